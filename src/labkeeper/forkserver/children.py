"""Forked children as their parent sees them: live ones, and where to report their exits."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from typing import Any

from . import wire


def fork() -> int:
    """Fork; in the child, reset this process's signal handling. Raises OSError."""
    # Until then, a child must not handle a signal as if it were this process.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class Wakeup:
    """A socket that can be read when a child may have ended."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._reader.fileno()

    def clear(self) -> None:
        """Wait for the next one."""
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)

    def close(self) -> None:
        """Close both ends; for a child, which `fork` has given the usual signal handling."""
        self._reader.close()
        self._writer.close()


class Children:
    """Children, each with a pipe to which its exit is reported once."""

    def __init__(self) -> None:
        self._reports: dict[int, int] = {}
        """Report pipes, by the pid of each live child."""
        self._unheard: dict[int, int] = {}
        """Wait statuses that could not be delivered, by pid."""

    def __bool__(self) -> bool:
        """Whether a child lives."""
        return bool(self._reports)

    def add(self, pid: int, report: int) -> None:
        """Add a child; takes ownership of the pipe."""
        self._reports[pid] = report
        # Left by an earlier process with this pid.
        self._unheard.pop(pid, None)

    @property
    def unheard(self) -> bool:
        """Whether an exit could not be delivered."""
        return bool(self._unheard)

    def attach(self, pid: Any, report: int) -> bool:
        """Report a child's exit, even an undelivered one, to another pipe; False if unknown."""
        if not isinstance(pid, int) or pid not in {*self._reports, *self._unheard}:
            return False
        report = os.dup(report)
        if pid in self._reports:
            os.close(self._reports[pid])
            self._reports[pid] = report
        else:
            self._tell(report, pid, self._unheard.pop(pid))
        return True

    def reap(self) -> list[int]:
        """Reap children and inherited orphans; return their pids."""
        ended = []
        with contextlib.suppress(ChildProcessError):
            while (end := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                pid, status = end
                ended.append(pid)
                if pid in self._reports:
                    self._tell(self._reports.pop(pid), pid, status)
        return ended

    def forget_unheard(self) -> None:
        """Discard undelivered exits."""
        self._unheard.clear()

    def forget(self) -> None:
        """Close all pipes; for a child, whose siblings these are."""
        for report in self._reports.values():
            os.close(report)
        self._reports.clear()

    def _tell(self, report: int, pid: int, status: int) -> None:
        try:
            os.write(report, wire.line({"status": status}))
        except OSError:
            # The keeper has died. The next one asks.
            self._unheard[pid] = status
        os.close(report)
