"""A backend without processes: `World` is the machine that tests control, `FakeBackend` uses it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from labkeeper.core.access import Caller
from labkeeper.core.errors import BackendRefused, BackendUnavailable
from labkeeper.core.messages import Ended, Fact, Gone, Ready, Report, Seen
from labkeeper.core.ports import Capacity, Library
from labkeeper.core.server import (
    Endpoint,
    Exit,
    Failure,
    FailureClass,
    Instance,
    OwnKernel,
    StopMethod,
    Usage,
)
from labkeeper.core.spec import QualifiedName, ServerSpec


@dataclass(slots=True)
class Temper:
    """The behaviour of the processes under one name, and of calls about them."""

    boots: bool = True
    """Whether it is ready as soon as it is launched, or only on `World.answer`."""
    obeys: bool = True
    """Whether it ends on terminate."""
    killable: bool = True
    """Whether it ends on kill; if not, only the test can end it."""
    refusal: BackendRefused | None = None
    """Raised by each launch."""
    reachable: bool = True
    """While false, every call raises BackendUnavailable and does nothing."""
    answers_lost: bool = False
    """While true, every call works but then raises BackendUnavailable; its outcome is unwatched."""


@dataclass(slots=True, eq=False)
class FakeProcess:
    """One process in a world."""

    spec: ServerSpec
    generation: int
    pid: int
    port: int
    answers: bool = False
    kernels: tuple[OwnKernel, ...] = ()
    """Kernels on its gateway; they only end with it on a terminate without `keep_kernels`."""
    method: StopMethod = StopMethod.NONE
    """The last means that was used to end it."""
    watcher: FakeBackend | None = None
    watched_as: int = 0
    """The generation under which its watcher reports."""
    greeted: bool = False
    """Whether its readiness was reported to its watcher."""

    @property
    def name(self) -> QualifiedName:
        """The name of its server."""
        return self.spec.qualified_name

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint at which it would answer."""
        return Endpoint(
            url=f"http://{self.spec.ip}:{self.port}{self.spec.base_url}",
            token=f"token-of-{self.pid}",
            base_url=self.spec.base_url,
            hostname=self.spec.ip,
            port=self.port,
            secure=False,
            password=False,
            root_dir=self.spec.root_dir,
            version="0",
        )

    @property
    def instance(self) -> Instance:
        """Its reference in the backend."""
        return Instance(id=f"fake-{self.pid}", pid=self.pid, launched_by="fake")


@dataclass(slots=True)
class World:
    """A machine whose processes, logs and ends outlive any one backend. Thread-safe."""

    processes: list[FakeProcess] = field(default_factory=list)
    """The living processes."""
    launched: list[tuple[QualifiedName, int]] = field(default_factory=list)
    """All processes ever started, as name and generation, in order."""
    ends: dict[QualifiedName, tuple[int, Ended]] = field(default_factory=dict)
    """The end of the last process of each name; clear it to make the ends unknown."""
    logs: dict[QualifiedName, list[str]] = field(default_factory=dict)
    kernels_ended: set[str] = field(default_factory=set)
    """Ids of the kernels that servers ended on their gateway when they shut down."""
    programs: dict[QualifiedName, tuple[str, ...]] = field(default_factory=dict)
    """The programs in the terminals of each server; unknown for a missing one."""
    capacity: Capacity | None = None
    """The memory capacity; None if unknown."""
    libraries: tuple[Library, ...] = ()
    """The libraries that kernels are to share."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    _tempers: dict[str, Temper] = field(default_factory=dict)
    _pids: Iterator[int] = field(default_factory=lambda: count(1000))
    _ports: Iterator[int] = field(default_factory=lambda: count(49152))

    def temper(self, name: QualifiedName | str) -> Temper:
        """Return the temper of a name, to be modified in place."""
        return self._tempers.setdefault(name, Temper())

    def living(self, name: QualifiedName | str) -> list[FakeProcess]:
        """Return the processes under a name; more than one is a bug of their launcher."""
        with self.lock:
            return [process for process in self.processes if process.name == name]

    def answer(self, name: QualifiedName | str) -> None:
        """Make the processes under a name answer from now on."""
        with self.lock:
            for process in self.living(name):
                process.answers = True
                _greet(process)

    def silence(self, name: QualifiedName | str) -> None:
        """Make the processes under a name stop answering."""
        with self.lock:
            for process in self.living(name):
                process.answers = False

    def leave(self, name: QualifiedName | str) -> None:
        """End the processes in good order, as a user's shutdown from inside does."""
        self.crash(name, Exit(code=0))

    def crash(self, name: QualifiedName | str, end: Exit = Exit(signal="SIGKILL")) -> None:  # noqa: B008 - frozen
        """End the processes under a name."""
        for process in self.living(name):
            self.end(process, end)

    def begin(self, spec: ServerSpec, generation: int) -> FakeProcess:
        """Start a process."""
        with self.lock:
            process = FakeProcess(
                spec, generation, next(self._pids), spec.port or next(self._ports)
            )
            self.processes.append(process)
            self.launched.append((spec.qualified_name, generation))
            self.ends.pop(spec.qualified_name, None)
            self.write(
                spec.qualified_name,
                f"launch {generation} of server '{spec.name}', pid {process.pid}",
            )
            return process

    def end(self, process: FakeProcess, end: Exit) -> None:
        """End a process, and report to its watcher."""
        with self.lock:
            if process not in self.processes:
                return
            self.processes.remove(process)
            self.write(process.name, f"pid {process.pid} ended: {end}")
            ended = Ended(
                end, process.method, kernels_left=process.kernels, failure=self._cause(process, end)
            )
            self.ends[process.name] = (process.generation, ended)
            if process.watcher is not None:
                process.watcher.say(process.name, process.watched_as, ended)

    def write(self, name: QualifiedName, line: str) -> None:
        """Add a line to a server's log."""
        self.logs.setdefault(name, []).append(line)

    def _cause(self, process: FakeProcess, end: Exit) -> Failure | None:
        if end.clean:
            return None
        kind = FailureClass.KILLED if end.signal else FailureClass.OTHER
        return Failure(
            kind, f"server '{process.name}' ended ({end})", end, tuple(self.logs[process.name][-3:])
        )


