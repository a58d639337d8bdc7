"""Resource usage of servers: read from their control groups, or summed over their processes.

All servers are measured together. The machine's processes are scanned only if a server has no
control group, and then once for all servers.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from labkeeper.backends.local.limits import ControlGroups, Counted
from labkeeper.backends.local.processes import Process, carries, is_of
from labkeeper.backends.local.server_dir import ServerDir
from labkeeper.core.server import Usage
from labkeeper.core.spec import QualifiedName
from labkeeper.forkserver import marks

_PROPORTIONAL_EVERY: Final = 60.0
"""Seconds between two readings of a server's shared memory, since Linux walks all page tables."""
_PROPORTIONAL_WITHIN: Final = 0.05
"""Seconds that these readings may take in one measurement; the rest wait for the next."""


@dataclass(slots=True)
class _Known:
    """State of one launch between two measurements."""

    process: Process
    summed: float = 0.0
    """The last sum over processes."""
    lost: float = 0.0
    """Seconds used by processes that none of its processes has reaped."""
    proportional: int | None = None
    looked: float = float("-inf")


class Meter:
    """Measures servers. Not thread-safe."""

    def __init__(self, groups: ControlGroups, runtime_dir: Path) -> None:
        self._groups = groups
        self._runtime_dir = runtime_dir
        self._server_dirs = os.fsencode(runtime_dir) + b"/"
        self._known: dict[QualifiedName, _Known] = {}
        self._marks: dict[tuple[int, str], bytes] = {}
        """Marks of the processes seen; a young one may not have its mark yet."""
        self._tick: int = os.sysconf("SC_CLK_TCK")
        self._page: int = os.sysconf("SC_PAGE_SIZE")

    def measure(self, servers: Mapping[QualifiedName, Process]) -> dict[QualifiedName, Usage]:
        """Return the usage of each server's processes; servers that have ended are left out."""
        self._known = {
            name: known
            if (known := self._known.get(name)) is not None and known.process == process
            else _Known(process)
            for name, process in servers.items()
        }
        counted = {name: self._groups.counted(name) for name in servers}
        grouped = {
            name: found.members
            for name, found in counted.items()
            if servers[name].pid in found.members
        }
        free = [name for name in servers if name not in grouped]
        stats = _stats(
            psutil.pids() if free else {pid for members in grouped.values() for pid in members}
        )
        members = grouped
        if free:
            members = grouped | self._found({name: servers[name] for name in free}, stats)
        alive = {
            name: {pid: stats[pid] for pid in pids if pid in stats}
            for name, pids in members.items()
        }
        alive = {name: found for name, found in alive.items() if found}
        self._look_at_shared(alive)
        return {
            name: self._usage(name, found, counted[name] if name in grouped else _UNCOUNTED)
            for name, found in alive.items()
        }

    def _usage(
        self, name: QualifiedName, stats: Mapping[int, marks.Stat], counted: Counted
    ) -> Usage:
        resident = sum(stat.pages for stat in stats.values()) * self._page
        summed = self._summed(name, sum(stat.ticks for stat in stats.values()) / self._tick)
        threads = sum(stat.threads for stat in stats.values())
        return Usage(
            memory=resident if counted.memory is None else counted.memory,
            cpu_seconds=summed if counted.cpu_seconds is None else counted.cpu_seconds,
            processes=len(stats),
            threads=threads if counted.tasks is None else counted.tasks,
            proportional=self._known[name].proportional,
        )

    def _summed(self, name: QualifiedName, ticks: float) -> float:
        known = self._known[name]
        known.lost += max(0.0, known.summed - ticks)
        known.summed = ticks
        return ticks + known.lost

    def _found(
        self, servers: Mapping[QualifiedName, Process], stats: Mapping[int, marks.Stat]
    ) -> dict[QualifiedName, frozenset[int]]:
        """Return all processes that descend from servers or carry their mark."""
        owners = {process.pid: name for name, process in servers.items() if _is(process, stats)}
        server_dirs = {os.fsencode(self._runtime_dir / name): name for name in servers}
        marks = {pid: self._mark(pid, stat) for pid, stat in stats.items() if pid not in owners}
        owners |= {pid: server_dirs[mark] for pid, mark in marks.items() if mark in server_dirs}
        found: dict[QualifiedName, set[int]] = {name: set() for name in servers}
        for pid in stats:
            for ancestor in _line(pid, stats):
                if ancestor in owners:
                    found[owners[ancestor]].add(pid)
                    break
        self._marks = {
            key: mark
            for key, mark in self._marks.items()
            if key[0] in stats and stats[key[0]].started == key[1]
        }
        return {name: frozenset(pids) for name, pids in found.items()}

    def _mark(self, pid: int, stat: marks.Stat) -> bytes:
        """Return a process's mark, or b"" for none. Read twice: it may be missing at first."""
        key = (pid, stat.started)
        if key not in self._marks or not self._marks[key]:
            again = key in self._marks
            mark = carries(pid, marks.MARK)
            if mark.isspace():
                # Space reserved by a process that was forked ahead, until it has its server.
                return b""
            if mark.startswith(self._server_dirs) and not _may_carry(pid, mark):
                mark = _NONE
            self._marks[key] = mark or (_NONE if again else b"")
        return self._marks[key]

    def _look_at_shared(self, alive: Mapping[QualifiedName, Mapping[int, marks.Stat]]) -> None:
        """Update shared memory, oldest reading first, until the time is used up."""
        begun = time.monotonic()
        for name in sorted(alive, key=lambda name: self._known[name].looked):
            known, now = self._known[name], time.monotonic()
            if now - known.looked < _PROPORTIONAL_EVERY or now - begun > _PROPORTIONAL_WITHIN:
                return
            known.looked = now
            known.proportional = _proportional(alive[name])


_UNCOUNTED: Final = Counted(frozenset(), None, None, None)
_LONGEST_LINE: Final = 100
"""Maximum number of ancestors followed; separate reads could even form a ring."""
_NONE: Final = b"-"
"""Stands for the mark of a process that has none and is not read again."""


def _may_carry(pid: int, mark: bytes) -> bool:
    """Whether a process's user may have that directory's mark; another user must have forged it."""
    with contextlib.suppress(psutil.Error):
        return is_of(pid, ServerDir(Path(os.fsdecode(mark))).users)
    return False


def _is(process: Process, stats: Mapping[int, marks.Stat]) -> bool:
    return process.pid in stats and stats[process.pid].started == process.started


def _line(pid: int, stats: Mapping[int, marks.Stat]) -> Iterator[int]:
    """Yield a process, its parent, and so on."""
    for _ in range(_LONGEST_LINE):
        if pid not in stats:
            return
        yield pid
        pid = stats[pid].parent


def _stats(pids: Iterable[int]) -> dict[int, marks.Stat]:
    """Return what Linux shows of processes, except of ended ones and zombies."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            stat = marks.stat(pid)
            if stat.state != "Z":
                found[pid] = stat
    return found


def _proportional(pids: Iterable[int]) -> int | None:
    """Return the summed memory with shared pages divided, or None if a process cannot be read."""
    total = 0
    for pid in pids:
        try:
            total += psutil.Process(pid).memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
        except (psutil.Error, OSError):
            return None
    return total
