"""How the process of a server comes to be: forked from a fork server where that is possible, else executed."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from labkeeper import shortage
from labkeeper.backends.local.forking import CannotFork, ForkServer
from labkeeper.backends.local.forkserver import PROGRAM
from labkeeper.backends.local.processes import Process
from labkeeper.core.errors import BackendUnavailable
from labkeeper.core.server import Exit
from labkeeper.forkserver import wire
from labkeeper.forkserver.privileges import drop_bounding_set

_STATUS_WITHIN: Final = 1.0
"""Seconds in which a fork server tells the exit status of a child that has ended."""
_TAKEN_WITHIN: Final = 10.0
"""Seconds in which an executed process takes its launch."""
_LINE_LIMIT: Final = 64 * 1024


class ReportPipe:
    """What a launched process says of itself, and its fork server of its end: lines of JSON."""

    def __init__(self) -> None:
        reader, self.writer = os.pipe()
        """The end for the process; ours only until it is handed over."""
        os.set_blocking(reader, False)
        self._reader: int | None = reader
        self._buffer = b""
        self._said: dict[str, Any] = {}

    @property
    def readable(self) -> list[int]:
        """The descriptor to wait for; none once nobody holds the other end."""
        return [] if self._reader is None else [self._reader]

    def said(self, key: str) -> Any:
        """Return what was said under a key; None when nothing was, so far."""
        self._take_in()
        return self._said.get(key)

    def exit(self, *, within: float = _STATUS_WITHIN) -> Exit | None:
        """Wait for the exit status; None when nobody tells it."""
        poll = select.poll()
        for reader in self.readable:
            poll.register(reader, select.POLLIN)
        while (status := self.said("status")) is None and self.readable:
            if not poll.poll(within * 1000):
                break
        return exit_of(os.waitstatus_to_exitcode(status)) if isinstance(status, int) else None

    def close_writer(self) -> None:
        """Let go of the end that was handed over."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def close(self) -> None:
        """Close both ends. Idempotent."""
        self.close_writer()
        if self._reader is not None:
            os.close(self._reader)
            self._reader = None

    def _take_in(self) -> None:
        while self._reader is not None:
            try:
                piece = os.read(self._reader, _LINE_LIMIT)
            except BlockingIOError:
                return
            if not piece or len(self._buffer) > _LINE_LIMIT:
                os.close(self._reader)
                self._reader = None
                return
            *lines, self._buffer = (self._buffer + piece).split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError):
                    message = json.loads(line)
                    if isinstance(message, dict):
                        self._said.update(message)


def exit_of(code: int) -> Exit:
    """Read an exit code as `subprocess` gives it: negative for a signal."""
    if code >= 0:
        return Exit(code=code)
    try:
        return Exit(signal=signal.Signals(-code).name)
    except ValueError:  # A real-time signal has no name.
        return Exit(signal=f"signal {-code}")


@dataclass(frozen=True, slots=True)
class Launched:
    """A process that is on its way to become a server."""

    process: Process
    report: ReportPipe
    by: Literal["fork", "exec"]
    reason: str | None = None
    """Why it was not forked."""
    forkserver: str | None = None
    """Which fork server is its parent."""
    child: subprocess.Popen[bytes] | None = None
    """Set when it is a child of ours, whose exit status we can read."""


@contextlib.contextmanager
def _report() -> Iterator[ReportPipe]:
    """Make a report whose writing end is handed over inside; it is closed when that fails."""
    report = ReportPipe()
    try:
        yield report
    except BaseException:
        report.close()
        raise
    finally:
        report.close_writer()


class Launcher:
    """Launches servers in one way or the other; they are the same afterwards."""

    def __init__(self, python: Path, forkserver: ForkServer | None, why_not: str = "") -> None:
        """`why_not` says why there is no fork server."""
        self._python = python
        self._forkserver = forkserver
        self._why_not = why_not

    def launch(self, launch: wire.Launch, log: int, hold: Callable[[int], None] = lambda _: None) -> Launched:
        """Make the process. Raises OSError, WireError, BackendUnavailable.

        `hold` is called with the pid of one that is executed, while that still loads: in time for all that it will start.
        """
        try:
            with _report() as report:
                if self._forkserver is None:
                    raise CannotFork(self._why_not)
                process, parent = self._forkserver.launch(launch, log, report.writer)
                return Launched(process, report, "fork", forkserver=parent)
        except CannotFork as because:
            # With a report of its own: a child that was forked all the same, unknown to us, sees that nobody hears it, and ends.
            with _report() as report:
                return self._execute(launch, log, report, str(because), hold)

    def _execute(self, launch: wire.Launch, log: int, report: ReportPipe, reason: str, hold: Callable[[int], None]) -> Launched:
        ours, its = socket.socketpair()
        with ours, its:
            ours.settimeout(_TAKEN_WITHIN)
            child = self._start(launch, log, its.fileno())
            its.close()
            try:
                # If it has died already, its log and its exit code say why.
                with contextlib.suppress(ProcessLookupError, ConnectionError):
                    for members in launch.cgroups:
                        Path(members).write_text(str(child.pid))
                    hold(child.pid)
                    wire.send(ours, replace(launch, user=None, cgroups=[]).message(), [log, report.writer])
                process = Process.find(child.pid)
                if process is None:  # Only when it was reaped, and nobody but us does that.
                    raise BackendUnavailable("cannot start a server: its process vanished")
            except BaseException:
                child.kill()
                child.wait()
                raise
        return Launched(process, report, "exec", reason, child=child)

    def _start(self, launch: wire.Launch, log: int, passed: int) -> subprocess.Popen[bytes]:
        """Start a process that waits for its launch on a descriptor that it is given.

        It is its user's from the first instruction on: the user's own files and variables may hold code that Python runs at its
        start. It does nothing before it has its launch, so what needs the keeper's rights is done from here.
        """
        user = launch.user

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(  # noqa: S603 - the interpreter is a setting; no piece comes from a shell
                [str(self._python), str(PROGRAM), "exec", str(passed)],
                env=launch.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                umask=launch.umask,
                start_new_session=True,
                user=user.uid if user else None,
                group=user.gid if user else None,
                extra_groups=user.groups if user else None,
                pass_fds=[passed],
            )

        if user is None:
            return start()
        # Capabilities are a thread's own: one that gives them up starts the process, and ends.
        with shortage.told_of_threads(), ThreadPoolExecutor(1, f"start-{user.uid}", drop_bounding_set) as starter:
            return starter.submit(start).result()
