"""Launching of server processes: forked from a fork server if possible, executed otherwise."""

from __future__ import annotations

import contextlib
import os
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
from labkeeper.backends.local.processes import Process, new_child, wait_until_readable
from labkeeper.core.server import Exit
from labkeeper.forkserver import wire
from labkeeper.forkserver.privileges import drop_bounding_set

_STATUS_WITHIN: Final = 1.0
"""Seconds to wait for a fork server to report a child's exit status."""
_TAKEN_WITHIN: Final = 10.0
"""Seconds in which an executed process must take its launch."""
_LINE_LIMIT: Final = 64 * 1024


class ReportPipe:
    """Pipe on which a launched process, and its fork server when it ends, send lines of JSON."""

    def __init__(self) -> None:
        reader, self.writer = os.pipe()
        """The process's end; held by the keeper only until it is handed over."""
        os.set_blocking(reader, False)
        self._reader: int | None = reader
        self._buffer = b""
        self._said: dict[str, Any] = {}

    @property
    def readable(self) -> list[int]:
        """The descriptor to wait on; empty once every writer has closed its end."""
        return [] if self._reader is None else [self._reader]

    def said(self, key: str) -> Any:
        """Return the latest value reported under a key, or None."""
        self._take_in()
        return self._said.get(key)

    def exit(self, *, within: float = _STATUS_WITHIN) -> Exit | None:
        """Wait for the exit status; return None if it is not reported in time."""
        while (status := self.said("status")) is None and self.readable:
            if not wait_until_readable(self.readable, timeout=within):
                break
        return exit_of(os.waitstatus_to_exitcode(status)) if isinstance(status, int) else None

    def close_writer(self) -> None:
        """Close the end that was handed over."""
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
                with contextlib.suppress(wire.WireError):
                    self._said.update(wire.read_line(line))


def exit_of(code: int) -> Exit:
    """Return the exit for a code in the style of `subprocess`, where negative means a signal."""
    if code >= 0:
        return Exit(code=code)
    try:
        return Exit(signal=signal.Signals(-code).name)
    except ValueError:  # A real-time signal has no name.
        return Exit(signal=f"signal {-code}")


@dataclass(frozen=True, slots=True)
class Launched:
    """A process that is becoming a server."""

    process: Process
    report: ReportPipe
    by: Literal["fork", "exec"]
    reason: str | None = None
    """Why it was not forked."""
    forkserver: str | None = None
    """The fork server that is its parent."""
    child: subprocess.Popen[bytes] | None = None
    """Set if it is the keeper's child, whose exit status the keeper can read."""


@contextlib.contextmanager
def report_pipe() -> Iterator[ReportPipe]:
    """Yield a pipe whose writing end is handed over in the block; an exception closes the pipe."""
    report = ReportPipe()
    try:
        yield report
    except BaseException:
        report.close()
        raise
    finally:
        report.close_writer()


class Launcher:
    """Launches servers by fork or exec; they do not differ afterwards."""

    def __init__(self, python: Path, forkserver: ForkServer | None, why_not: str = "") -> None:
        """`why_not` is the reason if there is no fork server."""
        self._python = python
        self._forkserver = forkserver
        self._why_not = why_not

    def launch(
        self, launch: wire.Launch, log: int, hold: Callable[[int], None] = lambda _: None
    ) -> Launched:
        """Launch the process. Raises OSError, WireError, BackendUnavailable.

        For an executed process, `hold` is called with its pid while it still loads, before it can
        start anything.
        """
        try:
            with report_pipe() as report:
                if self._forkserver is None:
                    raise CannotFork(self._why_not)
                process, parent = self._forkserver.launch(launch, log, report.writer)
                return Launched(process, report, "fork", forkserver=parent)
        except CannotFork as because:
            # A pipe of its own: a child that was forked without the keeper's knowledge sees that
            # the first pipe has no reader, and ends.
            with report_pipe() as report:
                return self._execute(launch, log, report, str(because), hold)

    def _execute(
        self,
        launch: wire.Launch,
        log: int,
        report: ReportPipe,
        reason: str,
        hold: Callable[[int], None],
    ) -> Launched:
        ours, its = socket.socketpair()
        with ours, its:
            ours.settimeout(_TAKEN_WITHIN)
            child = self._start(launch, log, its.fileno())
            its.close()
            with (
                new_child(child) as process,
                # If it has died already, its log and its exit code say why.
                contextlib.suppress(ProcessLookupError, ConnectionError),
            ):
                for members in launch.cgroups:
                    Path(members).write_text(str(child.pid))
                hold(child.pid)
                wire.send(
                    ours, replace(launch, user=None, cgroups=[]).message(), [log, report.writer]
                )
        return Launched(process, report, "exec", reason, child=child)

    def _start(self, launch: wire.Launch, log: int, passed: int) -> subprocess.Popen[bytes]:
        """Start a process that waits for its launch on an inherited descriptor.

        It runs as its user from the first instruction, since the user's files and variables may
        hold code that Python runs at startup. It does nothing before it has its launch, so the
        keeper does from here what needs the keeper's rights.
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
        # Capabilities are per thread: a thread drops them, starts the process and ends.
        with (
            shortage.told_of_threads(),
            ThreadPoolExecutor(1, f"start-{user.uid}", drop_bounding_set) as starter,
        ):
            return starter.submit(start).result()
