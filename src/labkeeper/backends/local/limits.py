"""Resource limits of servers: enforced by control groups where possible, otherwise by rlimits.

Version 2 of control groups is used for controllers that it has, version 1 for the others. Limits
that neither has are set with `setrlimit` if it supports them, and then hold for each process, not
for a whole server.

A server without limits has a group too where the host allows one. All its processes are born into
the group and stay there, whatever they do to their environment and parents, so the group finds and
ends them all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import structlog

from labkeeper import shortage
from labkeeper.backends.local.hierarchies import (
    Hierarchy,
    LimitedBy,
    all_mounts,
    base_of_all,
    is_own,
    listed,
    memory_groups,
    move,
    parts,
    version_1,
    version_2,
)
from labkeeper.backends.local.processes import sees, spared
from labkeeper.core.spec import Limits, QualifiedName, parse_qualified_name, qualified_name

_PERIOD: Final = 100_000
"""Period of CPU quotas in microseconds; the kernel's default."""


_GONE_WITHIN: Final = 1.0
"""Seconds in which the kernel releases a group whose processes have ended."""


_KILL: Final = "cgroup.kill"
"""The file that kills all processes of a group (version 2, Linux 5.14 or later)."""


_STILL: Final = (("cgroup.freeze", "1"), ("pids.max", "0"))
"""Files and values that keep a group without that file from starting more processes."""


_MEMORY_EVENTS: Final = ("memory.events", "memory.oom_control")
"""Files with a group's count of OOM kills: version 2, and version 1."""


_OWN_MEMORY_EVENTS: Final = ("memory.events.local", "memory.oom_control")
"""The same without its subgroups."""


_KILLED: Final = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
"""The count's form there and in `/proc/vmstat`."""


_log = structlog.get_logger("labkeeper.backends.local.limits")


@dataclass(frozen=True, slots=True)
class Enforced:
    """How one server is limited, and what its process has to do for it."""

    by: Mapping[str, LimitedBy] = field(default_factory=dict)
    """By name of the limit: `memory`, `cpus`, `processes`."""
    members: tuple[str, ...] = ()
    """Files that the process writes its pid to."""
    rlimits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MemoryKills:
    """The file in which Linux counts OOM kills."""

    file: Path
    certain: bool
    """Whether it counts those of one server only, not those of other processes as well."""

    def count(self) -> int:
        """Return the count, or 0 if it cannot be read."""
        return _oom_kills(self.file) or 0


def _oom_kills(file: Path) -> int | None:
    with contextlib.suppress(OSError):
        if (found := _KILLED.search(file.read_text())) is not None:
            return int(found[1])
    return None


@dataclass(frozen=True, slots=True)
class Counted:
    """What a server's control groups count; None for what no group counts."""

    members: frozenset[int]
    memory: int | None
    cpu_seconds: float | None
    tasks: int | None


