"""The core's ports in memory: a clock that jumps, a store, an executor run by hand, a backend without processes.

A test steers the *world*: `World` is the machine, `FakeBackend` is what a keeper has on it. A second `FakeBackend` over
the same world is a second keeper after the first one crashed.

    world, store, clock = World(), MemoryStore(), FakeClock()
    executor = InlineExecutor(lambda report: fleet.step(report))
    fleet = Fleet(
        backend=FakeBackend(executor.receive, world), preflight=PassingPreflight(), orphans=MemoryOrphans(),
        store=store, executor=executor, clock=clock, policy=Policy(),
    )
    fleet.step(Create(a_spec("lab")))
    executor.run_all()
    world.crash("lab", Exit(signal="SIGSEGV"))
"""

from __future__ import annotations

import math
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from labkeeper.core.access import EVERYTHING, Token, TokenLimits, concerns
from labkeeper.core.culling import CullPolicy, Explanation, Facts, decide, limits_of
from labkeeper.core.errors import BackendRefused, BackendUnavailable, StoreError
from labkeeper.core.lifecycle import State
from labkeeper.core.messages import KEEPER, Change, Ended, Fact, Gone, HistoryEntry, HistoryKind, Origin, Ready, Report, Seen
from labkeeper.core.ports import Capacity
from labkeeper.core.server import Endpoint, Exit, Failure, FailureClass, OrphanedKernel, OwnKernel, Snapshot, StopMethod, Usage
from labkeeper.core.spec import ServerName, ServerSpec

_FIRST_PID: Final = 1000
_FIRST_PORT: Final = 49152


def a_spec(name: str = "default", *, root_dir: str = "/notebooks", port: int | None = None) -> ServerSpec:
    """Give a spec of which only the name matters."""
    return ServerSpec(ServerName(name), root_dir, port=port)


class FakeClock:
    """A clock that jumps: it stands still until `advance`."""

    def __init__(self, *, monotonic: float = 0.0, time: float = 1_000_000.0) -> None:
        self._monotonic = monotonic
        self._time = time

    def monotonic(self) -> float:
        """Seconds that never go back."""
        return self._monotonic

    def time(self) -> float:
        """Seconds since the epoch."""
        return self._time

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass at once."""
        self._monotonic += seconds
        self._time += seconds


class MemoryStore:
    """A store that forgets with the test, and fails when told to."""

    def __init__(self) -> None:
        self.snapshots: dict[ServerName, Snapshot] = {}
        self.kernels: dict[str, OrphanedKernel] = {}
        """By the kernel's id."""
        self.history: list[HistoryEntry] = []
        self.kept_tokens: dict[str, Token] = {}
        """By their ids."""
        self.failing = False
        """While true every call raises StoreError."""

    def load(self) -> list[Snapshot]:
        """Give all servers."""
        self._check("read")
        return list(self.snapshots.values())

    def save(self, snapshot: Snapshot) -> None:
        """Keep one server."""
        self._check("write")
        self.snapshots[snapshot.name] = snapshot

    def forget(self, name: ServerName) -> None:
        """Drop one server."""
        self._check("write")
        self.snapshots.pop(name, None)

    def orphans(self) -> list[OrphanedKernel]:
        """Give all kernels that are still to be ended."""
        self._check("read")
        return list(self.kernels.values())

    def add_orphans(self, orphans: Sequence[OrphanedKernel]) -> None:
        """Keep some more."""
        self._check("write")
        self.kernels |= {orphan.kernel_id: orphan for orphan in orphans}

    def discard_orphans(self, kernel_ids: Sequence[str]) -> None:
        """Drop some."""
        self._check("write")
        for kernel_id in kernel_ids:
            self.kernels.pop(kernel_id, None)

    def wipe(self) -> None:
        """Nothing is on any disk."""

    def forgotten(self, after: int) -> int:
        """Count the entries newer than an id that are known no more."""
        self._check("read")
        return max(0, self.last_id() - after) - sum(entry.id > after for entry in self.history)

    def last_id(self) -> int:
        """Give the id of the newest entry."""
        self._check("read")
        return self.history[-1].id if self.history else 0

    def remember(self, entries: Sequence[HistoryEntry], *, keep: int) -> None:
        """Keep some more."""
        self._check("write")
        self.history = [*self.history, *entries]
        while len(self.history) > keep:
            ((actor, _),) = Counter(entry.origin.actor for entry in self.history).most_common(1)
            self.history.remove(next(entry for entry in self.history if entry.origin.actor == actor))

    def remembered(
        self, *, after: int, server: ServerName | None, limit: int, within: TokenLimits = EVERYTHING
    ) -> list[HistoryEntry]:
        """Give the oldest that are newer than an id."""
        self._check("read")
        return [entry for entry in self.history if entry.id > after and concerns(entry, server, within)][:limit]

    def latest(self, *, server: ServerName | None, limit: int, within: TokenLimits = EVERYTHING) -> list[HistoryEntry]:
        """Give the newest ones, the oldest of them first."""
        return self.remembered(after=0, server=server, limit=len(self.history), within=within)[-limit:]

    def tokens(self) -> list[Token]:
        """Give all."""
        self._check("read")
        return list(self.kept_tokens.values())

    def save_token(self, token: Token) -> None:
        """Keep one."""
        self._check("write")
        self.kept_tokens[token.id] = token

    def forget_token(self, id: str) -> None:  # noqa: A002 - as the field is called
        """Drop one."""
        self._check("write")
        self.kept_tokens.pop(id, None)

    def _check(self, what: str) -> None:
        if self.failing:
            raise StoreError(f"cannot {what} the store: it was told to fail")


