"""Listening sockets and the loop that serves them."""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog
from flask import Flask
from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.server import BaseWSGIServer

from labkeeper import shortage
from labkeeper.api.tls import Certificate
from labkeeper.api.wsgi.channel import AHEAD, Channel
from labkeeper.api.wsgi.parser import IN_MEMORY
from labkeeper.api.wsgi.threads import Threads
from labkeeper.core.errors import BackendUnavailable
from labkeeper.identity.peers import Peer, identify

_CONNECTIONS: Final = 2000
_RESERVE: Final = 512
"""Descriptors reserved for servers, their logs, and the store."""
_LARGE_BODIES: Final = 64
"""Limit of bodies that do not fit into memory, over all connections: each has a file and thus a
descriptor."""
_LOOK_EVERY: Final = 1.0
"""Interval in seconds between checks for timeouts."""
_AT_ONCE: Final = 32
"""Connections accepted before the existing ones get their turn."""
_HEADER_LIMIT: Final = 16 * 1024
_READ: Final = 32 * 1024
"""Bytes per read: more than a TLS record holds, so that none stay behind in OpenSSL."""
_UNTAKEN_OF_ALL: Final = 256 * 1024 * 1024
"""Unsent bytes of all answers together. A caller with a MiB or more of them has a file, with its
descriptor."""
_HIGH_WATER: Final = 2 * 1024 * 1024
"""Unsent bytes at which a thread also waits before it produces more of a streamed answer."""
_UNSENT: Final = 128 * 1024
"""Bytes that the kernel buffers beyond what it can send. With more, slow readers would not show."""

_PROXIED: Final[dict[str, Any]] = {
    "trusted_proxy": "localhost",  # waitress' name for the peer of a Unix socket
    "trusted_proxy_count": 1,
    "trusted_proxy_headers": {"x-forwarded-for", "x-forwarded-proto"},
}

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
        behind_proxy: socket.socket | None = None,
        certificate: Certificate | None = None,
        knows: Knows = lambda _authorization, _peer: True,
        fit: Callable[[int], None] = lambda _: None,
    ) -> None:
        """With a certificate it speaks TLS, except on Unix sockets.

        `behind_proxy` is a further Unix socket, for our own proxy: its peer is not identified, and
        its headers about the client are trusted.

        `knows` decides without blocking, from the Authorization header and the peer, whether to
        keep a body; the application is called in any case. `fit` is called with the possible number
        of threads whenever that changes.
        """
        self._map: dict[int, Any] = {}
        self._threads = Threads(threads, fit)
        self._doors = [
            _Door(
                app,
                self._map,
                listener,
                self._threads,
                certificate=certificate,
                knows=knows,
                max_body=max_body,
                is_proxied=listener is behind_proxy,
            )
            for listener in (*sockets, *([] if behind_proxy is None else [behind_proxy]))
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
        self._threads.shutdown()
        # The loop's objects may only be closed in its own thread. `pull_trigger` releases its lock
        # before it writes: a loop already awake would have closed the trigger by then.
        trigger = self._doors[0].trigger
        with trigger.lock:
            trigger.thunks.append(lambda: wasyncore.close_all(self._map))
            trigger._physical_pull()  # noqa: SLF001 - see above
        self._thread.join()


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
        threads: Threads,
        *,
        certificate: Certificate | None,
        knows: Knows,
        max_body: int,
        is_proxied: bool,
    ) -> None:
        self.knows = knows
        self._is_proxied = is_proxied
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
            channel_request_lookahead=AHEAD,
            outbuf_high_watermark=_HIGH_WATER,
            inbuf_overflow=IN_MEMORY,
            asyncore_use_poll=True,
            clear_untrusted_proxy_headers=True,
            ident=None,
            **(_PROXIED if is_proxied else {}),
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
            waiting = sorted(filter(Channel.is_waiting, channels), key=Channel.patience)
            for channel in waiting[:surplus]:
                # It is closed in the next round: until then its descriptor is not reused.
                channel.cut_off()

    def add_task(self, task: Channel) -> None:
        """Process a complete request once the previous answer has been received."""
        task.note_request()
        if not task.hold():
            super().add_task(task)

    def _drop_answers(self) -> None:
        """Close the connections idle for longest while too many bytes are unsent in total."""
        slow = sorted(
            (c for c in self._channels() if c.total_outbufs_len and c.is_waiting()),
            key=Channel.patience,
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
            channel = Channel(self, taken, address, self.adj, map=self._map)
        except OSError:
            connection.close()
            raise
        if self._is_unix and not self._is_proxied:
            channel.peer = identify(connection)

    def _to_give(self) -> int:
        """Return how many connections can be accepted: the free ones, else the closable ones."""
        channels = self._channels()
        return max(self._places - len(channels), 0) or sum(map(Channel.is_waiting, channels))

    def _channels(self) -> list[Channel]:
        """Return the connections of all sockets."""
        return [channel for channel in self._map.values() if isinstance(channel, Channel)]
