"""Finds and ends programs that a fork server started or inherited as orphans."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal

from .marks import stat

_PR_SET_CHILD_SUBREAPER = 36
"""From linux/prctl.h."""


def adopt_orphans() -> None:
    """Become the parent of processes below this one whose parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def living() -> list[int]:
    """Return the pids of live children: started here, or orphaned below this process."""
    try:
        # Usually there is none, and this is faster than scanning all processes of the machine.
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return []
    found = []
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        with contextlib.suppress(OSError):  # It has ended meanwhile.
            child = stat(pid)
            if child.parent == os.getpid() and child.state != "Z":
                found.append(pid)
    return found


def end_programs() -> None:
    """End all children and the orphans they leave; only while no child is a server."""
    while pids := living():
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