class PassingPreflight:
    """A gate that finds every gateway fit, and remembers what it was asked to expect."""

    def __init__(self) -> None:
        self.begun: list[tuple[ServerName, int, tuple[OwnKernel, ...]]] = []

    def begin(self, spec: ServerSpec, generation: int, kernels: Sequence[OwnKernel]) -> None:
        """Remember a launch, and the kernels that it is to take over."""
        self.begun.append((spec.name, generation, tuple(kernels)))


class MemoryOrphans:
    """Orphaned kernels that are kept."""

    def __init__(self) -> None:
        self.orphans: list[OrphanedKernel] = []

    def add(self, orphans: Sequence[OrphanedKernel]) -> None:
        """Take in more."""
        self.orphans.extend(orphans)

    def all(self) -> list[OrphanedKernel]:
        """Give all."""
        return list(self.orphans)


class NoCulling:
    """An explainer that has looked at no server, by a clock that stands still."""

    def refresh(self, snapshot: Snapshot) -> Explanation:
        """Say how a server stands to its rules."""
        facts = Facts(limits_of(snapshot.spec), 0.0, 0.0, snoozed_until=snapshot.snoozed_until or -math.inf)
        return Explanation(snapshot, decide(facts, CullPolicy(), 0.0), snapshot.since, None)

    cached = refresh


class Notes:
    """An event log that remembers."""

    def __init__(self) -> None:
        self.taken: list[tuple[HistoryKind, ServerName | None, str, Origin, Mapping[str, object]]] = []

    def record(
        self,
        kind: HistoryKind,
        server: ServerName | None,
        message: str,
        *,
        origin: Origin = KEEPER,
        generation: int | None = None,  # noqa: ARG002 - nobody asks for it
        details: Mapping[str, object] | None = None,
    ) -> None:
        """Remember one thing."""
        self.taken.append((kind, server, message, origin, details or {}))


