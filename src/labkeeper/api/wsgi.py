"""The WSGI server: waitress, in one thread of this process, with its own errors as problems, too.

Waitress reads requests without a thread for each, so slow callers cost nothing; a thread is held
only while an answer is produced. Nor does it wait for slow readers: the next request of a
connection begins when the previous answer has been received.
"""

from __future__ import annotations

import contextlib
import io
import re
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, Final

import structlog
from flask import Flask
from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import BaseWSGIServer
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask
from waitress.utilities import BadRequest, RequestEntityTooLarge, RequestHeaderFieldsTooLarge

from labkeeper import shortage
from labkeeper.api import problems
from labkeeper.api.browser import HEADERS
from labkeeper.api.concurrency import reserve
from labkeeper.api.tls import Certificate, NotYet, TlsSocket
from labkeeper.core.errors import BackendUnavailable
from labkeeper.identity.peers import PEER, UNREAD, Peer, identify

_CONNECTIONS: Final = 2000
_RESERVE: Final = 512
"""Descriptors reserved for servers, their logs, and the store."""
_LARGE_BODIES: Final = 64
"""Limit of bodies that do not fit into memory, over all connections: each has a file and thus a
descriptor."""
_IDLE_TIMEOUT: Final = 30.0
"""Seconds after which a connection is closed if it is without a request, or if its caller reads
less than `_LEAST` of the pending data."""
_LEAST: Final = 64 * 1024
"""Bytes: some 2 KiB a second."""
_HEAD_WITHIN: Final = 15.0
"""Timeout in seconds of a request head from its first byte on; before it, of the TLS handshake."""
_BODY_WITHIN: Final = 60.0
"""Timeout in seconds of a whole request, likewise. Dripping bytes does not extend it."""
_LOOK_EVERY: Final = 1.0
"""Interval in seconds between checks for timeouts."""
_AT_ONCE: Final = 32
"""Connections accepted before the existing ones get their turn."""
_HEADER_LIMIT: Final = 16 * 1024
_HEADERS: Final = 100
"""Maximum number of headers of a request."""
_READ: Final = 32 * 1024
"""Bytes per read: more than a TLS record holds, so that none stay behind in OpenSSL."""
_AHEAD: Final = 8
"""Pipelined requests of one connection; with one pending, a stream notices a closed connection."""
_UNTAKEN: Final = 64 * 1024
"""Unsent bytes of an answer up to which the caller's next request begins."""
_UNTAKEN_OF_ALL: Final = 256 * 1024 * 1024
"""Unsent bytes of all answers together. A caller with a MiB or more of them has a file, with its
descriptor."""
_HIGH_WATER: Final = 2 * 1024 * 1024
"""Unsent bytes at which a thread also waits before it produces more of a streamed answer."""
_IN_MEMORY: Final = 64 * 1024
"""Bytes of a body that are kept in memory; a larger one is in a file."""
_UNSENT: Final = 128 * 1024
"""Bytes that the kernel buffers beyond what it can send. With more, slow readers would not show."""
_ABORT: Final = struct.pack("ii", 1, 0)
"""Closes a connection at once (SO_LINGER): unsent data is dropped, and the caller cannot mistake
the answer for a complete one."""
_FAREWELL: Final = 5
"""Seconds for answers in progress to finish when the server closes."""
_FIRST_THREADS: Final = 4
"""Threads started before the first request."""
_DRAIN_LIMIT: Final = 256 * 1024 * 1024
"""Bytes of an oversized body that are read and discarded, so that its sender reads the answer."""

_CODINGS: Final = re.compile(
    rb"^transfer-encoding:[ \t]*(.*?)[ \t]*\r?$", re.IGNORECASE | re.MULTILINE
)
Knows = Callable[[str | None, Peer | None], bool]

_log = structlog.get_logger("labkeeper.api")


