"""The kernel loader: a process that loads ipykernel once, and forks a zygote for each server.

It is a program of its own, not a fork of the fork server: a kernel must not find the modules of
JupyterLab already imported, in versions that its user may have replaced since, or under names that
a file beside the notebook has, too. What it loads is what an executed kernel has after its first
cell: it executes one to find out.

It serves the fork server, over an inherited socket, with frames (see `wire`):

    <- {"preloaded": [...], "left_out": {...}}  once, when it has loaded
    {}  with a socket: fork a zygote that serves this socket (see `zygote`), as soon as the server
        at its other end introduces itself there

It ends with that connection, and when files on disk differ from what it has loaded; the fork server
then starts another.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from . import wire
from .children import fork
from .commands import LAUNCHER, executing
from .freshness import Freshness
from .libraries import Libraries, personal_files
from .libraries import load as load_libraries
from .marks import show
from .readings import recorded, that_matter

_REHEARSAL_SECONDS = 60
"""Seconds after which the rehearsal of a kernel is abandoned."""
_FRESH_EVERY = 5.0
"""Seconds between checks for changes on disk."""
_FIRST = ("ipykernel.kernelapp", "ipykernel.debugger")
"""Imported first: they know where the debugger's own modules are."""
_TITLE = "kernel-loader (of labkeeper)"
_REPORT = (
    "import json, os, sys; "
    "os.write({}, json.dumps([list(sys.modules), dict(os.environ)]).encode()); os._exit(0)"
)
"""The rehearsal's first cell."""


class LoadError(Exception):
    """Kernels cannot be forked from this process; the message is the reason."""


@dataclass(frozen=True)
class Loaded:
    """What a process has loaded for its kernels, and from where."""

    freshness: Freshness
    launcher: str
    """Path of `ipykernel_launcher`."""
    given: dict[str, str]
    """The environment that it was loaded in."""
    read: frozenset[str]
    """Names of the variables that modules read while they were loaded, if that matters."""
    set: dict[str, str]
    """Variables that modules set while they were loaded."""
    foreign: frozenset[str]
    """Modules that an executed kernel does not have: those of this program."""
    libraries: Libraries

    def told(self) -> dict[str, Any]:
        """Return what a server must know to tell whether a kernel can be forked."""
        return {
            "read": sorted(self.read),
            "given": self.given,
            "libraries": asdict(self.libraries.footprint),
        }


def serve(descriptor: int, libraries: Sequence[str]) -> tuple[socket.socket, Loaded]:
    """Load, then fork zygotes for a connected socket; returns in zygotes only: its connection."""
    fork_server = socket.socket(fileno=descriptor)
    fork_server.set_inheritable(False)
    show(_TITLE)
    begun = time.monotonic()
    loaded, failed = None, ""
    try:
        loaded = load(libraries)
    except LoadError as error:
        traceback.print_exc()
        failed = str(error)
    _tell(fork_server, _told(loaded, libraries))
    told = failed or f"ready after {time.monotonic() - begun:.1f} s"
    print(f"[labkeeper] kernel loader {os.getpid()}: {told}", file=sys.stderr, flush=True)
    # Zygotes are reaped by Linux.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    return _fork_zygotes(fork_server, loaded, failed)


def _told(loaded: Loaded | None, libraries: Sequence[str]) -> dict[str, Any]:
    """Return what the fork server is told of libraries."""
    if loaded is None:
        return {"preloaded": [], "left_out": dict.fromkeys(libraries, "ipykernel cannot be loaded")}
    return {"preloaded": loaded.libraries.names, "left_out": loaded.libraries.left_out}


def _fork_zygotes(
    fork_server: socket.socket, loaded: Loaded | None, failed: str
) -> tuple[socket.socket, Loaded]:
    waiting: dict[int, socket.socket] = {}
    """Connections whose servers have not introduced themselves yet."""
    while True:
        watched = [fork_server.fileno(), *waiting]
        ready, _, _ = select.select(watched, [], [], _FRESH_EVERY)
        if not ready:
            _end_if_stale(loaded)
        if fork_server.fileno() in ready:
            connection = _receive(fork_server)
            waiting[connection.fileno()] = connection
        for number in waiting.keys() & ready:
            connection = waiting.pop(number)
            if loaded is None:
                _tell(connection, {"failed": failed})
            elif _fork(connection):
                for other in (fork_server, *waiting.values()):
                    other.close()
                return connection, loaded
            connection.close()