class InlineExecutor:
    """Queues jobs, and runs them when told to, in the caller's thread. Reports, also those to `hear`, go to `mailbox`."""

    def __init__(self, mailbox: Callable[[Report], object]) -> None:
        self._mailbox = mailbox
        self._queues: defaultdict[ServerName, deque[Callable[[], Report | None]]] = defaultdict(deque)
        self._reports: deque[Report] = deque()

    def submit(self, name: ServerName, job: Callable[[], Report | None], _failed: Report | None = None) -> None:
        """Queue a job; what it raises is raised to whoever runs it."""
        self._queues[name].append(job)

    def receive(self, report: Report) -> None:
        """Queue a report, as the mailbox of a real keeper does; `deliver` hands it over."""
        self._reports.append(report)

    @property
    def waiting(self) -> list[ServerName]:
        """The names that have jobs queued."""
        return [name for name, queued in self._queues.items() if queued]

    def deliver(self) -> bool:
        """Hand over the oldest report; say whether there was one."""
        if not self._reports:
            return False
        self._mailbox(self._reports.popleft())
        return True

    def run_next(self, name: ServerName | str) -> bool:
        """Run the oldest job of one server, and queue the report that it returns; return whether there was one."""
        queued = self._queues[ServerName(name)]
        if not queued:
            return False
        report = queued.popleft()()
        if report is not None:
            self.receive(report)
        return True

    def run_all(self) -> None:
        """Run jobs and deliver reports until neither is left."""
        while self.deliver() or any(self.run_next(name) for name in self.waiting):
            pass

    def drop(self) -> None:
        """Lose all jobs and reports, as a keeper does that crashes."""
        self._queues.clear()
        self._reports.clear()


class Recorder:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.changes: list[Change] = []

    def changed(self, change: Change) -> None:
        """Hear of one change."""
        self.changes.append(change)

    def states(self, name: ServerName | str) -> list[State]:
        """Give the states that a server came to, in order, each stay once."""
        states: list[State] = []
        for change in self.changes:
            if change.after.name == name and (not states or states[-1] is not change.after.state):
                states.append(change.after.state)
        return states


@dataclass(slots=True)
class Temper:
    """How the processes under one name behave, and how well the machine answers about them."""

    boots: bool = True
    """Ready as soon as it is launched; else when the test calls `World.answer`."""
    obeys: bool = True
    """Ends when it is asked to; else only when it is told to."""
    killable: bool = True
    """Ends when it is told to; else only when the test lets it."""
    refusal: BackendRefused | None = None
    """Raised by each launch."""
    reachable: bool = True
    """While false every call raises BackendUnavailable, and does nothing."""
    answers_lost: bool = False
    """While true every call does its work, and then raises BackendUnavailable; nobody watches what it left."""


@dataclass(slots=True, eq=False)
class FakeProcess:
    """One process in a world."""

    spec: ServerSpec
    generation: int
    pid: int
    port: int
    answers: bool = False
    kernels: tuple[OwnKernel, ...] = ()
    """Kernels on its gateway; they end with it only when it is asked to end, and not told to keep them."""
    method: StopMethod = StopMethod.NONE
    """The last means that was used to end it."""
    watcher: FakeBackend | None = None
    watched_as: int = 0
    """The launch number under which its watcher reports."""
    greeted: bool = False
    """Whether its watcher has been told that it is ready."""

    @property
    def name(self) -> ServerName:
        """The name of its server."""
        return self.spec.name

    @property
    def endpoint(self) -> Endpoint:
        """Where it would answer."""
        return Endpoint(
            base_url=self.spec.base_url,
            hostname=self.spec.ip,
            notebook_dir=self.spec.root_dir,
            password=False,
            pid=self.pid,
            port=self.port,
            secure=False,
            token=f"token-of-{self.pid}",
            url=f"http://{self.spec.ip}:{self.port}{self.spec.base_url}",
            version="0",
            launched_by="fake",
        )


