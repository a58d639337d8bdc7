"""By what processes are known: the moment of their start, a mark in their environment, a title in the lists of processes.

A fork shows what its parent shows, until it writes over the memory that Linux shows.
"""

from __future__ import annotations

import ctypes
import os
import sys

MARK = "LABKEEPER_SERVER"
"""The environment variable by which all that a server starts is known; it holds the path of the server's directory."""
_NAME = b"jupyter-lab"
_PR_SET_NAME = 15
"""From linux/prctl.h."""


def stat(pid: int) -> list[str]:
    """Give the fields of proc(5) stat from the third one on; the name before them may hold spaces and parentheses."""
    with open(f"/proc/{pid}/stat", errors="replace") as stream:
        return stream.read().rpartition(")")[2].split()


def started(pid: int) -> str:
    """Give the moment a process started, in ticks since boot; with its pid that is its identity."""
    return stat(pid)[19]


def show(title: str) -> None:
    """Let the lists of processes show what this process is, as if it had been executed, where that is possible.

    Linux shows the memory in which a program found its arguments; a fork keeps that of its parent. It is written over in place,
    as `setproctitle` does.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, _NAME, 0, 0, 0)
        first, end = _memory_of_program()[:2]
        _overwrite(first, end - first, os.fsencode(title)[: max(0, end - first - 1)])


def mark(server_dir: str) -> None:
    """Let our environment, as others see it, carry the mark; its place was made when the program was started."""
    if sys.platform.startswith("linux"):
        first, end = _memory_of_program()[2:]
        found = ctypes.string_at(first, end - first).find(f"{MARK}=".encode())
        if found >= 0:
            place = first + found + len(MARK) + 1
            _overwrite(place, len(ctypes.string_at(place)), os.fsencode(server_dir))


def _memory_of_program() -> list[int]:
    """Give where our arguments and our environment begin and end; zeros where that is kept from us."""
    return [int(address) for address in stat(os.getpid())[45:49]]


def _overwrite(place: int, size: int, text: bytes) -> None:
    if place and len(text) <= size:
        ctypes.memmove(place, text.ljust(size, b"\0"), size)
