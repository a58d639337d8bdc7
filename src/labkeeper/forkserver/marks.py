"""Identification of processes: start time, a mark in the environment, a title in process lists.

A fork shows its parent's until it overwrites the memory that Linux shows.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import NamedTuple

MARK = "LABKEEPER_SERVER"
"""The variable that marks all that a server starts; its value is the server's directory."""
_PR_SET_NAME = 15
"""From linux/prctl.h."""


class Stat(NamedTuple):
    """A process as `/proc/PID/stat` shows it (proc(5))."""

    state: str
    parent: int
    group: int
    session: int
    terminal: int
    foreground: int
    """The process group in the foreground of its terminal."""
    ticks: int
    """CPU time: its own, and that of the children that it has reaped."""
    threads: int
    started: str
    """In ticks since boot; together with the pid it is unique."""
    pages: int
    """Resident memory."""
    arguments: tuple[int, int]
    """Addresses of their start and end in its memory; zeros if they are hidden."""
    environment: tuple[int, int]
    """The same of its environment."""


def stat(pid: int) -> Stat:
    """Return what Linux shows of a process. Raises OSError."""
    with open(f"/proc/{pid}/stat", errors="replace") as stream:
        # From the third field on; the second, its name, may hold spaces and ")".
        fields = stream.read().rpartition(")")[2].split()
    return Stat(
        state=fields[0],
        parent=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        terminal=int(fields[4]),
        foreground=int(fields[5]),
        ticks=sum(map(int, fields[11:15])),
        threads=int(fields[17]),
        started=fields[19],
        pages=int(fields[21]),
        arguments=(int(fields[45]), int(fields[46])),
        environment=(int(fields[47]), int(fields[48])),
    )


def started(pid: int) -> str:
    """Return a process's start time in ticks since boot."""
    return stat(pid).started


def show(*arguments: str) -> None:
    """Set arguments and name in process lists, as if this process had been executed with them.

    A title such as `jupyter-lab (server 'a')` is a single argument.

    Linux shows the memory of a program's arguments; a fork keeps its parent's. It is overwritten in
    place, as `setproctitle` does, as far as there is space.
    """
    if sys.platform.startswith("linux"):
        name = os.fsencode(os.path.basename(arguments[0].partition(" (")[0]))
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name, 0, 0, 0)
        first, end = stat(os.getpid()).arguments
        text = os.fsencode("\0".join(arguments))
        _overwrite(first, end - first, text[: max(0, end - first - 1)])


def mark(server_dir: str) -> None:
    """Set the mark in this process's visible environment, in space reserved at program start."""
    if sys.platform.startswith("linux"):
        first, end = stat(os.getpid()).environment
        found = ctypes.string_at(first, end - first).find(f"{MARK}=".encode())
        if found >= 0:
            place = first + found + len(MARK) + 1
            _overwrite(place, len(ctypes.string_at(place)), os.fsencode(server_dir))


def _overwrite(place: int, size: int, text: bytes) -> None:
    if place and len(text) <= size:
        ctypes.memmove(place, text.ljust(size, b"\0"), size)
