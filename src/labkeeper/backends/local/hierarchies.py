"""The cgroup hierarchies of this machine (versions 1 and 2), and the keeper's place in them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal

import structlog

from labkeeper import shortage

_USED: Final = ("memory", "cpu", "pids", "freezer")
"""The version 1 controllers that the keeper uses."""


LEAF: Final = "labkeeper-keeper"
"""The keeper's own group: in version 2, a group that limits subgroups holds no process.

Also named in deploy/limits.conf.
"""


_log = structlog.get_logger("labkeeper.backends.local.hierarchies")


class LimitedBy(StrEnum):
    """The mechanism that enforces a limit."""

    CGROUP2 = "cgroup2"
    CGROUP1 = "cgroup1"
    RLIMIT = "rlimit"
    """Enforced for each process separately."""
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """The directory in which groups can be created for one controller."""

    version: LimitedBy
    base: Path


def version_1(*ours: str) -> dict[str, Hierarchy]:
    """Return the usable version 1 hierarchies, by controller."""
    found = {}
    mounts = {
        option: mount
        for mount, kind, options in all_mounts()
        if kind == "cgroup"
        for option in options.split(",")
    }
    for controllers, path in _memberships():
        for controller in controllers:
            if (
                controller in _USED
                and controller in mounts
                and os.access(base := _own(mounts[controller], path, *ours), os.W_OK)
            ):
                found[controller] = Hierarchy(LimitedBy.CGROUP1, base)
    return found


def version_2(*ours: str) -> dict[str, Hierarchy]:
    """Return the version 2 hierarchy for each usable controller."""
    base = _base_2(*ours)
    if base is None:
        return {}
    try:
        controllers = _divided(base)
    except OSError as error:
        # Other processes share the keeper's group, or it was not delegated.
        _log.info("control groups of version 2 cannot be used", group=str(base), error=str(error))
        return {}
    return {controller: Hierarchy(LimitedBy.CGROUP2, base) for controller in controllers}


def why_not_version_2() -> str:
    """Return why version 2 cannot be used, or ""."""
    base = _base_2()
    if base is None:
        return "control groups of version 2 are not mounted"
    try:
        controllers = _divided(base)
    except OSError as error:
        return f"control groups of version 2 cannot be used: {error}"
    return "" if controllers else f"the control group {base} has no controller"


def _divided(base: Path) -> list[str]:
    """Return the controllers of a group for its subgroups, enabling those that are not yet.

    Raises OSError.
    """
    there = (base / "cgroup.controllers").read_text().split()
    controllers: list[str] = [c for c in ("memory", "cpu", "pids") if c in there]
    enabled = _enabled(base)
    if missing := [controller for controller in controllers if controller not in enabled]:
        _divide(base, missing)
    return controllers


def _base_2(*ours: str) -> Path | None:
    """Return the version 2 group that the keeper runs in."""
    mount = next((mount for mount, kind, _ in all_mounts() if kind == "cgroup2"), None)
    path = next((path for controllers, path in _memberships() if controllers == [""]), None)
    return None if mount is None or path is None else _own(mount, path, *ours)


def base_of_all(older: Mapping[str, Hierarchy], *ours: str) -> Path | None:
    """Return the group below which every server can have one, or None.

    Prefers version 2, even without a controller, to version 1.
    """
    base = _base_2(*ours)
    if base is not None and os.access(base, os.W_OK):
        return base
    # Of these, the first can keep a group from growing.
    return next(
        (older[controller].base for controller in ("pids", "freezer") if controller in older), None
    )


def _divide(base: Path, controllers: Sequence[str]) -> None:
    """Enable controllers for subgroups, moving the keeper into a leaf group.

    If it raises OSError, the keeper is back in its old group.
    """
    leaf = base / LEAF
    leaf.mkdir(exist_ok=True)
    try:
        (leaf / "cgroup.procs").write_text(str(os.getpid()))
        (base / "cgroup.subtree_control").write_text(
            " ".join(f"+{controller}" for controller in controllers)
        )
    except OSError:
        with contextlib.suppress(OSError):
            (base / "cgroup.procs").write_text(str(os.getpid()))
            leaf.rmdir()
        raise


def _enabled(base: Path) -> list[str]:
    """Return the controllers that subgroups of a version 2 group have. Raises OSError."""
    return (base / "cgroup.subtree_control").read_text().split()


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Undo, after the block, what `version_2` did in it: for programs that only try."""
    base = _base_2()
    with contextlib.ExitStack() as after:
        if base is not None:
            with contextlib.suppress(OSError):
                after.callback(_reunite, base, _enabled(base))
        yield


def _reunite(base: Path, before: Sequence[str]) -> None:
    """Undo `_divide`, unless nothing was divided, or others use the subgroups by now."""
    with contextlib.suppress(OSError):
        added = [controller for controller in _enabled(base) if controller not in before]
        if added:
            (base / "cgroup.subtree_control").write_text(
                " ".join(f"-{controller}" for controller in added)
            )
            (base / "cgroup.procs").write_text(str(os.getpid()))
            (base / LEAF).rmdir()


def memory_groups(pid: int) -> Iterator[Path]:
    """Yield the groups that may be charged for the memory of a process, the closest first."""
    memberships = _memberships(pid)
    for mount, kind, options in all_mounts():
        controller = {"cgroup": "memory", "cgroup2": ""}.get(kind)
        if kind == "cgroup" and controller not in options.split(","):
            continue
        for path in (path for controllers, path in memberships if controller in controllers):
            group = _own(mount, path)
            yield from (part for part in (group, *group.parents) if part.is_relative_to(mount))


def _memberships(pid: int | Literal["self"] = "self") -> list[tuple[list[str], str]]:
    """Return a process's groups: controllers and path. Version 2 has one empty controller name.

    See cgroups(7).
    """
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines()
        return [
            (controllers.split(","), path)
            for _, controllers, path in (line.split(":", 2) for line in lines)
        ]
    return []


def all_mounts() -> list[tuple[Path, str, str]]:
    """Return the mounts: mount point, file system type, options. See proc(5) and fstab(5)."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
        return [
            (Path(mount), kind, options)
            for _, mount, kind, options, *_ in (line.split(" ") for line in lines)
        ]
    return []


def _own(mount: Path, path: str, *ours: str) -> Path:
    """Return the directory of the keeper's group; in a container that is the root of the mount.

    If the group is the leaf, or its name begins with one of `ours` (a keeper may be started in a
    terminal of one of its servers), return its parent.
    """
    base = mount / path.lstrip("/")
    if not base.is_dir():
        return mount
    return base.parent if base.name.startswith((LEAF, *ours)) else base


def move(pid: int, members: Path) -> None:
    """Move a process and the children it has started meanwhile into a group.

    Raises OSError (ProcessLookupError if it has ended).
    """
    members.write_text(str(pid))
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                move(int(child), members)


def is_own(group: Path) -> bool:
    """Whether the keeper's user created a group.

    A user with another part of the hierarchy delegated can create groups of any name there.
    """
    with contextlib.suppress(OSError):
        return group.stat().st_uid == os.geteuid()
    return False


def listed(group: Path) -> list[Path]:
    """Return the subgroups of a group. Raises OSError if no file descriptor is free."""
    with shortage.suppress_others(OSError):
        return [path for path in group.iterdir() if path.is_dir()]
    return []


def parts(group: Path) -> Iterator[Path]:
    """Yield a group and all its subgroups, children first."""
    for part in listed(group):
        yield from parts(part)
    yield group
