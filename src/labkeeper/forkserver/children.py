"""The servers that a fork server has forked, as their parent sees them: who lives, and who is told of each end."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any


class Children:
    """Children, and for each a pipe to report its end to, once."""

    def __init__(self) -> None:
        self._reports: dict[int, int] = {}
        """By the pid of each living child."""
        self._unheard: dict[int, int] = {}
        """By pid: wait statuses that nobody was there to hear."""

    def __bool__(self) -> bool:
        """Whether one lives."""
        return bool(self._reports)

    def add(self, pid: int, report: int) -> None:
        """Take in a child; the pipe is ours to close."""
        self._reports[pid] = report
        # Of an earlier process that had this pid.
        self._unheard.pop(pid, None)

    @property
    def unheard(self) -> bool:
        """Whether there is an end that nobody was there to hear of."""
        return bool(self._unheard)

    def attach(self, pid: Any, report: int) -> bool:
        """Report the end of a child to somebody else, also one that nobody has heard of; say whether it is ours."""
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
        """Take in the ends of children, and of what they left behind; give the pids."""
        ended = []
        with contextlib.suppress(ChildProcessError):
            while (end := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                pid, status = end
                ended.append(pid)
                if pid in self._reports:
                    self._tell(self._reports.pop(pid), pid, status)
        return ended

    def forget_unheard(self) -> None:
        """Drop the ends that nobody has heard of."""
        self._unheard.clear()

    def forget(self) -> None:
        """Let go of all of them; for a child, whose siblings they are."""
        for report in self._reports.values():
            os.close(report)
        self._reports.clear()

    def _tell(self, report: int, pid: int, status: int) -> None:
        try:
            os.write(report, json.dumps({"status": status}).encode() + b"\n")
        except OSError:
            # The keeper has died. The next one asks.
            self._unheard[pid] = status
        os.close(report)
