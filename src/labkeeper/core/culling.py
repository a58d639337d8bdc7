"""Whether a server is culled: a verdict with its explanation, derived from facts and a policy.

All times are seconds by the keeper's monotonic clock. Jupyter uses the wall clock;
`ActivityHistory` converts its times, so that a jump of the wall clock stops no server.

Laws, checked by the tests:

1. A server that is in use, or whose use is unknown, has no time at which `idle_timeout` or
   `sleep_after` stops it. For the latter, idle kernels, any terminals, and visitors are use, too.
2. No server is stopped before it has been warned for as long as the policy requires.
3. More use, a longer grace or a longer snooze never bring the stop forward.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from labkeeper.core.durations import format_duration
from labkeeper.core.lifecycle import Goal
from labkeeper.core.messages import CULLER
from labkeeper.core.server import Activity, KernelUse, Snapshot, Visits
from labkeeper.core.spec import ServerSpec


class Rule(StrEnum):
    """The rules that can cull a server."""

    IDLE_TIMEOUT = "idle_timeout"
    """It has been unused for this long."""
    MAX_AGE = "max_age"
    """It has run for this long, used or not."""
    SLEEP_AFTER = "sleep_after"
    """It has been without kernels, terminals and visitors for this long."""


class Terminals(StrEnum):
    """Which terminals count as use."""

    PROGRAMS = "programs"
    """Those that run a program; a shell at its prompt does not count."""
    OPEN = "open"
    """All open ones."""
    IGNORE = "ignore"
    """None."""


class CullState(StrEnum):
    """The state of a server with respect to its rules."""

    OFF = "off"
    """It has no rules."""
    NOT_RUNNING = "not-running"
    """There is nothing to stop."""
    IN_USE = "in-use"
    """A holder keeps it; nothing counts down."""
    UNKNOWN = "unknown"
    """Its use cannot be determined, which counts as use."""
    SNOOZED = "snoozed"
    """A user has postponed culling."""
    COUNTING = "counting"
    """It will be stopped if it stays unused."""
    WARNED = "warned"
    """It is about to be stopped."""
    DUE = "due"
    """It is stopped now, unless a final check finds a change."""


@dataclass(frozen=True, slots=True)
class CullPolicy:
    """The culling policy for all servers. Durations in seconds."""

    grace: float = 600.0
    """Time after becoming ready during which a server does not count as idle."""
    warning: float = 300.0
    """Time between the warning and the stop, at most half of the rule's limit."""
    cull_busy: bool = False
    """Whether a busy kernel counts as in use only by its last activity."""
    cull_connected: bool = True
    """Whether an open connection to a kernel does not count as use."""
    terminals: Terminals = Terminals.PROGRAMS
    kernel_idle_timeout: float | None = None
    """Idle kernels are ended after this time, independently of their server."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known about one running server."""

    limits: Mapping[Rule, float]
    """The limit of each rule in seconds; a missing rule is off."""
    up_since: float
    """When it first became ready since its last start command."""
    ready_at: float
    """When it last became ready."""
    activity: Activity | None = None
    """None if unknown."""
    unknown: str = "it has not been asked yet"
    """Why the activity is unknown."""
    visits: Visits | None = None
    """None if unknown."""
    visits_unknown: str = ""
    """Why the visits are unknown."""
    occupied_at: float = -math.inf
    """When it last had a kernel, a terminal or a visitor, as far as is known."""
    snoozed_until: float = -math.inf
    warned: Mapping[Rule, float] = field(default_factory=dict)
    """When each rule issued its warning."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Something that keeps a server from being idle."""

    kind: str
    """`kernel`, `connection`, `terminal` or `visitor`."""
    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Outlook:
    """The outcome of one rule if nothing else happens."""

    rule: Rule
    limit: float
    since: float | None
    """Start of the count; None while a holder keeps the server."""
    stops_at: float | None
    warns_at: float | None
    """None if nothing stops it, or no warning is due."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The cull state of a server, with its reasons."""

    state: CullState
    reason: str
    next: Outlook | None = None
    """The outlook of the rule that would stop it first."""
    outlooks: tuple[Outlook, ...] = ()
    holders: tuple[Holder, ...] = ()
    last_used_at: float | None = None
    last_used: str | None = None
    """What was used last."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """A verdict with the data needed to present it."""

    snapshot: Snapshot
    verdict: Verdict
    offset: float
    """Added to the verdict's times, gives seconds since the epoch."""
    looked_at: float | None
    """When the server last answered, by our clock."""


