"""Programs that a fork server has started, or that lost their parent below it: found, and ended."""

from __future__ import annotations

import contextlib
import os
import signal

from .marks import stat


def living() -> list[int]:
    """Give the pids of our children that live: what was started here, and what has lost its parent below us."""
    try:
        # Most often there is none, and this is sooner told than by a look at every process of the machine.
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return []
    found = []
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        with contextlib.suppress(OSError):  # It has ended meanwhile.
            state, parent, *_ = stat(pid)
            if int(parent) == os.getpid() and state != "Z":
                found.append(pid)
    return found


def end_programs() -> None:
    """End all that was started here or below, when no child is a server; what each of them leaves comes to us in its turn."""
    while pids := living():
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
