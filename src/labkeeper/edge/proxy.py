"""What all connections of the edge share: routes, limits, and the ways to keeper and Labs."""

from __future__ import annotations

import asyncio
import functools
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, Protocol, TypeVar

from labkeeper.edge.access_log import AccessLog, Record
from labkeeper.edge.collected import LargeBodies
from labkeeper.edge.compression import Compressor
from labkeeper.edge.forwarded import Network, is_trusted
from labkeeper.edge.handshakes import Handshakes
from labkeeper.edge.hosts import Hosts
from labkeeper.edge.limits import Limits
from labkeeper.edge.report import Report
from labkeeper.edge.routes import Route, RouteTable
from labkeeper.edge.sessions import Session, SessionTable
from labkeeper.edge.upstream import Target, Upstream
from labkeeper.edge.uses import UseTable
from labkeeper.edge.visits import VisitTable
from labkeeper.edge.waiting import Waiting

_TRY_EVERY: Final = 0.02
"""Interval in seconds between attempts to reach a keeper that restarts."""
_CONNECT_WITHIN: Final = 5.0
"""Seconds."""
_Counted = TypeVar("_Counted", str, Session)


class NoRoute(Exception):  # noqa: N818 - named like the answer that it becomes
    """There is no running server of the name."""


class Unreachable(Exception):  # noqa: N818 - as NoRoute
    """Neither the keeper nor a Lab can be reached; the message is the reason."""

    def __init__(self, reason: str, status: HTTPStatus) -> None:
        super().__init__(reason)
        self.status = status


class Connection(Protocol):
    """A client's connection, as seen from here."""

    address: str
    """The client's."""
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


@dataclass(frozen=True, slots=True)
class _Tunnel:
    """A client's connection that has become a tunnel."""

    address: str
    session: Session | None
    """The session that has opened it."""