@dataclass(slots=True)
class World:
    """A machine: its processes, logs and memory of ends outlive any one backend. Any thread may use it."""

    processes: list[FakeProcess] = field(default_factory=list)
    """Those that live."""
    launched: list[tuple[ServerName, int]] = field(default_factory=list)
    """Each process that ever began: its name and launch number, in order."""
    ends: dict[ServerName, tuple[int, Ended]] = field(default_factory=dict)
    """How the last process under a name ended; empty it, and nobody knows."""
    logs: dict[ServerName, list[str]] = field(default_factory=dict)
    kernels_ended: set[str] = field(default_factory=set)
    """Ids of the kernels that servers ended on their gateway when they were asked to end."""
    programs: dict[ServerName, tuple[str, ...]] = field(default_factory=dict)
    """What runs in the terminals of a server; of one that is not here it cannot be known."""
    capacity: Capacity | None = None
    """How much memory there is; None if that is unknown."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    _tempers: dict[str, Temper] = field(default_factory=dict)
    _pids: Iterator[int] = field(default_factory=lambda: count(_FIRST_PID))
    _ports: Iterator[int] = field(default_factory=lambda: count(_FIRST_PORT))

    def temper(self, name: ServerName | str) -> Temper:
        """Give the temper of a name, to be changed in place."""
        return self._tempers.setdefault(name, Temper())

    def living(self, name: ServerName | str) -> list[FakeProcess]:
        """Give the processes under a name; more than one is a bug of whoever launched them."""
        with self.lock:
            return [process for process in self.processes if process.name == name]

    def answer(self, name: ServerName | str) -> None:
        """Let what lives under a name answer from now on."""
        with self.lock:
            for process in self.living(name):
                process.answers = True
                _greet(process)

    def silence(self, name: ServerName | str) -> None:
        """Let what lives under a name answer no more."""
        with self.lock:
            for process in self.living(name):
                process.answers = False

    def leave(self, name: ServerName | str) -> None:
        """Let it end by itself in good order, as when its user shuts it down from inside."""
        self.crash(name, Exit(code=0))

    def crash(self, name: ServerName | str, end: Exit = Exit(signal="SIGKILL")) -> None:  # noqa: B008 - frozen
        """Let what lives under a name end."""
        for process in self.living(name):
            self.end(process, end)

    def begin(self, spec: ServerSpec, generation: int) -> FakeProcess:
        """Start a process."""
        with self.lock:
            process = FakeProcess(spec, generation, next(self._pids), spec.port or next(self._ports))
            self.processes.append(process)
            self.launched.append((spec.name, generation))
            self.ends.pop(spec.name, None)
            self.write(spec.name, f"launch {generation} of server '{spec.name}', pid {process.pid}")
            return process

    def end(self, process: FakeProcess, end: Exit) -> None:
        """End a process, and tell its watcher."""
        with self.lock:
            if process not in self.processes:
                return
            self.processes.remove(process)
            self.write(process.name, f"pid {process.pid} ended: {end}")
            ended = Ended(end, process.method, kernels_left=process.kernels, failure=self._cause(process, end))
            self.ends[process.name] = (process.generation, ended)
            if process.watcher is not None:
                process.watcher.say(process.name, process.watched_as, ended)

    def write(self, name: ServerName, line: str) -> None:
        """Add a line to a server's log."""
        self.logs.setdefault(name, []).append(line)

    def _cause(self, process: FakeProcess, end: Exit) -> Failure | None:
        if end.clean:
            return None
        kind = FailureClass.KILLED if end.signal else FailureClass.OTHER
        return Failure(kind, f"server '{process.name}' ended ({end})", end, tuple(self.logs[process.name][-3:]))