class ControlGroups:
    """The control groups of the servers of one runtime directory."""

    def __init__(self, runtime_dir: Path) -> None:
        self._runtime_dir = runtime_dir
        self._prefix = f"labkeeper-{hashlib.sha256(os.fsencode(runtime_dir)).hexdigest()[:8]}-"
        # Immediately: a version 2 group can be divided only while the keeper is alone in it.
        older, newer = version_1(self._prefix), version_2(self._prefix)
        self._hierarchies = {**older, **newer}
        """By controller."""
        self._base = base_of_all(older, self._prefix)
        """Parent of the groups of servers without limits; None if the keeper cannot create any."""
        self._earlier = self._left_elsewhere()
        """Groups created by an earlier keeper that ran in another group."""

    def limit(self, name: QualifiedName, limits: Limits, *, own_user: bool) -> Enforced:
        """Enforce a server's limits as far as the host allows.

        `own_user` tells whether the server runs as another user than the keeper.
        """
        by: dict[str, LimitedBy] = {}
        members: list[str] = []
        rlimits: dict[str, int] = {}
        for what, controller, settings in _wanted(limits):
            hierarchy = self._hierarchies.get(controller)
            if (
                hierarchy is not None
                and (group := self._make(hierarchy, name, settings[hierarchy.version])) is not None
            ):
                by[what] = hierarchy.version
                members.append(str(group / "cgroup.procs"))
            elif what == "memory" and limits.memory is not None:
                by[what] = LimitedBy.RLIMIT
                rlimits["RLIMIT_DATA"] = limits.memory
            elif what == "processes" and limits.processes is not None and own_user:
                # It counts all processes of a user, including those of other servers.
                by[what] = LimitedBy.RLIMIT
                rlimits["RLIMIT_NPROC"] = limits.processes
            else:
                by[what] = LimitedBy.NOTHING
        return Enforced(by, tuple(dict.fromkeys(members)), rlimits)

    def hold(self, name: QualifiedName, pid: int) -> None:
        """Move a process into its server's group unless it is in one; without a group, do nothing.

        Done from outside, in parallel with its start, as Linux takes some ten milliseconds.
        """
        if self._base is None:
            return
        group = self._base / f"{self._prefix}{name}"
        try:
            hierarchy = self._base.stat().st_dev
            if pid not in _pids(
                group for group in self._of(name) if group.stat().st_dev == hierarchy
            ):
                group.mkdir(exist_ok=True)
                move(pid, group / "cgroup.procs")
        except ProcessLookupError:
            pass  # It has died already.
        except OSError as error:
            _log.debug(
                "a server has no control group", server=name, group=str(group), error=str(error)
            )

    def create(self, name: QualifiedName) -> list[str]:
        """Create the group of a process that enters it by itself.

        Return the file for its pid, or an empty list if no group can be created.
        """
        if self._base is None:
            return []
        group = self._base / f"{self._prefix}{name}"
        try:
            group.mkdir(exist_ok=True)
        except OSError as error:
            _log.debug("a process has no control group", group=str(group), error=str(error))
            return []
        return [str(group / "cgroup.procs")]

    def create_beside(self, name: QualifiedName, members: Sequence[str]) -> list[str]:
        """Create a server's group unless it is in one already, by these files of its limits.

        Return the file for the pid of a process that enters it by itself, or an empty list.
        """
        base = self._base
        if base is None or any(Path(file).stat().st_dev == base.stat().st_dev for file in members):
            return []
        return self.create(name)

    def members(self, name: QualifiedName) -> set[int]:
        """Return the pids in a server's groups and their subgroups.

        The keeper and its ancestors are left out.
        """
        pids = _pids(self._of(name))
        # Usually there are none.
        return pids - spared() if pids else pids

    def hold_any(self, pid: int) -> bool:
        """Whether a process is in or below any server's group. Raises OSError if it has ended."""
        groups = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="replace")
        return f"/{self._prefix}" in groups

    def kill(self, name: QualifiedName) -> None:
        """Kill all processes in a server's groups at once, including those that are just starting.

        Where Linux cannot do that, keep them from starting more if it can; the caller then has to
        end each process.
        """
        for group in self._of(name):
            if not _pids([group]).isdisjoint(spared()):
                continue
            if (group / _KILL).exists():
                with contextlib.suppress(OSError):
                    (group / _KILL).write_text("1")
                continue
            for part in parts(group):
                for setting, value in _STILL:
                    if (part / setting).exists():
                        with contextlib.suppress(OSError):
                            (part / setting).write_text(value)

    def memory_kills(self, name: QualifiedName, pid: int) -> MemoryKills:
        """Return the most specific OOM kill counter of a running server.

        It is that of its own group, of the group that it shares with others, or of the machine.
        A kill in another group, such as a neighbour's at its limit, counts only in the last.
        """
        own = (group / events for group in self._of(name) for events in _MEMORY_EVENTS)
        shared = (group / events for group in memory_groups(pid) for events in _OWN_MEMORY_EVENTS)
        for files, certain in ((own, True), (shared, False)):
            for file in files:
                if _oom_kills(file) is not None:
                    return MemoryKills(file, certain)
        return MemoryKills(Path("/proc/vmstat"), certain=False)

    def counted(self, name: QualifiedName) -> Counted:
        """Return the counters of a server's groups."""
        groups = self._of(name)
        return Counted(
            members=frozenset(_pids(groups)),
            memory=_first(groups, {"memory.current": int, "memory.usage_in_bytes": int}),
            cpu_seconds=_first(
                groups, {"cpu.stat": _busy, "cpuacct.usage": lambda text: int(text) / 1e9}
            ),
            tasks=_first(groups, {"pids.current": int}),
        )

    def names(self) -> set[QualifiedName]:
        """Return the names of all servers that have a group."""
        groups = (*self._earlier, *(group for base in self._bases for group in listed(base)))
        found = set()
        for group in groups:
            with contextlib.suppress(ValueError):
                if group.name.startswith(self._prefix) and self._holds_ours(group):
                    name = parse_qualified_name(group.name.removeprefix(self._prefix))
                    found.add(qualified_name(*name))
        return found

    def remove(self, name: QualifiedName) -> None:
        """Remove the groups of a server whose processes have ended. Idempotent."""
        for group in self._of(name):
            until = time.monotonic() + _GONE_WITHIN
            while group.exists():
                with contextlib.suppress(OSError):
                    for part in parts(group):
                        part.rmdir()
                    break
                if time.monotonic() > until:
                    _log.warning("cannot remove a control group", server=name, group=str(group))
                    break
                time.sleep(0.01)

    @property
    def _bases(self) -> set[Path]:
        return {hierarchy.base for hierarchy in self._hierarchies.values()} | (
            {self._base} if self._base else set()
        )

    def _of(self, name: QualifiedName) -> list[Path]:
        """Return the existing groups of a server."""
        full = f"{self._prefix}{name}"
        groups = {
            *(base / full for base in self._bases),
            *(group for group in self._earlier if group.name == full),
        }
        return [group for group in groups if group.is_dir()]

    def _left_elsewhere(self) -> AbstractSet[Path]:
        """Return the keeper's groups elsewhere on the machine.

        A keeper that was started from another shell ran in another group.
        """
        mounts = {mount for mount, kind, _ in all_mounts() if kind in {"cgroup", "cgroup2"}}
        used = {
            mount for mount in mounts if any(base.is_relative_to(mount) for base in self._bases)
        }
        found = {
            Path(place)
            for mount in used
            for place, _, _ in os.walk(mount)
            if Path(place).name.startswith(self._prefix)
        }
        found = {group for group in found if group.parent not in self._bases and is_own(group)}
        # The owner of an empty group cannot be determined.
        return {group for group in found if _pids([group]) and self._holds_ours(group)}

    def _holds_ours(self, group: Path) -> bool:
        """Whether it belongs to this keeper.

        A keeper in a container may have a runtime directory at the same path.
        """
        return all(sees(pid, self._runtime_dir) for pid in _pids([group]))

    def _make(
        self, hierarchy: Hierarchy, name: QualifiedName, settings: Mapping[str, str]
    ) -> Path | None:
        group = hierarchy.base / f"{self._prefix}{name}"
        try:
            group.mkdir(exist_ok=True)
            for setting, value in settings.items():
                (group / setting).write_text(value)
        except OSError as error:
            _log.warning(
                "cannot limit a server by a control group",
                server=name,
                group=str(group),
                error=str(error),
            )
            return None
        return group


