"""The hierarchies of control groups on this machine, of version 1 and 2, and where our groups are in them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import structlog

from labkeeper import shortage

_USED: Final = ("memory", "cpu", "pids", "freezer")
"""The controllers of version 1 that we have a use for."""


LEAF: Final = "labkeeper-keeper"
"""Where the keeper itself moves: under version 2 a group that limits its groups holds no process. In deploy/limits.conf, too."""


_log = structlog.get_logger("labkeeper.backends.local.hierarchies")


class LimitedBy(StrEnum):
    """What holds a limit."""

    CGROUP2 = "cgroup2"
    CGROUP1 = "cgroup1"
    RLIMIT = "rlimit"
    """For each process by itself."""
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where groups can be made for one controller."""

    version: LimitedBy
    base: Path


def version_1(*ours: str) -> dict[str, Hierarchy]:
    """Return the hierarchies of version 1 that we may use, by controller."""
    found = {}
    mounts = {option: mount for mount, kind, options in all_mounts() if kind == "cgroup" for option in options.split(",")}
    for controllers, path in _memberships():
        for controller in controllers:
            if controller in _USED and controller in mounts and os.access(base := _own(mounts[controller], path, *ours), os.W_OK):
                found[controller] = Hierarchy(LimitedBy.CGROUP1, base)
    return found


def version_2(*ours: str) -> dict[str, Hierarchy]:
    """Return the hierarchy of version 2 for each controller that we may use."""
    base = _base_2(*ours)
    if base is None:
        return {}
    try:
        controllers = [c for c in ("memory", "cpu", "pids") if c in (base / "cgroup.controllers").read_text().split()]
        enabled = (base / "cgroup.subtree_control").read_text().split()
        if missing := [controller for controller in controllers if controller not in enabled]:
            _divide(base, missing)
    except OSError as error:
        # Other processes share our group, or it was not given to us to divide.
        _log.info("control groups of version 2 cannot be used", group=str(base), error=str(error))
        return {}
    return {controller: Hierarchy(LimitedBy.CGROUP2, base) for controller in controllers}


def _base_2(*ours: str) -> Path | None:
    """Return the group of version 2 that we run in."""
    mount = next((mount for mount, kind, _ in all_mounts() if kind == "cgroup2"), None)
    path = next((path for controllers, path in _memberships() if controllers == [""]), None)
    return None if mount is None or path is None else _own(mount, path, *ours)


def base_of_all(older: Mapping[str, Hierarchy], *ours: str) -> Path | None:
    """Return the group below which every server can have one: of version 2, also without a controller, else of version 1."""
    base = _base_2(*ours)
    if base is not None and os.access(base, os.W_OK):
        return base
    # By the first of these a group can be kept from growing.
    return next((older[controller].base for controller in ("pids", "freezer") if controller in older), None)


def _divide(base: Path, controllers: Sequence[str]) -> None:
    """Let groups below ours be limited: we move out of it, into a leaf. Raises OSError, and then we are where we were."""
    leaf = base / LEAF
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


def all_mounts() -> list[tuple[Path, str, str]]:
    """Read what is mounted: place, type, options of the file system. See proc(5)."""
    mounts = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
            before, _, after = line.partition(" - ")
            kind, _, options = after.split(" ", 2)
            mounts.append((Path(before.split(" ")[4]), kind, options))
    return mounts


def _own(mount: Path, path: str, *ours: str) -> Path:
    """Return the directory of the group that we run in; a container sees its own group as the root of the mount.

    From our leaf, and from a group whose name begins with one of `ours` (a keeper may be started in the terminal of one of its
    servers), it is the one above.
    """
    base = mount / path.lstrip("/")
    if not base.is_dir():
        return mount
    return base.parent if base.name.startswith((LEAF, *ours)) else base


def move(pid: int, members: Path) -> None:
    """Move a process into a group, and what it has started meanwhile. Raises OSError (ProcessLookupError: it is gone)."""
    members.write_text(str(pid))
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                move(int(child), members)


def is_own(group: Path) -> bool:
    """Whether our user made a group: another one to whom some part of the hierarchy was given can make any of any name there."""
    with contextlib.suppress(OSError):
        return group.stat().st_uid == os.geteuid()
    return False


def listed(group: Path) -> list[Path]:
    """Return the groups that were made in a group. Raises OSError where no descriptor is free to look."""
    with shortage.suppress_others(OSError):
        return [path for path in group.iterdir() if path.is_dir()]
    return []


def parts(group: Path) -> Iterator[Path]:
    """Return a group and all below it, those below first."""
    for part in listed(group):
        yield from parts(part)
    yield group
