"""The libraries that a site names for its kernels (`LABKEEPER_PRELOAD`).

They are imported once, after ipykernel, in a process that looks to them like a kernel. One that
cannot be shared by forks is left out, for a reason: a child imports all of them first to find out.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import shutil
import signal
import site
import sys
import tempfile
import time
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .children import fork
from .footprint import Footprint
from .imitation import Imitation, imitated_kernel
from .programs import adopt_orphans, end_programs
from .readings import recorded, that_matter_to_libraries
from .spoilers import spoilers
from .writers import Guard

_SECONDS = 120.0
"""Seconds in which all libraries must have been imported."""
_PERSONAL = {
    "matplotlib": (
        ".config/matplotlib/matplotlibrc",
        ".config/matplotlib/stylelib",
        ".fonts",
        ".local/share/fonts",
    )
}
"""Files in a home directory that a library reads when it is imported."""
_LOCAL = {"matplotlib": ("matplotlibrc",)}
"""The same for the working directory."""
_DONE = "done"


@dataclass(frozen=True)
class Libraries:
    """What was loaded for kernels beside ipykernel."""

    names: tuple[str, ...] = ()
    """Those that the site has named."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why others were not loaded, by name."""
    modules: frozenset[str] = frozenset()
    """All modules that came with them."""
    read: frozenset[str] = frozenset()
    """Variables that they read, and that a kernel must have the same value of."""
    variables: dict[str, str] = field(default_factory=dict)
    """Variables that they set."""
    footprint: Footprint = field(default_factory=Footprint)

    @property
    def files(self) -> set[str]:
        """The files of all modules."""
        found = (getattr(sys.modules.get(name), "__file__", None) for name in self.modules)
        return set(filter(None, found))


class _Unfit(Exception):  # noqa: N818 - no error: the library is left out
    """A library cannot be shared; the message is the reason."""


def personal_files() -> list[str]:
    """Return the paths of files in this user's home directory that libraries read."""
    home = os.path.expanduser("~")
    return [os.path.join(home, file) for files in _PERSONAL.values() for file in files]


def load(names: Sequence[str], kernel_env: Mapping[str, str], argv: Sequence[str]) -> Libraries:
    """Import libraries, except unfit ones; once the modules of a plain kernel are imported.

    `kernel_env` and `argv` are those of a kernel (see `imitation`).
    """
    if not names:
        return Libraries()
    left_out = _rehearse(names, kernel_env, argv)
    for name, reason in left_out.items():
        print(f"[labkeeper] {name} is not preloaded: {reason}", file=sys.stderr, flush=True)
    before, variables = set(sys.modules), {**os.environ, **kernel_env}
    chosen = tuple(name for name in names if name not in left_out)
    earlier = _State.now()
    with _scene(kernel_env, argv) as scene:
        with recorded() as readings:
            for name in chosen:
                _import(name, scene)
                earlier.compare()
        given = {key: value for key, value in os.environ.items() if variables.get(key) != value}
    if not chosen:
        return Libraries(left_out=left_out)
    modules = frozenset(sys.modules.keys() - before)
    footprint = _footprint(modules)
    # The C library's conversions of times remember TZ.
    read = {"TZ", *that_matter_to_libraries(readings)}
    if footprint.met_at_home(os.path.expanduser("~")) is not None:
        read.add("HOME")
    return Libraries(chosen, left_out, modules, frozenset(read), given, footprint)


def _footprint(modules: Collection[str]) -> Footprint:
    top = {name.partition(".")[0] for name in modules}.difference(sys.builtin_module_names)
    home = os.path.join(os.path.expanduser("~"), "")
    own = site.getusersitepackages() if site.ENABLE_USER_SITE else ""
    return Footprint(
        sorted(top),
        [file for name in sorted(top) for file in _PERSONAL.get(name, ())],
        [file for name in sorted(top) for file in _LOCAL.get(name, ())],
        own[len(home) :] if own.startswith(home) else None,
    )


# Import


class _Scene(NamedTuple):
    guard: Guard
    imitation: Imitation


@contextlib.contextmanager
def _scene(kernel_env: Mapping[str, str], argv: Sequence[str]) -> Iterator[_Scene]:
    """Prepare the import of libraries."""
    guard = Guard()
    with imitated_kernel(kernel_env, argv) as imitation:
        sys.meta_path.insert(0, guard)
        try:
            yield _Scene(guard, imitation)
        finally:
            sys.meta_path.remove(guard)


