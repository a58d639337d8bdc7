"""One launch of one server, attended: from its process, over the proof that it is ready, to the proof that nothing is left."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
from structlog.contextvars import bound_contextvars

from labkeeper import shortage
from labkeeper.backends.local.cleanup import end_leftovers
from labkeeper.backends.local.echo import Echo
from labkeeper.backends.local.launching import Launched, ReportPipe, exit_of
from labkeeper.backends.local.limits import ControlGroups, MemoryKills
from labkeeper.backends.local.logs import LogFile
from labkeeper.backends.local.processes import Process, wait_until_ended
from labkeeper.backends.local.server_dir import Record, ServerDir
from labkeeper.core.errors import BackendError, BackendUnavailable
from labkeeper.core.messages import Ended, Fact, Ready, Report, Unreachable
from labkeeper.core.server import Endpoint, Exit, Failure, FailureClass, Instance, OwnKernel, StopMethod
from labkeeper.core.spec import ServerName
from labkeeper.jupyter.client import JupyterClient
from labkeeper.jupyter.failures import cause_of
from labkeeper.jupyter.records import endpoint_of, info_path, read_info, read_kernels, with_url
from labkeeper.threads import ThreadGroup

_TAIL_LINES: Final = 30
"""Lines of the log that a failure carries."""
_LONGEST_LINE: Final = 2000
"""Characters of each of them: they are kept with the server, and told in its history."""
_PROOF_PAUSES: Final = (0.005, 0.1)
"""Seconds between two looks at a server that says that it is ready and does not answer yet: at first, and at most."""
_FOUND_PAUSES: Final = (0.02, 0.1)
"""The same for a server that an earlier keeper launched, which has nobody to say so."""
_ROTATE_EVERY: Final = 2.0
"""Seconds between two looks at the size of a log."""
_LEFTOVER_GRACE: Final = 0.3
"""Seconds that what a server leaves behind has between SIGTERM and SIGKILL, after an end in good order."""
_FOR_KERNELS: Final = 0.75
"""The part of the time that a server gets to end which its kernels on a gateway get."""
_TRIED_AGAIN: Final = 0.2
"""Seconds after which a step is taken again that we lacked a descriptor for, say."""
_OUT_OF_MEMORY: Final = (
    "Linux killed it, because the memory that it may have had run out; ask for a higher memory_limit, or give the machine more",
    "most likely Linux killed it, because the machine's memory had run out; give it more, or limit what each server takes",
)
"""What a message says of a server that was killed for want of memory, for certain, and most likely."""
_LOOK_LIMIT: Final = 1.5
"""Seconds that a look at a running server may take, however slowly it answers; its next job waits meanwhile."""

_log = structlog.get_logger("labkeeper.backends.local.supervisor")


@dataclass(frozen=True, slots=True)
class Site:
    """What a supervisor works with."""

    name: ServerName
    server_dir: ServerDir
    log: LogFile
    echo: Echo | None
    """Repeats the server's log in the keeper's own."""
    groups: ControlGroups
    threads: ThreadGroup
    client: JupyterClient
    report: Callable[[Report], None]


@dataclass(slots=True, eq=False)
class ProcessSupervisor:
    """Supervises one launch, in a thread of its own. Made by `launched` or `adopted`."""

    site: Site
    process: Process
    record: Record
    _pipe: ReportPipe | None
    """What its fork server writes about its end, and the process about itself if we launched it."""
    _token: str | None = None
    """The token that it was launched with, if we launched it."""
    _child: subprocess.Popen[bytes] | None = None
    """Set if it is a child of ours, whose exit status we can read."""
    _hold: socket.socket | None = None
    """Keeps its port from others until it listens there itself."""
    _endpoint: Endpoint | None = None
    _over: threading.Event = field(default_factory=threading.Event)
    """Set when it is supervised no more."""
    _method: StopMethod = StopMethod.NONE
    _kernels: tuple[OwnKernel, ...] = ()
    """Those that it had when it was asked to end."""
    _looker: threading.Thread | None = None
    """Takes the last look at it; one that never ends is not joined by another."""
    _memory_kills: MemoryKills | None = None
    """Where those of it are counted that were killed for want of memory."""
    _killed: tuple[int, ...] = ()
    """What was counted in the last two looks: one that fell between a kill and the end that it led to must not hide it."""
    _known: set[Process] = field(default_factory=set)
    """Descendants seen before the end; beside the marked ones, for those that hide their environment."""

    @classmethod
    def launched(cls, site: Site, record: Record, launched: Launched, *, token: str, hold: socket.socket) -> ProcessSupervisor:
        """Return the supervisor of a process that this keeper has launched; `hold` is its port, closed by the supervisor."""
        return cls(site, launched.process, record, launched.report, token, launched.child, hold)

    @classmethod
    def adopted(cls, site: Site, record: Record, pipe: ReportPipe | None) -> ProcessSupervisor:
        """Return the supervisor of a process that an earlier keeper launched; by `pipe` its fork server reports its end."""
        return cls(site, Process(record.pid, record.started), record, pipe)

    @property
    def name(self) -> ServerName:
        """The name of the server."""
        return self.site.name

    @property
    def generation(self) -> int:
        """The number of the launch."""
        return self.record.generation

    @property
    def _instance(self) -> Instance:
        record = self.record
        id_ = f"{record.boot}/{record.pid}/{record.started}"
        return Instance(id_, record.pid, record.launched_by, record.exec_reason, dict(record.limited_by))

    def supervise(self, deregister: Callable[[], None]) -> None:
        """Watch it until its end, or ours; report when it is ready, and what became of it.

        `deregister` is called before the last report: what is asked for next must not go to a supervisor that has ended.
        """
        last: Fact | None = Unreachable(f"nobody watches server '{self.name}'")
        try:
            with bound_contextvars(server=self.name, generation=self.generation):
                last = self._supervise()
        finally:
            deregister()
            self._over.set()
            if last is not None:
                self.site.report(Report(self.name, self.generation, last))

    def wait(self, seconds: float) -> None:
        """Wait until it is supervised no more."""
        self._over.wait(seconds)

    def finish(self) -> Ended:
        """End what a process that has ended left, remove its directory, and return how it ended.

        Raises BackendUnavailable when something lives on.
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
        except Exception as error:  # noqa: BLE001 - a bug: what became of the server has to be found out some other way
            _log.exception("cannot watch a server")
            return Unreachable(f"cannot watch server '{self.name}': {error!r}")
        finally:
            self._close()

    def _close(self) -> None:
        """Release what is held for it, but the process."""
        for held in (self._hold, self._pipe):
            if held is not None:
                held.close()
        if self._child is not None and self._child.returncode is None:
            # A living child is left to the next keeper, without the warning that its handle would give when it is collected.
            self._child.returncode = 0

    def look(self) -> bool | None:
        """Return whether it answers; None if we had no thread or no descriptor to ask with.

        However slowly it answers, this takes a limited time: a command to end it is queued behind it.
        """
        if self._endpoint is None or (self._looker is not None and self._looker.is_alive()):
            return False
        answers: queue.SimpleQueue[bool | None] = queue.SimpleQueue()
        try:
            self._looker = self.site.threads.start(f"look-{self.name}", self._look, self._endpoint, answers)
        except BackendUnavailable:
            return None
        try:
            return answers.get(timeout=_LOOK_LIMIT)
        except queue.Empty:
            return False

    def ask_to_end(self, patience: float, *, keep_kernels: bool) -> None:
        """Ask by Jupyter's own API for `patience` seconds, then by SIGTERM."""
        until = time.monotonic() + patience
        self._known.update(self.process.descendants())
        self._kernels = self._recorded()
        if self.record.gateway and not self._says_how(keep_kernels, patience):
            # It would end them. Killed, it cannot.
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
        """Send SIGKILL to it; the attending thread ends the rest."""
        self._known.update(self.process.descendants())
        self._escalate(StopMethod.SIGKILL)
        self.process.send(signal.SIGKILL)

    def _bury(self) -> Ended:
        """End what it left, remove its directory, and tell how it ended. Raises BackendUnavailable when something lives on."""
        end = self._exit()
        out_of_memory = self._out_of_memory(end)
        self._tend_log()
        # After an end in good order its leftovers get the chance of one, too.
        grace = _LEFTOVER_GRACE if end.clean else 0.0
        end_rest = functools.partial(
            end_leftovers, self.name, self.site.server_dir.path, self._known, grace=grace, groups=self.site.groups
        )
        self._when_possible(end_rest)
        failure = None
        if not (end.clean and self.record.ready):
            tail = self._tail_of_launch()
            kind, line = (FailureClass.OUT_OF_MEMORY, out_of_memory) if out_of_memory else cause_of(end, tail)
            what = "server '{}' ended" if self.record.ready else "cannot start server '{}': JupyterLab ended before it was ready"
            failure = Failure(kind, f"{what.format(self.name)} ({end})" + (f": {line}" if line else ""), end, tail)
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
            self.site.report(Report(self.name, self.generation, Ready(self._endpoint, self._instance)))
        while not self._ended_within(_ROTATE_EVERY):
            if self.site.threads.closed:
                return None
            written = written or self._write_record()
            self._tend_log()
            self._count_memory_kills()
        return self._bury()

    def _until_ready(self) -> Endpoint | None:
        """Wait until it answers as itself; None when it ended before, or we are closing."""
        pause, slowest = _PROOF_PAUSES if self._token is not None else _FOUND_PAUSES
        self._count_memory_kills()
        while True:
            endpoint = self._announced()
            if endpoint is not None and self.site.client.proves(endpoint):
                if self._hold is not None:
                    self._hold.close()
                return endpoint
            # As long as it has said nothing there is nothing to look at: what it says wakes us.
            silent = endpoint is None and self._will_say
            if self._ended_within(_ROTATE_EVERY if silent else pause, or_says=silent) or self.site.threads.closed:
                return None
            self._tend_log()
            pause = min(pause * 1.2, slowest)

    @property
    def _will_say(self) -> bool:
        """Whether it can still say to us when it is ready: one that we have launched does."""
        return self._token is not None and self._pipe is not None and bool(self._pipe.readable)

    def _announced(self) -> Endpoint | None:
        """Return where it listens, once it says that it does: to us, when we launched it; else in Jupyter's file."""
        said = self._pipe.said("ready") if self._pipe else None
        if said is None and self._will_say:
            return None
        pid = self.process.pid
        endpoint = read_info(self.site.server_dir.jupyter, pid) if said is None else endpoint_of(said, pid)
        endpoint = endpoint and self._as_asked(endpoint)
        # Before anything is sent there: our token is for its process alone. And Jupyter writes its file before it has the port.
        return endpoint if endpoint and self.process.listens_on(endpoint.port) else None

    def _as_asked(self, said: Endpoint) -> Endpoint:
        """Let what the launch asked for go over what the process says of itself, which its user has a hand in."""
        record = self.record
        told: dict[str, Any] = {}
        if (asked := record.asked) is not None:
            told = {"hostname": asked.hostname, "port": asked.port, "base_url": asked.base_url}
            told["secure"] = asked.secure or said.secure
        return with_url(said, **told, token=self._token or said.token)

    def _ended_within(self, seconds: float, *, or_says: bool = False) -> bool:
        said = self._pipe.readable if or_says and self._pipe else []
        return wait_until_ended(self.process, or_readable=[self.site.threads.wake, *said], timeout=seconds)

    def _exit(self) -> Exit:
        """Return how its process ended, as its parent saw it. If none did, its info file tells whether it ended in good order."""
        if self._child is not None:
            return exit_of(self._child.wait())
        seen = self._pipe.exit() if self._pipe else None
        if seen is not None:
            return seen
        left_it = os.path.lexists(info_path(self.site.server_dir.jupyter, self.process.pid))
        return Exit(code=0) if self.record.ready and not left_it else Exit()

    def _count_memory_kills(self) -> None:
        self._memory_kills = self._memory_kills or self.site.groups.memory_kills(self.name)
        self._killed = (*self._killed[-1:], self._memory_kills.count())

    def _out_of_memory(self, end: Exit) -> str:
        """Return a sentence if Linux killed it for want of memory, "" otherwise."""
        if end.signal != signal.SIGKILL.name or self._method is StopMethod.SIGKILL or self._memory_kills is None:
            return ""
        grown = self._memory_kills.count() > self._killed[0]
        return _OUT_OF_MEMORY[0 if self._memory_kills.certain else 1] if grown else ""

    def _when_possible(self, step: Callable[[], object]) -> None:
        """Take a step as soon as we have what that takes: when an end is told, nothing is left. Raises OSError when we close."""
        while True:
            try:
                step()
                return
            except OSError as error:
                if not shortage.is_ours(error) or self.site.threads.sleep(_TRIED_AGAIN):
                    raise

    # Small things

    def _write_record(self) -> bool:
        """Write what is known of it; return whether that succeeded: a full disk may have space later."""
        try:
            self.site.server_dir.write_record(self.record)
        except OSError:
            return False
        return True

    def _look(self, endpoint: Endpoint, answers: queue.SimpleQueue[bool | None]) -> None:
        answers.put(self.site.client.answers(endpoint))

    def _recorded(self) -> tuple[OwnKernel, ...]:
        return read_kernels(self.site.server_dir.kernels)

    def _says_how(self, keep_kernels: bool, patience: float) -> bool:
        """Tell it how its kernels on a gateway are to end; return whether it will be so."""
        try:
            self.site.server_dir.write_stop_request(keep_kernels=keep_kernels, within=patience * _FOR_KERNELS)
        except OSError:
            return not keep_kernels
        return True

    def _escalate(self, method: StopMethod) -> None:
        """Note what is used to end it; a gentler way that was slow does not take back a harder one."""
        self._method = max(self._method, method, key=list(StopMethod).index)

    def _tend_log(self) -> None:
        if self.site.echo is not None:
            self.site.echo.repeat()
        self.site.log.rotate()

    def _tail_of_launch(self) -> tuple[str, ...]:
        lines: list[str] = []
        with contextlib.suppress(OSError):  # A report is not held up by a log that cannot be read.
            lines = list(self.site.log.tail(_TAIL_LINES))
        starts = [at for at, line in enumerate(lines) if line.startswith("[labkeeper] launch ")]
        return tuple(line[:_LONGEST_LINE] for line in (lines[starts[-1] + 1 :] if starts else lines))
