"""What a server may use of the machine: limited by control groups where the host lets us, else by what a process can be told.

Version 2 of control groups is used where it has the controller, version 1 where that has it. What neither has is limited with
`setrlimit`, where there is such a limit; it then holds for each process, not for all of a server together.

A server without limits has a group too, where the host lets us make one. What it starts is born into its group, and stays there
whatever it does to its environment and its parents, so all of it is found, and ended, by the group.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    move,
    parts,
    version_1,
    version_2,
)
from labkeeper.backends.local.processes import sees, spared
from labkeeper.core.spec import Limits, ServerName, server_name

_PERIOD: Final = 100_000
"""Microseconds over which processor time is counted; the kernel's own default."""


_GONE_WITHIN: Final = 1.0
"""Seconds in which the kernel lets go of a group whose processes have ended."""


_KILL: Final = "cgroup.kill"
"""The file by which Linux ends all of a group (version 2, since 5.14)."""


_STILL: Final = (("cgroup.freeze", "1"), ("pids.max", "0"))
"""Files, and what to write there, by which a group without that one can at least start nothing any more."""


_MEMORY_EVENTS: Final = ("memory.events", "memory.oom_control")
"""Where a group counts its processes that were killed for want of memory: under version 2, and version 1."""


_KILLED: Final = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
"""How they, and `/proc/vmstat`, tell the number."""


_log = structlog.get_logger("labkeeper.backends.local.limits")


@dataclass(frozen=True, slots=True)
class Enforced:
    """What limits one server, and what its process has to do for it."""

    by: Mapping[str, LimitedBy] = field(default_factory=dict)
    """By the name of the limit: `memory`, `cpus`, `processes`."""
    members: tuple[str, ...] = ()
    """Files that its process writes its pid into."""
    rlimits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MemoryKills:
    """Where Linux counts the processes that it has killed for want of memory."""

    file: Path
    certain: bool
    """Whether only those of one server are counted there, and not those of the whole machine."""

    def count(self) -> int:
        """Read how many there were; 0 where that cannot be told."""
        with contextlib.suppress(OSError):
            if (found := _KILLED.search(self.file.read_text())) is not None:
                return int(found[1])
        return 0


@dataclass(frozen=True, slots=True)
class Counted:
    """What the control groups of a server count; None where no group does."""

    members: frozenset[int]
    memory: int | None
    cpu_seconds: float | None
    tasks: int | None


