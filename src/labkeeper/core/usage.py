"""The history of a server's usage: samples aggregated over intervals of equal length.

There are three levels of detail, each with intervals of its own length, and each bounded. Every
sample counts in every level, so a mean is that of the samples themselves. An interval without a
sample has no point: nothing is interpolated.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from labkeeper.core.server import Sample

UNKNOWN: Final = -1
"""Number of kernels in an interval in which it is not known."""
_MOST_KERNELS: Final = 2**15 - 1


class Point(NamedTuple):
    """One interval in which a server was measured."""

    at: int
    """Its start, in seconds since the epoch."""
    generation: int
    """The newest in the interval."""
    samples: int
    memory: float
    """Mean, in bytes."""
    memory_max: float
    cpus: float
    """Mean number of busy processors."""
    cpus_max: float
    kernels: int
    """The most, or `UNKNOWN`."""

    def merged(self, other: Point) -> Point:
        """Return the point of all samples of both, in the interval of this one."""
        samples = self.samples + other.samples
        # In this form a mean never leaves the range of its parts.
        share = other.samples / samples
        return Point(
            self.at,
            max(self.generation, other.generation),
            samples,
            self.memory + (other.memory - self.memory) * share,
            max(self.memory_max, other.memory_max),
            self.cpus + (other.cpus - self.cpus) * share,
            max(self.cpus_max, other.cpus_max),
            max(self.kernels, other.kernels),
        )


@dataclass(frozen=True, slots=True)
class Level:
    """One level of detail. All in seconds."""

    name: int
    """The length of an interval unless samples are rarer; identifies the level in the store."""
    step: int
    """The length of an interval."""
    span: int
    """How far it goes back."""

    @property
    def size(self) -> int:
        """The maximum number of points."""
        return math.ceil(self.span / self.step)

    def start(self, at: float) -> int:
        """Return the start of the interval of a time."""
        return math.floor(at / self.step) * self.step

    def point(self, sample: Sample) -> Point | None:
        """Return the point of one sample; None if its processors are not known yet."""
        if sample.cpus is None:
            return None
        memory = float(sample.usage.memory)
        kernels = UNKNOWN if sample.load is None else min(sample.load.kernels, _MOST_KERNELS)
        return Point(
            self.start(sample.at),
            sample.generation,
            1,
            memory,
            memory,
            sample.cpus,
            sample.cpus,
            kernels,
        )


@dataclass(frozen=True, slots=True)
class Levels:
    """The levels of detail; see `levels`."""

    fine: Level
    """Only in memory."""
    minutes: Level
    hours: Level

    @property
    def stored(self) -> tuple[Level, Level]:
        """Those that survive the keeper."""
        return self.minutes, self.hours

    def covering(self, seconds: float) -> Level:
        """Return the finest level that goes so far back, or the one that goes back farthest."""
        for level in (self.fine, self.minutes):
            # A caller's last hour began before we read the clock.
            if seconds < level.span + level.step:
                return level
        return self.hours


def levels(period: float) -> Levels:
    """Return the levels for samples that are `period` seconds apart."""

    def level(name: int, span: int) -> Level:
        return Level(name, max(name, math.ceil(period)), span)

    return Levels(level(5, 3600), level(60, 86400), level(3600, 30 * 86400))


class Series:
    """The newest points of one level, oldest first, in 34 bytes each, allocated when needed.

    Memory is kept to 24 bits: exact up to 64 GiB, since it is counted in pages.
    """

    _ROW: Final = struct.Struct("<qIIffffh")

    def __init__(self, size: int) -> None:
        """`size` is the maximum number of points."""
        self._size = size
        self._rows = bytearray()

    def __len__(self) -> int:
        return len(self._rows) // self._ROW.size

    def __iter__(self) -> Iterator[Point]:
        return iter(self.tail(self._size))

    def add(self, point: Point) -> None:
        """Add a point, or merge it with that of its interval.

        If the clock was set back, the points after it were measured at times that are unknown: they
        are dropped.
        """
        row = self._ROW
        while self._rows and (last := self._last()).at >= point.at:
            del self._rows[-row.size :]
            if last.at == point.at:
                point = last.merged(point)
        self._rows += row.pack(*point)
        del self._rows[: -row.size * self._size]

    def tail(self, count: int) -> list[Point]:
        """Return the newest points, at most `count`, oldest first."""
        rows = self._rows[-self._ROW.size * count :] if count else b""
        return [Point(*row) for row in self._ROW.iter_unpack(rows)]

    def _last(self) -> Point:
        return Point(*self._ROW.unpack_from(self._rows, len(self._rows) - self._ROW.size))


@dataclass(frozen=True, slots=True)
class UsageHistory:
    """The usage of a server over time, by columns; None in an interval without a sample.

    The columns begin at the first point and end at the last: all are empty if there is none. Times
    are seconds since the epoch.
    """

    since: float
    """What was asked for, or the farthest that its level goes back."""
    until: float
    """When it was returned."""
    resolution: int
    """Seconds from the start of one interval to that of the next."""
    start: int
    """Start of the first interval."""
    memory: Sequence[int | None] = ()
    """Mean, in bytes."""
    memory_max: Sequence[int | None] = ()
    cpus: Sequence[float | None] = ()
    """Mean number of busy processors."""
    cpus_max: Sequence[float | None] = ()
    kernels: Sequence[int | None] = ()
    """The most; None also if it is not known."""
    generation: Sequence[int | None] = ()
    """Another number than before: the server was launched again."""


def history(points: Iterable[Point], level: Level, *, since: float, until: float) -> UsageHistory:
    """Return the history from points of a level in any order, those of one interval merged."""
    farthest = level.start(until) - (level.size - 1) * level.step
    since = max(min(since, until), farthest)
    first = level.start(since)
    found: dict[int, Point] = {}
    for point in points:
        at = level.start(point.at)
        if first <= at <= until:
            known = found.get(at)
            found[at] = point if known is None else known.merged(point)
    if not found:
        return UsageHistory(since, until, level.step, first)
    starts = range(min(found), max(found) + 1, level.step)
    cells = [found.get(at) for at in starts]
    return UsageHistory(
        since,
        until,
        level.step,
        starts[0],
        memory=[c and round(c.memory) for c in cells],
        memory_max=[c and round(c.memory_max) for c in cells],
        cpus=[c and round(c.cpus, 3) for c in cells],
        cpus_max=[c and round(c.cpus_max, 3) for c in cells],
        kernels=[None if c is None or c.kernels == UNKNOWN else c.kernels for c in cells],
        generation=[c and c.generation for c in cells],
    )


@dataclass(frozen=True, slots=True)
class RecentUsage:
    """The usage of a server in the last intervals, the current one last; None without a sample."""

    memory: Sequence[float | None]
    """Bytes."""
    cpus: Sequence[float | None]


def recent(points: Iterable[Point], level: Level, *, count: int, now: float) -> RecentUsage:
    """Return the last `count` intervals of the points of a level."""
    memory: list[float | None] = [None] * count
    cpus: list[float | None] = [None] * count
    first = level.start(now) - (count - 1) * level.step
    for point in points:
        place, beside = divmod(point.at - first, level.step)
        if 0 <= place < count and not beside:
            memory[place], cpus[place] = point.memory, point.cpus
    return RecentUsage(memory, cpus)
