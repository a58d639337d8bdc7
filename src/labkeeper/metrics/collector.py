"""Prometheus metrics: events are counted as they happen; states are read at each scrape.

We count in plain numbers, and prometheus_client writes them (`exposition`).
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from labkeeper.core.culling import culled_by
from labkeeper.core.lifecycle import AT_REST, ENDINGS, Event, Goal, State
from labkeeper.core.messages import (
    CULLER,
    Change,
    EdgeUse,
    HistoryEntry,
    HistoryKind,
    WebhookStatus,
)
from labkeeper.core.ports import Clock
from labkeeper.core.server import OrphanedKernel, Snapshot
from labkeeper.core.spec import QualifiedName
from labkeeper.metrics.families import (
    CULLS,
    EDGE_ANSWERS,
    EDGE_CONNECTIONS,
    EDGE_HANDSHAKES,
    EDGE_HELD,
    EDGE_REFUSED,
    EDGE_RESTARTS,
    ENDS,
    FAMILIES,
    GATEWAYS,
    HTTP_DURATION,
    HTTP_REQUESTS,
    KERNEL_CULLS,
    NONE,
    ORPHANED_KERNELS,
    ORPHANS,
    RESTARTS,
    SERVERS,
    START_DURATION,
    STARTS,
    STOP_DURATION,
    UNKNOWN_WAY,
    WEBHOOK_EVENTS,
    WEBHOOK_PENDING,
    Distribution,
    Family,
    Kind,
    Labels,
    Value,
)

if TYPE_CHECKING:
    from labkeeper.metrics.exposition import Exposition

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_NOT_BEGUN: Final = AT_REST | {State.BACKOFF}
_DECIDED: Final = _NOT_BEGUN | {State.RUNNING, State.STOPPING, State.KILLING}
"""States that end a start, successful or not; a lost server may still become ready."""


@dataclass(frozen=True, slots=True)
class World:
    """Sources read at each scrape. All of them are quick and thread-safe."""

    servers: Callable[[], Sequence[Snapshot]] = tuple
    orphans: Callable[[], Sequence[OrphanedKernel]] = tuple
    webhooks: Callable[[], Sequence[WebhookStatus]] = tuple
    edge: Callable[[], EdgeUse | None] = lambda: None


class _Histogram:
    """The number of values in each bucket, and their sum."""

    def __init__(self, buckets: Sequence[float]) -> None:
        self._bounds = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Add a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def written(self) -> Distribution:
        """Return Prometheus' cumulative buckets, and the sum."""
        bounds = [*map(str, self._bounds), "+Inf"]
        return list(zip(bounds, accumulate(self._counts), strict=True)), self._sum