class ControlGroups:
    """The control groups of the servers of one runtime directory."""

    def __init__(self, runtime_dir: Path) -> None:
        self._runtime_dir = runtime_dir
        self._prefix = f"labkeeper-{hashlib.sha256(os.fsencode(runtime_dir)).hexdigest()[:8]}-"
        # At once: a group of version 2 can be divided only as long as we are alone in it.
        older, newer = version_1(self._prefix), version_2(self._prefix)
        self._hierarchies = {**older, **newer}
        """By controller."""
        self._base = base_of_all(older, self._prefix)
        """Where servers without limits have their groups; None where we cannot make any."""
        self._earlier = self._left_elsewhere()
        """Groups that an earlier keeper made, which ran in another group than we do."""

    def limit(self, name: ServerName, limits: Limits, *, own_user: bool) -> Enforced:
        """Put the limits of a server in force, as far as the host lets us; `own_user`: whether it runs as another user."""
        by: dict[str, LimitedBy] = {}
        members: list[str] = []
        rlimits: dict[str, int] = {}
        for what, controller, settings in _wanted(limits):
            hierarchy = self._hierarchies.get(controller)
            if hierarchy is not None and (group := self._make(hierarchy, name, settings[hierarchy.version])) is not None:
                by[what] = hierarchy.version
                members.append(str(group / "cgroup.procs"))
            elif what == "memory" and limits.memory is not None:
                by[what] = LimitedBy.RLIMIT
                rlimits["RLIMIT_DATA"] = limits.memory
            elif what == "processes" and limits.processes is not None and own_user:
                # It counts all processes of a user, so it would count those of other servers too.
                by[what] = LimitedBy.RLIMIT
                rlimits["RLIMIT_NPROC"] = limits.processes
            else:
                by[what] = LimitedBy.NOTHING
        return Enforced(by, tuple(dict.fromkeys(members)), rlimits)

    def hold(self, name: ServerName, pid: int) -> None:
        """Put a process into the group of its server, unless it is in one; where that cannot be, nothing changes.

        From outside, beside its start: Linux takes some ten milliseconds for it.
        """
        if self._base is None:
            return
        group = self._base / f"{self._prefix}{name}"
        try:
            hierarchy = self._base.stat().st_dev
            if pid not in _pids(group for group in self._of(name) if group.stat().st_dev == hierarchy):
                group.mkdir(exist_ok=True)
                move(pid, group / "cgroup.procs")
        except ProcessLookupError:
            pass  # It has died already.
        except OSError as error:
            _log.debug("a server has no control group", server=name, group=str(group), error=str(error))

    def door(self, name: ServerName) -> list[str]:
        """Make the group of a process that enters it by itself; return the file for its pid, or none if no group can be made."""
        if self._base is None:
            return []
        group = self._base / f"{self._prefix}{name}"
        try:
            group.mkdir(exist_ok=True)
        except OSError as error:
            _log.debug("a process has no control group", group=str(group), error=str(error))
            return []
        return [str(group / "cgroup.procs")]

    def members(self, name: ServerName) -> set[int]:
        """Return the pids of all processes in the groups of a server, and in groups below them, but ourselves and our parents."""
        pids = _pids(self._of(name))
        # Most often there is none.
        return pids - spared() if pids else pids

    def hold_any(self, pid: int) -> bool:
        """Whether a process is in the group of any server, or below it. Raises OSError when it has ended."""
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
        return any(part.startswith(self._prefix) for line in lines for part in line.split("/"))

    def kill(self, name: ServerName) -> None:
        """End all processes in the groups of a server at once, with what they are just starting.

        Where Linux cannot do that, they start nothing more, as far as it can do that; each is then to be ended by itself.
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

    def memory_kills(self, name: ServerName) -> MemoryKills:
        """Return where the processes of a server are counted that Linux kills for want of memory, or where nothing tells, all."""
        for file in (group / events for group in self._of(name) for events in _MEMORY_EVENTS):
            with contextlib.suppress(OSError):
                if _KILLED.search(file.read_text()) is not None:
                    return MemoryKills(file, certain=True)
        return MemoryKills(Path("/proc/vmstat"), certain=False)

    def counted(self, name: ServerName) -> Counted:
        """Read what the groups of a server count."""
        groups = self._of(name)
        return Counted(
            members=frozenset(_pids(groups)),
            memory=_first(groups, {"memory.current": int, "memory.usage_in_bytes": int}),
            cpu_seconds=_first(groups, {"cpu.stat": _busy, "cpuacct.usage": lambda text: int(text) / 1e9}),
            tasks=_first(groups, {"pids.current": int}),
        )

    def names(self) -> set[ServerName]:
        """Return the names of all servers that have a group."""
        groups = (*self._earlier, *(group for base in self._bases for group in listed(base)))
        found = set()
        for group in groups:
            with contextlib.suppress(ValueError):
                if group.name.startswith(self._prefix) and self._holds_ours(group):
                    found.add(server_name(group.name.removeprefix(self._prefix)))
        return found

    def remove(self, name: ServerName) -> None:
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
        return {hierarchy.base for hierarchy in self._hierarchies.values()} | ({self._base} if self._base else set())

    def _of(self, name: ServerName) -> list[Path]:
        """Return the groups of a server that exist."""
        full = f"{self._prefix}{name}"
        groups = {*(base / full for base in self._bases), *(group for group in self._earlier if group.name == full)}
        return [group for group in groups if group.is_dir()]

    def _left_elsewhere(self) -> AbstractSet[Path]:
        """Find groups of ours anywhere on the machine: a keeper that was started from another shell ran in another group."""
        mounts = {mount for mount, kind, _ in all_mounts() if kind in {"cgroup", "cgroup2"}}
        used = {mount for mount in mounts if any(base.is_relative_to(mount) for base in self._bases)}
        found = {Path(place) for mount in used for place, _, _ in os.walk(mount) if Path(place).name.startswith(self._prefix)}
        found = {group for group in found if group.parent not in self._bases and is_own(group)}
        # Of an empty one nobody can tell whose it is.
        return {group for group in found if _pids([group]) and self._holds_ours(group)}

    def _holds_ours(self, group: Path) -> bool:
        """Whether it is no group of a keeper in a container, whose runtime directory has the same path as ours."""
        return all(sees(pid, self._runtime_dir) for pid in _pids([group]))

    def _make(self, hierarchy: Hierarchy, name: ServerName, settings: Mapping[str, str]) -> Path | None:
        group = hierarchy.base / f"{self._prefix}{name}"
        try:
            group.mkdir(exist_ok=True)
            for setting, value in settings.items():
                (group / setting).write_text(value)
        except OSError as error:
            _log.warning("cannot limit a server by a control group", server=name, group=str(group), error=str(error))
            return None
        return group


def _wanted(limits: Limits) -> Iterator[tuple[str, str, dict[LimitedBy, dict[str, str]]]]:
    """Return each limit that is set: its name, its controller, and the files to write under each version."""
    if limits.memory is not None:
        amount = str(limits.memory)
        yield (
            "memory",
            "memory",
            {LimitedBy.CGROUP2: {"memory.max": amount}, LimitedBy.CGROUP1: {"memory.limit_in_bytes": amount}},
        )
    if limits.cpus is not None:
        quota = str(int(limits.cpus * _PERIOD))
        older = {"cpu.cfs_period_us": str(_PERIOD), "cpu.cfs_quota_us": quota}
        yield "cpus", "cpu", {LimitedBy.CGROUP2: {"cpu.max": f"{quota} {_PERIOD}"}, LimitedBy.CGROUP1: older}
    if limits.processes is not None:
        files = {"pids.max": str(limits.processes)}
        yield "processes", "pids", {LimitedBy.CGROUP2: files, LimitedBy.CGROUP1: files}


def _pids(groups: Iterable[Path]) -> set[int]:
    """Return the pids of all processes in groups, and below them. Raises OSError where no descriptor is free to look."""
    found: set[int] = set()
    for part in (part for group in groups for part in parts(group)):
        with shortage.suppress_others(OSError):
            found.update(map(int, (part / "cgroup.procs").read_text().split()))
    return found


_N = TypeVar("_N", int, float)


def _first(groups: Iterable[Path], files: Mapping[str, Callable[[str], _N]]) -> _N | None:
    """Read the first of these files that tells what it should."""
    for file, read in ((group / name, read) for group in groups for name, read in files.items()):
        with contextlib.suppress(OSError, KeyError, ValueError):
            return read(file.read_text())
    return None


def _busy(stat: str) -> float:
    """Read the seconds of processors out of `cpu.stat`; that of version 1 does not have them. Raises KeyError."""
    return int(dict(line.split(maxsplit=1) for line in stat.splitlines())["usage_usec"]) / 1e6
