"""Explains how a server has ended: by its exit, by OOM kills, and by its last log lines."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from labkeeper.backends.local.launching import ReportPipe, exit_of
from labkeeper.backends.local.limits import ControlGroups, MemoryKills
from labkeeper.backends.local.logs import LogFile
from labkeeper.core.server import Exit, Failure, FailureClass, StopMethod
from labkeeper.core.spec import QualifiedName
from labkeeper.jupyter.failures import cause_of

_TAIL_LINES: Final = 30
"""Number of log lines in a failure."""
_LONGEST_LINE: Final = 2000
"""Maximum characters of each line: they are stored with the server and shown in its history."""
_OUT_OF_MEMORY: Final = (
    (
        "Linux killed it, because the memory that it may have had run out; "
        "ask for a higher memory_limit, or give the machine more"
    ),
    (
        "most likely Linux killed it, because the memory of the machine or the keeper's container "
        "had run out; give it more, or limit what each server takes"
    ),
)
"""Messages about a server that was OOM killed: certainly, and most likely."""


def seen_exit(
    child: subprocess.Popen[bytes] | None, pipe: ReportPipe | None, info: Path, *, ready: bool
) -> Exit:
    """Return how a process ended, as its parent saw it: the keeper, or a fork server on the pipe.

    Without that, its info file shows whether it ended in good order, if it was ready.
    """
    if child is not None:
        return exit_of(child.wait())
    seen = pipe.exit() if pipe else None
    if seen is not None:
        return seen
    return Exit(code=0) if ready and not os.path.lexists(info) else Exit()


@dataclass(slots=True)
class MemoryWatch:
    """Whether a server was OOM killed. Counts have to be taken while it lives."""

    groups: ControlGroups
    name: QualifiedName
    pid: int
    _kills: MemoryKills | None = None
    """Counter of its OOM kills."""
    _counts: tuple[int, ...] = ()
    """Those of the last two checks: one between a kill and the end must not hide the kill."""

    def count(self) -> None:
        """Take a count."""
        self._kills = self._kills or self.groups.memory_kills(self.name, self.pid)
        self._counts = (*self._counts[-1:], self._kills.count())

    def explain(self, end: Exit, method: StopMethod) -> str:
        """Return a sentence if it was OOM killed, "" otherwise."""
        if end.signal != signal.SIGKILL.name or method is StopMethod.SIGKILL or self._kills is None:
            return ""
        grown = self._kills.count() > self._counts[0]
        return _OUT_OF_MEMORY[0 if self._kills.certain else 1] if grown else ""


def failure_of(
    name: QualifiedName, end: Exit, log: LogFile, *, ready: bool, out_of_memory: str
) -> Failure | None:
    """Return the failure that an end is, or None if the server was ready and ended in good order.

    `out_of_memory` is the explanation of `MemoryWatch`.
    """
    if end.clean and ready:
        return None
    tail = _tail_of_launch(log)
    kind, line = cause_of(end, tail)
    if out_of_memory:
        kind, line = FailureClass.OUT_OF_MEMORY, out_of_memory
    what = f"cannot start server '{name}': JupyterLab ended before it was ready"
    if ready:
        what = f"server '{name}' ended"
    return Failure(kind, f"{what} ({end})" + (f": {line}" if line else ""), end, tail)


def _tail_of_launch(log: LogFile) -> tuple[str, ...]:
    lines: list[str] = []
    with contextlib.suppress(OSError):  # A report does not fail because its log cannot be read.
        lines = log.tail(_TAIL_LINES)
    starts = [at for at, line in enumerate(lines) if line.startswith("[labkeeper] launch ")]
    return tuple(line[:_LONGEST_LINE] for line in (lines[starts[-1] + 1 :] if starts else lines))
