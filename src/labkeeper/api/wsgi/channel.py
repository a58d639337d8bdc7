"""One connection: its requests, its unsent answers, and its timeouts."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, Final

from waitress.channel import HTTPChannel
from waitress.server import BaseWSGIServer

from labkeeper.api.tls import NotYet, TlsSocket
from labkeeper.api.wsgi.parser import RequestParser
from labkeeper.api.wsgi.tasks import ApplicationTask, ProblemTask
from labkeeper.identity.peers import Peer

_IDLE_TIMEOUT: Final = 30.0
"""Seconds after which a connection is closed if it is without a request, or if its caller reads
less than `_LEAST` of the pending data."""
_LEAST: Final = 64 * 1024
"""Bytes: some 2 KiB a second."""
_HEAD_WITHIN: Final = 15.0
"""Timeout in seconds of a request head from its first byte on; before it, of the TLS handshake."""
_BODY_WITHIN: Final = 60.0
"""Timeout in seconds of a whole request, likewise. Dripping bytes does not extend it."""
AHEAD: Final = 8
"""Pipelined requests of one connection; with one pending, a stream notices a closed connection."""
_UNTAKEN: Final = 64 * 1024
"""Unsent bytes of an answer up to which the caller's next request begins."""
_ABORT: Final = struct.pack("ii", 1, 0)
"""Closes a connection at once (SO_LINGER): unsent data is dropped, and the caller cannot mistake
the answer for a complete one."""


class Channel(HTTPChannel):
    """One connection."""

    task_class = ApplicationTask
    error_task_class = ProblemTask
    peer: Callable[[], Peer | None] | None = None
    """Returns the peer; set for a Unix socket."""

    def __init__(
        self,
        server: BaseWSGIServer,
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

    def parser_class(self, adj: Any) -> RequestParser:
        """Return the parser for the next request; waitress expects a class here."""
        return RequestParser(adj, self._keeps)

    def _keeps(self, authorization: str | None, may_be_large: bool) -> bool:
        peer = None if self.peer is None else self.peer()
        return self.server.knows(authorization, peer) and (
            not may_be_large or self.server.has_room_for_a_large_body()
        )

    def under_way(self) -> list[RequestParser]:
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
            surplus = self.requests[AHEAD:]
            if surplus:
                del self.requests[AHEAD:]
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