class WsgiServer:
    """Serves an application on listening sockets until it is closed, all in one loop."""

    def __init__(
        self,
        app: Flask,
        sockets: Sequence[socket.socket],
        *,
        threads: int,
        max_body: int,
        certificate: Certificate | None = None,
        knows: Knows = lambda _authorization, _peer: True,
        fit: Callable[[int], None] = lambda _: None,
    ) -> None:
        """With a certificate it speaks TLS, except on Unix sockets.

        `knows` decides without blocking, from the Authorization header and the peer, whether to
        keep a body; the application is called in any case. `fit` is called with the possible number
        of threads whenever that changes.
        """
        self._map: dict[int, Any] = {}
        self._threads = _Threads(threads, fit)
        self._doors = [
            _Door(
                app,
                self._map,
                listener,
                self._threads,
                certificate=certificate,
                knows=knows,
                max_body=max_body,
            )
            for listener in sockets
        ]
        self._thread = threading.Thread(target=self._doors[0].run, name="wsgi", daemon=True)

    def start(self) -> None:
        """Begin to serve. Raises BackendUnavailable if threads cannot be started."""
        try:
            with shortage.told_of_threads():
                self._threads.begin()
            shortage.start(self._thread)
        except BackendUnavailable:
            self._threads.shutdown()
            raise

    def close(self) -> None:
        """Finish answers in progress, close every connection, and end all threads."""
        # First the worker threads: they wake the loop when they write, and must not find it closed.
        self._threads.shutdown(cancel_pending=True, timeout=_FAREWELL)
        # The loop's objects may only be closed in its own thread. `pull_trigger` releases its lock
        # before it writes: a loop already awake would have closed the trigger by then.
        trigger = self._doors[0].trigger
        with trigger.lock:
            trigger.thunks.append(lambda: wasyncore.close_all(self._map))
            trigger._physical_pull()  # noqa: SLF001 - see above
        self._thread.join()


