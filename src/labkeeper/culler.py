"""The culler: polls the activity of running servers, warns about idle ones, and stops them.

A server is polled once per period, and when a deadline is due, in a thread of its own, so that a
hung one delays no other. A server without rules is never polled.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
    rule_of_stop,
    warned_at,
)
from labkeeper.core.durations import format_duration, format_time
from labkeeper.core.errors import BackendError, BackendUnavailable
from labkeeper.core.lifecycle import Event, State
from labkeeper.core.messages import CULLER, Change, HistoryKind, Message, Order, Origin
from labkeeper.core.ports import Backend, Clock, EventLog, Probe, Visitors
from labkeeper.core.server import Activity, Endpoint, KernelUse, Snapshot, Visits
from labkeeper.core.spec import QualifiedName
from labkeeper.threads import ThreadGroup

_LOOK_EVERY: Final = 0.5
"""Interval in seconds between checks for due servers."""

_log = structlog.get_logger("labkeeper.culler")


@dataclass(slots=True, eq=False)
class _Watched:
    """One launch to which a rule applies."""

    snapshot: Snapshot
    endpoint: Endpoint
    facts: Facts
    memory: ActivityHistory
    due: float
    looked_at: float | None = None
    """When the server last answered."""
    asker: threading.Thread = field(default_factory=threading.Thread)
    """The thread of the current or last poll; before the first, one that is not started."""


class Culler:
    """A subscriber of the fleet, with a thread of its own; see also `core.ports.CullStatus`."""

    def __init__(
        self,
        give: Callable[[Message], object],
        *,
        backend: Backend,
        probe: Probe,
        visitors: Visitors | None,
        event_log: EventLog,
        threads: ThreadGroup,
        clock: Clock,
        policy: CullPolicy,
        period: float,
    ) -> None:
        """`give` passes a command to the fleet without waiting. `period` is in seconds.

        Without `visitors`, whether a server has any is unknown, which counts as use.
        """
        self._give = give
        self._backend = backend
        self._probe = probe
        self._visitors = visitors
        self._event_log = event_log
        self._threads = threads
        self._clock = clock
        self._policy = policy
        self._period = period
        self._lock = threading.Lock()
        self._watched: dict[QualifiedName, _Watched] = {}

    def start(self) -> None:
        """Start the thread."""
        self._threads.watch("culler", self._round, every=lambda: _LOOK_EVERY)

    def changed(self, change: Change) -> None:
        """Watch a running server, or stop watching one that does not run."""
        after = change.after
        with self._lock:
            known = self._watched.get(after.qualified_name)
            if (
                after.state is not State.RUNNING
                or after.endpoint is None
                or not self._concerns(after)
            ):
                self._watched.pop(after.qualified_name, None)
            elif known is None or known.snapshot.generation != after.generation:
                self._watched[after.qualified_name] = self._watch(after, after.endpoint)
            else:
                known.snapshot = after
                if change.event is Event.SNOOZE:
                    self._snooze(known)

    def refresh(self, snapshot: Snapshot) -> Explanation:
        """Poll a server and return its explanation."""
        watched = self._watched.get(snapshot.qualified_name)
        if watched is not None:
            self._ask(watched)
        return self.cached(snapshot)

    def cached(self, snapshot: Snapshot) -> Explanation:
        """Return the explanation from the last poll."""
        now = self._clock.monotonic()
        watched = self._watched.get(snapshot.qualified_name)
        if snapshot.state is not State.RUNNING:
            sleeps = rule_of_stop(snapshot) is Rule.SLEEP_AFTER
            reason = "it sleeps until its Lab is visited" if sleeps else f"it is {snapshot.state}"
            verdict = Verdict(CullState.NOT_RUNNING, reason)
        elif watched is None:
            verdict = decide(Facts(limits_of(snapshot.spec), now, now), self._policy, now)
        else:
            verdict = decide(watched.facts, self._policy, now)
        return Explanation(
            snapshot,
            verdict,
            self._clock.time() - now,
            None if watched is None else watched.looked_at,
        )

    # Watching

    def _concerns(self, snapshot: Snapshot) -> bool:
        return bool(limits_of(snapshot.spec) or self._policy.kernel_idle_timeout)

    def _watch(self, snapshot: Snapshot, endpoint: Endpoint) -> _Watched:
        now = self._clock.monotonic()
        ready_at = self._ours(snapshot.started_at)
        # Only a first launch that we saw become ready is known to be unused before.
        floor = {"floor": ready_at} if snapshot.up_since == snapshot.started_at else {}
        facts = Facts(limits_of(snapshot.spec), self._ours(snapshot.up_since), ready_at)
        watched = _Watched(
            snapshot,
            endpoint,
            facts,
            ActivityHistory(**floor),
            now + random.uniform(0, self._period),  # noqa: S311
        )
        self._snooze(watched)
        return watched

    def _snooze(self, watched: _Watched) -> None:
        """Convert the end of its snooze to our clock once, so that clock jumps do not matter."""
        until = watched.snapshot.snoozed_until
        watched.facts = replace(
            watched.facts, snoozed_until=float("-inf") if until is None else self._ahead(until)
        )

    def _ours(self, at: float | None) -> float:
        """Return a past time by our clock."""
        return min(self._clock.monotonic(), self._ahead(self._clock.time() if at is None else at))

    def _ahead(self, at: float) -> float:
        return self._clock.monotonic() + at - self._clock.time()

    # Polling

    def _round(self) -> None:
        for watched in self._due():
            watched.asker = self._threads.start(
                f"cull-{watched.snapshot.qualified_name}", self._look, watched
            )

    def _due(self) -> list[_Watched]:
        now = self._clock.monotonic()
        with self._lock:
            return [w for w in self._watched.values() if w.due <= now and not w.asker.is_alive()]

    def _look(self, watched: _Watched) -> None:
        """Poll one server and act on the verdict."""
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
        """Update the facts about a server; without an answer, its activity is unknown."""
        visits, why = self._visits(watched)
        try:
            found = self._probe.activity(watched.endpoint)
            seen = self._with_programs(watched.snapshot.qualified_name, found)
        except BackendError as error:
            with self._lock:
                watched.facts = replace(watched.facts, activity=None, unknown=error.message)
            return
        with self._lock:
            now, wall = self._clock.monotonic(), self._clock.time()
            watched.looked_at = now
            activity = watched.memory.take(seen, now=now, wall=wall)
            facts = replace(watched.facts, activity=activity, visits=visits, visits_unknown=why)
            occupied_at = max(facts.occupied_at, _occupied_at(facts, now))
            watched.facts = replace(facts, occupied_at=occupied_at)

    def _visits(self, watched: _Watched) -> tuple[Visits | None, str]:
        """Return the visits to a server's Lab, or None and why they are not known."""
        if Rule.SLEEP_AFTER not in watched.facts.limits:
            return None, ""
        if self._visitors is None:
            return None, "only the edge sees visitors, and it is off"
        try:
            return self._visitors.visits(watched.snapshot), ""
        except BackendUnavailable as error:
            return None, error.message

    def _with_programs(self, name: QualifiedName, seen: Activity) -> Activity:
        """Add the programs in the terminals, which Jupyter lists in order of creation."""
        if not seen.terminals:
            return seen
        programs = self._backend.programs(name)
        if programs is None or len(programs) != len(seen.terminals):
            return seen
        pairs = zip(seen.terminals, programs, strict=True)
        return replace(
            seen, terminals=tuple(replace(terminal, program=program) for terminal, program in pairs)
        )

    def _judge(self, watched: _Watched) -> Verdict:
        """Return the verdict; issue a warning if due."""
        with self._lock:
            now = self._clock.monotonic()
            verdict = decide(watched.facts, self._policy, now)
            before, warned = watched.facts.warned, warned_at(verdict, watched.facts.warned, now)
            watched.facts = replace(watched.facts, warned=warned)
        for outlook in verdict.outlooks:
            if outlook.rule in warned.keys() - before.keys():
                self._warn(watched.snapshot, outlook, now)
        return verdict

    # Acting

    def _warn(self, snapshot: Snapshot, outlook: Outlook, now: float) -> None:
        ahead = (outlook.stops_at or now) - now
        moment = format_time(self._clock.time() + ahead)
        message = (
            f"server '{snapshot.name}' will be stopped in {format_duration(ahead)}, "
            f"by {outlook.rule}, unless it is snoozed"
        )
        message += "" if outlook.rule is Rule.MAX_AGE else " or used"
        _log.info(
            "a server is about to be culled",
            server=snapshot.qualified_name,
            rule=str(outlook.rule),
            stops_at=moment,
        )
        self._event_log.record(
            HistoryKind.CULL_WARNING,
            snapshot.qualified_name,
            message,
            origin=Origin(CULLER, reason=str(outlook.rule)),
            generation=snapshot.generation,
            details={"rule": str(outlook.rule), "stops_at": moment},
        )

    def _stop(self, watched: _Watched, rule: Rule) -> None:
        """Stop it, unless a final check finds a change."""
        snapshot, before = watched.snapshot, watched.facts.activity
        self._ask(watched)
        again = self._judge(watched)
        still_due = (
            again.state is CullState.DUE and again.next is not None and again.next.rule is rule
        )
        if not still_due or (rule is not Rule.MAX_AGE and watched.facts.activity != before):
            _log.info(
                "a server is not culled: it has changed at the last moment",
                server=snapshot.qualified_name,
                now=again.reason,
            )
            return
        _log.info("a server is culled", server=snapshot.qualified_name, reason=again.reason)
        self._give(
            Order(
                snapshot.qualified_name,
                Event.STOP,
                origin=Origin(CULLER, reason=again.reason),
                seen=snapshot,
            )
        )

    def _end_kernels(self, watched: _Watched) -> None:
        """End idle kernels, unless a final check finds them changed."""
        before = {kernel for kernel, _ in self._idle_kernels(watched)}
        if not before:
            return
        self._ask(watched)
        for kernel, seconds in self._idle_kernels(watched):
            if kernel in before and not self._threads.closed:
                self._end_kernel(
                    watched,
                    kernel.id,
                    f"kernel_idle_timeout: unused for {format_duration(seconds)}",
                )

    def _idle_kernels(self, watched: _Watched) -> Sequence[tuple[KernelUse, float]]:
        return idle_kernels(watched.facts, self._policy, self._clock.monotonic())

    def _end_kernel(self, watched: _Watched, kernel_id: str, reason: str) -> None:
        name = watched.snapshot.qualified_name
        try:
            self._probe.end_kernel(watched.endpoint, kernel_id)
        except BackendError as error:
            _log.warning(
                "a kernel cannot be culled", server=name, kernel=kernel_id, error=error.message
            )
            return
        _log.info("a kernel is culled", server=name, kernel=kernel_id, reason=reason)
        self._event_log.record(
            HistoryKind.KERNEL_CULLED,
            name,
            f"kernel {kernel_id} of server '{name}' was ended because it was not used",
            origin=Origin(CULLER, reason=reason),
            generation=watched.snapshot.generation,
            details={"kernel": kernel_id},
        )


def _occupied_at(facts: Facts, now: float) -> float:
    """Return when a server last had a kernel, a terminal or a visitor, by one look at it."""
    activity, visits = facts.activity, facts.visits
    if activity is not None and (activity.kernels or activity.terminals):
        return now
    if visits is None:
        return -math.inf
    if visits.open:
        # A websocket may be open for hours after the last request.
        return now
    return -math.inf if visits.ago is None else now - visits.ago
