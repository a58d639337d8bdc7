"""The forked servers as their parent sees them: live children, and where to report their exit."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from . import wire


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