def _wanted(limits: Limits) -> Iterator[tuple[str, str, dict[LimitedBy, dict[str, str]]]]:
    """Yield each limit that is set: name, controller, and the files to write under each version."""
    if limits.memory is not None:
        amount = str(limits.memory)
        newer, older = {"memory.max": amount}, {"memory.limit_in_bytes": amount}
        yield "memory", "memory", {LimitedBy.CGROUP2: newer, LimitedBy.CGROUP1: older}
    if limits.cpus is not None:
        quota = str(int(limits.cpus * _PERIOD))
        newer = {"cpu.max": f"{quota} {_PERIOD}"}
        older = {"cpu.cfs_period_us": str(_PERIOD), "cpu.cfs_quota_us": quota}
        yield "cpus", "cpu", {LimitedBy.CGROUP2: newer, LimitedBy.CGROUP1: older}
    if limits.processes is not None:
        files = {"pids.max": str(limits.processes)}
        yield "processes", "pids", {LimitedBy.CGROUP2: files, LimitedBy.CGROUP1: files}


def _pids(groups: Iterable[Path]) -> set[int]:
    """Return the pids in groups and their subgroups.

    Raises OSError if no file descriptor is free.
    """
    found: set[int] = set()
    for part in (part for group in groups for part in parts(group)):
        with shortage.suppress_others(OSError):
            found.update(map(int, (part / "cgroup.procs").read_text().split()))
    return found


_N = TypeVar("_N", int, float)


def _first(groups: Iterable[Path], files: Mapping[str, Callable[[str], _N]]) -> _N | None:
    """Return the first value that can be read from these files, or None."""
    for file, read in ((group / name, read) for group in groups for name, read in files.items()):
        with contextlib.suppress(OSError, KeyError, ValueError):
            return read(file.read_text())
    return None


def _busy(stat: str) -> float:
    """Return the CPU seconds in `cpu.stat`; version 1 raises KeyError."""
    return int(dict(line.split(maxsplit=1) for line in stat.splitlines())["usage_usec"]) / 1e6
