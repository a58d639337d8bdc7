"""What a server leaves behind when it has ended: found by its mark, and ended too."""

from __future__ import annotations

import time
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Final

from labkeeper.backends.processes import Process, end_all, marked
from labkeeper.backends.standalone.child import MARK
from labkeeper.core.errors import BackendUnavailable
from labkeeper.core.model import ServerName

LIMIT: Final = 3.0
"""Seconds after which what cannot be ended is reported as such."""
_EMPTY_LOOKS: Final = 3
"""Looks in a row that find nothing, before nothing is believed to be left."""


def end_leftovers(name: ServerName, room: Path, known: AbstractSet[Process], *, grace: float) -> bool:
    """End all that carries the mark of a server's room, and what is `known` of it; say whether there was any.

    `grace` is the time in seconds that it has between SIGTERM and SIGKILL. Raises BackendUnavailable when something lives on.
    """
    found = False
    until = time.monotonic() + LIMIT
    empty = 0
    # What is ended last may have started something meanwhile, and a look may pass between a parent and its child.
    while empty < _EMPTY_LOOKS:
        left = {*marked(MARK, str(room)), *(process for process in known if process.alive())}
        empty = 0 if left else empty + 1
        if left and time.monotonic() > until:
            pids = ", ".join(str(process.pid) for process in left)
            raise BackendUnavailable(f"cannot end all processes of server '{name}': {pids} live on after SIGKILL")
        end_all(left, grace=grace, within=LIMIT)
        found, grace = found or bool(left), 0.0
    return found
