"""What a server leaves behind when it has ended: found by its control groups and by its mark, and ended too."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Final

from labkeeper.backends.limits import ControlGroups
from labkeeper.backends.processes import Process, end_all, marked, rooms_marked, sees
from labkeeper.backends.room import Room
from labkeeper.backends.standalone.identity import MARK
from labkeeper.core.errors import BackendUnavailable
from labkeeper.core.model import ServerName, server_name

LIMIT: Final = 3.0
"""Seconds after which what cannot be ended is reported as such."""
_EMPTY_LOOKS: Final = 3
"""Looks in a row that find nothing, before nothing is believed to be left."""


def end_leftovers(
    name: ServerName, room: Path, known: AbstractSet[Process], *, grace: float, groups: ControlGroups | None = None
) -> set[int]:
    """End all in a server's control groups, all that carries the mark of its room, and what is `known` of it; give the pids.

    `grace` is the time in seconds that it has between SIGTERM and SIGKILL. Raises BackendUnavailable when something lives on.
    """
    found: set[int] = set()
    until = time.monotonic() + LIMIT
    empty = 0
    # What is ended last may have started something meanwhile, and a look may pass between a parent and its child.
    while empty < _EMPTY_LOOKS:
        members = (Process.find(pid) for pid in groups.members(name)) if groups else ()
        carriers = (process for process in marked(MARK, str(room)) if sees(process.pid, room.parent))
        left = {*filter(None, members), *carriers, *(process for process in known if process.alive())}
        empty = 0 if left else empty + 1
        if left and time.monotonic() > until:
            pids = ", ".join(str(process.pid) for process in left)
            raise BackendUnavailable(f"cannot end all processes of server '{name}': {pids} live on after SIGKILL")
        if groups and not grace:
            # Also where nothing was found: what starts the next one and ends may live too briefly to be looked at.
            groups.kill(name)
        end_all(left, grace=grace, within=LIMIT)
        found, grace = found | {process.pid for process in left}, 0.0
    return found


def strays(runtime_dir: Path, groups: ControlGroups) -> set[ServerName]:
    """Name all servers of which there is anything: a room, a process with its mark, a control group."""
    rooms = rooms_marked(MARK, runtime_dir)
    with contextlib.suppress(OSError):
        rooms.update(path for path in runtime_dir.iterdir() if Room(path).recognised)
    found = groups.names()
    for room in rooms:
        with contextlib.suppress(ValueError):
            found.add(server_name(room.name))
    return found