class Metrics:
    """A subscriber of fleet and history. Thread-safe."""

    def __init__(self, clock: Clock, world: World | None = None, *, version: str = "") -> None:
        self._clock = clock
        self._world = world or World()
        self._version = version
        self._lock = threading.Lock()
        self._counts: dict[Family, Counter[Labels]] = {
            family: Counter(dict.fromkeys(family.known, 0))
            for family in FAMILIES
            if family.kind is Kind.COUNTER
        }
        self._histograms: dict[Family, dict[Labels, _Histogram]] = {
            family: {labels: _Histogram(family.buckets) for labels in family.known}
            for family in FAMILIES
            if family.kind is Kind.HISTOGRAM
        }
        self._begun: dict[QualifiedName, float] = {}
        """The beginning of each start whose outcome is open."""
        self._up: set[QualifiedName] = set()
        """Servers that have been ready and whose end was not seen yet."""

    # Events

    def changed(self, change: Change) -> None:
        """Count a change of a server."""
        with self._lock:
            if change.before is None:
                # Adopted: the next event that counts is its end.
                self._up.update(
                    {change.after.qualified_name} if change.after.started_at is not None else ()
                )
                return
            self._take_start(change, change.before)
            self._take_end(change, change.before)
            if change.after.restarts > change.before.restarts:
                self._count(RESTARTS)
            if change.event is Event.STOP and change.origin.actor == CULLER:
                self._count(CULLS, culled_by(CULLER, change.origin.reason) or NONE)

    def heard(self, entry: HistoryEntry) -> None:
        """Count a history entry."""
        with self._lock:
            if entry.kind is HistoryKind.KERNEL_CULLED:
                self._count(KERNEL_CULLS)
            elif entry.kind is HistoryKind.ORPHANS:
                pids = entry.details.get("pids")
                self._count(ORPHANS, by=pids if isinstance(pids, int) else 0)

    def answered(self, route: str | None, method: str, status: int, seconds: float) -> None:
        """Count an answered request; `route` is its path pattern, None if it matches none."""
        where = (route or NONE, method if method in _METHODS else "other")
        with self._lock:
            self._count(HTTP_REQUESTS, *where, str(status))
            self._observe(HTTP_DURATION, seconds, *where)

    def _take_start(self, change: Change, before: Snapshot) -> None:
        after = change.after
        if after.generation != before.generation or (
            before.state in _NOT_BEGUN and after.state not in _NOT_BEGUN
        ):
            self._begun.setdefault(after.qualified_name, self._clock.monotonic())
        if (
            after.state not in _DECIDED
            or (begun := self._begun.pop(after.qualified_name, None)) is None
        ):
            return
        if after.instance is not None:
            self._count(STARTS, "ready", NONE, after.instance.launched_by)
            self._observe(
                START_DURATION, self._clock.monotonic() - begun, after.instance.launched_by
            )
        elif after.goal is Goal.UP:
            self._count(STARTS, "failed", _class_of(after), UNKNOWN_WAY)
        else:
            self._count(STARTS, "stopped", NONE, UNKNOWN_WAY)

    def _take_end(self, change: Change, before: Snapshot) -> None:
        after, report = change.after, change.after.stop_report
        if report is not None and report != before.stop_report:
            self._observe(STOP_DURATION, report.seconds, str(report.method))
        if after.state is State.RUNNING:
            self._up.add(after.qualified_name)
        elif change.event in ENDINGS and after.qualified_name in self._up:
            self._up.remove(after.qualified_name)
            if before.goal is Goal.UP:
                self._count(ENDS, _class_of(after))

    def _count(self, family: Family, *labels: str, by: int = 1) -> None:
        self._counts[family][labels] += by

    def _observe(self, family: Family, value: float, *labels: str) -> None:
        self._histograms[family].setdefault(labels, _Histogram(family.buckets)).observe(value)

    # Scrapes

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics in the best format for an `Accept` header, and its media type."""
        return self._exposition.text(accept)

    @cached_property
    def _exposition(self) -> Exposition:
        from labkeeper.metrics.exposition import Exposition  # noqa: PLC0415 - 10 ms of a start

        return Exposition(self.values, self._version)

    def values(self) -> dict[Family, Mapping[Labels, Value]]:
        """Return the present values of all families but that of the version."""
        looked_at = self._looked_at()
        with self._lock:
            # Nothing else is done under the lock, for which the fleet waits.
            counts = {family: dict(counted) for family, counted in self._counts.items()}
            histograms = {
                family: {labels: one.written() for labels, one in of_family.items()}
                for family, of_family in self._histograms.items()
            }
        return {**counts, **histograms, **looked_at}

    def _looked_at(self) -> dict[Family, Mapping[Labels, float]]:
        """Return the values read at each scrape."""
        servers, webhooks = self._world.servers(), self._world.webhooks()
        states = Counter(str(server.state) for server in servers)
        health = _healths(servers)
        return {
            SERVERS: {labels: states[labels[0]] for labels in SERVERS.known},
            ORPHANED_KERNELS: {(): len(self._world.orphans())},
            GATEWAYS: {
                ("reachable",): sum(health.values()),
                ("unreachable",): len(health) - sum(health.values()),
            },
            WEBHOOK_EVENTS: {
                labels: count
                for hook in webhooks
                for labels, count in ((("delivered",), hook.delivered), (("dead",), hook.dead))
            },
            WEBHOOK_PENDING: {(): sum(hook.pending for hook in webhooks)} if webhooks else {},
            **_of_edge(self._world.edge()),
        }


def _of_edge(use: EdgeUse | None) -> dict[Family, Mapping[Labels, float]]:
    if use is None:
        return {EDGE_CONNECTIONS: {}, EDGE_HELD: {}, EDGE_HANDSHAKES: {}}
    return {
        EDGE_CONNECTIONS: {("http",): use.connections, ("websocket",): use.websockets},
        EDGE_HELD: {(): use.held},
        EDGE_HANDSHAKES: {(): use.handshakes},
        EDGE_REFUSED: {(): use.refused},
        EDGE_RESTARTS: {(): use.restarts},
        EDGE_ANSWERS: dict(use.answers.items()),
    }


def _healths(servers: Sequence[Snapshot]) -> dict[str, bool]:
    """Return whether each gateway of running servers is usable by all of them."""
    found: dict[str, bool] = {}
    for server in servers:
        if server.gateway is not None and server.spec.gateway is not None:
            found[server.spec.gateway.url] = (
                found.get(server.spec.gateway.url, True) and server.gateway.reachable
            )
    return found


def _class_of(snapshot: Snapshot) -> str:
    return NONE if snapshot.failure is None else str(snapshot.failure.kind)