class _Threads(ThreadedTaskDispatcher):
    """Starts threads on demand, a few more than busy, up to a limit; none ends early."""

    def __init__(self, most: int, fit: Callable[[int], None]) -> None:
        super().__init__()
        self._most = most
        self._fit = fit
        self._short = False
        """Whether the last thread could not be started."""
        self._growing = threading.Lock()

    def begin(self) -> None:
        """Start the first threads. Raises RuntimeError."""
        self.set_thread_count(min(_FIRST_THREADS, self._most))

    def add_task(self, task: Any) -> None:
        """Queue a request."""
        with self._growing:
            self._grow()
        super().add_task(task)

    def shutdown(self, cancel_pending: bool = True, timeout: float = _FAREWELL) -> bool:  # noqa: FBT002 - waitress' signature
        """End all threads; abandon those that exceed the timeout."""
        with self._growing:
            self._most = 0
        stopped: bool = super().shutdown(cancel_pending, timeout)
        return stopped

    def start_new_thread(self, target: Any, thread_no: int) -> None:
        """Start a thread. Raises RuntimeError."""
        try:
            super().start_new_thread(target, thread_no)
        except RuntimeError:
            self.threads.discard(thread_no)
            raise

    def _grow(self) -> None:
        with self.lock:
            there = len(self.threads)
            # Ahead of need: if no more can be started, waiting callers must not hold all of them.
            wanted = self.active_count + len(self.queue) + 1 + reserve(there)
        if wanted <= there or there >= self._most:
            return
        try:
            self.set_thread_count(there + 1)
        except RuntimeError:
            if not self._short:
                _log.warning(
                    "no more threads can be started, so fewer callers can wait at a time; "
                    "raise the limit of processes (ulimit -u, or the container's --pids-limit), "
                    "or lower LABKEEPER_THREADS",
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
    """Return how many connections the descriptor limit allows, minus those reserved."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed == resource.RLIM_INFINITY:
        return _CONNECTIONS
    return max(_CONNECTIONS // 20, min(_CONNECTIONS, allowed - _RESERVE - _LARGE_BODIES))


class _Door(BaseWSGIServer):
    """One listening socket. All share the connection limit, which slow callers cannot exhaust.

    New connections are accepted even at the limit: the one that has kept us waiting longest is
    closed, with an incomplete request or an unread answer. Both mostly arrive at once, so this
    hardly ever hits a well-behaved caller.
    """

    def __init__(
        self,
        app: Flask,
        map_: dict[int, Any],
        listener: socket.socket,
        threads: _Threads,
        *,
        certificate: Certificate | None,
        knows: Knows,
        max_body: int,
    ) -> None:
        self.knows = knows
        self._is_unix = listener.family == socket.AF_UNIX
        self._certificate = None if self._is_unix else certificate
        self._places = _connection_limit()
        self._look_at = 0.0
        adjustments = Adjustments(
            sockets=[listener],
            url_scheme="http" if self._certificate is None else "https",
            max_request_body_size=max_body + 1,
            max_request_header_size=_HEADER_LIMIT,
            recv_bytes=_READ,
            backlog=512,
            channel_request_lookahead=_AHEAD,
            outbuf_high_watermark=_HIGH_WATER,
            inbuf_overflow=_IN_MEMORY,
            asyncore_use_poll=True,
            clear_untrusted_proxy_headers=True,
            ident=None,
        )
        known = (listener.family, listener.type, listener.proto, listener.getsockname())
        super().__init__(
            app,
            map_,
            _sock=listener,
            dispatcher=threads,
            adj=adjustments,
            sockinfo=known,
            bind_socket=False,
        )

    def getsockname(self) -> tuple[str, str]:
        """Return host and port."""
        if self._is_unix:
            return "localhost", ""
        return socket.getnameinfo(
            self.socket.getsockname(), socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
        )

    def readable(self) -> bool:
        """Whether to accept connections; called in each round of the loop."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK_EVERY
            for channel in self.active_channels.values():
                if channel.is_late(now):
                    channel.cut_off()
            self._drop_answers()
        return self.accepting and self._to_give() > 0

    def handle_accept(self) -> None:
        """Accept waiting connections, and close others to make room."""
        for _ in range(min(_AT_ONCE, self._to_give())):
            try:
                accepted = self.accept()
                if accepted is None:
                    break
                self._let_in(*accepted)
            except OSError as error:
                # The peer has disconnected, or no descriptor is free.
                _log.debug("cannot accept a connection", error=str(error))
                break
        channels = self._channels()
        surplus = len(channels) - sum(channel.will_close for channel in channels) - self._places
        if surplus > 0:
            waiting = sorted(filter(_Channel.is_waiting, channels), key=_Channel.patience)
            for channel in waiting[:surplus]:
                # It is closed in the next round: until then its descriptor is not reused.
                channel.cut_off()

    def add_task(self, task: _Channel) -> None:
        """Process a complete request once the previous answer has been received."""
        task.note_request()
        if not task.hold():
            super().add_task(task)

    def _drop_answers(self) -> None:
        """Close the connections idle for longest while too many bytes are unsent in total."""
        slow = sorted(
            (c for c in self._channels() if c.total_outbufs_len and c.is_waiting()),
            key=_Channel.patience,
        )
        surplus = sum(channel.total_outbufs_len for channel in slow) - _UNTAKEN_OF_ALL
        for channel in slow:
            if surplus <= 0:
                break
            surplus -= channel.total_outbufs_len
            channel.cut_off()

    def has_room_for_a_large_body(self) -> bool:
        """Whether another large body is allowed, over all sockets."""
        return (
            sum(request.is_large for channel in self._channels() for request in channel.under_way())
            < _LARGE_BODIES
        )

    def _let_in(self, connection: socket.socket, address: Any) -> None:
        try:
            if self._is_unix:
                address = ("localhost", None)
            else:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)
            connection.setblocking(False)
            taken = connection if self._certificate is None else self._certificate.wrap(connection)
            channel = _Channel(self, taken, address, self.adj, map=self._map)
        except OSError:
            connection.close()
            raise
        if self._is_unix:
            channel.peer = identify(connection)

    def _to_give(self) -> int:
        """Return how many connections can be accepted: the free ones, else the closable ones."""
        channels = self._channels()
        return max(self._places - len(channels), 0) or sum(map(_Channel.is_waiting, channels))

    def _channels(self) -> list[_Channel]:
        """Return the connections of all sockets."""
        return [channel for channel in self._map.values() if isinstance(channel, _Channel)]


