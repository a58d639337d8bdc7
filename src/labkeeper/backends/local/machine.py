"""The memory of this machine, and of the container that the keeper may run in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import psutil

from labkeeper.core.ports import HostMemory

GROUPS: Final = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory"))
"""The group of a container, as it is seen inside: of version 2, and of version 1."""
_FILES: Final = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""What a group may use, and what it uses."""
_CACHE: Final = frozenset({"inactive_file", "total_inactive_file"})
"""What of that Linux takes back before anybody has to end: files that were read and are not used."""


class OwnMachine:
    """See `core.ports.Machine`. A few short files are read each time."""

    def __init__(self, groups: Sequence[Path] = GROUPS) -> None:
        self._groups = groups

    def memory(self) -> HostMemory | None:
        """Give the lesser of what the machine has and what our container may have."""
        try:
            machine = psutil.virtual_memory()
        except (psutil.Error, OSError):
            return None
        everything = HostMemory(machine.total, machine.available)
        return min([everything, *self._limited(machine.total)], key=lambda memory: memory.available)

    def _limited(self, total: int) -> Iterator[HostMemory]:
        for group in self._groups:
            for most, used in _FILES:
                # Without a limit one says "max", the other a number that no machine has.
                with contextlib.suppress(OSError, ValueError):
                    limit = int((group / most).read_text())
                    if limit < total:
                        taken = int((group / used).read_text()) - _cached(group)
                        yield HostMemory(limit, max(0, limit - taken))


def _cached(group: Path) -> int:
    """Give the bytes of a group's files that are not in use. Raises OSError, ValueError."""
    lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    return max((int(amount) for name, amount in lines if name in _CACHE), default=0)
