"""Identification of processes: start time, a mark in the environment, a title in process lists.

A fork shows its parent's until it overwrites the memory that Linux shows.
"""

from __future__ import annotations

import ctypes
import os
import sys

MARK = "LABKEEPER_SERVER"
"""The variable that marks all that a server starts; its value is the server's directory."""
_NAME = b"jupyter-lab"
_PR_SET_NAME = 15
"""From linux/prctl.h."""


def stat(pid: int) -> list[str]:
    """Return the fields of proc(5) stat from the third on; the second may hold spaces and ")"."""
    with open(f"/proc/{pid}/stat", errors="replace") as stream:
        return stream.read().rpartition(")")[2].split()


def started(pid: int) -> str:
    """Return a process's start time in ticks since boot; together with the pid it is unique."""
    return stat(pid)[19]


def show(title: str) -> None:
    """Set the title in process lists, as if this process had been executed, where possible.

    Linux shows the memory of a program's arguments; a fork keeps its parent's. It is overwritten in
    place, as `setproctitle` does.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, _NAME, 0, 0, 0)
        first, end = _memory_of_program()[:2]
        _overwrite(first, end - first, os.fsencode(title)[: max(0, end - first - 1)])


def mark(server_dir: str) -> None:
    """Set the mark in this process's visible environment, in space reserved at program start."""
    if sys.platform.startswith("linux"):
        first, end = _memory_of_program()[2:]
        found = ctypes.string_at(first, end - first).find(f"{MARK}=".encode())
        if found >= 0:
            place = first + found + len(MARK) + 1
            _overwrite(place, len(ctypes.string_at(place)), os.fsencode(server_dir))


def _memory_of_program() -> list[int]:
    """Return the start and end of arguments and environment; zeros if they are hidden."""
    return [int(address) for address in stat(os.getpid())[45:49]]


def _overwrite(place: int, size: int, text: bytes) -> None:
    if place and len(text) <= size:
        ctypes.memmove(place, text.ljust(size, b"\0"), size)
