"""Privileges that a process drops for good: inspection, gains by executed programs, and root's.

Each is one call of Linux's prctl(2). On other systems these functions do nothing.
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
"""More than exist: they are bits of one number."""


def hide() -> None:
    """Hide environment, memory and open files in /proc from the same user, and disable core dumps.

    Forked children are hidden too; an executed program is not.
    """
    _prctl(_PR_SET_DUMPABLE, 0)


def be_inspectable() -> None:
    """Let the same user inspect this process, as if it had been executed after a change of user."""
    _prctl(_PR_SET_DUMPABLE, 1)


def gain_nothing() -> None:
    """Keep executed programs, also of children, from gaining rights by setuid or capabilities."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_bounding_set() -> None:
    """Drop from this thread and its children, for good, all capabilities lost by a change of user.

    Without permission to do so there is none to lose, or `gain_nothing` has to suffice.
    """
    for capability in range(_CAPABILITIES):
        if _prctl(_PR_CAPBSET_READ, capability) == 1:
            _prctl(_PR_CAPBSET_DROP, capability)


def _prctl(option: int, value: int) -> int:
    if not sys.platform.startswith("linux"):
        return -1
    return int(ctypes.CDLL(None).prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))))