class _Nothing:
    """Receives a body and discards it."""

    def append(self, piece: bytes) -> None:
        pass

    def __len__(self) -> int:
        return 0

    def getfile(self) -> io.BytesIO:
        return io.BytesIO()

    def close(self) -> None:
        pass


class _Parser(HTTPRequestParser):
    """Also reads a discarded body to its end: a caller cut off while sending sees no answer.

    A body is kept if its sender is known and there is room. So a request without a token costs no
    more than its connection.
    """

    expect_continue: bool
    body_rcv: Any
    is_head = False
    """Whether its answer has no body; known even for otherwise unreadable requests."""
    is_large = False
    """Whether its body is kept and may be too long for memory."""
    unread = False
    """Whether its body is discarded."""
    _left = 0

    def __init__(self, adj: Any, keeps: Callable[[str | None, bool], bool]) -> None:
        """`keeps` decides by the Authorization header and whether the body may be large."""
        super().__init__(adj)
        self._keeps = keeps

    def received(self, data: bytes) -> int:
        """Consume bytes; return how many."""
        if self._left:
            taken = min(len(data), self._left)
            self._left -= taken
            self.completed = self._left == 0
            return taken
        if self.body_rcv is None:
            self.is_head = (self.header_plus + data).lstrip().startswith(b"HEAD ")
        try:
            consumed: int = super().received(data)
        except ValueError:
            # A URL or length that Python cannot parse.
            self.error = BadRequest("the request line or a header cannot be read")
            self.completed = True
            return len(data)
        if isinstance(self.error, RequestEntityTooLarge):
            self._refuse_body()
        return consumed

    def parse_header(self, header_plus: bytes) -> None:
        """Parse the head of a request. Raises ParsingError."""
        if header_plus.count(b"\n") <= _HEADERS + 1:
            super().parse_header(header_plus)
        else:
            # As waitress does for a head that is too long.
            super().parse_header(b"GET / HTTP/1.0\r\n")
            self.error = RequestHeaderFieldsTooLarge(f"exceeds {_HEADERS} headers")
        self._check_length(_CODINGS.findall(header_plus))
        if "close" in {
            option.strip(" \t").lower() for option in self.headers.get("CONNECTION", "").split(",")
        }:
            # Waitress compares only the whole header.
            self.headers["CONNECTION"] = "close"
        if self.body_rcv is not None:
            may_be_large = self.chunked or self.content_length >= _IN_MEMORY
            if self._keeps(self.headers.get("AUTHORIZATION"), may_be_large):
                self.is_large = may_be_large
            else:
                self._throw_body_away()

    def _check_length(self, codings: list[bytes]) -> None:
        """Reject framing that another program may read differently (RFC 9112, 6.1 and 6.3)."""
        plain = self.version == "1.1" and [coding.lower() for coding in codings] == [b"chunked"]
        if codings and ("CONTENT_LENGTH" in self.headers or not plain):
            raise ParsingError(
                "Transfer-Encoding must be 'chunked', once, in HTTP/1.1, and without Content-Length"
            )

    def _throw_body_away(self) -> None:
        self.unread = True
        self.body_rcv.buf = _Nothing()
        if self.expect_continue:
            # The sender awaits 100 Continue and gets its answer instead; more data is no request.
            self.expect_continue, self.body_rcv = False, None
            self.headers["CONNECTION"] = "close"

    def _refuse_body(self) -> None:
        if self.expect_continue or self.body_rcv is None:
            # The sender waits for 100 Continue and gets the error.
            self.expect_continue = False
        elif self.content_length < _DRAIN_LIMIT:
            self._left = self.content_length
            self.completed = self._left == 0


