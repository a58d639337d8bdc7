"""Start and stop many servers, one after another, on one keeper, and look for leaks.

Memory is compared between the middle and the end, because each of a keeper's hundreds of threads
allocates some when it first works. Everything else is compared between the beginning and the end.
"""

from __future__ import annotations

import time
from typing import Any, Final

import psutil

from guard import started_by_us
from keepers import Labkeeper
from processes import memory_of
from progress import say

_WARMUP: Final = 20
"""Cycles before the first count, to fill pools and complete late imports."""
_SETTLE: Final = 3.0
_REPORT_EVERY: Final = 50
_MIB: Final = 1024 * 1024


def allowed_growth(cycles: int) -> int:
    """Return the bytes of growth that do not count as a leak: allocators vary by about a MiB."""
    return _MIB + 2 * 1024 * cycles


def cycles(keeper: Labkeeper, count: int) -> dict[str, Any]:
    """Start and stop servers; return the resources in use before, in the middle, and after."""
    _run(keeper, _WARMUP)
    before = _count(keeper)
    _run(keeper, count // 2)
    middle = _count(keeper)
    _run(keeper, count - count // 2)
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
    """List what grew: memory by more than is allowed, anything else by any amount."""
    found = []
    for name, last in after.items():
        first, allowed = before[name], 0
        if name.endswith("RSS"):
            first, allowed = middle[name], allowed_growth(count - count // 2)
        if last > first + allowed:
            found.append(f"{name}: {first} -> {last}")
    return found


def _run(keeper: Labkeeper, count: int) -> None:
    for number in range(count):
        keeper.stop(keeper.launch(f"cycle{number}"))
        if (number + 1) % _REPORT_EVERY == 0:
            say(f"{keeper.label}: {number + 1} of {count} cycles")


def _count(keeper: Labkeeper) -> dict[str, int]:
    time.sleep(_SETTLE)
    server_dirs = keeper.state / "run"
    found = {
        "processes": len(started_by_us()),
        "files in the runtime directory": len(list(server_dirs.rglob("*"))),
    }
    for name, pid in keeper.service_pids().items():
        process = psutil.Process(pid)
        found |= {
            f"{name}: descriptors": process.num_fds(),
            f"{name}: threads": process.num_threads(),
            f"{name}: RSS": memory_of(pid).rss,
        }
    return found
