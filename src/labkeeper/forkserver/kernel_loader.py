"""The kernel loader: a process that loads ipykernel once, and forks a zygote for each server.

It is a program of its own, not a fork of the fork server: a kernel must not find the modules of
JupyterLab already imported, in versions that its user may have replaced since, or under names that
a file beside the notebook has, too. What it loads is what an executed kernel has after its first
cell: it executes one to find out.

It serves the fork server, over an inherited socket, with frames (see `wire`):

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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import wire
from .children import fork
from .commands import LAUNCHER, executing
from .freshness import Freshness
from .marks import show

_REHEARSAL_SECONDS = 60
"""Seconds after which the rehearsal of a kernel is abandoned."""
_FRESH_EVERY = 5.0
"""Seconds between checks for changes on disk."""
_FIRST = ("ipykernel.kernelapp", "ipykernel.debugger")
"""Imported first: they know where the debugger's own modules are."""
_TITLE = "kernel-loader (of labkeeper)"
_REPORT = "import json, os, sys; os.write({}, json.dumps(list(sys.modules)).encode()); os._exit(0)"
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
    """Names of the variables that modules read while they were loaded."""
    set: dict[str, str]
    """Variables that modules set while they were loaded."""
    foreign: frozenset[str]
    """Modules that an executed kernel does not have: those of this program."""


def serve(descriptor: int) -> tuple[socket.socket, Loaded]:
    """Load, then fork zygotes for a connected socket; returns in zygotes only: its connection."""
    fork_server = socket.socket(fileno=descriptor)
    fork_server.set_inheritable(False)
    show(_TITLE)
    begun = time.monotonic()
    loaded, failed = None, ""
    try:
        loaded = load()
    except LoadError as error:
        traceback.print_exc()
        failed = str(error)
    told = failed or f"ready after {time.monotonic() - begun:.1f} s"
    print(f"[labkeeper] kernel loader {os.getpid()}: {told}", file=sys.stderr, flush=True)
    # Zygotes are reaped by Linux.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    return _fork_zygotes(fork_server, loaded, failed)


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
                _refuse(connection, failed)
            elif _fork(connection):
                for other in (fork_server, *waiting.values()):
                    other.close()
                return connection, loaded
            connection.close()


def load_for(descriptor: int) -> tuple[socket.socket, Loaded]:
    """Load, in order to become the zygote that serves a connected socket; exits if that fails."""
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    show(_TITLE)
    try:
        return connection, load()
    except LoadError as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            wire.send(connection, {"failed": str(error)})
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
        _refuse(connection, f"cannot fork: {error.strerror}")
        return False


def _refuse(connection: socket.socket, reason: str) -> None:
    with contextlib.suppress(OSError):
        wire.send(connection, {"failed": reason})


def _end_if_stale(loaded: Loaded | None) -> None:
    changed = "(loading failed)" if loaded is None else loaded.freshness.changed()
    if changed is not None:
        print(
            f"[labkeeper] kernel loader {os.getpid()} ends: {changed} has changed on disk",
            file=sys.stderr,
            flush=True,
        )
        os._exit(0)


def load() -> Loaded:
    """Import what kernels need. Raises LoadError.

    The garbage collector ignores present objects from here on, so that their pages stay shared.
    """
    given, ours, read = dict(os.environ), set(sys.modules), set[str]()
    gc.disable()
    try:
        freshness = Freshness()
        modules = _rehearse()
        with _recorded(read):
            for name in (*_FIRST, *modules):
                if name not in sys.modules:
                    # A few exist only for an executed kernel; each kernel imports them itself.
                    with contextlib.suppress(ImportError):
                        importlib.import_module(name)
        launcher = importlib.util.find_spec(LAUNCHER)
        if launcher is None or launcher.origin is None:
            raise LoadError(f"there is no {LAUNCHER}")
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
    present = {name: value for name, value in os.environ.items() if given.get(name) != value}
    return Loaded(
        freshness,
        launcher.origin,
        given,
        frozenset(read),
        present,
        frozenset(ours.difference(modules, ["__main__"])),
    )


def _rehearse() -> list[str]:
    """Execute a kernel; return its modules after its first cell, in order of their import.

    Raises OSError, ValueError, subprocess.SubprocessError.
    """
    reader, writer = os.pipe()
    directory = tempfile.mkdtemp(dir=os.getcwd())
    command = [*executing(sys.executable), "-f", os.path.join(directory, "kernel.json")]
    command += [f"--IPKernelApp.exec_lines={_REPORT.format(writer)}"]
    try:
        subprocess.run(  # noqa: S603 - the interpreter that runs already
            command,
            env={**os.environ, "IPYTHONDIR": directory},
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=[writer],
            timeout=_REHEARSAL_SECONDS,
            check=True,
        )
        os.set_blocking(reader, False)
        with open(reader, "rb", closefd=False) as stream:
            return [name for name in json.loads(stream.read() or b"[]") if name != "__main__"]
    finally:
        os.close(reader)
        os.close(writer)
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _recorded(names: set[str]) -> Iterator[None]:
    """Record the names of environment variables that are read in the block."""
    environment: Any = os.environ
    kind = type(environment)

    def reading(method: Any) -> Any:
        def read(variables: Any, name: Any) -> Any:
            names.add(os.fsdecode(name))
            return method(variables, name)

        return read

    methods = {name: reading(getattr(kind, name)) for name in ("__getitem__", "__contains__")}
    environment.__class__ = type(kind.__name__, (kind,), methods)
    try:
        yield
    finally:
        environment.__class__ = kind