class _Problem(ErrorTask):
    """Answers waitress's own errors (bad request line, oversized body) as the application would."""

    def execute(self) -> None:
        """Write the answer."""
        error = self.request.error
        if isinstance(error, RequestEntityTooLarge):
            largest = self.channel.server.adj.max_request_body_size - 1
            why = f"body must be at most {largest} bytes"
        elif error.code == HTTPStatus.BAD_REQUEST:
            why = error.body.removeprefix("exceeds ")
        else:
            why = error.reason
        body = problems.unread(error.code, error.reason, f"cannot take the request: {why}")
        self.status = f"{error.code} {error.reason}"
        self.response_headers += [("Content-Type", problems.MEDIA_TYPE), *HEADERS.items()]
        self.set_close_on_finish()
        self.content_length = len(body)
        # Not `self.request`, which is a dummy after an error of ours.
        self.write(b"" if self.channel.requests[0].is_head else body)


class _Task(WSGITask):
    """Calls the application; adds the peer, if known, and whether a body was discarded."""

    def get_environment(self) -> dict[str, Any]:
        """Return the WSGI environment."""
        environment: dict[str, Any] = super().get_environment()
        if self.channel.peer is not None and (peer := self.channel.peer()) is not None:
            environment[PEER] = peer
        if self.request.unread:
            environment[UNREAD] = True
        return environment

    def write(self, data: bytes) -> None:
        """Write a piece of the answer, if it has a body."""
        super().write(b"" if self.request.is_head else data)

    def finish(self) -> None:
        """Write the head if that is still to be done, and the end of a chunked body."""
        if not self.request.is_head:
            super().finish()
        elif not self.wrote_header:
            self.write(b"")