def load_for(descriptor: int, libraries: Sequence[str]) -> tuple[socket.socket, Loaded]:
    """Load, in order to become the zygote that serves a connected socket; exits if that fails."""
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    show(_TITLE)
    try:
        return connection, load(libraries)
    except LoadError as error:
        traceback.print_exc()
        _tell(connection, {"failed": str(error)})
        os._exit(1)


def _receive(fork_server: socket.socket) -> socket.socket:
    """Return the next socket to serve; exits if the fork server has closed."""
    try:
        _, files = wire.receive(fork_server)
        (file,) = files
        return socket.socket(fileno=file)
    except (EOFError, OSError, ValueError, wire.WireError):
        os._exit(0)


def _fork(connection: socket.socket) -> bool:
    """Fork a zygote for a server that introduces itself; return whether this is it."""
    try:
        # A spare may have ended instead.
        return bool(connection.recv(1, socket.MSG_PEEK)) and fork() == 0
    except OSError as error:
        _tell(connection, {"failed": f"cannot fork: {error.strerror}"})
        return False


def _tell(connection: socket.socket, message: dict[str, Any]) -> None:
    # The other end may have gone.
    with contextlib.suppress(OSError):
        wire.send(connection, message)


def _end_if_stale(loaded: Loaded | None) -> None:
    changed = "(loading failed)" if loaded is None else loaded.freshness.changed()
    if changed is not None:
        print(
            f"[labkeeper] kernel loader {os.getpid()} ends: {changed} has changed on disk",
            file=sys.stderr,
            flush=True,
        )
        os._exit(0)


def load(libraries: Sequence[str] = ()) -> Loaded:
    """Import what kernels need, and the libraries that the site has named. Raises LoadError.

    The garbage collector ignores present objects from here on, so that their pages stay shared.
    """
    given, ours = dict(os.environ), set(sys.modules)
    gc.disable()
    try:
        freshness = Freshness(personal_files() if libraries else ())
        plain = _rehearse()
        with recorded() as readings:
            for name in (*_FIRST, *plain.modules):
                if name not in sys.modules:
                    # A few exist only for an executed kernel; each kernel imports them itself.
                    with contextlib.suppress(ImportError):
                        importlib.import_module(name)
        launcher = importlib.util.find_spec(LAUNCHER)
        if launcher is None or launcher.origin is None:
            raise LoadError(f"there is no {LAUNCHER}")
        present = {name: value for name, value in os.environ.items() if given.get(name) != value}
        foreign = ours.difference(plain.modules, ["__main__"])
        for name in foreign:
            # Libraries import them for themselves, and keep them.
            if not _is_ours(name):
                sys.modules.pop(name)
        added = load_libraries(libraries, plain.set, [launcher.origin, "-f", "kernel.json"])
        changed = freshness.settle()
    except subprocess.SubprocessError as error:
        print(getattr(error, "output", ""), file=sys.stderr, flush=True)
        raise LoadError(f"the rehearsal of a kernel failed: {error}") from error
    except Exception as error:
        raise LoadError(f"loading ipykernel failed: {error}") from error
    if changed is not None:
        raise LoadError(f"{changed} changed while ipykernel was loaded")
    gc.collect()
    gc.freeze()
    gc.enable()
    return Loaded(
        freshness,
        launcher.origin,
        given,
        frozenset(that_matter(readings) | added.read),
        {**present, **added.variables},
        frozenset(filter(_is_ours, foreign)),
        added,
    )


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == __package__.partition(".")[0]


class _Plain(NamedTuple):
    """What an executed kernel has after its first cell."""

    modules: list[str]
    """In order of their import."""
    set: dict[str, str]
    """Variables that it sets for itself."""


def _rehearse() -> _Plain:
    """Execute a kernel, and let it report. Raises OSError, ValueError, SubprocessError."""
    report = os.memfd_create("rehearsal")
    directory = tempfile.mkdtemp(dir=os.getcwd())
    own = {**os.environ, "IPYTHONDIR": directory}
    command = [*executing(sys.executable), "-f", os.path.join(directory, "kernel.json")]
    command += [f"--IPKernelApp.exec_lines={_REPORT.format(report)}"]
    try:
        subprocess.run(  # noqa: S603 - the interpreter that runs already
            command,
            env=own,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=[report],
            timeout=_REHEARSAL_SECONDS,
            check=True,
        )
        os.lseek(report, 0, os.SEEK_SET)
        with open(report, "rb", closefd=False) as stream:
            modules, variables = json.loads(stream.read() or b"[[], {}]")
    finally:
        os.close(report)
        shutil.rmtree(directory, ignore_errors=True)
    return _Plain(
        [name for name in modules if name != "__main__"],
        {name: value for name, value in variables.items() if own.get(name) != value},
    )
