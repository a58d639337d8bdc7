"""Programs in the terminals of a server, as Linux sees them; Jupyter does not know.

The shell of a terminal is a child of the server that leads a session with a controlling terminal.
The terminal is busy when the foreground process group is not the shell's. Background jobs do not
count.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import psutil

from labkeeper.backends.local.processes import Process
from labkeeper.forkserver import marks


def foregrounds(server: Process) -> list[str] | None:
    """Return the program in the foreground of each terminal, oldest terminal first; "" for none.

    None if that is unknown.
    """
    if sys.platform != "linux":
        return None
    stats = {}
    try:
        for child in psutil.Process(server.pid).children():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # It has ended.
                stats[child.pid] = marks.stat(child.pid)
    except (psutil.Error, OSError):
        return None
    shells = [stat for pid, stat in stats.items() if stat.terminal and stat.session == pid]
    return [_program(shell) for shell in sorted(shells, key=lambda shell: int(shell.started))]


def _program(shell: marks.Stat) -> str:
    if shell.foreground <= 0 or shell.foreground == shell.group:
        return ""
    # The first process of a pipeline may have ended before the others.
    with contextlib.suppress(OSError):
        return (
            Path(f"/proc/{shell.foreground}/comm")
            .read_text(encoding="utf-8", errors="replace")
            .rstrip("\n")
        )
    return "a program"