class ActivityHistory:
    """When each part of one server was last used, by our monotonic clock.

    A time of Jupyter's is converted once, when it is new. It must lie between the previous look
    and this one; if not, the wall clock has jumped since, and the time of this look is used, which
    is the later.
    """

    def __init__(self, floor: float = -math.inf) -> None:
        """`floor` is when the server was created, by our clock, if known."""
        self._looked = floor
        self._known: dict[tuple[str, str], tuple[float, float]] = {}

    def take(self, seen: Activity, *, now: float, wall: float) -> Activity:
        """Return the activity with all times converted to our clock."""
        known: dict[tuple[str, str], tuple[float, float]] = {}

        def ours(kind: str, name: str, at: float | None) -> float | None:
            if at is None:
                return None
            before = self._known.get((kind, name))
            moment = (
                before[1]
                if before is not None and before[0] == at
                else self._bring_over(at, now, wall)
            )
            known[kind, name] = at, moment
            return moment

        taken = Activity(
            ours("server", "", seen.last_activity),
            tuple(
                replace(one, last_activity=ours("kernel", one.id, one.last_activity))
                for one in seen.kernels
            ),
            tuple(
                replace(one, last_activity=ours("terminal", one.name, one.last_activity))
                for one in seen.terminals
            ),
        )
        self._known, self._looked = known, now
        return taken

    def _bring_over(self, at: float, now: float, wall: float) -> float:
        moment = now - (wall - at)
        return moment if self._looked <= moment <= now else now


def limits_of(spec: ServerSpec) -> dict[Rule, float]:
    """Return the rules of a server with their limits."""
    given = {rule: getattr(spec, rule.value) for rule in Rule}
    return {rule: limit for rule, limit in given.items() if limit}


def culled_by(actor: str, reason: str) -> Rule | None:
    """Return the rule behind a stop, by its actor and reason; None if it was not the culler's."""
    if actor != CULLER:
        return None
    return next((rule for rule in Rule if rule == reason.partition(":")[0]), None)


def rule_of_stop(snapshot: Snapshot) -> Rule | None:
    """Return the rule by which a server was stopped, or is about to be; None if it was not."""
    order = snapshot.stopped_by
    return None if order is None else culled_by(order.actor, order.reason)


def wakes(snapshot: Snapshot) -> bool:
    """Whether a visit to its Lab starts a server that is stopped, or about to be.

    It does if the server was stopped because it was not used, which a visitor changes. `max_age`
    limits how long a server runs; a visit would lift that limit.
    """
    by_rule = rule_of_stop(snapshot) in {Rule.IDLE_TIMEOUT, Rule.SLEEP_AFTER}
    return by_rule and snapshot.goal is Goal.DOWN


def decide(facts: Facts, policy: CullPolicy, now: float) -> Verdict:
    """Return the verdict on a server at this time."""
    busy = tuple(_holders(facts.activity, policy)) if facts.activity else ()
    kept = (*busy, *_occupants(facts, {(holder.kind, holder.id) for holder in busy}))
    used_at, used = max(_uses(facts, policy), key=lambda use: use[0])
    since = {
        Rule.IDLE_TIMEOUT: None if busy or facts.activity is None else used_at,
        Rule.MAX_AGE: facts.up_since,
        Rule.SLEEP_AFTER: None if kept else _empty_since(facts, used_at),
    }
    holders = kept if Rule.SLEEP_AFTER in facts.limits else busy
    outlooks = tuple(_outlook(rule, since[rule], facts, policy, now) for rule in facts.limits)
    first = min(
        (o for o in outlooks if o.stops_at is not None),
        key=lambda o: o.stops_at or 0.0,
        default=None,
    )
    state = _state_of(facts, outlooks, holders, first, now)
    reason = _reason(state, facts, holders, first, now)
    return Verdict(state, reason, first, outlooks, holders, used_at, used)


def warned_at(verdict: Verdict, before: Mapping[Rule, float], now: float) -> dict[Rule, float]:
    """Return when each rule about to stop a server warned; one missing in `before` warns now."""
    near = (o.rule for o in verdict.outlooks if o.warns_at is not None and o.warns_at <= now)
    return {rule: before.get(rule, now) for rule in near}


def idle_kernels(
    facts: Facts, policy: CullPolicy, now: float
) -> tuple[tuple[KernelUse, float], ...]:
    """Return the kernels to end individually, with the idle time of each."""
    limit = policy.kernel_idle_timeout
    if not limit or facts.activity is None or now < facts.snoozed_until:
        return ()
    held = {holder.id for holder in _holders(replace(facts.activity, terminals=()), policy)}
    idle = (
        (kernel, now - kernel.last_activity)
        for kernel in facts.activity.kernels
        if kernel.last_activity is not None
    )
    return tuple(
        (kernel, seconds) for kernel, seconds in idle if kernel.id not in held and seconds >= limit
    )


