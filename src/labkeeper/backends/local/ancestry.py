"""Ancestry of processes: whether a process descends from a server.

Such a process runs code of the server's users, often under the keeper's own user. It can clear its
environment, leave its parents and start a session of its own. It cannot leave its control group
(unless it is root), nor its fork server's descendants, since a fork server inherits its orphans;
and no process can join a session that is older than itself. A process counts as a server's unless
one of these rules proves otherwise.
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
"""The process that inherits orphans."""
_LONGEST_LINE: Final = 1000
"""Maximum number of ancestors followed; separate reads could even form a ring."""


class Ancestry:
    """Processes of servers in the runtime directories of this keeper and of earlier ones."""

    def __init__(self, groups: Mapping[Path, ControlGroups]) -> None:
        """Take the control groups of each runtime directory."""
        self._server_dirs = tuple(os.fsencode(runtime_dir) + b"/" for runtime_dir in groups)
        self._forkservers = [runtime_dir / PLACE for runtime_dir in groups]
        self._groups = tuple(groups.values())
        self._first_loose: int | None = None
        """Start of the first server that has neither a fork server nor a control group."""

    def note_executed(self, process: Process) -> None:
        """Register a server that was executed."""
        with contextlib.suppress(OSError):  # If it has ended, its orphans are unknown.
            if self._in_group(process.pid):
                return
        if sys.platform == "linux":
            started = int(process.started)
            self._first_loose = min(started, self._first_loose or started)

    def is_of_server(self, pid: int, servers: Collection[int]) -> bool:
        """Whether a process is one of these servers or may descend from any, even an ended one.

        A process that has ended or cannot be inspected counts as one too.
        """
        ours = spared()
        try:
            below = pid
            for one in _line(pid):
                if one == os.getpid():
                    # The keeper starts nothing but servers.
                    return one != pid
                if one in ours or one == _INIT:
                    return self._may_be_adopted(below, one)
                if one in servers or self._is_known(one):
                    return True
                below = one
            # Its parent is in an enclosing namespace, as with `docker exec`; a server's orphans go
            # to process 1.
            return False
        except (OSError, IndexError, ValueError):
            return True

    def _is_known(self, pid: int) -> bool:
        if self._in_group(pid) or carries(pid, MARK).startswith(self._server_dirs):
            return True
        with contextlib.suppress(PermissionError):  # Fork servers are the keeper's user's.
            place = Path(f"/proc/{pid}/cwd").readlink()
            return any(place.is_relative_to(directory) for directory in self._forkservers)
        return False

    def _in_group(self, pid: int) -> bool:
        return any(groups.hold_any(pid) for groups in self._groups)

    def _may_be_adopted(self, pid: int, parent: int) -> bool:
        """Whether this process may be an orphan of a server that its parent inherited."""
        if self._first_loose is None:
            return False
        if stat(pid).session == stat(parent).session:
            # Servers start sessions of their own.
            return False
        return int(stat(pid).started) >= self._first_loose


def _line(pid: int) -> Iterator[int]:
    """Yield a process, its parent, and so on. Raises OSError if one of them has ended meanwhile."""
    for _ in range(_LONGEST_LINE):
        if pid <= 0:
            return
        yield pid
        pid = stat(pid).parent
    raise ValueError("no end")
