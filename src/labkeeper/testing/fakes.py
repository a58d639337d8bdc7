"""The core's ports in memory: a clock that jumps, a store, a manual executor, and others.

A test controls the *world*: `World` is the machine, `FakeBackend` a keeper's access to it. A second
`FakeBackend` over the same world is a second keeper after a crash of the first.

    world, store, clock = World(), MemoryStore(), FakeClock()
    executor = InlineExecutor(lambda report: fleet.step(report))
    fleet = Fleet(
        backend=FakeBackend(executor.receive, world), preflight=PassingPreflight(),
        orphans=MemoryOrphans(), store=store, executor=executor, clock=clock, policy=Policy(),
    )
    fleet.step(Create(a_spec("lab")))
    executor.run_all()
    world.crash("lab", Exit(signal="SIGSEGV"))
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence

from labkeeper.core.access import WHOLE, Session, SessionUse, Token, View
from labkeeper.core.errors import StoreError
from labkeeper.core.lifecycle import State
from labkeeper.core.messages import Change, HistoryEntry, Report
from labkeeper.core.ports import UsagePoints
from labkeeper.core.server import OrphanedKernel, OwnKernel, Snapshot
from labkeeper.core.spec import QualifiedName, ServerName, ServerSpec
from labkeeper.core.usage import Point


def a_spec(
    name: str = "default", *, root_dir: str = "/notebooks", port: int | None = None
) -> ServerSpec:
    """Return a spec of which only the name matters."""
    return ServerSpec(ServerName(name), root_dir, port=port)


class FakeClock:
    """A clock that stands still until `advance`."""

    def __init__(self, *, monotonic: float = 0.0, time: float = 1_000_000.0) -> None:
        self._monotonic = monotonic
        self._time = time

    def monotonic(self) -> float:
        """Return seconds that never go back."""
        return self._monotonic

    def time(self) -> float:
        """Return seconds since the epoch."""
        return self._time

    def advance(self, seconds: float) -> None:
        """Advance by `seconds` at once."""
        self._monotonic += seconds
        self._time += seconds


class MemoryStore:
    """A store in memory that can be made to fail."""

    def __init__(self) -> None:
        self.snapshots: dict[QualifiedName, Snapshot] = {}
        self.kernels: dict[str, OrphanedKernel] = {}
        """By kernel id."""
        self.history: list[HistoryEntry] = []
        self.kept_tokens: dict[str, Token] = {}
        """By id."""
        self.kept_sessions: dict[str, Session] = {}
        """By id."""
        self.kept_session_use: SessionUse | None = None
        self.kept_usage: dict[tuple[QualifiedName, int], dict[int, Point]] = {}
        """By server and level, then by start of the interval."""
        self.failing = False
        """While true, every call raises StoreError."""

    def load(self) -> list[Snapshot]:
        """Return all servers."""
        self._check("read")
        return list(self.snapshots.values())

    def save(self, snapshot: Snapshot) -> None:
        """Save one server."""
        self._check("write")
        self.snapshots[snapshot.qualified_name] = snapshot

    def forget(self, name: QualifiedName) -> None:
        """Remove one server."""
        self._check("write")
        self.snapshots.pop(name, None)
        self.kept_usage = {key: kept for key, kept in self.kept_usage.items() if key[0] != name}

    def orphans(self) -> list[OrphanedKernel]:
        """Return all kernels that are still to be ended."""
        self._check("read")
        return list(self.kernels.values())

    def add_orphans(self, orphans: Sequence[OrphanedKernel]) -> None:
        """Add kernels."""
        self._check("write")
        self.kernels |= {orphan.kernel_id: orphan for orphan in orphans}

    def discard_orphans(self, kernel_ids: Sequence[str]) -> None:
        """Remove kernels."""
        self._check("write")
        for kernel_id in kernel_ids:
            self.kernels.pop(kernel_id, None)

    def wipe(self) -> None:
        """Do nothing: there is no disk."""

    def forgotten(self, after: int) -> int:
        """Return the number of dropped entries newer than an id."""
        self._check("read")
        return max(0, self.last_id() - after) - sum(entry.id > after for entry in self.history)

    def last_id(self) -> int:
        """Return the id of the newest entry."""
        self._check("read")
        return self.history[-1].id if self.history else 0

    def remember(self, entries: Sequence[HistoryEntry], *, keep: int) -> None:
        """Add entries."""
        self._check("write")
        self.history = [*self.history, *entries]
        while len(self.history) > keep:
            ((actor, _),) = Counter(entry.origin.actor for entry in self.history).most_common(1)
            self.history.remove(
                next(entry for entry in self.history if entry.origin.actor == actor)
            )

    def remembered(self, view: View = WHOLE, *, after: int, limit: int) -> list[HistoryEntry]:
        """Return the oldest entries newer than an id."""
        self._check("read")
        return [entry for entry in self.history if entry.id > after and view.shows(entry)][:limit]

    def latest(self, view: View = WHOLE, *, limit: int) -> list[HistoryEntry]:
        """Return the newest entries, oldest first."""
        return self.remembered(view, after=0, limit=len(self.history))[-limit:]

    def tokens(self) -> list[Token]:
        """Return all tokens."""
        self._check("read")
        return list(self.kept_tokens.values())

    def save_token(self, token: Token) -> None:
        """Save a token."""
        self._check("write")
        self.kept_tokens[token.id] = token

    def forget_token(self, id: str) -> None:  # noqa: A002 - as the field is called
        """Remove a token."""
        self._check("write")
        self.kept_tokens.pop(id, None)

    def sessions(self) -> list[Session]:
        """Return all sessions, the oldest first."""
        self._check("read")
        return list(self.kept_sessions.values())

    def save_session(self, session: Session) -> None:
        """Save a session."""
        self._check("write")
        self.kept_sessions[session.id] = session

    def forget_sessions(self, ids: Collection[str]) -> None:
        """Remove sessions."""
        self._check("write")
        for id_ in ids:
            self.kept_sessions.pop(id_, None)

    def session_use(self) -> SessionUse | None:
        """Return when sessions were last used."""
        self._check("read")
        return self.kept_session_use

    def save_session_use(self, use: SessionUse) -> None:
        """Save when sessions were last used."""
        self._check("write")
        self.kept_session_use = use

    def add_usage(self, points: UsagePoints) -> None:
        """Add points, merged with those of the same intervals."""
        self._check("write")
        for (server, level), found in points.items():
            if server in self.snapshots:
                kept = self.kept_usage.setdefault((server, level), {})
                for point in found:
                    known = kept.get(point.at)
                    kept[point.at] = point if known is None else known.merged(point)

    def trim_usage(self, sizes: Mapping[int, int]) -> None:
        """Keep the newest points of each server."""
        self._check("write")
        for (_, level), kept in self.kept_usage.items():
            for at in sorted(kept)[: -sizes[level]]:
                del kept[at]

    def usage(self, server: QualifiedName, level: int, *, since: int) -> list[Point]:
        """Return the points of a level that start at `since` or later, oldest first."""
        self._check("read")
        kept = self.kept_usage.get((server, level), {})
        return [kept[at] for at in sorted(kept) if at >= since]

    def _check(self, what: str) -> None:
        if self.failing:
            raise StoreError(f"cannot {what} the store: it was told to fail")


class PassingPreflight:
    """A preflight that passes every gateway and records its calls."""

    def __init__(self) -> None:
        self.begun: list[tuple[QualifiedName, int, tuple[OwnKernel, ...]]] = []

    def begin(self, spec: ServerSpec, generation: int, kernels: Sequence[OwnKernel]) -> None:
        """Record a launch, and the kernels that it is to take over."""
        self.begun.append((spec.qualified_name, generation, tuple(kernels)))


class MemoryOrphans:
    """Orphaned kernels in memory."""

    def __init__(self) -> None:
        self.orphans: list[OrphanedKernel] = []

    def add(self, orphans: Sequence[OrphanedKernel]) -> None:
        """Add kernels."""
        self.orphans.extend(orphans)

    def all(self) -> list[OrphanedKernel]:
        """Return all kernels."""
        return list(self.orphans)


class InlineExecutor:
    """Queues jobs and runs them on request in the caller's thread. Reports go to `mailbox`."""

    def __init__(self, mailbox: Callable[[Report], object]) -> None:
        self._mailbox = mailbox
        self._queues: defaultdict[QualifiedName, deque[Callable[[], Report | None]]] = defaultdict(
            deque
        )
        self._reports: deque[Report] = deque()

    def submit(
        self, name: QualifiedName, job: Callable[[], Report | None], _failed: Report | None = None
    ) -> None:
        """Queue a job; its exceptions are raised by the method that runs it."""
        self._queues[name].append(job)

    def receive(self, report: Report) -> None:
        """Queue a report, like the mailbox of a real keeper; `deliver` passes it on."""
        self._reports.append(report)

    @property
    def waiting(self) -> list[QualifiedName]:
        """The names with queued jobs."""
        return [name for name, queued in self._queues.items() if queued]

    def deliver(self) -> bool:
        """Deliver the oldest report; return whether there was one."""
        if not self._reports:
            return False
        self._mailbox(self._reports.popleft())
        return True

    def run_next(self, name: QualifiedName | str) -> bool:
        """Run the oldest job of a server and queue its report; return whether there was a job."""
        queued = self._queues[QualifiedName(name)]
        if not queued:
            return False
        report = queued.popleft()()
        if report is not None:
            self.receive(report)
        return True

    def run_all(self) -> None:
        """Run jobs and deliver reports until none are left."""
        while self.deliver() or any(self.run_next(name) for name in self.waiting):
            pass

    def drop(self) -> None:
        """Drop all jobs and reports, as a crash does."""
        self._queues.clear()
        self._reports.clear()


class Recorder:
    """A subscriber that records changes."""

    def __init__(self) -> None:
        self.changes: list[Change] = []

    def changed(self, change: Change) -> None:
        """Record one change."""
        self.changes.append(change)

    def states(self, name: QualifiedName | str) -> list[State]:
        """Return the states that a server entered, in order, each stay once."""
        states: list[State] = []
        for change in self.changes:
            if change.after.qualified_name == name and (
                not states or states[-1] is not change.after.state
            ):
                states.append(change.after.state)
        return states
