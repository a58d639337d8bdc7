"""Supervision of one launch of one server, from its process to the proof that nothing is left."""

from __future__ import annotations

import contextlib
import functools
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import structlog
from structlog.contextvars import bound_contextvars

from labkeeper import shortage
from labkeeper.backends.local.cleanup import end_leftovers
from labkeeper.backends.local.launching import Launched, ReportPipe
from labkeeper.backends.local.postmortem import MemoryWatch, failure_of, seen_exit
from labkeeper.backends.local.processes import Process, marked, wait_until_ended
from labkeeper.backends.local.server_dir import Record
from labkeeper.backends.local.sites import Site
from labkeeper.core.errors import BackendError, BackendUnavailable
from labkeeper.core.messages import Ended, Fact, Ready, Report, Unreachable
from labkeeper.core.server import Endpoint, Instance, OwnKernel, StopMethod
from labkeeper.core.spec import QualifiedName
from labkeeper.forkserver.marks import MARK
from labkeeper.jupyter.records import endpoint_of, info_path, read_info, read_kernels, with_url

_PROOF_PAUSES: Final = (0.005, 0.1)
"""Seconds between probes of a server that reports readiness but does not answer: first, maximum."""
_FOUND_PAUSES: Final = (0.02, 0.1)
"""The same for a server of an earlier keeper, which cannot report readiness."""
_ROTATE_EVERY: Final = 2.0
"""Seconds between checks of a log's size."""
_LEFTOVER_GRACE: Final = 0.3
"""Seconds between SIGTERM and SIGKILL for leftover processes, after a clean exit."""
_FOR_KERNELS: Final = 0.75
"""Share of a server's grace period that its kernels on a gateway get."""
_TRIED_AGAIN: Final = 0.2
"""Seconds before a step is retried that failed for lack of resources, such as descriptors."""
_LOOK_LIMIT: Final = 1.5
"""Maximum seconds of a probe of a running server; its next job waits meanwhile."""

_log = structlog.get_logger("labkeeper.backends.local.supervisor")


