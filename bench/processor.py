"""CPU time of everything that the bench has started, whether it still runs or has ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time

import psutil

from guard import started_by_us


class ProcessorTime:
    """CPU time of a contender from now on: of its services and servers, and of all below them.

    It is the sum over all processes below the guard, to which orphans return; so every one that has
    ended is in the time of an ancestor that has waited for it. The bench's own time is left out,
    and so is that of the other contenders, which idle meanwhile: the rate of that is measured
    first, while no contender has work to do. Threads of the operating system are not included.
    """

    def __init__(self, background: float) -> None:
        """Measure the rate of idle contenders, for `background` seconds."""
        used, at = _seconds_so_far(), time.perf_counter()
        time.sleep(background)
        self._used, self._at = _seconds_so_far(), time.perf_counter()
        self._rate = (self._used - used) / (self._at - at)

    def seconds(self) -> float:
        """Return the CPU time so far, in seconds."""
        used, at = _seconds_so_far(), time.perf_counter()
        return used - self._used - self._rate * (at - self._at)


def _seconds_so_far() -> float:
    processes = started_by_us()
    ended = [*processes, psutil.Process(), psutil.Process(os.getppid())]
    return sum(map(_own_seconds, processes)) + sum(map(_seconds_of_children, ended))


def _own_seconds(process: psutil.Process) -> float:
    """Return a process's CPU time by its clock; /proc has whole ticks of 10 ms only."""
    clock = ctypes.c_int()
    if ctypes.CDLL(None).clock_getcpuclockid(process.pid, ctypes.byref(clock)) == 0:
        with contextlib.suppress(OSError):
            return time.clock_gettime(clock.value)
    return 0.0


def _seconds_of_children(process: psutil.Process) -> float:
    """Return the CPU time of the children of a process that it has waited for, and of theirs."""
    with contextlib.suppress(psutil.Error):
        times = process.cpu_times()
        return float(times.children_user + times.children_system)
    return 0.0
