"""Many servers, one after another, on one keeper: whatever is not given back shows.

Memory is compared between the middle and the end: a thread that works for the first time takes some, and a keeper has hundreds of
threads. All else is compared between the beginning and the end.
"""

from __future__ import annotations

import time
from typing import Any, Final

import psutil

from contenders import Labkeeper
from guard import started_by_us
from processes import memory_of
from progress import say

_WARMUP: Final = 20
"""Cycles before the first count: pools have filled, and what is loaded late is loaded."""
_SETTLE: Final = 3.0
_TELL_EVERY: Final = 50
_MIB: Final = 1024 * 1024


def allowance(cycles: int) -> int:
    """Give the bytes by which a process may grow and yet leak nothing: allocators breathe by a MiB or so."""
    return _MIB + 2 * 1024 * cycles


def cycles(keeper: Labkeeper, count: int) -> dict[str, Any]:
    """Start and stop servers; count before, in the middle, and after."""
    _turn(keeper, _WARMUP)
    before = _count(keeper)
    _turn(keeper, count // 2)
    middle = _count(keeper)
    _turn(keeper, count - count // 2)
    after = _count(keeper)
    counts = {"before": before, "middle": middle, "after": after}
    return {
        "cycles": count,
        "launched_by": keeper.launch_by,
        "counts": counts,
        "leaks": _leaks(before, middle, after, count),
    }


def _leaks(
    before: dict[str, int], middle: dict[str, int], after: dict[str, int], count: int
) -> list[str]:
    """Name what has grown: memory by more than its allowance, anything else at all."""
    found = []
    for name, last in after.items():
        first, allowed = (
            (middle[name], allowance(count - count // 2))
            if name.endswith("RSS")
            else (before[name], 0)
        )
        if last > first + allowed:
            found.append(f"{name}: {first} -> {last}")
    return found


def _turn(keeper: Labkeeper, count: int) -> None:
    for number in range(count):
        keeper.stop(keeper.launch(f"cycle{number}"))
        if (number + 1) % _TELL_EVERY == 0:
            say(f"{keeper.label}: {number + 1} of {count} cycles")


def _count(keeper: Labkeeper) -> dict[str, int]:
    time.sleep(_SETTLE)
    server_dirs = keeper.state / "run"
    found = {
        "processes": len(started_by_us()),
        "files in the runtime directory": len(list(server_dirs.rglob("*"))),
    }
    for name, pid in keeper.beside().items():
        process = psutil.Process(pid)
        found |= {
            f"{name}: descriptors": process.num_fds(),
            f"{name}: threads": process.num_threads(),
            f"{name}: RSS": memory_of(pid).rss,
        }
    return found
