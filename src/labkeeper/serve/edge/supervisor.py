"""Supervises the edge: chooses or starts it, restarts it if it dies, pushes its routes, ends it.

Keeper and edge both hold the listening socket of the public address. Whichever survives hands it
on, so the address is never given up in between, and connections wait in its queue.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Protocol

import structlog

from labkeeper.backends.local.processes import wait_until_readable
from labkeeper.core.access import Session
from labkeeper.core.errors import BackendUnavailable, SettingsError
from labkeeper.core.lifecycle import State
from labkeeper.core.messages import Change, EdgeUse
from labkeeper.core.server import Snapshot, Visits
from labkeeper.core.spec import QualifiedName
from labkeeper.edge import wire
from labkeeper.edge.report import Answers, ReportError
from labkeeper.edge.routes import Route
from labkeeper.edge.wire import REPORT_EVERY, WireError
from labkeeper.lab_addresses import LabAddresses
from labkeeper.serve.edge.certificate import Certificate
from labkeeper.serve.edge.instances import EdgeError, Instances
from labkeeper.serve.edge.link import Link
from labkeeper.serve.edge.messages import route_of, session_message, visits_of
from labkeeper.threads import ThreadGroup

_LOOK_EVERY = 1.0
"""Seconds between two looks at the files of the certificate."""
_TRY_AGAIN = 1.0
"""Seconds between two attempts to start an edge."""
_SILENT_FOR = 3 * REPORT_EVERY
"""Seconds without a report after which an edge has a last chance: it may be suspended, or stuck."""
_LAST_CHANCE = REPORT_EVERY + 1.0
"""Seconds in which it must report then, or it is replaced."""
_ANSWER_WITHIN = 2.0
"""Seconds in which an edge must answer a question."""

_log = structlog.get_logger("labkeeper.serve.edge")


class Observe(Protocol):
    """Receives how browser sessions were used."""

    def __call__(self, used: Mapping[str, float], *, complete: bool) -> None:
        """See `labkeeper.identity.sessions.Sessions.observe`."""


@dataclass(frozen=True, slots=True)
class Answering:
    """How an edge answers, as the settings have it."""

    labs: LabAddresses
    hosts: Sequence[str]
    """Our host names beyond those always safe."""
    trusted: Sequence[str]
    """The proxies in front that are believed about clients."""
    access_log: bool
    """Whether it logs each answer."""
    longest_body: int
    """Bytes of a body that the keeper accepts."""


class Edge:
    """The edge of a keeper; routes can be set from any thread."""

    def __init__(
        self,
        instances: Instances,
        answering: Answering,
        *,
        certificate: Certificate | None,
        public: socket.socket,
        link: Link,
        ending: list[Link],
        was_found: bool,
    ) -> None:
        """`ending` are edges that finish what they have begun. Use `running` instead."""
        self.was_found = was_found
        """Whether an edge has served, and seen how sessions were used, since the last keeper."""
        self.public = public
        """The listening socket of the public address."""
        self.secret = instances.key()
        """The secret that keepers share with their edges."""
        self._instances = instances
        self._answering = answering
        self._restarts = 0
        self._refused = 0
        self._answers = Answers()
        self._certificate = certificate
        self._link = link
        self._ending = ending
        self._routes: dict[QualifiedName, Route] = {}
        self._uncertain: dict[QualifiedName, int] = {}
        """Servers of earlier keepers that have not been found yet, with their generations: an edge
        that was left with them keeps their routes."""
        self._id = secrets.token_hex(8)
        """By which an edge says that it has told this keeper of all uses."""
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        """Guards the link, the routes and the sessions: together they are what the edge knows."""

    def changed(self, change: Change) -> None:
        """Push what a change of a server means for its route; a subscriber of the fleet."""
        name = change.after.qualified_name
        route = route_of(change.after, self._answering.labs, self.secret)
        with self._lock:
            if self._is_uncertain(change):
                self._uncertain[name] = change.after.generation
                return
            left = self._uncertain.pop(name, None) is not None
            if route == self._routes.get(name) and not left:
                return
            if route is None:
                self._routes.pop(name, None)
                self._tell({"do": "unroute", "server": name})
            else:
                # As the edge does: another server that had the address has ended.
                others = self._routes.items()
                self._routes = {n: other for n, other in others if other.address != route.address}
                self._routes[name] = route
                self._tell({"do": "route", "route": asdict(route)})

    def _is_uncertain(self, change: Change) -> bool:
        """Whether a server is one of `_uncertain`, also after a change."""
        name, after = change.after.qualified_name, change.after
        if change.before is None:
            return after.state is State.LOST
        is_same = self._uncertain.get(name) == after.generation
        return is_same and after.state in {State.LOST, State.STARTING}

    def set_sessions(self, begun: Collection[Session], ended: Collection[Session]) -> None:
        """Push browser sessions that begin and that end."""
        with self._lock:
            self._sessions |= {session.digest: session for session in begun}
            for session in ended:
                self._sessions.pop(session.digest, None)
            news = {
                "begun": [session_message(session) for session in begun],
                "ended": [session.digest for session in ended],
            }
            self._tell({"do": "sessions", **news})

    def visits(self, snapshot: Snapshot) -> Visits:
        """Return the visits to a running server's Lab. Raises BackendUnavailable if unknown."""
        name = snapshot.qualified_name
        with self._lock:
            links, routed = [self._link, *self._ending], name in self._routes
        if not routed:
            raise BackendUnavailable(
                f"cannot know who visits server '{snapshot.name}': the edge does not serve it"
            )
        try:
            # An edge that finishes what it has begun may still have open websockets.
            found = [
                visits_of(link.ask(self.secret, "visits", name, within=_ANSWER_WITHIN))
                for link in links
            ]
        except (OSError, EOFError, wire.WireError) as error:
            raise BackendUnavailable(
                f"cannot know who visits server '{snapshot.name}': the edge does not say"
            ) from error
        ago = min((one.ago for one in found if one.ago is not None), default=None)
        return Visits(sum(one.open for one in found), ago)

    def _tell(self, message: dict[str, object]) -> None:
        """Send a command to the edge, and to those that finish what they have begun.

        These have open connections, too, and may have received the beginning of a request.
        """
        for link in (self._link, *self._ending):
            link.command(message)

    def upstream(self) -> AbstractContextManager[socket.socket]:
        """Return the keeper's listening socket for requests that come through the edge."""
        return self._instances.upstream()

    def supervise(self, threads: ThreadGroup, observe: Observe) -> None:
        """Push all routes, and replace the edge whenever it dies, until the threads end.

        `observe` is called with each report. Raises BackendUnavailable if no thread can be started.
        """
        with self._lock:
            self._push_all()
        threads.start("edge", self._watch, threads, observe)

    def _push_all(self) -> None:
        link = self._link
        if self._certificate is not None:
            link.command(self._certificate.message())
        link.command({"do": "trust", "proxies": list(self._answering.trusted)})
        routes = [asdict(route) for route in self._routes.values()]
        sessions = [session_message(session) for session in self._sessions.values()]
        answering = self._answering
        link.command(
            {
                "do": "all",
                "domain": answering.labs.domain if answering.labs.mode == "host" else "",
                "hosts": list(answering.hosts),
                "access_log": answering.access_log,
                "longest_body": answering.longest_body,
                "routes": routes,
                "kept": self._uncertain,
                "keeper": self._id,
                "sessions": sessions,
            }
        )

    def _watch(self, threads: ThreadGroup, observe: Observe) -> None:
        while not threads.closed:
            links = [self._link, *self._ending]
            descriptors = {link.connection.fileno(): link for link in links}
            timeout = REPORT_EVERY if self._certificate is None else _LOOK_EVERY
            ready = wait_until_readable([*descriptors, threads.wake], timeout=timeout)
            if threads.closed:
                return
            self._renew_certificate()
            for descriptor, link in descriptors.items():
                try:
                    if descriptor in ready:
                        self._receive(link, observe)
                    elif time.monotonic() - link.heard.at > _SILENT_FOR:
                        self._wait_for(link, threads)
                except (OSError, EOFError, WireError, ReportError) as error:
                    self._lose(link, str(error), threads)

    def _wait_for(self, link: Link, threads: ThreadGroup) -> None:
        """Raise TimeoutError unless a silent edge reports now: we may have been suspended with it.

        As on a virtual machine that was paused.
        """
        descriptors = [link.connection.fileno(), threads.wake]
        if not wait_until_readable(descriptors, timeout=_LAST_CHANCE):
            raise TimeoutError("it does not report")

    def _receive(self, link: Link, observe: Observe) -> None:
        """Receive what an edge reports. Raises OSError, EOFError, WireError, ReportError."""
        before = link.heard.report
        link.receive()
        now = link.heard.report
        with self._lock:
            # Each edge counts from 0, and so would what is published when one is replaced.
            self._answers += now.answers - before.answers
            self._refused += now.refused - before.refused
            links, known = [self._link, *self._ending], self._sessions.keys()
            used: dict[str, float] = {}
            for digest, ago in (use for one in links for use in one.heard.take_uses(known).items()):
                used[digest] = min(ago, used.get(digest, ago))
        observe(used, complete=all(one.heard.report.tells_all(self._id) for one in links))
        self._instances.access_log.rotate()

    def _lose(self, link: Link, reason: str, threads: ThreadGroup) -> None:
        """Replace an edge that has died, or see one off that has finished."""
        if link is self._link:
            _log.warning(
                "the edge has died, and is started again", pid=link.process.pid, reason=reason
            )
            # It may be suspended, and would serve with what it knew if it went on.
            self._instances.bury(link, kill=True)
            self._replace(threads)
        else:
            with self._lock:
                self._ending.remove(link)
            self._instances.bury(link)
            self._instances.tidy()

    def use(self) -> EdgeUse:
        """Return what edges have reported; for metrics."""
        with self._lock:
            reports = [link.heard.report for link in (self._link, *self._ending)]
            return EdgeUse(
                connections=sum(report.connections for report in reports),
                websockets=sum(report.websockets for report in reports),
                held=sum(report.held for report in reports),
                handshakes=sum(report.handshakes for report in reports),
                refused=self._refused,
                restarts=self._restarts,
                answers=dict(self._answers),
            )

    def _renew_certificate(self) -> None:
        if self._certificate is not None and self._certificate.renew():
            with self._lock:
                self._link.command(self._certificate.message())

    def _replace(self, threads: ThreadGroup) -> None:
        """Start another edge at the same address; try until it succeeds or the threads end."""
        while not threads.closed:
            try:
                link = self._instances.start(self.public)
            except EdgeError as error:
                _log.error("the public address is not served", error=str(error))
                threads.sleep(_TRY_AGAIN)
                continue
            with self._lock:
                self._link = link
                self._restarts += 1
                self._push_all()
            return

    def end(self) -> None:
        """End the edge and those before it."""
        links = [self._link, *self._ending]
        for link in links:
            with contextlib.suppress(OSError):
                link.send({"do": "stop"})
        for link in links:
            self._instances.bury(link)
        self._instances.tidy()

    def leave(self) -> None:
        """Leave them to the next keeper."""
        self._instances.leave([self._link, *self._ending])


