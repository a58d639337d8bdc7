"""The fork server: a process that loads Jupyter once, and forks a server at each keeper request.

It holds no secrets and runs one thread, without an event loop or a server of its own. As a parent
it sees the exits of its servers; as a subreaper it inherits their orphans. It outlives its keeper.

A keeper connects to a Unix socket and sends one request per connection (see `wire`):

    {"do": "keep"}              answered when forking is possible or has failed; the connection
                                then shows that the keeper lives, and carries what the kernel
                                loader tells of libraries (see `kernel_loader`), and
                                {"retired": why} when this process forks no more
    {"do": "launch"}            with a file that holds the launch, a log, and a report pipe:
                                answered with the pid, or with {"retired": why}; only the child
                                reads the file, so that this process never holds a secret
    {"do": "attach", "pid": n}  with a report pipe, for a child of an earlier keeper
    {"do": "retire"}            fork no more, and end when no child is left; with "all_heard",
                                sent by a keeper that closes, past exits will not be asked for

The pipe carries lines of JSON: {"ready": server_info} from the child, {"status": wait status} from
this process. Requests, answers and lines also have a `version`, which `wire` adds and checks.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

from . import pages, wire
from .children import Children, Wakeup, fork
from .freshness import Freshness
from .marks import show, started
from .preload import PreloadError, load, rehearsed_launch, written_pages
from .programs import adopt_orphans, end_programs
from .requests import REQUEST_SECONDS, Request, accept
from .server import Given
from .wire import Launch, WireError
from .zygote_client import FirstZygote
from .zygotes import Zygotes

_FRESH_EVERY = 5.0
"""Seconds between checks for changes on disk while no server is requested."""
_QUIET = 0.25
"""Seconds between a fork and forking the next child ahead: a starting server has CPU priority."""
_ZYGOTE_AFTER = {True: 0.01, False: 1.0}
"""Seconds until a server that was forked ahead, or was not, has its zygote prepared: entering a
control group holds up the threads of others, and beside the latter more servers are starting."""
_KEEPERLESS = 10.0
"""Seconds without keeper and servers before it ends; until then exits can be asked for."""


def serve(descriptor: int) -> Given:
    """Load, then serve on a bound Unix socket; returns in children only."""
    listener = socket.socket(fileno=descriptor)
    listener.set_inheritable(False)
    # The keeper listens on it already. From here on SO_PEERCRED gives clients this process's pid.
    listener.listen(128)
    adopt_orphans()
    gc.disable()
    begun = time.monotonic()
    try:
        freshness = load(listener)
        # The garbage collector ignores present objects from here on, so their pages stay shared.
        gc.collect()
        gc.freeze()
        written = written_pages(listener)
    except PreloadError as error:
        traceback.print_exc()
        _refuse(listener, str(error))
    seconds = time.monotonic() - begun
    print(
        f"[labkeeper] fork server {os.getpid()} is ready after {seconds:.1f} s",
        file=sys.stderr,
        flush=True,
    )
    return _ForkServer(listener, freshness, written).run()


def _refuse(listener: socket.socket, reason: str) -> NoReturn:
    """Report to the keeper why there is no fork server, and end."""
    end_programs()
    print(f"[labkeeper] cannot fork servers: {reason}", file=sys.stderr, flush=True)
    listener.settimeout(_KEEPERLESS)
    with contextlib.suppress(OSError, WireError, EOFError):
        connection, _ = listener.accept()
        connection.settimeout(REQUEST_SECONDS)
        wire.receive(connection)
        wire.send(connection, {"failed": reason})
    os._exit(1)


@dataclass
class _Spare:
    """A child that waits for its launch on the connection."""

    pid: int
    connection: socket.socket


class _ForkServer:
    """The single thread and all its open files, which are closed in a child."""

    def __init__(
        self, listener: socket.socket, freshness: Freshness, written: list[tuple[int, int]]
    ) -> None:
        self._listener = listener
        self._freshness = freshness
        self._written = written
        """The pages that a server writes to."""
        self._looked_at = time.monotonic()
        self._keepers: set[socket.socket] = set()
        """Connections that keepers hold while they live."""
        self._last_needed = time.monotonic()
        """When a keeper was last seen, or a child last ended."""
        self._children = Children()
        self._spare: _Spare | None = None
        """The child that was forked ahead."""
        self._busy_until = 0.0
        """When the machine is likely to be idle again."""
        self._retired = ""
        """Why it forks no more."""
        self._wakeup = Wakeup()
        self._selector = selectors.DefaultSelector()
        self._zygotes = Zygotes(rehearsed_launch(), self._selector)
        self._zygote: socket.socket | None = None
        """A child's connection to its zygote; in this process only while it forks."""
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._wakeup, selectors.EVENT_READ)

    def run(self) -> Given:
        """Serve until no longer needed, then exit; returns in children only."""
        # The rehearsal's orphans may have ended before SIGCHLD was handled.
        self._reap()
        while True:
            ready = {key.fileobj for key, _ in self._selector.select(self._patience())}
            if self._wakeup in ready:
                self._reap()
            for keeper in self._keepers & ready:
                self._part_from(keeper)
            if self._zygotes.heard(ready):
                self._tell(self._zygotes.libraries)
            if self._listener in ready and (request := accept(self._listener)) is not None:
                if (
                    self._answer(request)
                    and not self._give_to_spare(request)
                    and self._fork_for(request) == 0
                ):
                    self._close(request.connection)
                    return self._take(request.files, ahead=False)
            elif self._wants_spare() and (connection := self._fork_spare()) is not None:
                return self._wait_for_launch(connection)
            if time.monotonic() - self._looked_at > _FRESH_EVERY:
                self._look()
            if self._needless():
                self._dismiss_spare()
                _end()

    def _patience(self) -> float:
        """Return the seconds until the next work that is not requested."""
        if self._spare is None and not self._retired:
            return max(0.0, self._busy_until - time.monotonic())
        return _FRESH_EVERY

    def _needless(self) -> bool:
        if self._children or (self._keepers and not self._retired):
            return False
        heard = bool(self._retired) and not self._children.unheard
        return heard or time.monotonic() - self._last_needed > _KEEPERLESS

    # Requests

    def _answer(self, request: Request) -> bool:
        """Answer a request, except a launch to be forked; return whether it is one."""
        what, count = request.message.get("do"), len(request.files)
        answer: dict[str, Any] = {"error": f"bad request {what!r} with {count} files"}
        if what == "keep":
            self._keep(request)
            return False
        if what == "launch" and count == 3:  # noqa: PLR2004 - the launch, a log, and a pipe to report to
            if not self._retired:
                return True
            answer = {"retired": self._retired}
        elif what == "attach" and count == 1:
            answer = {"known": self._children.attach(request.message.get("pid"), request.files[0])}
        elif what == "retire":
            self._retire("its keeper needs it no more")
            if request.message.get("all_heard"):
                self._children.forget_unheard()
            answer = {}
        request.answer(answer)
        request.close()
        return False

    def _keep(self, request: Request) -> None:
        for file in request.files:
            os.close(file)
        self._keepers.add(request.connection)
        self._selector.register(request.connection, selectors.EVENT_READ)
        request.answer({"pid": os.getpid()})
        if self._zygotes.libraries:
            request.answer(self._zygotes.libraries)
        if self._retired:
            request.answer({"retired": self._retired})

    def _part_from(self, keeper: socket.socket) -> None:
        self._selector.unregister(keeper)
        self._keepers.discard(keeper)
        keeper.close()
        self._last_needed = time.monotonic()

    # Children

    def _fork_for(self, request: Request) -> int:
        """Fork for a request and confirm it; return the child's pid, or 0 in the child."""
        try:
            pid = self._fork()
        except OSError as error:
            request.answer({"error": f"cannot fork: {error.strerror}"})
            request.close()
            return -1
        if pid > 0:
            self._confirm(request, pid)
        return pid

    def _give_to_spare(self, request: Request) -> bool:
        """Pass a request to the child that was forked ahead; return whether it was accepted."""
        spare, self._spare = self._spare, None
        if spare is None:
            return False
        with spare.connection:
            try:
                wire.send(spare.connection, {}, request.files)
            except (OSError, WireError):
                # It has died or accepts nothing; it is reaped like any other.
                os.kill(spare.pid, signal.SIGKILL)
                return False
        self._confirm(request, spare.pid)
        return True

    def _confirm(self, request: Request, pid: int) -> None:
        """Report the server's pid to the keeper, unless it was forked from outdated files."""
        self._busy_until = time.monotonic() + _QUIET
        # Checked while the child starts on another core, instead of before.
        self._look()
        if self._retired:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            request.answer({"retired": self._retired})
        else:
            self._children.add(pid, request.files.pop())
            request.answer({"pid": pid, "started": started(pid)})
        request.close()

    def _wants_spare(self) -> bool:
        return self._spare is None and not self._retired and time.monotonic() >= self._busy_until

    def _fork_spare(self) -> socket.socket | None:
        """Fork a child ahead; return, in the child only, the connection for its launch."""
        ours, its = socket.socketpair()
        try:
            pid = self._fork()
        except OSError as error:
            print(f"[labkeeper] cannot fork ahead: {error}", file=sys.stderr, flush=True)
            self._busy_until = time.monotonic() + _FRESH_EVERY
            ours.close()
            its.close()
            return None
        if pid == 0:
            ours.close()
            return its
        its.close()
        ours.settimeout(REQUEST_SECONDS)
        self._spare = _Spare(pid, ours)
        return None

    def _dismiss_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.connection.close()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(spare.pid, 0)

    def _wait_for_launch(self, connection: socket.socket) -> Given:
        """In a child: prepare, then wait for the launch; exit if the connection closes."""
        self._close()
        show("jupyter-lab (waits for its launch)")
        pages.copy(self._written)
        try:
            with connection:
                _, files = wire.receive(connection)
        except (OSError, EOFError, WireError):
            os._exit(0)
        return self._take(files, ahead=True)

    def _fork(self) -> int:
        """Fork a child that has a zygote, if there is a loader. Raises OSError."""
        self._zygote = self._zygotes.new()
        pid = -1
        try:
            pid = fork()
        finally:
            if pid != 0 and self._zygote is not None:
                self._zygote.close()
        return pid

    def _take(self, files: list[int], *, ahead: bool) -> Given:
        """In a child: read the launch from a request's files. Raises WireError."""
        launch, log, report = files
        zygote = FirstZygote(self._zygote, "no kernel loader runs", _ZYGOTE_AFTER[ahead])
        return Given(Launch.read(launch), log, report, zygote)

    def _close(self, *more: socket.socket) -> None:
        """In a child: close all files of the fork server."""
        self._selector.close()
        own: tuple[Any, ...] = (self._listener, self._wakeup, self._zygotes)
        for one in (*own, *self._keepers, *more):
            one.close()
        if self._spare is not None:
            self._spare.connection.close()
        self._children.forget()
        gc.enable()

    # Events

    def _look(self) -> None:
        """Retire if loaded files have changed on disk."""
        self._looked_at = time.monotonic()
        changed = None if self._retired else self._freshness.changed()
        if changed is not None:
            self._retire(f"{changed} has changed on disk")

    def _retire(self, reason: str) -> None:
        self._retired = reason
        self._dismiss_spare()
        self._zygotes.end()
        print(
            f"[labkeeper] fork server {os.getpid()} retires: {reason}", file=sys.stderr, flush=True
        )
        self._tell({"retired": reason})

    def _tell(self, message: dict[str, Any]) -> None:
        for keeper in self._keepers:
            with contextlib.suppress(OSError, WireError):
                wire.send(keeper, message)

    def _reap(self) -> None:
        self._wakeup.clear()
        ended = self._children.reap()
        self._zygotes.reaped(ended)
        self._last_needed = time.monotonic()
        if self._spare is not None and self._spare.pid in ended:
            self._spare.connection.close()
            self._spare = None
            # It should have lived. Do not let the cause end one child after another.
            self._busy_until = time.monotonic() + _FRESH_EVERY


def _end() -> NoReturn:
    """Exit, ending all descendants and removing this process's files."""
    end_programs()
    with contextlib.suppress(OSError):  # It may have been removed by others.
        here = os.getcwd()
        for name in os.listdir(here):
            os.unlink(name)
        os.rmdir(here)
    os._exit(0)
