"""Servers as processes of this machine.

Each server has a room of its own, `<runtime_dir>/<name>/`. Each live one has an attendant here: a thread that waits until it is
ready, then until it ends, then removes what is left of it, and reports each of these.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog

from labkeeper import jupyter
from labkeeper.backends.logfile import LogFile
from labkeeper.backends.processes import Process, boot_id, end_all, marked, wait_until_ended
from labkeeper.backends.room import TOKEN_BYTES, Record, Room
from labkeeper.core.errors import BackendError, BackendRefused, BackendUnavailable
from labkeeper.core.model import (
    Ended,
    Endpoint,
    Exit,
    Fact,
    Failure,
    FailureClass,
    Gone,
    Ready,
    Report,
    Seen,
    ServerName,
    ServerSpec,
    StopMethod,
    Unreachable,
)

MARK: Final = "LABKEEPER_SERVER"
"""The environment variable by which all that a server starts is known; its value is the server's room."""
TAIL_LINES: Final = 30
"""Lines of the log that a failure carries."""

_READY_POLL: Final = (0.02, 0.1)
"""Seconds between two looks at a starting server: at first, and at most."""
_ROTATE_EVERY: Final = 2.0
"""Seconds between two looks at the size of a log."""
_LEFTOVER_GRACE: Final = 0.3
"""Seconds that what a server leaves behind has between SIGTERM and SIGKILL, after an end in good order."""
_LEFTOVER_LIMIT: Final = 3.0
"""Seconds after which what cannot be ended is reported as such."""
_EMPTY_LOOKS: Final = 3
"""Looks in a row that find nothing, before nothing is believed to be left."""
_LOOK_LIMIT: Final = 1.5
"""Seconds that a look at a running server may take in its lane, however slowly it answers."""
_TOKEN: Final = re.compile(rf"\b[0-9a-f]{{{2 * TOKEN_BYTES}}}\b")

_log = structlog.get_logger("labkeeper.backends.local")


@dataclass(slots=True, eq=False)
class _Run:
    """One launch of one server, from its process to the proof of its end."""

    name: ServerName
    launch: int
    room: Room
    process: Process
    gateway: bool
    child: subprocess.Popen[bytes] | None = None
    """Set when it is a child of ours, whose exit status we can read."""
    hold: socket.socket | None = None
    endpoint: Endpoint | None = None
    method: StopMethod = StopMethod.NONE
    kernels: tuple[str, ...] = ()
    listed: bool = False
    """Whether it could list them when it was asked to end."""
    looking: bool = False
    """Whether a look at it is under way; one that never ends is not joined by another."""
    known: set[Process] = field(default_factory=set)
    """Descendants seen before the end; beside the marked ones, for those that hide their environment."""
    over: threading.Event = field(default_factory=threading.Event)
    """Set when its end was reported, or this backend was closed."""

    def escalate(self, method: StopMethod) -> None:
        """Note what is used to end it; a gentler way that was slow does not take back a harder one."""
        order = list(StopMethod)
        self.method = max(self.method, method, key=order.index)


