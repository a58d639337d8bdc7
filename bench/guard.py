"""Leaves nothing behind: neither process nor directory, however the bench ends.

The bench runs as a child of a guard that does nothing but wait. The guard is a subreaper (prctl(2)): whatever loses its parent
below it, be it a kernel or a program that made itself a daemon, becomes its child instead of init's. So "all that the bench
started" is "all descendants of the guard"; no name is guessed, and what is not ours cannot be hit.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

import psutil

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE: Final = 10.0
"""Seconds that killed processes may take to go."""


def guarded(work: Callable[[Path], int]) -> int:
    """Run `work` in a child, with a directory of its own; then end and remove what is left, and say so. Gives the exit code."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    server_dir = Path(tempfile.mkdtemp(prefix="labkeeper-bench-"))
    child = os.fork()
    if child == 0:
        _be_the_child(work, server_dir)
    for number in _SIGNALS:
        signal.signal(number, lambda *_: _forward(child))
    code = _wait_for(child)
    clean = _sweep()
    shutil.rmtree(server_dir, ignore_errors=True)
    return code if clean else code or 1


def started_by_us() -> list[psutil.Process]:
    """Give every live process that the bench has started, itself left out; to be called in the guard's child."""
    return [
        p for p in psutil.Process(os.getppid()).children(recursive=True) if p.pid != os.getpid()
    ]


def _be_the_child(work: Callable[[Path], int], server_dir: Path) -> NoReturn:
    code = 1
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        for number in _SIGNALS:
            signal.signal(number, _interrupt)
        code = work(server_dir)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception:  # noqa: BLE001 - nobody above would print it
        traceback.print_exc()
    finally:
        # Threads that still wait for an answer must not hold up the end; the guard ends what they wait for.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _forward(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGTERM)


def _wait_for(child: int) -> int:
    """Wait for the child, and bury at once whatever else ends here, as init would: a keeper must not see zombies for long."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            return abs(os.waitstatus_to_exitcode(status))


def _sweep() -> bool:
    """End what is left, and prove that nothing is."""
    left = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE
    ]
    if left:
        print(
            f"ending what is left: {', '.join(_name(process) for process in left)}", file=sys.stderr
        )
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        children = psutil.Process().children(recursive=True)
        for process in children:
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not children:
            print("no process of the bench is left", file=sys.stderr)
            return True
        time.sleep(0.02)
    print(f"PROCESSES ARE LEFT: {psutil.Process().children(recursive=True)}", file=sys.stderr)
    return False


def _name(process: psutil.Process) -> str:
    try:
        return f"{process.name()} ({process.pid})"
    except psutil.Error:
        return str(process.pid)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