class FakeBackend:
    """`core.ports.Backend` over a `World`; see there for the laws."""

    def __init__(self, report: Callable[[Report], object], world: World | None = None) -> None:
        self.world = World() if world is None else world
        self._report: Callable[[Report], object] | None = report
        self._measured = 0

    def abandon(self) -> None:
        """Report nothing any more, as the backend of a keeper that crashed; its processes live on."""
        self._report = None

    def say(self, name: ServerName, generation: int, fact: Fact) -> None:
        """Report a fact; the world calls it for the processes that are watched from here."""
        if self._report is not None:
            self._report(Report(name, generation, fact))

    def launch(self, spec: ServerSpec, generation: int) -> None:
        """Start a process, unless this launch has one already; what an earlier launch left is ended first."""
        with self.world.lock:
            temper = self._reach(spec.name)
            if temper.refusal is not None:
                raise temper.refusal
            process = self._clear(spec, generation) or self.world.begin(spec, generation)
            if not temper.answers_lost:
                self._watch(process, generation)
            if temper.boots:
                self.world.answer(spec.name)
            self._lose(temper)

    def terminate(
        self,
        name: ServerName,
        generation: int,
        grace: float,  # noqa: ARG002 - nothing here takes time
        *,
        keep_kernels: bool = False,
    ) -> None:
        """Ask what lives under a name to end."""
        with self.world.lock:
            temper = self._reach(name)
            if temper.obeys and not keep_kernels:
                for process in self.world.living(name):
                    self.world.kernels_ended |= {kernel.id for kernel in process.kernels}
                    process.kernels = ()
            self._end(name, generation, StopMethod.SHUTDOWN, Exit(code=0) if temper.obeys else None)
            self._lose(temper)

    def kill(self, name: ServerName, generation: int) -> None:
        """End what lives under a name."""
        with self.world.lock:
            temper = self._reach(name)
            self._end(name, generation, StopMethod.SIGKILL, Exit(signal="SIGKILL") if temper.killable else None)
            self._lose(temper)

    def observe(self, name: ServerName, generation: int) -> Fact:
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

    def forget(self, name: ServerName) -> None:
        """Remove the log, and the memory of how it ended."""
        with self.world.lock:
            self.world.logs.pop(name, None)
            self.world.ends.pop(name, None)

    def usage(self, names: Collection[ServerName]) -> Mapping[ServerName, Usage]:
        """Give the same for all that live; the clock of their processors does not stand still."""
        with self.world.lock:
            self._measured += 1
            living = {process.name for process in self.world.processes} & {*names}
            return {name: Usage(2**27, float(self._measured), processes=1, threads=2, proportional=2**26) for name in living}

    def strays(self, known: Collection[ServerName]) -> Collection[ServerName]:
        """Name what lives under names that are not known."""
        with self.world.lock:
            return {process.name for process in self.world.processes} - set(known)

    def sweep(self, name: ServerName) -> None:
        """End what lives under a name, and tell nobody."""
        with self.world.lock:
            for process in self.world.living(name):
                process.watcher = None
                self.world.end(process, Exit(signal="SIGKILL"))
            self.world.ends.pop(name, None)

    def log(self, name: ServerName, tail: int | None) -> Sequence[str]:
        """Give the last `tail` lines, or all."""
        lines = self.world.logs.get(name, [])
        return lines[:] if tail is None else lines[max(0, len(lines) - tail) :]

    def capacity(self) -> Capacity | None:
        """Return what the test said that the machine has."""
        return self.world.capacity

    def is_server(self, _pid: int) -> bool:
        """Return False: its servers are no processes."""
        return False

    def close(self) -> None:
        """Have nothing to end."""

    def programs(self, name: ServerName) -> Sequence[str] | None:
        """Say what the test said that runs in its terminals."""
        return self.world.programs.get(name)

    def follow(self, name: ServerName, tail: int | None, live: Callable[[], bool]) -> Iterator[str]:
        """Give lines as they are written; it never waits, so a reader that is too fast gets many empty texts."""
        log = self.world.logs.get(name, [])
        given = len(log) - len(self.log(name, tail))
        more = True
        while more:
            # Asked before reading: what was written before the end is still read after it.
            more = live() and self.world.logs.get(name) is log
            lines = log[given:]
            given += len(lines)
            yield from (f"{line}\n" for line in lines)
            if more:
                yield ""

    def _reach(self, name: ServerName) -> Temper:
        temper = self.world.temper(name)
        if not temper.reachable:
            raise BackendUnavailable(f"cannot reach the machine of server '{name}': it was told not to answer")
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
        """End all of other launches; give the process of this one."""
        for process in self.world.living(spec.name):
            if process.generation == generation:
                return process
            if not self.world.temper(spec.name).killable:
                why = f"launch {process.generation} of it cannot be ended"
                raise BackendUnavailable(f"cannot start server '{spec.name}': {why}")
            self._end(spec.name, process.watched_as, StopMethod.SIGKILL, Exit(signal="SIGKILL"))
        return None

    def _end(self, name: ServerName, generation: int, method: StopMethod, end: Exit | None) -> None:
        """Use one means to end what lives under a name; it has worked where `end` says how."""
        living = self.world.living(name)
        if not living:
            self.say(name, generation, Ended(Exit()))
        for process in living:
            process.method = method
            process.watcher, process.watched_as = self, generation
            if end is not None:
                self.world.end(process, end)


def _greet(process: FakeProcess) -> None:
    """Report that a process is ready: once to each watcher, and once more after each observation."""
    if process.watcher is not None and not process.greeted:
        process.greeted = True
        process.watcher.say(process.name, process.watched_as, Ready(process.endpoint))