class _Channel(HTTPChannel):
    """One connection."""

    task_class = _Task
    error_task_class = _Problem
    peer: Callable[[], Peer | None] | None = None
    """Returns the peer; set for a Unix socket."""

    def __init__(
        self,
        server: _Door,
        connection: socket.socket | TlsSocket,
        address: Any,
        adj: Any,
        map: Any,  # noqa: A002 - waitress' name
    ) -> None:
        self._tls = connection if isinstance(connection, TlsSocket) else None
        self._since = time.monotonic()
        """Start of the wait for its caller: its connection, last request, or last receipt."""
        self._begun: float | None = None
        """When the first byte after the last complete request came; an empty line counts."""
        self._held = False
        """Whether a request waits until the previous answer has been received."""
        self._taken = 0
        """Bytes that the caller has received."""
        self._writing = False
        """Whether a thread writes its data to the socket itself."""
        self._keeping_up = self._since, 0
        """When the caller last kept up with its unsent data, and the bytes received by then."""
        super().__init__(server, connection, address, adj, map=map)

    def parser_class(self, adj: Any) -> _Parser:
        """Return the parser for the next request; waitress expects a class here."""
        return _Parser(adj, self._keeps)

    def _keeps(self, authorization: str | None, may_be_large: bool) -> bool:
        peer = None if self.peer is None else self.peer()
        return self.server.knows(authorization, peer) and (
            not may_be_large or self.server.has_room_for_a_large_body()
        )

    def under_way(self) -> list[_Parser]:
        """Return the complete requests, and the incomplete one, if any."""
        coming = self.request
        return [*self.requests, *([] if coming is None else [coming])]

    def is_waiting(self) -> bool:
        """Whether it waits for its caller. Only the loop, which calls this, receives requests."""
        return not self.will_close and (self._held or not self.requests)

    def patience(self) -> float:
        """Return a sort key: the connection that has waited longest is closed first."""
        return self._since

    def is_late(self, now: float) -> bool:
        """Whether its caller has timed out. The loop calls this all the time."""
        if not self.total_outbufs_len or self._taken - self._keeping_up[1] >= _LEAST:
            self._keeping_up = now, self._taken
        if self.total_outbufs_len:
            return now - self._keeping_up[0] > _IDLE_TIMEOUT
        if self.requests:
            self._since = now
            return False
        if self._tls is not None and not self._tls.greeted:
            return now - self._since > _HEAD_WITHIN
        if self._begun is None:
            return now - self._since > _IDLE_TIMEOUT
        has_head = self.request is not None and self.request.headers_finished
        return now - max(self._begun, self._since) > (_BODY_WITHIN if has_head else _HEAD_WITHIN)

    def cut_off(self) -> None:
        """Make the loop close it, which also releases a thread that waits for its caller."""
        self.will_close = True
        with contextlib.suppress(OSError):
            if self.total_outbufs_len:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
            # The loop waits until the socket is writable: never, if the peer does not read.
            self.socket.shutdown(socket.SHUT_RDWR)

    def hold(self) -> bool:
        """Return whether its next request has to wait; the loop then resumes it."""
        self._held = self.total_outbufs_len > _UNTAKEN
        return self._held

    def _go_on(self) -> None:
        if self._held and self.total_outbufs_len <= _UNTAKEN:
            self._held = False
            self.server.task_dispatcher.add_task(self)

    def readable(self) -> bool:
        """Whether to read more; called in each round of the loop and whenever a thread is done."""
        self._go_on()
        return bool(super().readable())

    def send(self, data: bytes, do_close: bool = True) -> int:  # noqa: FBT002 - waitress' signature
        """Write what can be written now."""
        sent: int = super().send(data, do_close)
        if sent:
            self._taken += sent
            self._since = time.monotonic()
        return sent

    def write_soon(self, data: Any) -> int:
        """Queue a piece of an answer once there is room for it."""
        super()._flush_outbufs_below_high_watermark()
        if not self.total_outbufs_len:
            # Unsent data begins here. The loop's last check may be old if data was always pending.
            self._keeping_up = time.monotonic(), self._taken
        self._writing = True
        try:
            taken: int = super().write_soon(data)
        finally:
            self._writing = False
        if self.total_outbufs_len:
            # The loop may have checked before the flag was cleared.
            self.server.pull_trigger()
        return taken

    def _flush_outbufs_below_high_watermark(self) -> None:
        """Do not wait between two answers, unlike waitress: see `hold`."""

    def del_channel(self, map: Any = None) -> None:  # noqa: A002 - waitress' name
        """Leave the loop, and close a partial body, whose file must not wait for a collection."""
        super().del_channel(map)
        if self.request is not None:
            self.request.close()

    def handle_close(self) -> None:
        """Close it, and discard its requests."""
        super().handle_close()
        self._go_on()

    def note_request(self) -> None:
        """Record the arrival of a request; may be called from a thread."""
        self._since, self._begun = time.monotonic(), None

    def received(self, data: bytes) -> bool:
        """Receive bytes of requests, and record when."""
        self._begun = self._begun or time.monotonic()
        taken: bool = super().received(data)
        self._bound()
        if self.request is not None and self._begun is None:
            # After a complete request.
            self._begun = time.monotonic()
        return taken

    def _bound(self) -> None:
        """Drop surplus requests; the last one kept ends the connection (RFC 9112, 9.3.2)."""
        with self.requests_lock:
            surplus = self.requests[_AHEAD:]
            if surplus:
                del self.requests[_AHEAD:]
                self.requests[-1].headers["CONNECTION"] = "close"
        for request in surplus:
            request.close()

    def handle_read(self) -> None:
        """Read what has arrived, if it is enough to process."""
        with contextlib.suppress(NotYet):
            super().handle_read()

    def writable(self) -> bool:
        """Whether there is something to write; TLS may have data of its own."""
        if self._tls is not None and self._tls.wants_write:
            return True
        # While a thread writes, the loop could only contend for the lock and slow that thread.
        return bool(self.will_close if self._writing else super().writable())

    def handle_write(self) -> None:
        """Write pending data."""
        if self._tls is not None and self._tls.wants_write:
            self.handle_read()
        if self.socket is not None:
            super().handle_write()
