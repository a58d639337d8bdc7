"""What a server may use of the machine: limited by control groups where the host lets us, else by what a process can be told.

Version 2 of control groups is used where it has the controller, version 1 where that has it. What neither has is limited with
`setrlimit`, where there is such a limit; it then holds for each process, not for all of a server together.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

import structlog

from labkeeper.core.model import Limits, ServerName

_PERIOD: Final = 100_000
"""Microseconds over which processor time is counted; the kernel's own default."""
_LEAF: Final = "labkeeper-keeper"
"""Where the keeper itself moves: under version 2 a group that limits its groups holds no process."""
_GONE_WITHIN: Final = 1.0
"""Seconds in which the kernel lets go of a group whose processes have ended."""

_log = structlog.get_logger("labkeeper.backends.limits")


class LimitedBy(StrEnum):
    """What holds a limit."""

    CGROUP2 = "cgroup2"
    CGROUP1 = "cgroup1"
    RLIMIT = "rlimit"
    """For each process by itself."""
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Enforced:
    """What limits one server, and what its process has to do for it."""

    by: Mapping[str, LimitedBy] = field(default_factory=dict)
    """By the name of the limit: `memory`, `cpus`, `processes`."""
    members: tuple[str, ...] = ()
    """Files that its process writes its pid into."""
    rlimits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Hierarchy:
    """Where groups can be made for one controller."""

    version: LimitedBy
    base: Path


class ControlGroups:
    """The control groups of the servers of one runtime directory."""

    def __init__(self, runtime_dir: Path) -> None:
        self._prefix = f"labkeeper-{hashlib.sha256(os.fsencode(runtime_dir)).hexdigest()[:8]}-"
        # At once: a group of version 2 can be divided only as long as we are alone in it.
        self._hierarchies = {**_version_1(), **_version_2()}
        """By controller."""

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

    def remove(self, name: ServerName) -> None:
        """Remove the groups of a server whose processes have ended. Idempotent."""
        for base in {hierarchy.base for hierarchy in self._hierarchies.values()}:
            group = base / f"{self._prefix}{name}"
            until = time.monotonic() + _GONE_WITHIN
            while group.exists():
                with contextlib.suppress(OSError):
                    group.rmdir()
                    break
                if time.monotonic() > until:
                    _log.warning("cannot remove a control group", group=str(group))
                    break
                time.sleep(0.01)

    def _make(self, hierarchy: _Hierarchy, name: ServerName, settings: Mapping[str, str]) -> Path | None:
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
    """Give each limit that is set: its name, its controller, and the files to write under each version."""
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


def _version_1() -> dict[str, _Hierarchy]:
    found = {}
    mounts = {option: mount for mount, kind, options in _mounts() if kind == "cgroup" for option in options.split(",")}
    for controllers, path in _memberships():
        for controller in controllers:
            if controller in mounts and os.access(base := _within(mounts[controller], path), os.W_OK):
                found[controller] = _Hierarchy(LimitedBy.CGROUP1, base)
    return found


def _version_2() -> dict[str, _Hierarchy]:
    mount = next((mount for mount, kind, _ in _mounts() if kind == "cgroup2"), None)
    path = next((path for controllers, path in _memberships() if controllers == [""]), None)
    if mount is None or path is None:
        return {}
    base = _within(mount, path)
    if base.name == _LEAF:
        base = base.parent
    try:
        controllers = [c for c in ("memory", "cpu", "pids") if c in (base / "cgroup.controllers").read_text().split()]
        enabled = (base / "cgroup.subtree_control").read_text().split()
        if missing := [controller for controller in controllers if controller not in enabled]:
            _divide(base, missing)
    except OSError as error:
        # Other processes share our group, or it was not given to us to divide.
        _log.info("control groups of version 2 cannot be used", group=str(base), error=str(error))
        return {}
    return {controller: _Hierarchy(LimitedBy.CGROUP2, base) for controller in controllers}


def _divide(base: Path, controllers: Sequence[str]) -> None:
    """Let groups below ours be limited: we move out of it, into a leaf. Raises OSError, and then we are where we were."""
    leaf = base / _LEAF
    leaf.mkdir(exist_ok=True)
    try:
        (leaf / "cgroup.procs").write_text(str(os.getpid()))
        (base / "cgroup.subtree_control").write_text(" ".join(f"+{controller}" for controller in controllers))
    except OSError:
        with contextlib.suppress(OSError):
            (base / "cgroup.procs").write_text(str(os.getpid()))
            leaf.rmdir()
        raise


def _memberships() -> list[tuple[list[str], str]]:
    """Read the groups that we are in: controllers (one empty name for version 2) and path. See cgroups(7)."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        return [(controllers.split(","), path) for _, controllers, path in (line.split(":", 2) for line in lines)]
    return []


def _mounts() -> list[tuple[Path, str, str]]:
    """Read what is mounted: place, type, options of the file system. See proc(5)."""
    mounts = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
            before, _, after = line.partition(" - ")
            kind, _, options = after.split(" ", 2)
            mounts.append((Path(before.split(" ")[4]), kind, options))
    return mounts


def _within(mount: Path, path: str) -> Path:
    """Give the directory of a group; a container sees its own group as the root of the mount."""
    base = mount / path.lstrip("/")
    return base if base.is_dir() else mount
