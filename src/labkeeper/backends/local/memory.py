"""Memory of this machine, and of the container that the keeper may run in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import psutil

from labkeeper.core.ports import Capacity

GROUPS: Final = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory"))
"""The container's own group as seen from inside: version 2, and version 1."""
_FILES: Final = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""Limit and usage of a group."""
_CACHE: Final = frozenset({"inactive_file", "total_inactive_file"})
"""Reclaimable part of the usage: cached files that are not in use."""


def free_memory(groups: Sequence[Path] = GROUPS) -> Capacity | None:
    """Return the lesser of the machine's and the container's memory; None if it cannot be read."""
    try:
        machine = psutil.virtual_memory()
    except (psutil.Error, OSError):
        return None
    everything = Capacity(machine.total, machine.available)
    return min([everything, *_limited(groups, machine.total)], key=lambda memory: memory.available)


def _limited(groups: Sequence[Path], total: int) -> Iterator[Capacity]:
    for group in groups:
        for most, used in _FILES:
            # Without a limit, version 2 has "max", version 1 a number that no machine has.
            with contextlib.suppress(OSError, ValueError):
                limit = int((group / most).read_text())
                if limit < total:
                    taken = int((group / used).read_text()) - _cached(group)
                    yield Capacity(limit, max(0, limit - taken))


def _cached(group: Path) -> int:
    """Return the bytes of a group's files that are not in use. Raises OSError, ValueError."""
    lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    return max((int(amount) for name, amount in lines if name in _CACHE), default=0)