class Proxy:
    """The state of the edge. It belongs to the thread of its loop."""

    def __init__(
        self,
        keeper: str,
        *,
        limits: Limits,
        most: int,
        loop: asyncio.AbstractEventLoop,
        log_file: int | None = None,
    ) -> None:
        """`keeper` is the path of the keeper's socket; `most` limits the connections.

        `log_file` is the descriptor of the access log.
        """
        self.loop = loop
        self.limits = limits
        self.access_log = AccessLog(log_file, loop)
        self.hosts = Hosts()
        self.routes = RouteTable()
        self.sessions = SessionTable()
        self.compressor = Compressor(loop)
        self.large_bodies = LargeBodies(limits.large_bodies, limits.large_bodies_of_address)
        self.handshakes = Handshakes(loop)
        self.visits = VisitTable(loop.time)
        self.uses = UseTable(loop.time)
        self.trusted: tuple[Network, ...] = ()
        """The proxies in front, whose headers about clients are believed."""
        self.hsts = False
        """Whether browsers that use TLS are told to use nothing else."""
        self.draining = False
        self.waiting: Waiting[Connection] = Waiting()
        """Clients without a request."""
        self._keeper = keeper
        self._most = most
        self._clients: set[Connection] = set()
        self._tunnels: dict[asyncio.Transport, _Tunnel] = {}
        """By the client's connection."""
        self._addresses: Counter[str] = Counter()
        """Connections by the address of the client."""
        self._in_use: Counter[Session] = Counter()
        """Requests in progress and tunnels of each session."""
        self._report = Report()
        self.last_used = loop.time()
        """When a connection was last open, by the loop's clock."""

    # Clients

    def enter(self, client: Connection) -> bool:
        """Register a connection; return whether there is room for it.

        If there is none, the client that has been without a request for longest has to go: one of
        the same address, if that has its share.
        """
        is_greedy = self._is_greedy(client.address)
        if is_greedy or self.open >= self._most:
            idle = self.waiting.longest(client.address if is_greedy else None)
            if idle is None:
                self._report.refused += 1
                return False
            # At once: further connections may be made before its end is reported.
            self.leave(idle)
            idle.cut_off()
        self._clients.add(client)
        self._addresses[client.address] += 1
        return True

    def _is_greedy(self, address: str) -> bool:
        """Whether an address has all connections that it may have; a proxy may have them all."""
        has_all = self._addresses[address] >= self.limits.connections_of_address
        return has_all and not is_trusted(address, self.trusted)

    def leave(self, client: Connection) -> None:
        """Forget a connection."""
        if client in self._clients:
            self._clients.remove(client)
            _decrease(self._addresses, client.address)
        self.waiting.remove(client)
        self.last_used = self.loop.time()

    def has_room(self, session: Session | None) -> bool:
        """Whether a session may have another request in progress."""
        return session is None or self._in_use[session] < self.limits.requests_of_session

    def use(self, session: Session) -> None:
        """Count a request or a tunnel of a session, which has begun."""
        self._in_use[session] += 1
        self._note_use(session)

    def _release(self, session: Session) -> None:
        """Count a request or a tunnel of a session as ended."""
        _decrease(self._in_use, session)
        self._note_use(session)

    def _note_use(self, session: Session) -> None:
        self.visits.note(session.server)
        self.uses.note(session.digest)

    def ended(self, record: Record) -> None:
        """Count and log a request that has ended."""
        if record.session is not None:
            self._release(record.session)
        self._report.answered(record)
        self.access_log.add(record)

    def tunnel_opened(
        self, client: asyncio.Transport, address: str, session: Session | None
    ) -> Callable[[], None]:
        """Register a tunnel; return what is to be called at its end."""
        tunnel = self._tunnels[client] = _Tunnel(address, session)
        self._addresses[address] += 1
        if session is not None:
            self.use(session)
        return functools.partial(self._tunnel_closed, client, tunnel)

    def _tunnel_closed(self, client: asyncio.Transport, tunnel: _Tunnel) -> None:
        del self._tunnels[client]
        _decrease(self._addresses, tunnel.address)
        if tunnel.session is not None:
            self._release(tunnel.session)
        self.last_used = self.loop.time()

    @property
    def open(self) -> int:
        """The number of clients' connections."""
        return len(self._clients) + len(self._tunnels)

    def visitors(self, server: str) -> int:
        """Return how many requests and tunnels of browsers with a session a Lab has now."""
        return sum(count for used, count in self._in_use.items() if used.server == server)

    def shut_out(self, sessions: Collection[Session]) -> None:
        """Close what sessions that have ended have opened."""
        if not sessions:
            return
        for client in [client for client in self._clients if client.session in sessions]:
            client.cut_off()
        for transport in [t for t, known in self._tunnels.items() if known.session in sessions]:
            transport.abort()

    def sweep(self) -> None:
        """Close the connections whose time is up."""
        self.shut_out(self.sessions.expire(time.time()))
        self.visits.keep(self.routes)
        self.uses.keep(self.sessions.digests)
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
        self.compressor.close()

    def report(self, tell: Callable[[dict[str, Any]], bool]) -> None:
        """Report to keepers; `tell` returns whether it has sent a message to all of them."""
        report = self._report
        report.connections, report.websockets = len(self._clients), len(self._tunnels)
        report.handshakes = len(self.handshakes)
        report.uses = self.uses.news({session.digest for session in self._in_use})
        report.untold, report.keeper = self.uses.untold - len(report.uses), self.uses.keeper
        if tell({"report": report.message()}):
            self.uses.told(report.uses)

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
        while route is not None:
            upstream = await self._connect_lab(route)
            if (now := self.routes.find(server)) == route:
                return upstream
            # Launched again meanwhile: who listens there now may be another server.
            upstream.abort()
            route = now
        raise NoRoute(f"cannot find a running server '{server}' here")

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
            if self._report.held >= self.limits.most_held:
                raise _no_keeper() from None
        self._report.held += 1
        try:
            until = self.loop.time() + self.limits.hold
            while self.loop.time() < until:
                await asyncio.sleep(_TRY_EVERY)
                try:
                    return await self._try_keeper()
                except OSError:
                    continue
        finally:
            self._report.held -= 1
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


def _decrease(counts: Counter[_Counted], what: _Counted) -> None:
    """Decrease a count, and forget it at 0."""
    counts[what] -= 1
    if not counts[what]:
        del counts[what]


def _no_keeper() -> Unreachable:
    """Return a new error: each time that one is raised, it keeps more of what it passes through."""
    return Unreachable(
        "cannot reach the keeper: it is restarting or has ended; try again later",
        HTTPStatus.SERVICE_UNAVAILABLE,
    )