@contextmanager
def running(
    instances: Instances,
    answering: Answering,
    listen: Callable[[str, int], socket.socket],
    *,
    certificate: Certificate | None = None,
    ends: Callable[[], bool],
) -> Iterator[Edge]:
    """Find or start the edge, and yield it; afterwards end it if `ends()`, or else leave it.

    `listen` creates the listening socket of the public address if no edge has it. With a
    certificate the edge speaks TLS. If the block raises, an edge that was found is left. Raises
    SettingsError.
    """
    try:
        found = instances.find()
        public, link, ending = _choose(instances, found, listen)
    except EdgeError as error:
        raise SettingsError(str(error)) from error
    except OSError as error:
        raise SettingsError(f"cannot start the edge: {error}") from error
    edge = Edge(
        instances,
        answering,
        certificate=certificate,
        public=public,
        link=link,
        ending=ending,
        was_found=any(one.public is not None for one in found),
    )
    keep = bool(found)
    try:
        yield edge
        keep = not ends()
    finally:
        edge.leave() if keep else edge.end()
        edge.public.close()


def _choose(
    instances: Instances, found: list[Link], listen: Callable[[str, int], socket.socket]
) -> tuple[socket.socket, Link, list[Link]]:
    """Keep an edge that equals a new one; else start one, at its address if that is the same.

    Return the listening socket, the edge, and all others: they finish what they have begun. Raises
    OSError, EdgeError, SettingsError.
    """
    at_address = [link for link in found if link.public and link.address == instances.address]
    same = (instances.build, instances.secure)
    equal = next((link for link in at_address if (link.build, link.secure) == same), None)
    old = equal or next(iter(at_address), None)
    public = old.public.dup() if old and old.public else listen(*instances.address)
    try:
        link = equal or instances.start(public)
    except EdgeError:
        public.close()
        raise
    instances.tidy()
    others = [other for other in found if other is not link]
    for other in others:
        with contextlib.suppress(OSError):
            other.send({"do": "drain"})
    for left in found:
        left.close_public()
    return public, link, others
