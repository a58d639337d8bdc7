"""What a process gives up for good: to be looked into, to gain rights by what it runs, to have root's rights once more.

Each of these is one call of Linux's prctl(2). Elsewhere there is nothing of the kind, and nothing is done.
"""

from __future__ import annotations

import ctypes
import sys

_PR_SET_DUMPABLE = 4
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
"""From linux/prctl.h."""
_CAPABILITIES = 64
"""More than there are: they are bits of one number."""


def hide() -> None:
    """Close our environment, memory and open files in /proc to others of our own user, and leave no core dump.

    Children of a fork are closed, too; what is executed is open again.
    """
    _prctl(_PR_SET_DUMPABLE, 0)


def gain_nothing() -> None:
    """Let no program that we or our children run give us more rights than we have: no setuid bit, no capability of a file."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_bounding_set() -> None:
    """Let this thread, and what it starts, never have a capability again that is lost when it becomes another user.

    Where we may not do that there is none to lose, or `gain_nothing` has to be enough.
    """
    for capability in range(_CAPABILITIES):
        if _prctl(_PR_CAPBSET_READ, capability) == 1:
            _prctl(_PR_CAPBSET_DROP, capability)


def _prctl(option: int, value: int) -> int:
    if not sys.platform.startswith("linux"):
        return -1
    return int(ctypes.CDLL(None).prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))))