class FakeBackend:
    """`core.ports.Backend` over a `World`; see there for the laws."""

    def __init__(
        self,
        report: Callable[[Report], object],
        world: World | None = None,
        *,
        validate: Callable[[ServerSpec, Caller], ServerSpec] = lambda spec, _: spec,
    ) -> None:
        self.world = World() if world is None else world
        self.validate = validate
        self._report: Callable[[Report], object] | None = report
        self._measured = 0

    def abandon(self) -> None:
        """Stop reporting, like the backend of a crashed keeper; the processes keep running."""
        self._report = None

    def say(self, name: QualifiedName, generation: int, fact: Fact) -> None:
        """Report a fact; called by the world for the processes watched from here."""
        if self._report is not None:
            self._report(Report(name, generation, fact))

    def launch(self, spec: ServerSpec, generation: int) -> None:
        """Start a process unless this launch has one; earlier launches are ended first."""
        with self.world.lock:
            temper = self._reach(spec.qualified_name)
            if temper.refusal is not None:
                raise temper.refusal
            process = self._clear(spec, generation) or self.world.begin(spec, generation)
            if not temper.answers_lost:
                self._watch(process, generation)
            if temper.boots:
                self.world.answer(spec.qualified_name)
            self._lose(temper)

    def terminate(
        self,
        name: QualifiedName,
        generation: int,
        grace: float,  # noqa: ARG002 - nothing here takes time
        *,
        keep_kernels: bool = False,
    ) -> None:
        """Terminate the processes under a name."""
        with self.world.lock:
            temper = self._reach(name)
            if temper.obeys and not keep_kernels:
                for process in self.world.living(name):
                    self.world.kernels_ended |= {kernel.id for kernel in process.kernels}
                    process.kernels = ()
            self._end(name, generation, StopMethod.SHUTDOWN, Exit(code=0) if temper.obeys else None)
            self._lose(temper)

    def kill(self, name: QualifiedName, generation: int) -> None:
        """Kill the processes under a name."""
        with self.world.lock:
            temper = self._reach(name)
            self._end(
                name,
                generation,
                StopMethod.SIGKILL,
                Exit(signal="SIGKILL") if temper.killable else None,
            )
            self._lose(temper)

    def observe(self, name: QualifiedName, generation: int) -> Fact:
        """Look for a process, and watch it from here on."""
        with self.world.lock:
            temper = self._reach(name)
            self._lose(temper)
            for process in self.world.living(name):
                process.greeted = False
                self._watch(process, generation)
                return Seen(process.answers)
            known, ended = self.world.ends.get(name, (None, None))
            return ended if ended is not None and known == generation else Gone()

    def forget(self, name: QualifiedName) -> None:
        """Remove the log and the recorded end."""
        with self.world.lock:
            self.world.logs.pop(name, None)
            self.world.ends.pop(name, None)

    def libraries(self) -> Sequence[Library]:
        """Return those of the world."""
        return self.world.libraries

    def usage(self, names: Collection[QualifiedName]) -> Mapping[QualifiedName, Usage]:
        """Return equal usage for all living servers, with increasing CPU time."""
        with self.world.lock:
            self._measured += 1
            living = {process.name for process in self.world.processes} & {*names}
            return {
                name: Usage(
                    2**27, float(self._measured), processes=1, threads=2, proportional=2**26
                )
                for name in living
            }

    def strays(self, known: Collection[QualifiedName]) -> Collection[QualifiedName]:
        """Return the living servers that are not known."""
        with self.world.lock:
            return {process.name for process in self.world.processes} - set(known)

    def sweep(self, name: QualifiedName) -> None:
        """End the processes under a name without a report."""
        with self.world.lock:
            for process in self.world.living(name):
                process.watcher = None
                self.world.end(process, Exit(signal="SIGKILL"))
            self.world.ends.pop(name, None)

    def log(self, name: QualifiedName, tail: int | None) -> Sequence[str]:
        """Return the last `tail` lines, or all."""
        lines = self.world.logs.get(name, [])
        return lines[:] if tail is None else lines[max(0, len(lines) - tail) :]

    def capacity(self) -> Capacity | None:
        """Return the capacity set by the test."""
        return self.world.capacity

    def is_server(self, _pid: int) -> bool:
        """Return False: no real process is a server."""
        return False

    def close(self) -> None:
        """Do nothing: there are no threads."""

    def programs(self, name: QualifiedName) -> Sequence[str] | None:
        """Return the terminal programs set by the test."""
        return self.world.programs.get(name)

    def follow(
        self, name: QualifiedName, tail: int | None, live: Callable[[], bool]
    ) -> Iterator[str]:
        """Yield lines as they are written; never waits, so a fast reader gets many empty texts."""
        log = self.world.logs.get(name, [])
        given = len(log) - len(self.log(name, tail))
        more = True
        while more:
            # Checked before reading: lines written before the end are still read after it.
            more = live() and self.world.logs.get(name) is log
            lines = log[given:]
            given += len(lines)
            yield from (f"{line}\n" for line in lines)
            if more:
                yield ""

    def _reach(self, name: QualifiedName) -> Temper:
        temper = self.world.temper(name)
        if not temper.reachable:
            raise BackendUnavailable(
                f"cannot reach the machine of server '{name}': it was told not to answer"
            )
        return temper

    def _lose(self, temper: Temper) -> None:
        if temper.answers_lost:
            raise BackendUnavailable("cannot say what came of it: the answer was lost, as told")

    def _watch(self, process: FakeProcess, generation: int) -> None:
        process.greeted = process.greeted and process.watcher is self
        process.watcher, process.watched_as = self, generation
        if process.answers:
            _greet(process)

    def _clear(self, spec: ServerSpec, generation: int) -> FakeProcess | None:
        """End all other launches; return the process of this one."""
        for process in self.world.living(spec.qualified_name):
            if process.generation == generation:
                return process
            if not self.world.temper(spec.qualified_name).killable:
                why = f"launch {process.generation} of it cannot be ended"
                raise BackendUnavailable(f"cannot start server '{spec.name}': {why}")
            self._end(
                spec.qualified_name, process.watched_as, StopMethod.SIGKILL, Exit(signal="SIGKILL")
            )
        return None

    def _end(
        self, name: QualifiedName, generation: int, method: StopMethod, end: Exit | None
    ) -> None:
        """Apply one means of ending to a name's processes; `end` is the exit if it works."""
        living = self.world.living(name)
        if not living:
            self.say(name, generation, Ended(Exit()))
        for process in living:
            process.method = method
            process.watcher, process.watched_as = self, generation
            if end is not None:
                self.world.end(process, end)


def _greet(process: FakeProcess) -> None:
    """Report readiness once to each watcher, and again after each observation."""
    if process.watcher is not None and not process.greeted:
        process.greeted = True
        process.watcher.say(
            process.name, process.watched_as, Ready(process.endpoint, process.instance)
        )
