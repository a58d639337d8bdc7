"""Leave no process and no directory behind, however the bench ends.

The bench runs as a child of a guard that only waits. The guard is a subreaper (prctl(2)): a
descendant that loses its parent, such as a kernel or a daemon, becomes its child instead of init's.
So everything that the bench started is a descendant of the guard, and can be killed without
guessing by name.
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
_TIMEOUT: Final = 10.0
"""Seconds for killed processes to end."""


def guarded(work: Callable[[Path], int]) -> int:
    """Run `work` in a child, with a temporary directory; clean up, and return the exit code."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    server_dir = Path(tempfile.mkdtemp(prefix="labkeeper-bench-"))
    child = os.fork()
    if child == 0:
        _run_child(work, server_dir)
    for number in _SIGNALS:
        signal.signal(number, lambda *_: _forward(child))
    code = _wait_for(child)
    clean = _kill_rest()
    shutil.rmtree(server_dir, ignore_errors=True)
    return code if clean else code or 1


def started_by_us() -> list[psutil.Process]:
    """Return every live process that the bench has started. Call this in the guard's child."""
    descendants = psutil.Process(os.getppid()).children(recursive=True)
    return [process for process in descendants if process.pid != os.getpid()]


def _run_child(work: Callable[[Path], int], server_dir: Path) -> NoReturn:
    code = 1
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        for number in _SIGNALS:
            signal.signal(number, _interrupt)
        code = work(server_dir)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception:  # noqa: BLE001 - os._exit below would hide it
        traceback.print_exc()
    finally:
        # Do not join threads that wait for a response; the guard kills what they wait for.
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
    """Wait for the child; meanwhile reap orphans, as init would, so that no keeper sees zombies."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            return abs(os.waitstatus_to_exitcode(status))


def _kill_rest() -> bool:
    """Kill the remaining descendants; return whether all ended."""
    descendants = psutil.Process().children(recursive=True)
    left = [_name(each) for each in descendants if each.status() != psutil.STATUS_ZOMBIE]
    if left:
        print(f"killing leftover processes: {', '.join(left)}", file=sys.stderr)
    until = time.monotonic() + _TIMEOUT
    while time.monotonic() < until:
        children = psutil.Process().children(recursive=True)
        for process in children:
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not children:
            print("all processes of the bench have ended", file=sys.stderr)
            return True
        time.sleep(0.02)
    print(f"PROCESSES HAVE NOT ENDED: {psutil.Process().children(recursive=True)}", file=sys.stderr)
    return False


def _name(process: psutil.Process) -> str:
    try:
        return f"{process.name()} ({process.pid})"
    except psutil.Error:
        return str(process.pid)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