_BUSY: Final = {"busy": "is busy", "unknown": "does not tell its state, which counts as busy"}


def _holders(activity: Activity, policy: CullPolicy) -> Iterator[Holder]:
    """Yield what is in use now."""
    for kernel in activity.kernels:
        if not policy.cull_busy and kernel.state in _BUSY:
            yield Holder("kernel", kernel.id, _BUSY[kernel.state])
        if not policy.cull_connected and kernel.connections:
            yield Holder(
                "connection", kernel.id, f"{kernel.connections} open to kernel {kernel.id}"
            )
    for terminal in activity.terminals:
        if policy.terminals is Terminals.OPEN:
            yield Holder("terminal", terminal.name, "is open")
        elif policy.terminals is Terminals.PROGRAMS and terminal.program:
            yield Holder("terminal", terminal.name, f"runs {terminal.program}")


def _occupants(facts: Facts, known: Collection[tuple[str, str]]) -> Iterator[Holder]:
    """Yield what keeps a server awake, even if idle, except what is known."""
    activity = facts.activity or Activity(None)
    for kernel in activity.kernels:
        if ("kernel", kernel.id) not in known:
            yield Holder("kernel", kernel.id, "exists")
    for terminal in activity.terminals:
        if ("terminal", terminal.name) not in known:
            yield Holder("terminal", terminal.name, "is open")
    if facts.visits is not None and facts.visits.open:
        yield Holder("visitor", "browser", "has the Lab open")


def _empty_since(facts: Facts, used_at: float) -> float | None:
    """Return since when a server has had nothing that keeps it awake; None if that is unknown."""
    if facts.activity is None or facts.visits is None:
        return None
    return max(facts.ready_at, facts.occupied_at, used_at)


def _uses(facts: Facts, policy: CullPolicy) -> Iterator[tuple[float, str]]:
    """Yield the times of last use; if the server reports none, becoming ready counts."""
    activity = facts.activity or Activity(None)
    if activity.last_activity is None:
        yield facts.ready_at, "its start"
    # The most specific first: a tie goes to the first.
    times = [(kernel.last_activity, f"kernel {kernel.id}") for kernel in activity.kernels]
    if policy.terminals is not Terminals.IGNORE:
        times += [
            (terminal.last_activity, f"terminal {terminal.name}") for terminal in activity.terminals
        ]
    for at, what in (*times, (activity.last_activity, "its API")):
        if at is not None:
            yield at, what


def _outlook(
    rule: Rule, since: float | None, facts: Facts, policy: CullPolicy, now: float
) -> Outlook:
    limit = facts.limits[rule]
    if since is None:
        return Outlook(rule, limit, None, None, None)
    grace = -math.inf if rule is Rule.MAX_AGE else facts.ready_at + policy.grace
    ahead = min(policy.warning, limit / 2)
    stops_at = max(since + limit, grace, facts.snoozed_until, facts.warned.get(rule, now) + ahead)
    return Outlook(rule, limit, since, stops_at, stops_at - ahead if ahead else None)


def _state_of(
    facts: Facts,
    outlooks: tuple[Outlook, ...],
    holders: tuple[Holder, ...],
    first: Outlook | None,
    now: float,
) -> CullState:
    if not outlooks:
        return CullState.OFF
    if first is None or first.stops_at is None:
        return CullState.IN_USE if holders else CullState.UNKNOWN
    if first.stops_at <= now:
        return CullState.DUE
    if first.warns_at is not None and first.warns_at <= now:
        return CullState.WARNED
    return CullState.SNOOZED if now < facts.snoozed_until else CullState.COUNTING


def _reason(
    state: CullState, facts: Facts, holders: tuple[Holder, ...], first: Outlook | None, now: float
) -> str:
    match state:
        case CullState.OFF:
            return "it has neither idle_timeout nor max_age nor sleep_after"
        case CullState.UNKNOWN:
            why = facts.unknown if facts.activity is None else facts.visits_unknown
            return f"whether it is used cannot be known, which counts as use: {why}"
        case CullState.IN_USE:
            return "it is in use: " + ", ".join(
                f"{holder.kind} {holder.id} {holder.reason}" for holder in holders
            )
        case CullState.SNOOZED:
            return f"it is snoozed for another {format_duration(facts.snoozed_until - now)}"
    return (
        ""
        if first is None or first.since is None
        else f"{first.rule}: {_SO_FAR[first.rule]} {format_duration(now - first.since)}"
    )


_SO_FAR: Final = {
    Rule.IDLE_TIMEOUT: "unused for",
    Rule.MAX_AGE: "it has run for",
    Rule.SLEEP_AFTER: "without kernels, terminals and visitors for",
}
"""What each rule counts."""
