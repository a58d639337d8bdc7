"""A zygote: a process that has loaded ipykernel, and forks the kernels of one server.

Each server has its own, forked from a process that knows no launch, so that nothing of one server
is in the memory of another one's kernels. It is confined like its server, so its kernels are, too:
the same user, control groups and limits. It serves one socket, the server's, with frames (see
`wire`):

    {...}             first: a launch without its environment and configuration, with the log
    <- {"pid": n, ...}  with what it has loaded (see `kernel_loader`)
    {"do": "kernel"}  with a file that holds the launch of a kernel, a report pipe, and a handle
                      (pidfd) of the server; only the child reads the file
    <- {"pid": n}     with a handle of the kernel
    <- {"stale": f}   instead: this file has changed since it was loaded; nothing is forked

The pipe carries lines of JSON: {"bound": true} from the kernel once its ports are open, and
{"status": wait status} from this process.

It ends when the socket is closed and no kernel of it is left.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
from dataclasses import dataclass

from . import wire
from .children import Children, Wakeup, fork
from .confinement import confine, join, open_streams
from .kernel_loader import Loaded
from .wire import Launch, WireError

_KERNEL_FILES = 3


@dataclass(frozen=True)
class Files:
    """What a kernel is forked with; open files."""

    launch: int
    report: int
    server: int


def run(connection: socket.socket, loaded: Loaded) -> Files:
    """Serve until the server closes the connection, then exit; returns in kernels only."""
    try:
        message, (log,) = wire.receive(connection)
        launch = Launch.parse(message)
        open_streams(log)
        # Without them it is limited all the same.
        with contextlib.suppress(OSError):
            join(launch.zygote_cgroups)
        confine(launch)
        wire.send(connection, {"pid": os.getpid(), **loaded.told()})
    except EOFError:
        # It is a spare server's, and is not needed.
        os._exit(0)
    except (OSError, ValueError, WireError) as error:
        print(f"[labkeeper] no kernels can be forked: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    return _Zygote(connection, loaded).run()


class _Zygote:
    def __init__(self, connection: socket.socket, loaded: Loaded) -> None:
        self._connection = connection
        self._loaded = loaded
        self._open = True
        self._children = Children()
        self._wakeup = Wakeup()
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ)
        self._selector.register(self._wakeup, selectors.EVENT_READ)

    def run(self) -> Files:
        while self._open or self._children:
            ready = {key.fileobj for key, _ in self._selector.select()}
            if self._wakeup in ready:
                self._wakeup.clear()
                self._children.reap()
            if self._connection in ready and (files := self._serve()) is not None:
                return files
        os._exit(0)

    def _serve(self) -> Files | None:
        """Answer a request; return a kernel's files in the kernel only."""
        try:
            _, files = wire.receive(self._connection)
        except (EOFError, OSError, WireError):
            self._selector.unregister(self._connection)
            self._open = False
            return None
        if len(files) != _KERNEL_FILES:
            self._answer({"error": f"bad request with {len(files)} files"}, files)
            return None
        try:
            pid = fork()
        except OSError as error:
            self._answer({"error": f"cannot fork: {error.strerror}"}, files)
            return None
        if pid == 0:
            self._close()
            return Files(*files)
        # Checked while the child starts on another core, instead of before.
        if (changed := self._loaded.freshness.changed()) is not None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._answer({"stale": changed}, files)
            return None
        launch, report, server = files
        self._children.add(pid, report)
        self._answer({"pid": pid}, [launch, server, os.pidfd_open(pid)], send=1)
        return None

    def _answer(self, message: dict[str, object], files: list[int], *, send: int = 0) -> None:
        """Send an answer with the last `send` files, and close all of them."""
        try:
            wire.send(self._connection, message, files[len(files) - send :])
        except (OSError, WireError):
            self._open = False
        for file in files:
            os.close(file)

    def _close(self) -> None:
        """In a child: close all files of the zygote."""
        self._selector.close()
        self._wakeup.close()
        self._connection.close()
        self._children.forget()
