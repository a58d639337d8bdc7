"""The WSGI server around the application: waitress, in one thread of this process, with problems as its own answers too.

Waitress reads requests without a thread for each, so slow callers cost nothing; a thread is held only while an answer is made.
"""

from __future__ import annotations

import json
import resource
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

import structlog
import waitress
from flask import Flask
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.task import ErrorTask, ThreadedTaskDispatcher
from waitress.utilities import BadRequest, RequestEntityTooLarge

from labkeeper.api.places import reserve
from labkeeper.api.problems import MEDIA_TYPE

_CONNECTIONS: Final = 2000
_RESERVE: Final = 512
"""Descriptors that are kept for servers, their logs, and the store."""
_IDLE_TIMEOUT: Final = 30
"""Seconds after which a connection without a request is closed."""
_HEADER_LIMIT: Final = 64 * 1024
_FAREWELL: Final = 5
"""Seconds that answers under way get to end, when the server closes."""
_FIRST_THREADS: Final = 4
"""Threads that are there before the first request is."""
_DRAIN_LIMIT: Final = 256 * 1024 * 1024
"""Bytes of an oversized body that are read and thrown away, so that its sender lives to read the answer."""

_log = structlog.get_logger("labkeeper.api")


class WsgiServer:
    """Serves an application on a listening socket until it is closed."""

    def __init__(
        self, app: Flask, listener: socket.socket, *, threads: int, max_body: int, fit: Callable[[int], None] = lambda _: None
    ) -> None:
        """`fit` is told how many threads there can be, whenever that is found out to be another number."""
        self._map: dict[int, Any] = {}
        self._threads = _Threads(threads, fit)
        self._server = waitress.create_server(
            app,
            map=self._map,
            _dispatcher=self._threads,
            sockets=[listener],
            threads=threads,
            max_request_body_size=max_body + 1,
            max_request_header_size=_HEADER_LIMIT,
            connection_limit=_connection_limit(),
            channel_timeout=_IDLE_TIMEOUT,
            backlog=512,
            # Lets a stream notice that its reader has gone, also when the reader has asked for more behind it.
            channel_request_lookahead=8,
            asyncore_use_poll=True,
            clear_untrusted_proxy_headers=True,
            ident=None,
        )
        self._server.channel_class = _Channel
        self._thread = threading.Thread(target=self._server.run, name="wsgi", daemon=True)

    def start(self) -> None:
        """Begin to answer. Raises RuntimeError when threads cannot be started."""
        try:
            self._threads.begin()
            self._thread.start()
        except RuntimeError:
            self._threads.shutdown()
            raise

    def close(self) -> None:
        """Let answers that are under way end, close every connection, and end all threads."""
        # First the threads that answer: they wake the loop when they write, and must not find it closed.
        self._threads.shutdown(cancel_pending=True, timeout=_FAREWELL)
        # What belongs to the loop may be closed in the loop's own thread only. `pull_trigger` lets its lock go before it
        # writes: a loop that is awake by then would have closed what it writes to.
        trigger = self._server.trigger
        with trigger.lock:
            trigger.thunks.append(lambda: wasyncore.close_all(self._map))
            trigger._physical_pull()  # noqa: SLF001 - see above
        self._thread.join()


class _Threads(ThreadedTaskDispatcher):
    """Starts threads as they are needed: some more than have work, up to a limit. None ends before the server does."""

    def __init__(self, most: int, fit: Callable[[int], None]) -> None:
        super().__init__()
        self._most = most
        self._fit = fit
        self._short = False
        """Whether the last thread that was wanted could not be started."""
        self._growing = threading.Lock()

    def begin(self) -> None:
        """Start the first ones. Raises RuntimeError."""
        self.set_thread_count(min(_FIRST_THREADS, self._most))

    def add_task(self, task: Any) -> None:
        """Take in a request."""
        with self._growing:
            self._grow()
        super().add_task(task)

    def shutdown(self, cancel_pending: bool = True, timeout: float = _FAREWELL) -> bool:  # noqa: FBT002 - waitress' signature
        """End all threads; give up on those that take longer."""
        with self._growing:
            self._most = 0
        stopped: bool = super().shutdown(cancel_pending, timeout)
        return stopped

    def start_new_thread(self, target: Any, thread_no: int) -> None:
        """Start one. Raises RuntimeError."""
        try:
            super().start_new_thread(target, thread_no)
        except RuntimeError:
            self.threads.discard(thread_no)
            raise

    def _grow(self) -> None:
        with self.lock:
            there = len(self.threads)
            # Kept ahead of need: when no more can be started, those who wait must not hold all there are.
            wanted = self.active_count + len(self.queue) + 1 + reserve(there)
        if wanted <= there or there >= self._most:
            return
        try:
            self.set_thread_count(there + 1)
        except RuntimeError:
            if not self._short:
                _log.warning(
                    "no more threads can be started, so fewer callers can wait at a time; raise the limit of processes"
                    " (ulimit -u, or the container's --pids-limit), or lower LABKEEPER_THREADS",
                    threads=there,
                    wanted=self._most,
                )
            self._short = True
            self._fit(there)
        else:
            if self._short:
                self._fit(self._most)
            self._short = False


def _connection_limit() -> int:
    """Say how many connections the descriptors of this process allow, with enough left for what it does itself."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _CONNECTIONS if allowed == resource.RLIM_INFINITY else max(_CONNECTIONS // 20, min(_CONNECTIONS, allowed - _RESERVE))


class _Parser(HTTPRequestParser):
    """Reads an oversized body to its end and keeps nothing of it: a caller that is cut off while it sends sees no answer."""

    expect_continue: bool
    _left = 0

    def received(self, data: bytes) -> int:
        """Take bytes; give how many."""
        if self._left:
            taken = min(len(data), self._left)
            self._left -= taken
            self.completed = self._left == 0
            return taken
        try:
            consumed: int = super().received(data)
        except ValueError:
            # Of a URL or a length that Python cannot read.
            self.error, self.completed = BadRequest("the request line or a header cannot be read"), True
            return len(data)
        if isinstance(self.error, RequestEntityTooLarge):
            self._refuse_body()
        return consumed

    def _refuse_body(self) -> None:
        if self.expect_continue:
            # Its sender waits to be told to go on, and is told no.
            self.expect_continue = False
        elif self.content_length < _DRAIN_LIMIT:
            self._left = self.content_length
            self.completed = self._left == 0


class _Problem(ErrorTask):
    """Answers what waitress itself refuses (a broken request line, an oversized body) as the application would."""

    def execute(self) -> None:
        """Write the answer."""
        error = self.request.error
        code = error.reason.lower().replace(" ", "_")
        detail = f"cannot take the request: {error.body.removeprefix('exceeds ') if error.code == 400 else error.reason}"  # noqa: PLR2004
        if isinstance(error, RequestEntityTooLarge):
            detail = f"cannot take the request: body must be at most {self.channel.server.adj.max_request_body_size - 1} bytes"
        members = {"type": f"urn:labkeeper:problem:{code}", "title": error.reason, "status": error.code, "detail": detail}
        body = json.dumps({**members, "code": code, "request_id": ""}).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", MEDIA_TYPE))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Channel(HTTPChannel):
    parser_class = _Parser
    error_task_class = _Problem
