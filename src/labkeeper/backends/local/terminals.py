"""Programs in the terminals of a server, as Linux sees them; Jupyter does not know.

The shell of a terminal is a child of the server that leads a session with a controlling terminal.
The terminal is busy when the foreground process group is not the shell's. Background jobs do not
count.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from labkeeper.backends.local.processes import Process
from labkeeper.forkserver import marks


@dataclass(frozen=True, slots=True)
class _Stat:
    """The fields of `/proc/PID/stat` that concern terminals (proc(5))."""

    group: int
    session: int
    terminal: int
    foreground: int
    started: int


def foregrounds(server: Process) -> list[str] | None:
    """Return the program in the foreground of each terminal, oldest terminal first; "" for none.

    None if that is unknown.
    """
    if sys.platform != "linux":
        return None
    try:
        children = psutil.Process(server.pid).children()
        stats = {child.pid: stat for child in children if (stat := _stat(child.pid)) is not None}
    except (psutil.Error, OSError, ValueError):
        return None
    shells = [stat for pid, stat in stats.items() if stat.terminal and stat.session == pid]
    return [_program(shell) for shell in sorted(shells, key=lambda shell: shell.started)]


def _program(shell: _Stat) -> str:
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


def _stat(pid: int) -> _Stat | None:
    """Return a process's fields, or None if it has ended. Raises OSError, ValueError."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        _state, _parent, group, session, terminal, foreground, *rest = marks.stat(pid)
        return _Stat(int(group), int(session), int(terminal), int(foreground), int(rest[13]))
    return None