def _import(name: str, scene: _Scene) -> None:
    """Import a library. Raises _Unfit."""
    try:
        importlib.import_module(name)
    except BaseException as error:
        if not scene.guard.refused:
            traceback.print_exc()
            raise _Unfit(f"importing it raises {type(error).__name__}") from error
    if scene.guard.refused:
        print(f"[labkeeper] {scene.guard.refused[0]}", file=sys.stderr, flush=True)
        raise _Unfit("others can write to its files")
    if scene.imitation.unfit():
        print(f"[labkeeper] it uses {scene.imitation.used}", file=sys.stderr, flush=True)
        raise _Unfit("it uses the kernel that imports it")


class _State(NamedTuple):
    """What an import must leave as it is: a kernel would share it, or would not have it."""

    spoilers: set[str]
    directory: str
    umask: int
    handlers: list[Any]
    """Of signals."""

    @classmethod
    def now(cls) -> _State:
        umask = os.umask(0o077)
        os.umask(umask)
        handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
        return cls(spoilers(), os.getcwd(), umask, handlers)

    def compare(self) -> None:
        """Compare it with the present one. Raises _Unfit."""
        now = self.now()
        if new := sorted(now.spoilers - self.spoilers):
            raise _Unfit(f"importing it {new[0]}")
        if now[1:] != self[1:]:
            raise _Unfit("importing it changes the working directory, the umask or signal handlers")


# Rehearsal


def _rehearse(
    names: Sequence[str], kernel_env: Mapping[str, str], argv: Sequence[str]
) -> dict[str, str]:
    """Return why libraries cannot be loaded, by name."""
    left_out: dict[str, str] = {}
    until = time.monotonic() + _SECONDS
    while rest := [name for name in names if name not in left_out]:
        unfit = _first_unfit(rest, kernel_env, argv, until)
        if unfit is None:
            break
        left_out.update([unfit])
    return left_out


def _first_unfit(
    names: Sequence[str], kernel_env: Mapping[str, str], argv: Sequence[str], until: float
) -> tuple[str, str] | None:
    """Import libraries in a child; return the first that cannot be loaded, and why."""
    directory = tempfile.mkdtemp(dir=os.getcwd())
    reader, writer = os.pipe()
    pid = fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.setsid()
            tempfile.tempdir = directory
            _perform(names, kernel_env, argv, writer)
        os._exit(1)
    os.close(writer)
    try:
        told = _lines(reader, until)
        in_time = time.monotonic() < until
        # With all that it has started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(reader)
        shutil.rmtree(directory, ignore_errors=True)
    if told[-1:] == [_DONE]:
        name, *reasons = json.loads(told[-2])
        return (name, reasons[0]) if reasons else None
    (name,) = json.loads(told[-1]) if told else names[:1]
    if not in_time:
        return name, f"importing it takes longer than {_SECONDS:.0f} s"
    return name, f"importing it ends the process (wait status {status})"


def _lines(reader: int, until: float) -> list[str]:
    """Return the complete lines that a child has written until its end, or until a time."""
    text = b""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    while (left := until - time.monotonic()) > 0 and poll.poll(left * 1000):
        piece = os.read(reader, 1 << 16)
        text += piece
        if not piece or text.endswith(f"{_DONE}\n".encode()):
            break
    return text.decode().split("\n")[:-1]


def _perform(
    names: Sequence[str], kernel_env: Mapping[str, str], argv: Sequence[str], writer: int
) -> None:
    """Import libraries; write the name of each before it is imported, and a reason to the last."""
    adopt_orphans()
    before = _State.now()
    with _scene(kernel_env, argv) as scene:
        for name in names:
            os.write(writer, f"{json.dumps([name])}\n".encode())
            try:
                _import(name, scene)
                before.compare()
                if os.listdir(tempfile.gettempdir()):
                    raise _Unfit("importing it leaves temporary files")
            except _Unfit as because:
                os.write(writer, f"{json.dumps([name, str(because)])}\n".encode())
                break
    end_programs()
    os.write(writer, f"{_DONE}\n".encode())