class LocalBackend:
    """Runs each server by executing `jupyter-lab`; see `core.ports.Backend` for the laws."""

    def __init__(
        self,
        report: Callable[[Report], None],
        *,
        python: Path,
        runtime_dir: Path,
        log_dir: Path,
        client: jupyter.JupyterClient,
        log_max_bytes: int = 10 * 1024 * 1024,
    ) -> None:
        self._report = report
        self._python = python
        # One spelling, so that a server's mark is the same for every keeper that comes by another link.
        self._runtime_dir = runtime_dir.resolve()
        self._log_dir = log_dir
        self._client = client
        self._log_max_bytes = log_max_bytes
        self._runs: dict[ServerName, _Run] = {}
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        # Closing the writing end wakes every attendant at once.
        self._wake, self._wake_writer = os.pipe()

    # The calls of the port

    def launch(self, spec: ServerSpec, launch: int) -> None:
        """Execute `jupyter-lab` in a session of its own."""
        run = self._runs.get(spec.name)
        if run is not None and run.launch == launch and run.process.alive():
            return
        self._clear(spec.name)
        program = self._program()
        hold = _hold_port(spec)
        try:
            run = self._spawn(spec, launch, program, hold)
        except BaseException:
            hold.close()
            raise
        self._attend(run)

    def terminate(self, name: ServerName, launch: int, grace: float) -> None:
        """Ask by Jupyter's own API for half of the grace, then by SIGTERM."""
        run = self._runs.get(name)
        if run is None:
            self._end_unattended(name, launch)
        else:
            self._thread(f"ask-{name}", self._ask_to_end, run, grace / 2)

    def kill(self, name: ServerName, launch: int) -> None:
        """Send SIGKILL to the server; its attendant ends the rest."""
        run = self._runs.get(name)
        if run is None:
            self._end_unattended(name, launch)
            return
        run.known.update(run.process.descendants())
        run.escalate(StopMethod.SIGKILL)
        run.process.send(signal.SIGKILL)

    def observe(self, name: ServerName, launch: int) -> Fact:
        """Look for the process, first among those attended, then in the record that an earlier keeper left."""
        run = self._runs.get(name)
        if run is None:
            room = self._room(name)
            record = room.noted()
            if record is None or record.launch != launch or record.boot != boot_id():
                self._clear(name)
                return Gone()
            run = _Run(name, launch, room, Process(record.pid, record.started), record.gateway)
            if not run.process.alive():
                return self._bury(run, _exit_unseen(run, was_ready=record.ready), was_ready=record.ready)
            self._attend(run)
        return Seen(answers=run.endpoint is not None and self._look(run, run.endpoint))

    def forget(self, name: ServerName) -> None:
        """Remove the room and the log."""
        self._clear(name)
        self._logfile(name).remove()

    def log(self, name: ServerName, tail: int | None) -> Sequence[str]:
        """Read the log file."""
        try:
            return [_scrub(line) for line in self._logfile(name).tail(tail)]
        except OSError as error:
            raise BackendUnavailable(f"cannot read the log of server '{name}': {error.strerror}") from error

    def follow(self, name: ServerName, tail: int | None, live: Callable[[], bool]) -> Iterator[str]:
        """Read the log file as it grows."""
        return map(_scrub, self._logfile(name).follow(tail, live))

    def close(self) -> None:
        """End all threads; servers live on, for the next keeper to observe."""
        self._closed.set()
        os.close(self._wake_writer)
        for thread in list(self._threads):
            thread.join()
        os.close(self._wake)

    # A launch

    def _program(self) -> list[str]:
        script = self._python.parent / "jupyter-lab"
        if not script.exists():
            raise BackendRefused(
                f"cannot start a server: there is no {script}; install jupyterlab for {self._python}, "
                "or name an interpreter that has it by LABKEEPER_JUPYTER_PYTHON",
                failure_class=FailureClass.IMPORT_ERROR,
            )
        return [str(self._python), str(script)]

    def _spawn(self, spec: ServerSpec, launch: int, program: list[str], hold: socket.socket) -> _Run:
        room, port = self._room(spec.name), hold.getsockname()[1]
        if sys.platform != "linux":
            hold.close()
        headline = f"[labkeeper] launch {launch} of server '{spec.name}', {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        try:
            bundle = room.furnish(spec)
            with self._logfile(spec.name).open(headline) as log:
                child = subprocess.Popen(  # noqa: S603 - the interpreter is a setting; no piece comes from a shell
                    [*program, *jupyter.arguments(spec, port=port, config=room.config)],
                    cwd=spec.root_dir,
                    env={
                        **jupyter.environment(spec, os.environ, runtime_dir=room.path, ca_bundle=bundle),
                        MARK: str(room.path),
                    },
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            process = Process.find(child.pid)
            if process is None:  # Only when it was reaped, and nobody but us does that.
                raise BackendUnavailable(f"cannot start server '{spec.name}': its process vanished")
            run = _Run(spec.name, launch, room, process, spec.gateway is not None, child, hold)
            self._write_record(run)
        except (OSError, ValueError) as error:
            self._clear(spec.name)
            full = isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}
            kind = FailureClass.DISK_FULL if full else FailureClass.CONFIG_ERROR
            raise BackendRefused(f"cannot start server '{spec.name}': {error}", failure_class=kind) from error
        return run

    def _write_record(self, run: _Run) -> None:
        run.room.note(
            Record(
                launch=run.launch,
                pid=run.process.pid,
                started=run.process.started,
                boot=boot_id(),
                gateway=run.gateway,
                ready=run.endpoint is not None,
            )
        )

    # The attendant

    def _attend(self, run: _Run) -> None:
        self._runs[run.name] = run
        self._thread(f"attend-{run.name}", self._attendant, run)

    def _attendant(self, run: _Run) -> None:
        try:
            self._watch(run)
        except BackendError as error:
            self._say(run, Unreachable(error.message))
        except Exception as error:
            # A bug: what became of the server has to be found out some other way.
            self._say(run, Unreachable(f"cannot watch server '{run.name}': {error!r}"))
            raise
        finally:
            if run.hold is not None:
                run.hold.close()
            if self._runs.get(run.name) is run:
                del self._runs[run.name]
            run.over.set()

    def _watch(self, run: _Run) -> None:
        run.endpoint = self._until_ready(run)
        if run.endpoint is not None:
            with contextlib.suppress(OSError):  # Only a keeper that crashes on a full disk misses it.
                self._write_record(run)
            self._say(run, Ready(run.endpoint))
        while not wait_until_ended(run.process, or_readable=self._wake, timeout=_ROTATE_EVERY):
            if self._closed.is_set():
                _let_go(run.child)
                return
            self._logfile(run.name).rotate()
        was_ready = run.endpoint is not None
        end = _exit_of(run.child) if run.child is not None else _exit_unseen(run, was_ready=was_ready)
        self._say(run, self._bury(run, end, was_ready=was_ready))

    def _until_ready(self, run: _Run) -> Endpoint | None:
        """Wait until it answers as itself; None when it ended before, or we are closing."""
        pause, slowest = _READY_POLL
        while True:
            endpoint = jupyter.read_info(run.room.path, run.process.pid)
            # Jupyter writes the file before it has the port: only its own socket and its token prove who answers.
            if (
                endpoint is not None
                and run.process.listens_on(endpoint.port)
                and self._client.answers(endpoint)
                and self._client.accepts_token(endpoint)
            ):
                if run.hold is not None:
                    run.hold.close()
                return endpoint
            self._logfile(run.name).rotate()
            if wait_until_ended(run.process, or_readable=self._wake, timeout=pause) or self._closed.is_set():
                return None
            pause = min(pause * 1.2, slowest)

    def _look(self, run: _Run, endpoint: Endpoint) -> bool:
        """Look whether a server answers, within a time that it has no say in: what is to end it waits in the same lane."""
        if run.looking:
            return False
        run.looking = True
        answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

        def look() -> None:
            try:
                answers.put(self._client.answers(endpoint))
            finally:
                run.looking = False

        self._thread(f"look-{run.name}", look)
        try:
            return answers.get(timeout=_LOOK_LIMIT)
        except queue.Empty:
            return False

    def _ask_to_end(self, run: _Run, patience: float) -> None:
        until = time.monotonic() + patience
        run.known.update(run.process.descendants())
        if run.endpoint is not None:
            with contextlib.suppress(BackendError):
                listed = self._client.kernels(run.endpoint, timeout=patience / 2)
                run.kernels, run.listed = tuple(kernel.id for kernel in listed), True
            run.escalate(StopMethod.SHUTDOWN)
            if self._client.shutdown(run.endpoint, timeout=until - time.monotonic()):
                run.over.wait(max(0.0, until - time.monotonic()))
        if not run.over.is_set() and run.process.alive():
            run.escalate(StopMethod.SIGTERM)
            run.process.send(signal.SIGTERM)

    def _bury(self, run: _Run, end: Exit, *, was_ready: bool) -> Ended:
        """End what it left, remove its room, and tell how it ended. Raises BackendUnavailable when something lives on."""
        # After an end in good order its leftovers get the chance of one, too.
        self._end_leftovers(run.name, run.known, grace=_LEFTOVER_GRACE if end.clean else 0.0)
        failure = None
        if not (end.clean and was_ready):
            tail = self._tail_of_launch(run)
            kind, line = jupyter.cause_of(end, tail)
            what = "server '{}' ended" if was_ready else "cannot start server '{}': JupyterLab ended before it was ready"
            failure = Failure(kind, f"{what.format(run.name)} ({end})" + (f": {line}" if line else ""), end, tail)
        left: tuple[str, ...] = ()
        if run.gateway and not (end.clean and run.listed):
            # A server whose gateway hangs cannot list its kernels, but it has logged them.
            left = run.kernels or jupyter.started_kernels(self._lines(run.name, None))
        stopped = () if left else run.kernels
        run.room.remove()
        return Ended(end, run.method, stopped, left, failure)

    def _lines(self, name: ServerName, count: int | None) -> Sequence[str]:
        """Read the log for a report, which is not held up by a log that cannot be read."""
        with contextlib.suppress(BackendUnavailable):
            return self.log(name, count)
        return ()

    def _tail_of_launch(self, run: _Run) -> tuple[str, ...]:
        lines = list(self._lines(run.name, TAIL_LINES))
        starts = [at for at, line in enumerate(lines) if line.startswith("[labkeeper] launch ")]
        return tuple(lines[starts[-1] + 1 :] if starts else lines)

    # What is left of a server

    def _end_unattended(self, name: ServerName, launch: int) -> None:
        found = self._clear(name)
        self._report(Report(name, launch, Ended(Exit(), StopMethod.SIGKILL if found else StopMethod.NONE)))

    def _clear(self, name: ServerName) -> bool:
        """End whatever exists under a name, and remove its room; say whether anything lived. Raises BackendUnavailable."""
        run = self._runs.get(name)
        if run is not None:
            run.process.send(signal.SIGKILL)
            run.over.wait(_LEFTOVER_LIMIT)
        found = self._end_leftovers(name, set(), grace=0.0)
        self._room(name).remove()
        return found

    def _end_leftovers(self, name: ServerName, known: set[Process], *, grace: float) -> bool:
        """End all that carries the mark of a server, and what is `known` of it; say whether there was any."""
        found = False
        until = time.monotonic() + _LEFTOVER_LIMIT
        mark = str(self._room(name).path)
        empty = 0
        # What is ended last may have started something meanwhile, and a look may pass between a parent and its child.
        while empty < _EMPTY_LOOKS:
            left = {*marked(MARK, mark), *(process for process in known if process.alive())}
            empty = 0 if left else empty + 1
            if left and time.monotonic() > until:
                pids = ", ".join(str(process.pid) for process in left)
                raise BackendUnavailable(f"cannot end all processes of server '{name}': {pids} live on after SIGKILL")
            end_all(left, grace=grace, within=_LEFTOVER_LIMIT)
            found, grace = found or bool(left), 0.0
        return found

    # Places

    def _room(self, name: ServerName) -> Room:
        return Room(self._runtime_dir / name)

    def _logfile(self, name: ServerName) -> LogFile:
        return LogFile(self._log_dir / f"{name}.log", max_bytes=self._log_max_bytes)

    # Threads

    def _say(self, run: _Run, fact: Fact) -> None:
        self._report(Report(run.name, run.launch, fact))

    def _thread(self, name: str, target: Callable[..., None], *args: object) -> None:
        def body() -> None:
            try:
                target(*args)
            except Exception:  # noqa: BLE001 - a bug: it must be seen, and nobody waits for this thread
                _log.exception("a thread failed", thread=name)
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=body, name=name, daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()


