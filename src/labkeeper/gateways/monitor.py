"""Monitoring of gateways of running servers, and of those that have orphaned kernels.

Each gateway is polled at intervals, once for all its servers; an unavailable one with increasing
pauses. Changes are reported to each server. Orphaned kernels are ended once their gateway answers.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from labkeeper.core.errors import BackendError
from labkeeper.core.lifecycle import State
from labkeeper.core.messages import Change, GatewaySeen, Report
from labkeeper.core.ports import Clock
from labkeeper.core.server import GatewayHealth
from labkeeper.core.spec import Gateway, QualifiedName
from labkeeper.gateways.client import GatewayClient
from labkeeper.gateways.orphans import OrphanedKernels
from labkeeper.threads import ThreadGroup

_FIRST_PAUSE: Final = 2.0
"""Seconds before an unavailable gateway is asked again; doubled each time."""
_LONGEST_PAUSES: Final = 4
"""Maximum pause as a multiple of the period."""
_FAILURES: Final = 3
"""Failed kernel deletions after which a gateway is left alone for a while."""
_MAY_COME: Final = 300.0
"""Seconds in which a requested kernel may still appear on a gateway that did not answer."""
_LOOK_EVERY: Final = 1.0
"""Seconds between checks for due gateways."""

_log = structlog.get_logger("labkeeper.gateways.monitor")


@dataclass(slots=True, eq=False)
class _Watched:
    """One gateway with one set of credentials."""

    gateway: Gateway
    due: float
    servers: dict[QualifiedName, tuple[int, GatewayHealth | None]] = field(default_factory=dict)
    """The launches that get reports, with the last health of each."""
    misses: int = 0
    """Number of consecutive failures."""
    asked: float = 0.0
    """When it was last asked; seconds since the epoch."""
    asker: threading.Thread = field(default_factory=threading.Thread)
    """The thread that asks it or last did; before the first, one that is not started."""


class GatewayWatch:
    """Subscriber of the fleet with its own thread."""

    def __init__(
        self,
        tell: Callable[[Report], object],
        *,
        threads: ThreadGroup,
        client: GatewayClient,
        orphans: OrphanedKernels,
        clock: Clock,
        period: float,
    ) -> None:
        """`period` is in seconds."""
        self._tell = tell
        self._threads = threads
        self._client = client
        self._orphans = orphans
        self._clock = clock
        self._period = period
        self._lock = threading.Lock()
        self._watched: list[_Watched] = []

    def start(self) -> None:
        """Start the thread."""
        self._threads.watch("gateways", self._look, every=lambda: _LOOK_EVERY)

    def changed(self, change: Change) -> None:
        """Add a running server, or remove one that does not run."""
        after = change.after
        with self._lock:
            for watched in self._watched:
                if watched.gateway != after.spec.gateway or after.state is not State.RUNNING:
                    watched.servers.pop(after.qualified_name, None)
            if after.state is not State.RUNNING or after.spec.gateway is None:
                return
            watched = self._find(after.spec.gateway)
            if after.qualified_name not in watched.servers and after.gateway is None:
                # An adopted server, whose gateway has not been asked yet.
                watched.due = self._clock.monotonic()
            watched.servers[after.qualified_name] = (after.generation, after.gateway)

    def _find(self, gateway: Gateway) -> _Watched:
        for watched in self._watched:
            if watched.gateway == gateway:
                return watched
        fresh = _Watched(gateway, due=self._clock.monotonic() + self._period)
        self._watched.append(fresh)
        return fresh

    def _look(self) -> None:
        self._orphans.save()
        self._orphans.expire()
        for watched in self._due():
            watched.asker = self._threads.start("ask-gateway", self._ask, watched)

    def _due(self) -> list[_Watched]:
        """Return the gateways to be asked now, and remove unused ones."""
        now = self._clock.monotonic()
        orphans = self._orphans.all()
        owing = [orphan.gateway for orphan in orphans]
        with self._lock:
            for orphan in orphans:
                watched = self._find(orphan.gateway)
                if orphan.since > watched.asked:
                    watched.due = min(watched.due, now)
            self._watched = [
                w for w in self._watched if w.servers or w.asker.is_alive() or w.gateway in owing
            ]
            return [w for w in self._watched if w.due <= now and not w.asker.is_alive()]

    def _ask(self, watched: _Watched) -> None:
        watched.asked = self._clock.time()
        try:
            health = self._client.check(watched.gateway)
        except BackendError as error:
            # That is no evidence about the gateway. It stays due.
            _log.warning(
                "a gateway cannot be reached", gateway=watched.gateway.url, error=error.message
            )
            return
        settled = health.reachable and self._collect(watched.gateway)
        with self._lock:
            watched.misses = 0 if settled else watched.misses + 1
            pause = min(_FIRST_PAUSE * 2 ** min(watched.misses, 20), self._period * _LONGEST_PAUSES)
            watched.due = self._clock.monotonic() + (pause if watched.misses else self._period)
            news = [
                Report(name, generation, GatewaySeen(replace(health, since=_since(known, health))))
                for name, (generation, known) in watched.servers.items()
                if _differs(known, health)
            ]
        for report in news:
            self._tell(report)

    def _collect(self, gateway: Gateway) -> bool:
        """End the orphaned kernels on a gateway that answers; return whether none are left."""
        orphans, failed = self._orphans.on(gateway), 0
        # In random order: kernels that cannot be ended must not block the others.
        for orphan in random.sample(orphans, len(orphans)):
            if self._threads.closed or failed >= _FAILURES:
                return False
            try:
                was_there = self._client.end_kernel(gateway, orphan.kernel_id)
            except BackendError as error:
                _log.warning(
                    "an orphaned kernel cannot be ended",
                    kernel=orphan.kernel_id,
                    server=orphan.server,
                    error=error.message,
                )
                failed += 1
                continue
            if was_there:
                _log.info(
                    "an orphaned kernel was ended",
                    kernel=orphan.kernel_id,
                    gateway=gateway.url,
                    server=orphan.server,
                )
            elif orphan.starting and self._clock.time() - orphan.since < _MAY_COME:
                continue
            self._orphans.discard([orphan.kernel_id])
        return not failed


def _differs(known: GatewayHealth | None, health: GatewayHealth) -> bool:
    return known is None or (known.error, known.kernelspecs) != (health.error, health.kernelspecs)


def _since(known: GatewayHealth | None, health: GatewayHealth) -> float:
    """Return when reachability last changed; other errors or kernelspec counts do not matter."""
    return (
        known.since if known is not None and known.reachable is health.reachable else health.since
    )
