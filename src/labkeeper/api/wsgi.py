"""The WSGI server: waitress, in one thread of this process.

The edge is before it, and sends it whole requests only. A caller that sends or reads slowly holds
no thread here, but does hold a connection; limiting those is the edge's work.
"""

from __future__ import annotations

import resource
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from flask import Flask
from waitress import create_server, wasyncore
from waitress.task import ThreadedTaskDispatcher

from labkeeper import shortage
from labkeeper.core.errors import BackendUnavailable
from labkeeper.identity.peers import PEER, Connection

_FAREWELL: Final = 5
"""Seconds for answers in progress to finish when the server closes."""
_CONNECTIONS: Final = 4000
_RESERVE: Final = 512
"""Descriptors reserved for servers, their logs, and the store."""
_LONGEST_BODY: Final = 64 * 1024 * 1024
"""Bytes up to which waitress reads a body that is too long, so that its sender reads the answer."""
_OPTIONS: Final[dict[str, Any]] = {
    "asyncore_use_poll": True,
    "backlog": 512,
    # With a request ahead, a stream notices that its connection was closed.
    "channel_request_lookahead": 1,
    "clear_untrusted_proxy_headers": True,
    "ident": None,
    # Of a streamed answer, which waits before it produces more.
    "outbuf_high_watermark": 2 * 1024 * 1024,
}
_BEHIND_EDGE: Final[dict[str, Any]] = {
    "trusted_proxy": "localhost",  # waitress' name for the peer of a Unix socket
    "trusted_proxy_count": 1,
    "trusted_proxy_headers": {"x-forwarded-for", "x-forwarded-proto"},
}

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class WsgiServer:
    """Serves an application on listening sockets until it is closed, all in one loop."""

    def __init__(
        self,
        app: Flask | Wsgi,
        sockets: Sequence[socket.socket],
        *,
        threads: int,
        max_body: int,
        behind_edge: socket.socket | None = None,
    ) -> None:
        """`behind_edge` is a further socket; what its callers say about clients is believed.

        Peers are identified on sockets that do so: see `labkeeper.identity.peers.Listener`.
        """
        self._map: dict[int, Any] = {}
        self._threads = ThreadedTaskDispatcher()
        self._count = threads
        options = _OPTIONS | {
            "connection_limit": _connection_limit(),
            "max_request_body_size": max(2 * max_body, _LONGEST_BODY),
        }
        kinds = [(listener, options) for listener in sockets]
        if behind_edge is not None:
            kinds.append((behind_edge, options | _BEHIND_EDGE))
        self._servers = [
            create_server(
                _identifying(app),
                self._map,
                _dispatcher=self._threads,
                sockets=[listener],
                **chosen,
            )
            for listener, chosen in kinds
        ]
        self._thread = threading.Thread(target=self._servers[0].run, name="wsgi", daemon=True)

    def start(self) -> None:
        """Begin to serve. Raises BackendUnavailable if threads cannot be started."""
        try:
            with shortage.told_of_threads():
                self._threads.set_thread_count(self._count)
            shortage.start(self._thread)
        except BackendUnavailable:
            self._threads.shutdown(timeout=_FAREWELL)
            wasyncore.close_all(self._map)
            raise

    def close(self) -> None:
        """Finish answers in progress, close every connection, and end all threads."""
        # First the worker threads: they wake the loop when they write, and must not find it closed.
        self._threads.shutdown(timeout=_FAREWELL)
        # The loop's objects may only be closed in its own thread. `pull_trigger` releases its lock
        # before it writes: a loop already awake would have closed the trigger by then.
        trigger = self._servers[0].trigger
        with trigger.lock:
            trigger.thunks.append(lambda: wasyncore.close_all(self._map))
            trigger._physical_pull()  # noqa: SLF001 - see above
        self._thread.join()


def _connection_limit() -> int:
    """Return how many connections the descriptor limit allows, minus those reserved."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed == resource.RLIM_INFINITY:
        return _CONNECTIONS
    return max(_CONNECTIONS // 40, min(_CONNECTIONS, allowed - _RESERVE))


def _identifying(app: Flask | Wsgi) -> Wsgi:
    """Return an application whose environment has the peer of the connection, if it is known."""

    def call(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        # Waitress hands out its channel, and with it the socket, by this method only.
        connection = environ["waitress.client_disconnected"].__self__.socket
        if isinstance(connection, Connection) and (peer := connection.peer()) is not None:
            environ[PEER] = peer
        return app(environ, start_response)

    return call
