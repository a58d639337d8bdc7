"""The usage log: what servers used over time, in memory and in the store.

The finest level is kept in memory only. Points of the others are added to the store once a minute,
and read from there when requested, so that they occupy no memory and survive the keeper.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Final

from labkeeper.core.errors import StoreError
from labkeeper.core.messages import Change
from labkeeper.core.ports import Clock, UsageStore
from labkeeper.core.server import Sample
from labkeeper.core.spec import QualifiedName
from labkeeper.core.usage import (
    Level,
    Point,
    RecentUsage,
    Series,
    UsageHistory,
    history,
    levels,
    recent,
)
from labkeeper.threads import ThreadGroup

DEFAULT_SPAN: Final = 3600.0
"""Seconds of history that are returned unless the caller asks for more or less."""
_SAVE_EVERY: Final = 60.0
_MOST_PENDING: Final = 60
"""Points of a server and level that wait for the store; while it fails, older ones are dropped."""

_Pending = dict[tuple[QualifiedName, int], dict[int, Point]]
"""Points by server and name of their level, and by start of their interval."""


class UsageLog:
    """Records samples and returns their history. Thread-safe."""

    def __init__(self, store: UsageStore, clock: Clock, *, period: float) -> None:
        """`period` is the time in seconds between two samples."""
        self._store = store
        self._clock = clock
        self._levels = levels(period)
        self._lock = threading.Lock()
        self._series: dict[QualifiedName, Series] = {}
        self._pending: _Pending = {}
        self._saving = threading.Lock()
        self._trimmed_at = float("-inf")

    def start(self, threads: ThreadGroup) -> None:
        """Start the thread that saves."""
        # At the end of each minute, so that its point is written once.
        threads.watch(
            "usage-log", self.save, every=lambda: _SAVE_EVERY - self._clock.time() % _SAVE_EVERY
        )

    def record(self, samples: Mapping[QualifiedName, Sample]) -> None:
        """Record samples. The first of a launch is left out: it has no processors in use yet."""
        with self._lock:
            for name, sample in samples.items():
                if (point := self._levels.fine.point(sample)) is None:
                    continue
                if name not in self._series:
                    self._series[name] = Series(self._levels.fine.size)
                self._series[name].add(point)
                for level in self._levels.stored:
                    at = level.start(sample.at)
                    self._add_pending((name, level.name), point._replace(at=at))

    def changed(self, change: Change) -> None:
        """Forget a deleted server; the store does so by itself."""
        if change.after.forgotten:
            name = change.after.qualified_name
            with self._lock:
                self._series.pop(name, None)
                for level in self._levels.stored:
                    self._pending.pop((name, level.name), None)

    def history(self, name: QualifiedName, since: float | None = None) -> UsageHistory:
        """Return a server's usage since a time, by default an hour ago; empty if there is none.

        It comes from the finest level that goes so far back, and for which all of it is known.
        Raises StoreError.
        """
        now = self._clock.time()
        since = now - DEFAULT_SPAN if since is None else since
        level = self._levels.covering(now - since)
        if level is not self._levels.fine:
            points = self._stored_and_pending(name, level, since)
            return history(points, level, since=since, until=now)
        with self._lock:
            points = list(self._series.get(name, ()))
        oldest = points[0].at if points else now
        if oldest > since + level.step:
            minutes = self._levels.minutes
            known = self._stored_and_pending(name, minutes, since)
            if any(point.at + minutes.step <= oldest for point in known):
                # From an earlier keeper.
                return history(known, minutes, since=since, until=now)
        return history(points, level, since=since, until=now)

    def recent(
        self, names: Collection[QualifiedName], points: int = 30
    ) -> Mapping[QualifiedName, RecentUsage]:
        """Return the last points of the finest level, of those servers that have any.

        Reads nothing from the store: what was before the keeper is not in it.
        """
        now, level = self._clock.time(), self._levels.fine
        with self._lock:
            tails = {
                name: self._series[name].tail(points) for name in names if name in self._series
            }
        return {name: recent(tail, level, count=points, now=now) for name, tail in tails.items()}

    def save(self) -> None:
        """Save what is pending. If the store fails, it remains pending; the store logs that."""
        with self._saving:
            with self._lock:
                self._drop_outdated()
                taken, self._pending = self._pending, {}
            if not taken:
                return
            try:
                self._store.add_usage({key: list(found.values()) for key, found in taken.items()})
            except StoreError:
                self._return(taken)
                return
            self._trim()

    def _trim(self) -> None:
        now = self._clock.monotonic()
        if now - self._trimmed_at >= self._levels.hours.step:
            with suppress(StoreError):
                self._store.trim_usage({level.name: level.size for level in self._levels.stored})
                self._trimmed_at = now

    def _return(self, taken: _Pending) -> None:
        """Put back what could not be saved, before what has been recorded since."""
        with self._lock:
            newer, self._pending = self._pending, taken
            for key, found in newer.items():
                for point in found.values():
                    self._add_pending(key, point)

    def _add_pending(self, key: tuple[QualifiedName, int], point: Point) -> None:
        found = self._pending.setdefault(key, {})
        known = found.get(point.at)
        found[point.at] = point if known is None else known.merged(point)
        if len(found) > _MOST_PENDING:
            del found[next(iter(found))]

    def _drop_outdated(self) -> None:
        """Free the memory of servers that have not run for as long as the finest level goes."""
        oldest = self._clock.time() - self._levels.fine.span
        for name, series in list(self._series.items()):
            if all(point.at < oldest for point in series.tail(1)):
                del self._series[name]

    def _stored_and_pending(self, name: QualifiedName, level: Level, since: float) -> list[Point]:
        # Not while a save is between the two, when its points would be in neither.
        with self._saving:
            with self._lock:
                pending = list(self._pending.get((name, level.name), {}).values())
            return [
                *self._store.usage(name, level.name, since=level.start(since)),
                *pending,
            ]
