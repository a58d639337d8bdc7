"""Whether a process stems from a server: such a one runs what its users want, under our own user as often as not.

What a server starts can clear its environment, leave its parents, and found a session of its own. It cannot leave its control
group (unless it is root), nor the line below its fork server, which inherits all that is left behind; and no process can join a
session that was there before it. Where none of this proves that a process is not of a server, it is taken for one.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final

from labkeeper.backends.local.forkserver import PLACE
from labkeeper.backends.local.limits import ControlGroups
from labkeeper.backends.local.processes import Process, carries, spared
from labkeeper.forkserver.marks import MARK, stat

_INIT: Final = 1
"""The process that others are left to."""
_LONGEST_LINE: Final = 1000
"""Ancestors that are gone through; what is read one after the other may even form a ring."""


class Ancestry:
    """Knows the servers of some runtime directories: ours, and those of earlier keepers."""

    def __init__(self, groups: Mapping[Path, ControlGroups]) -> None:
        """Take the control groups of each runtime directory."""
        self._server_dirs = tuple(os.fsencode(runtime_dir) + b"/" for runtime_dir in groups)
        self._forkservers = [runtime_dir / PLACE for runtime_dir in groups]
        self._groups = tuple(groups.values())
        self._first_loose: int | None = None
        """When the first server started that neither a fork server nor a group holds together."""

    def note_executed(self, process: Process) -> None:
        """Know a server that was executed."""
        with contextlib.suppress(OSError):  # When it has ended, it is not known where what it left is.
            if self._in_group(process.pid):
                return
        if sys.platform == "linux":
            started = int(process.started)
            self._first_loose = min(started, self._first_loose or started)

    def is_of_server(self, pid: int, servers: Collection[int]) -> bool:
        """Whether a process is one of these servers, or may stem from any server, also one that has ended.

        One that has ended itself, or hides what it is, is taken for one, too.
        """
        ours = spared()
        try:
            below = pid
            for one in _line(pid):
                if one == os.getpid():
                    # We start nothing but servers.
                    return one != pid
                if one in ours or one == _INIT:
                    return self._may_be_adopted(below, one)
                if one in servers or self._is_known(one):
                    return True
                below = one
            # Its parent is in a namespace around ours, as with `docker exec`: what a server leaves behind comes to process 1.
            return False
        except (OSError, IndexError, ValueError):
            return True

    def _is_known(self, pid: int) -> bool:
        if self._in_group(pid) or carries(pid, MARK).startswith(self._server_dirs):
            return True
        with contextlib.suppress(PermissionError):  # Fork servers are of our own user, and let us look.
            place = Path(f"/proc/{pid}/cwd").readlink()
            return any(place.is_relative_to(directory) for directory in self._forkservers)
        return False

    def _in_group(self, pid: int) -> bool:
        return any(groups.hold_any(pid) for groups in self._groups)

    def _may_be_adopted(self, pid: int, parent: int) -> bool:
        """Whether this process may have come to its parent because a server had left it behind."""
        if self._first_loose is None:
            return False
        if stat(pid)[3] == stat(parent)[3]:
            # Servers found sessions of their own.
            return False
        return int(stat(pid)[19]) >= self._first_loose


def _line(pid: int) -> Iterator[int]:
    """Return a process, its parent, and so on. Raises OSError when one of them has ended meanwhile."""
    for _ in range(_LONGEST_LINE):
        if pid <= 0:
            return
        yield pid
        pid = int(stat(pid)[1])
    raise ValueError("no end")
