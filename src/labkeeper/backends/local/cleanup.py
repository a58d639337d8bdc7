"""Cleanup after a server has ended: its leftover processes are found by control group and mark."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from labkeeper.backends.local.limits import ControlGroups
from labkeeper.backends.local.processes import (
    Process,
    boot_id,
    end_all,
    marked,
    sees,
    server_dirs_marked,
)
from labkeeper.backends.local.server_dir import ServerDir
from labkeeper.core.errors import BackendUnavailable
from labkeeper.core.spec import QualifiedName, parse_qualified_name, qualified_name
from labkeeper.forkserver.marks import MARK

LIMIT: Final = 3.0
"""Seconds after which a process that cannot be ended is reported."""
_EMPTY_LOOKS: Final = 3
"""Consecutive empty scans that prove that no process is left."""


def end_leftovers(
    name: QualifiedName,
    server_dir: Path,
    known: AbstractSet[Process],
    *,
    grace: float,
    groups: ControlGroups | None = None,
) -> set[int]:
    """End all processes in a server's control groups, with its mark or in `known`; return the pids.

    A mark counts in processes of the server's user and of the keeper's; if the directory, which
    records that user, is lost, it counts in all. `grace` is the time in seconds between SIGTERM and
    SIGKILL. Raises BackendUnavailable if a process survives, and OSError if no file descriptor is
    free: without a scan, no process is reported as ended.
    """
    found: set[int] = set()
    users = ServerDir(server_dir).users
    until = time.monotonic() + LIMIT
    empty = 0
    # The last process ended may have started another meanwhile, and a scan may miss a child whose
    # parent has just ended.
    while empty < _EMPTY_LOOKS:
        members = (Process.find(pid) for pid in groups.members(name)) if groups else ()
        carriers = (
            process
            for process in marked(MARK, str(server_dir), users=users)
            if sees(process.pid, server_dir.parent)
        )
        left = {
            *filter(None, members),
            *carriers,
            *(process for process in known if process.alive()),
        }
        empty = 0 if left else empty + 1
        if left and time.monotonic() > until:
            pids = ", ".join(str(process.pid) for process in left)
            raise BackendUnavailable(
                f"cannot end all processes of server '{name}': {pids} survive SIGKILL"
            )
        if groups and not grace:
            # Even if none was found: a process that starts the next one and ends may be too
            # short-lived for a scan.
            groups.kill(name)
        end_all(left, grace=grace, within=LIMIT)
        found, grace = found | {process.pid for process in left}, 0.0
    return found


@dataclass(frozen=True, slots=True)
class EarlierDir:
    """A runtime directory of earlier keepers.

    `names` are the servers found in it when this keeper started.
    """

    runtime_dir: Path
    groups: ControlGroups
    names: AbstractSet[QualifiedName]

    @classmethod
    def look(cls, runtime_dir: Path) -> EarlierDir:
        """Return the directory with the servers found in it."""
        groups = ControlGroups(runtime_dir)
        return cls(runtime_dir, groups, strays(runtime_dir, groups))

    def clear(self, name: QualifiedName) -> set[int]:
        """End all processes of a server and remove its directory; return the pids.

        Raises BackendUnavailable.
        """
        return clear(ServerDir(self.runtime_dir / name), self.groups)


def clear(server_dir: ServerDir, groups: ControlGroups) -> set[int]:
    """End all processes of a server, and remove its directory and control groups; return the pids.

    A directory that no keeper created stays. Raises BackendUnavailable if a process survives.
    """
    name = QualifiedName(server_dir.path.name)
    found = end_leftovers(
        name, server_dir.path, _recorded_processes(server_dir), grace=0.0, groups=groups
    )
    groups.remove(name)
    if server_dir.recognised:
        server_dir.remove()
    return found


def _recorded_processes(server_dir: ServerDir) -> set[Process]:
    """Return the process recorded in a server directory, and its descendants.

    Raises BackendUnavailable.
    """
    record = server_dir.read_record()
    if record is None or record.boot != boot_id():
        return set()
    process = Process(record.pid, record.started)
    return {process, *process.descendants()}


def end_with_all_below(parent: Process) -> None:
    """End a process that inherits the orphans among its descendants, and all of these.

    While it lives none can hide. Suspended, it cannot start more.
    """
    parent.send(signal.SIGSTOP)
    until, empty = time.monotonic() + LIMIT, 0
    while empty < _EMPTY_LOOKS and time.monotonic() < until:
        below = [process for process in parent.descendants() if process.alive()]
        empty = 0 if below else empty + 1
        end_all(below, grace=0.0, within=LIMIT)
    parent.send(signal.SIGKILL)


def strays(runtime_dir: Path, groups: ControlGroups) -> set[QualifiedName]:
    """Return all servers that have a directory, a marked process or a control group.

    Raises BackendUnavailable if no file descriptor is free.
    """
    try:
        server_dirs, found = server_dirs_marked(MARK, runtime_dir), groups.names()
    except OSError as error:
        raise BackendUnavailable(
            f"cannot look for processes of earlier keepers: {error}"
        ) from error
    with contextlib.suppress(OSError):
        server_dirs.update(path for path in runtime_dir.iterdir() if ServerDir(path).recognised)
    for server_dir in server_dirs:
        with contextlib.suppress(ValueError):
            found.add(qualified_name(*parse_qualified_name(server_dir.name)))
    return found