def _hold_port(spec: ServerSpec) -> socket.socket:
    """Bind the port without listening, so that nobody takes it before Jupyter does; raise BackendRefused where it is taken.

    On Linux a bound socket that does not listen, with SO_REUSEADDR on both sides, lets the other one bind and listen.
    Elsewhere it would be in the way, and is closed again at once.
    """
    family = socket.AF_INET6 if ":" in spec.ip else socket.AF_INET
    hold = socket.socket(family, socket.SOCK_STREAM)
    try:
        hold.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        hold.bind((spec.ip, spec.port or 0))
    except OSError as error:
        hold.close()
        kind = FailureClass.PORT_IN_USE if error.errno == errno.EADDRINUSE else FailureClass.CONFIG_ERROR
        raise BackendRefused(
            f"cannot start server '{spec.name}': port {spec.port} on {spec.ip} is not to be had ({error.strerror}); "
            "end what holds it, or ask for another port",
            failure_class=kind,
        ) from error
    return hold


def _exit_of(child: subprocess.Popen[bytes]) -> Exit:
    code = child.wait()
    if code >= 0:
        return Exit(code=code)
    try:
        return Exit(signal=signal.Signals(-code).name)
    except ValueError:  # A real-time signal has no name.
        return Exit(signal=f"signal {-code}")


def _exit_unseen(run: _Run, *, was_ready: bool) -> Exit:
    """Tell how a process ended that was no child of ours: its info file goes when a server that ran ends in good order."""
    left_it = jupyter.info_path(run.room.path, run.process.pid).exists()
    return Exit(code=0) if was_ready and not left_it else Exit()


def _let_go(child: subprocess.Popen[bytes] | None) -> None:
    """Leave a living child to the next keeper, without the warning that its handle would give when it is collected."""
    if child is not None:
        child.returncode = 0


def _scrub(line: str) -> str:
    """Hide what looks like a token of ours: 192 bits in hexadecimal."""
    return _TOKEN.sub("[token]", line)
