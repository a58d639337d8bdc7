"""The culler: asks running servers how they are used, warns of those that nobody uses, and stops them.

A server is asked once a period, and when something is due, by a thread of its own, so that one that hangs holds up no other. One
that no rule is about is never asked.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import structlog

from labkeeper.core.culling import (
    ActivityHistory,
    CullPolicy,
    CullState,
    Explanation,
    Facts,
    Outlook,
    Rule,
    Verdict,
    decide,
    idle_kernels,
    limits_of,
    warned_at,
)
from labkeeper.core.durations import format_duration, format_time
from labkeeper.core.errors import BackendError
from labkeeper.core.lifecycle import Event, State
from labkeeper.core.messages import CULLER, Change, HistoryKind, Message, Order, Origin
from labkeeper.core.ports import Backend, Clock, EventLog, Probe
from labkeeper.core.server import Activity, Endpoint, KernelUse, Snapshot
from labkeeper.core.spec import ServerName
from labkeeper.threads import ThreadGroup

_LOOK_EVERY: Final = 0.5
"""Seconds between two looks at what is due."""

_log = structlog.get_logger("labkeeper.culler")


@dataclass(slots=True, eq=False)
class _Watched:
    """One launch that a rule is about."""

    snapshot: Snapshot
    endpoint: Endpoint
    facts: Facts
    memory: ActivityHistory
    due: float
    seen: Activity | None = None
    """What the server said last, in its own words; None where it did not answer."""
    looked_at: float | None = None
    asker: threading.Thread | None = None
    """Takes the look that was due, or did the last time."""


class Culler:
    """A listener of the fleet, with a thread of its own; see `core.ports.CullStatus`, too."""

    def __init__(
        self,
        give: Callable[[Message], object],
        *,
        backend: Backend,
        probe: Probe,
        event_log: EventLog,
        threads: ThreadGroup,
        clock: Clock,
        policy: CullPolicy,
        period: float,
    ) -> None:
        """`give` takes a command to the fleet, and does not wait. `period` is in seconds."""
        self._give = give
        self._backend = backend
        self._probe = probe
        self._event_log = event_log
        self._threads = threads
        self._clock = clock
        self._policy = policy
        self._period = period
        self._lock = threading.Lock()
        self._watched: dict[ServerName, _Watched] = {}

    def start(self) -> None:
        """Begin to look."""
        self._threads.watch("culler", self._round, every=lambda: _LOOK_EVERY)

    def changed(self, change: Change) -> None:
        """Take in a server that runs, and leave out one that does not."""
        after = change.after
        with self._lock:
            known = self._watched.get(after.name)
            if after.state is not State.RUNNING or after.endpoint is None or not self._concerns(after):
                self._watched.pop(after.name, None)
            elif known is None or known.snapshot.generation != after.generation:
                self._watched[after.name] = self._watch(after, after.endpoint)
            else:
                self._renew(known, after)

    def refresh(self, snapshot: Snapshot) -> Explanation:
        """Return how one server stands, after a look at it."""
        watched = self._watched.get(snapshot.name)
        if watched is not None:
            self._ask(watched)
        return self.cached(snapshot)

    def cached(self, snapshot: Snapshot) -> Explanation:
        """Return how one server stands, by the last look at it."""
        now = self._clock.monotonic()
        watched = self._watched.get(snapshot.name)
        if snapshot.state is not State.RUNNING:
            verdict = Verdict(CullState.NOT_RUNNING, f"it is {snapshot.state}")
        elif watched is None:
            verdict = decide(Facts(limits_of(snapshot.spec), now, now), self._policy, now)
        else:
            verdict = decide(watched.facts, self._policy, now)
        return Explanation(snapshot, verdict, self._clock.time() - now, None if watched is None else watched.looked_at)

    # What is watched

    def _concerns(self, snapshot: Snapshot) -> bool:
        return bool(limits_of(snapshot.spec) or self._policy.kernel_idle_timeout)

    def _watch(self, snapshot: Snapshot, endpoint: Endpoint) -> _Watched:
        now = self._clock.monotonic()
        ready_at = self._ours(snapshot.started_at)
        # Only of a first launch that we saw become ready is it known that it cannot have been used before.
        floor = {"floor": ready_at} if snapshot.up_since == snapshot.started_at else {}
        facts = Facts(limits_of(snapshot.spec), self._ours(snapshot.up_since), ready_at)
        watched = _Watched(snapshot, endpoint, facts, ActivityHistory(**floor), now + random.uniform(0, self._period))  # noqa: S311
        self._snooze(watched)
        return watched

    def _renew(self, watched: _Watched, after: Snapshot) -> None:
        before, watched.snapshot = watched.snapshot, after
        if after.snoozed_until != before.snoozed_until:
            self._snooze(watched)

    def _snooze(self, watched: _Watched) -> None:
        """Take over until when it is snoozed: brought over to our clock once, it holds however the wall clock jumps."""
        until = watched.snapshot.snoozed_until
        watched.facts = replace(watched.facts, snoozed_until=float("-inf") if until is None else self._ahead(until))

    def _ours(self, at: float | None) -> float:
        """Bring a time of the past over to our clock."""
        return min(self._clock.monotonic(), self._ahead(self._clock.time() if at is None else at))

    def _ahead(self, at: float) -> float:
        return self._clock.monotonic() + at - self._clock.time()

    # A look

    def _round(self) -> None:
        for watched in self._due():
            watched.asker = self._threads.start(f"cull-{watched.snapshot.name}", self._look, watched)

    def _due(self) -> list[_Watched]:
        now = self._clock.monotonic()
        with self._lock:
            watched = self._watched.values()
            return [w for w in watched if w.due <= now and not (w.asker is not None and w.asker.is_alive())]

    def _look(self, watched: _Watched) -> None:
        """Ask one server, and do what follows."""
        watched.due = self._clock.monotonic() + self._period
        self._ask(watched)
        verdict = self._judge(watched)
        if verdict.state is CullState.DUE and verdict.next is not None:
            self._stop(watched, verdict.next.rule)
        else:
            self._end_kernels(watched)
        now = self._clock.monotonic()
        moments = (at for o in self._judge(watched).outlooks for at in (o.warns_at, o.stops_at))
        watched.due = min([watched.due, *(at for at in moments if at is not None and at > now)])

    def _ask(self, watched: _Watched) -> None:
        """Bring what is known of a server to what is so; one that does not answer is known no more."""
        try:
            seen = self._with_programs(watched.snapshot.name, self._probe.activity(watched.endpoint))
        except BackendError as error:
            with self._lock:
                watched.seen, watched.facts = None, replace(watched.facts, activity=None, unknown=error.message)
            return
        with self._lock:
            now, wall = self._clock.monotonic(), self._clock.time()
            watched.seen, watched.looked_at = seen, now
            watched.facts = replace(watched.facts, activity=watched.memory.take(seen, now=now, wall=wall))

    def _with_programs(self, name: ServerName, seen: Activity) -> Activity:
        """Add what runs in the terminals; Jupyter lists them as it made them, the oldest first."""
        if not seen.terminals:
            return seen
        programs = self._backend.programs(name)
        if programs is None or len(programs) != len(seen.terminals):
            return seen
        pairs = zip(seen.terminals, programs, strict=True)
        return replace(seen, terminals=tuple(replace(terminal, program=program) for terminal, program in pairs))

    def _judge(self, watched: _Watched) -> Verdict:
        """Return how it stands, and warn where that is due."""
        with self._lock:
            now = self._clock.monotonic()
            verdict = decide(watched.facts, self._policy, now)
            before, warned = watched.facts.warned, warned_at(verdict, watched.facts.warned, now)
            watched.facts = replace(watched.facts, warned=warned)
        for outlook in verdict.outlooks:
            if outlook.rule in warned.keys() - before.keys():
                self._warn(watched.snapshot, outlook, now)
        return verdict

    # What follows

    def _warn(self, snapshot: Snapshot, outlook: Outlook, now: float) -> None:
        ahead = (outlook.stops_at or now) - now
        moment = format_time(self._clock.time() + ahead)
        message = f"server '{snapshot.name}' will be stopped in {format_duration(ahead)}, by {outlook.rule}, unless it is snoozed"
        message += " or used" if outlook.rule is Rule.IDLE_TIMEOUT else ""
        _log.info("a server is about to be culled", server=snapshot.name, rule=str(outlook.rule), stops_at=moment)
        details = {"rule": str(outlook.rule), "stops_at": moment}
        origin = Origin(CULLER, reason=str(outlook.rule))
        self._event_log.record(
            HistoryKind.CULL_WARNING, snapshot.name, message, origin=origin, generation=snapshot.generation, details=details
        )

    def _stop(self, watched: _Watched, rule: Rule) -> None:
        """Stop it, unless a last look finds that anything has changed."""
        snapshot, before = watched.snapshot, watched.seen
        self._ask(watched)
        again = self._judge(watched)
        still_due = again.state is CullState.DUE and again.next is not None and again.next.rule is rule
        if not still_due or (rule is Rule.IDLE_TIMEOUT and watched.seen != before):
            _log.info("a server is not culled: it has changed at the last moment", server=snapshot.name, now=again.reason)
            return
        _log.info("a server is culled", server=snapshot.name, reason=again.reason)
        self._give(Order(snapshot.name, Event.STOP, origin=Origin(CULLER, reason=again.reason), seen=snapshot))

    def _end_kernels(self, watched: _Watched) -> None:
        """End the kernels that nobody uses, unless a last look finds that they have changed."""
        if not self._idle_kernels(watched):
            return
        before = set(watched.seen.kernels) if watched.seen is not None else set()
        self._ask(watched)
        unchanged = {kernel.id for kernel in before & set(watched.seen.kernels if watched.seen is not None else ())}
        for kernel, seconds in self._idle_kernels(watched):
            if kernel.id in unchanged and not self._threads.closed:
                self._end_kernel(watched, kernel.id, f"kernel_idle_timeout: nobody used it for {format_duration(seconds)}")

    def _idle_kernels(self, watched: _Watched) -> Sequence[tuple[KernelUse, float]]:
        return idle_kernels(watched.facts, self._policy, self._clock.monotonic())

    def _end_kernel(self, watched: _Watched, kernel_id: str, reason: str) -> None:
        name, generation = watched.snapshot.name, watched.snapshot.generation
        try:
            self._probe.end_kernel(watched.endpoint, kernel_id)
        except BackendError as error:
            _log.warning("a kernel cannot be culled", server=name, kernel=kernel_id, error=error.message)
            return
        _log.info("a kernel is culled", server=name, kernel=kernel_id, reason=reason)
        message = f"kernel {kernel_id} of server '{name}' was ended, because nobody uses it"
        origin = Origin(CULLER, reason=reason)
        self._event_log.record(
            HistoryKind.KERNEL_CULLED, name, message, origin=origin, generation=generation, details={"kernel": kernel_id}
        )
