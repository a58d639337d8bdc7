"""What all connections of the edge share: routes, limits, and the ways to keeper and Labs."""

from __future__ import annotations

import asyncio
import functools
import socket
import time
from collections.abc import Callable, Collection
from http import HTTPStatus
from typing import Final, Protocol

from labkeeper.edge.forwarded import Network
from labkeeper.edge.limits import Limits
from labkeeper.edge.routes import Route, RouteTable
from labkeeper.edge.sessions import Session, SessionTable
from labkeeper.edge.upstream import Target, Upstream

_TRY_EVERY: Final = 0.02
"""Interval in seconds between attempts to reach a keeper that restarts."""
_CONNECT_WITHIN: Final = 5.0
"""Seconds."""


class NoRoute(Exception):  # noqa: N818 - named like the answer that it becomes
    """There is no running server of the name."""


class Unreachable(Exception):  # noqa: N818 - as NoRoute
    """Neither the keeper nor a Lab can be reached; the message is the reason."""

    def __init__(self, reason: str, status: HTTPStatus) -> None:
        super().__init__(reason)
        self.status = status


class Connection(Protocol):
    """A client's connection, as seen from here."""

    deadline: float
    """By the loop's clock."""

    @property
    def session(self) -> Session | None:
        """The session of its request in progress."""

    def time_out(self, now: float) -> None:
        """Act on the deadline."""

    def rest(self, since: float) -> None:
        """Close what it keeps open behind it, if that was not used since."""

    def cut_off(self) -> None:
        """Close it at once."""

    def drain(self) -> None:
        """Close it after the current answer."""


class Proxy:
    """The state of the edge. It belongs to the thread of its loop."""

    def __init__(
        self, keeper: str, *, limits: Limits, most: int, loop: asyncio.AbstractEventLoop
    ) -> None:
        """`keeper` is the path of the keeper's socket; `most` limits the connections."""
        self.loop = loop
        self.limits = limits
        self.routes = RouteTable()
        self.sessions = SessionTable()
        self.trusted: tuple[Network, ...] = ()
        """The proxies in front, whose headers about clients are believed."""
        self.hsts = False
        """Whether browsers that use TLS are told to use nothing else."""
        self.draining = False
        self.waiting: dict[Connection, None] = {}
        """Clients without a request, the longest waiting one first."""
        self._keeper = keeper
        self._most = most
        self._clients: set[Connection] = set()
        self._tunnels: dict[asyncio.Transport, Session | None] = {}
        """By the client's connection, with the session that opened each."""
        self._held = 0
        self.last_used = loop.time()
        """When a connection was last open, by the loop's clock."""

    # Clients

    def enter(self, client: Connection) -> bool:
        """Register a connection; return whether there is room for it.

        If there is none, the client that has been without a request for longest has to go.
        """
        if self.open >= self._most:
            if not self.waiting:
                return False
            idle = next(iter(self.waiting))
            # At once: further connections may be made before its end is reported.
            self.leave(idle)
            idle.cut_off()
        self._clients.add(client)
        return True

    def leave(self, client: Connection) -> None:
        """Forget a connection."""
        self._clients.discard(client)
        self.waiting.pop(client, None)
        self.last_used = self.loop.time()

    def tunnel_opened(
        self, client: asyncio.Transport, session: Session | None
    ) -> Callable[[], None]:
        """Register a tunnel; return what is to be called at its end."""
        self._tunnels[client] = session
        return functools.partial(self._tunnel_closed, client)

    def _tunnel_closed(self, client: asyncio.Transport) -> None:
        self._tunnels.pop(client, None)
        self.last_used = self.loop.time()

    @property
    def open(self) -> int:
        """The number of clients' connections."""
        return len(self._clients) + len(self._tunnels)

    def shut_out(self, sessions: Collection[Session]) -> None:
        """Close what sessions that have ended have opened."""
        if not sessions:
            return
        for client in [client for client in self._clients if client.session in sessions]:
            client.cut_off()
        for transport in [t for t, session in self._tunnels.items() if session in sessions]:
            transport.abort()

    def sweep(self) -> None:
        """Close the connections whose time is up."""
        self.shut_out(self.sessions.expire(time.time()))
        now = self.loop.time()
        for client in [client for client in self._clients if client.deadline <= now]:
            client.time_out(now)
        for client in self.waiting:
            client.rest(now - self.limits.upstream_idle)

    def drain(self) -> None:
        """Close each connection after its current answer; tunnels stay open."""
        self.draining = True
        for client in list(self._clients):
            client.drain()

    def close(self) -> None:
        """Close all connections at once."""
        for client in list(self._clients):
            client.cut_off()
        for transport in list(self._tunnels):
            transport.abort()

    # Keeper and Labs

    def target(self, server: str | None) -> Target:
        """Return where requests for a Lab go; None: to the keeper, or the Lab has no route."""
        return None if server is None else self.routes.find(server)

    async def connect(self, server: str | None) -> Upstream:
        """Return a new connection to the keeper (None) or a Lab. Raises NoRoute, Unreachable."""
        if server is None:
            return await self._connect_keeper()
        route = self.routes.find(server)
        if route is None:
            # The keeper may have sent it in the same instant.
            await asyncio.sleep(0)
            route = self.routes.find(server)
        if route is None:
            raise NoRoute(f"cannot find a running server '{server}' here")
        return await self._connect_lab(route)

    async def _connect_lab(self, route: Route) -> Upstream:
        try:
            async with asyncio.timeout(_CONNECT_WITHIN):
                _, upstream = await self.loop.create_connection(
                    functools.partial(Upstream, route), route.host, route.port
                )
        except OSError as error:  # TimeoutError, too.
            raise Unreachable(
                f"cannot reach server '{route.server}': {error.strerror or 'no answer'}",
                HTTPStatus.BAD_GATEWAY,
            ) from error
        return upstream

    async def _connect_keeper(self) -> Upstream:
        """Connect to the keeper; if it is not there, wait for the next one."""
        try:
            return await self._try_keeper()
        except OSError:
            if self._held >= self.limits.most_held:
                raise _no_keeper() from None
        self._held += 1
        try:
            until = self.loop.time() + self.limits.hold
            while self.loop.time() < until:
                await asyncio.sleep(_TRY_EVERY)
                try:
                    return await self._try_keeper()
                except OSError:
                    continue
        finally:
            self._held -= 1
        raise _no_keeper()

    async def _try_keeper(self) -> Upstream:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.setblocking(False)
            # At once or not at all; asyncio would take a full backlog for a connection.
            connection.connect(self._keeper)
            _, upstream = await self.loop.create_unix_connection(
                functools.partial(Upstream, None), sock=connection
            )
        except BaseException:
            connection.close()
            raise
        return upstream


def _no_keeper() -> Unreachable:
    """Return a new error: each time that one is raised, it keeps more of what it passes through."""
    return Unreachable(
        "cannot reach the keeper: it is restarting or has ended; try again later",
        HTTPStatus.SERVICE_UNAVAILABLE,
    )