@dataclass(slots=True, eq=False)
class ProcessSupervisor:
    """Supervises one launch in its own thread. Created by `launched` or `adopted`."""

    site: Site
    process: Process
    record: Record
    _pipe: ReportPipe | None
    """Carries its fork server's report of its end, and its own messages if launched here."""
    _token: str | None = None
    """Its token, if this keeper launched it."""
    _child: subprocess.Popen[bytes] | None = None
    """Set if it is the keeper's child, whose exit status the keeper can read."""
    _hold: socket.socket | None = None
    """Reserves its port until it listens there itself."""
    _endpoint: Endpoint | None = None
    _over: threading.Event = field(default_factory=threading.Event)
    """Set when supervision has ended."""
    _method: StopMethod = StopMethod.NONE
    _kernels: tuple[OwnKernel, ...] = ()
    """Its kernels when it was asked to end."""
    _looker: threading.Thread | None = None
    """Runs the latest probe; while it hangs, no other is started."""
    _known: set[Process] = field(default_factory=set)
    """Descendants seen before its end, including those that hide their environment."""
    _memory: MemoryWatch = field(init=False)

    def __post_init__(self) -> None:
        self._memory = MemoryWatch(self.site.groups, self.name, self.process.pid)

    @classmethod
    def launched(
        cls, site: Site, record: Record, launched: Launched, *, token: str, hold: socket.socket
    ) -> ProcessSupervisor:
        """Return a supervisor for a process of this keeper. It closes `hold`, the reserved port."""
        return cls(site, launched.process, record, launched.report, token, launched.child, hold)

    @classmethod
    def adopted(cls, site: Site, record: Record, pipe: ReportPipe | None) -> ProcessSupervisor:
        """Return a supervisor for a process of an earlier keeper.

        On `pipe` its fork server reports its end.
        """
        return cls(site, Process(record.pid, record.started), record, pipe)

    @property
    def name(self) -> QualifiedName:
        """The name of the server."""
        return self.site.name

    @property
    def generation(self) -> int:
        """The generation of the launch."""
        return self.record.generation

    @property
    def _instance(self) -> Instance:
        record = self.record
        id_ = f"{record.boot}/{record.pid}/{record.started}"
        return Instance(
            id_, record.pid, record.launched_by, record.exec_reason, dict(record.limited_by)
        )

    def supervise(self, deregister: Callable[[], None]) -> None:
        """Watch the server until it ends or the keeper closes; report its readiness and its end.

        `deregister` is called before the last report, so that the next request does not reach a
        supervisor that has ended.
        """
        last: Fact | None = Unreachable(f"no thread watches server '{self.name}'")
        try:
            with bound_contextvars(server=self.name, generation=self.generation):
                last = self._supervise()
        finally:
            deregister()
            self._over.set()
            if last is not None:
                self.site.report(Report(self.name, self.generation, last))

    def wait(self, seconds: float) -> None:
        """Wait until supervision has ended."""
        self._over.wait(seconds)

    def finish(self) -> Ended:
        """End the leftovers of an ended process, remove its directory, and return how it ended.

        Raises BackendUnavailable if a process survives.
        """
        try:
            return self._bury()
        finally:
            self._close()

    def abort(self) -> None:
        """Kill a process that has just been launched, and wait for its end."""
        self.kill()
        if self._child is not None:
            self._child.wait()
        self._close()

    def _supervise(self) -> Fact | None:
        try:
            if self.process.alive():
                self.site.groups.hold(self.name, self.process.pid)
            return self._watch()
        except BackendError as error:
            return Unreachable(error.message)
        except Exception as error:  # noqa: BLE001 - a bug: the server's state is still unknown
            _log.exception("cannot watch a server")
            return Unreachable(f"cannot watch server '{self.name}': {error!r}")
        finally:
            self._close()

    def _close(self) -> None:
        """Release all resources but the process."""
        for held in (self._hold, self._pipe):
            if held is not None:
                held.close()
        if self._child is not None and self._child.returncode is None:
            # A live child is left to the next keeper, without the warning that its handle would
            # emit.
            self._child.returncode = 0

    def look(self) -> bool | None:
        """Return whether it answers; None if no thread or descriptor was available to ask.

        Takes limited time however slow the answer: a command to end the server is queued behind it.
        """
        endpoint = self._endpoint
        if endpoint is None or (self._looker is not None and self._looker.is_alive()):
            return False
        answers: list[bool | None] = []
        try:
            self._looker = self.site.threads.start(
                f"look-{self.name}", lambda: answers.append(self.site.client.answers(endpoint))
            )
        except BackendUnavailable:
            return None
        self._looker.join(_LOOK_LIMIT)
        return answers[0] if answers else False

    def ask_to_end(self, patience: float, *, keep_kernels: bool) -> None:
        """Request shutdown through Jupyter's API for `patience` seconds, then send SIGTERM."""
        until = time.monotonic() + patience
        self._note_processes()
        self._kernels = self._recorded()
        if self.record.gateway and not self._says_how(keep_kernels, patience):
            # It would end kernels that have to survive. Killed, it cannot.
            self.kill()
            return
        if self._endpoint is not None:
            self._escalate(StopMethod.SHUTDOWN)
            if self.site.client.shutdown(self._endpoint, timeout=until - time.monotonic()):
                self._over.wait(max(0.0, until - time.monotonic()))
        if not self._over.is_set() and self.process.alive():
            self._escalate(StopMethod.SIGTERM)
            self.process.send(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL; the supervisor's thread ends the rest."""
        self._note_processes()
        self._escalate(StopMethod.SIGKILL)
        self.process.send(signal.SIGKILL)

    def _note_processes(self) -> None:
        """Remember all below the server and its forked kernels, which are not below it."""
        self._known.update(self.process.descendants())
        if self.site.groups.members(self.name):
            # Its control group has them all.
            return
        server_dir = self.site.server_dir
        with contextlib.suppress(OSError):
            for process in marked(MARK, str(server_dir.path), users=server_dir.users):
                self._known.update({process, *process.descendants()})

    def _bury(self) -> Ended:
        """End its leftovers, remove its directory, and return how it ended.

        Raises BackendUnavailable if a process survives.
        """
        info = info_path(self.site.server_dir.jupyter, self.process.pid)
        end = seen_exit(self._child, self._pipe, info, ready=self.record.ready)
        out_of_memory = self._memory.explain(end, self._method)
        self._tend_log()
        # After a clean exit its leftovers may end cleanly too.
        grace = _LEFTOVER_GRACE if end.clean else 0.0
        end_rest = functools.partial(
            end_leftovers,
            self.name,
            self.site.server_dir.path,
            self._known,
            grace=grace,
            groups=self.site.groups,
        )
        self._when_possible(end_rest)
        failure = failure_of(
            self.name, end, self.site.log, ready=self.record.ready, out_of_memory=out_of_memory
        )
        had = self._recorded()
        left = had if self.record.gateway else ()
        stopped = {kernel.id for kernel in (*self._kernels, *had)} - {kernel.id for kernel in left}
        self._when_possible(self.site.server_dir.remove)
        self.site.groups.remove(self.name)
        return Ended(end, self._method, tuple(sorted(stopped)), left, failure)

    # The life of a server

    def _watch(self) -> Fact | None:
        self._endpoint = self._until_ready()
        written = True
        if self._endpoint is not None:
            self.record = self.record.model_copy(update={"ready": True})
            written = self._write_record()
            self.site.report(
                Report(self.name, self.generation, Ready(self._endpoint, self._instance))
            )
        while not self._ended_within(_ROTATE_EVERY):
            if self.site.threads.closed:
                return None
            written = written or self._write_record()
            self._tend_log()
            self._memory.count()
        return self._bury()

    def _until_ready(self) -> Endpoint | None:
        """Wait until it answers as itself; None if it ends first or the keeper closes."""
        pause, slowest = _PROOF_PAUSES if self._token is not None else _FOUND_PAUSES
        self._memory.count()
        while True:
            endpoint = self._announced()
            if endpoint is not None and self.site.client.proves(endpoint):
                if self._hold is not None:
                    self._hold.close()
                return endpoint
            # Until it reports there is nothing to probe; its report wakes this thread.
            silent = endpoint is None and self._will_say
            if (
                self._ended_within(_ROTATE_EVERY if silent else pause, or_says=silent)
                or self.site.threads.closed
            ):
                return None
            self._tend_log()
            pause = min(pause * 1.2, slowest)

    @property
    def _will_say(self) -> bool:
        """Whether it can still report its readiness, as servers of this keeper do."""
        return self._token is not None and self._pipe is not None and bool(self._pipe.readable)

    def _announced(self) -> Endpoint | None:
        """Return its endpoint once it reports that it listens.

        Servers of this keeper report on the pipe, others in Jupyter's info file.
        """
        said = self._pipe.said("ready") if self._pipe else None
        if said is None and self._will_say:
            return None
        pid = self.process.pid
        endpoint = (
            read_info(self.site.server_dir.jupyter, pid) if said is None else endpoint_of(said, pid)
        )
        endpoint = endpoint and self._as_asked(endpoint)
        # Checked before anything is sent there: the token is for this process alone, and Jupyter
        # writes its file before it has the port.
        return endpoint if endpoint and self.process.listens_on(endpoint.port) else None

    def _as_asked(self, said: Endpoint) -> Endpoint:
        """Return the endpoint; the launch's values override those that the user can influence."""
        asked = self.record.asked
        return with_url(
            said,
            hostname=asked.hostname,
            port=asked.port,
            base_url=asked.base_url,
            secure=asked.secure or said.secure,
            behind_edge=asked.behind_edge,
            token=self._token or said.token,
        )

    def _ended_within(self, seconds: float, *, or_says: bool = False) -> bool:
        said = self._pipe.readable if or_says and self._pipe else []
        return wait_until_ended(
            self.process, or_readable=[self.site.threads.wake, *said], timeout=seconds
        )

    def _when_possible(self, step: Callable[[], object]) -> None:
        """Run a step, retrying while resources are lacking: a reported end leaves nothing behind.

        Raises OSError when the keeper closes.
        """
        while True:
            try:
                step()
                return
            except OSError as error:
                if not shortage.is_ours(error) or self.site.threads.sleep(_TRIED_AGAIN):
                    raise

    # Small things

    def _write_record(self) -> bool:
        """Write the record; return whether that succeeded: a full disk may have space later."""
        try:
            self.site.server_dir.write_record(self.record)
        except OSError:
            return False
        return True

    def _recorded(self) -> tuple[OwnKernel, ...]:
        return read_kernels(self.site.server_dir.kernels)

    def _says_how(self, keep_kernels: bool, patience: float) -> bool:
        """Tell the server how to end its kernels on a gateway; return whether it will comply."""
        try:
            self.site.server_dir.write_stop_request(
                keep_kernels=keep_kernels, within=patience * _FOR_KERNELS
            )
        except OSError:
            return not keep_kernels
        return True

    def _escalate(self, method: StopMethod) -> None:
        """Record the method used to end it; a slow gentle method does not replace a harsher one."""
        self._method = max(self._method, method, key=list(StopMethod).index)

    def _tend_log(self) -> None:
        if self.site.echo is not None:
            self.site.echo.repeat()
        self.site.log.rotate()
