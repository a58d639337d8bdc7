"""The laws of `core.lifecycle`, proven for every sequence of events in a small hostile world.

A breadth-first search over `advance`, with queued jobs, facts in transit, and one process. The
world may refuse, lose answers, and let the process crash, hang, exit or survive a kill; the keeper
may crash at any time. Bounds on queued jobs and facts in transit keep the world small.

The third law ("when the world answers at last ...") is proven for a second, fair world, entered
from each configuration that the hostile one can reach: every path through it must end, and end
well. There, a timer fires only when nothing else is due. The rows that the check does not need are
those whose facts may also be lost: a timer leads to the same state, later.
"""

from __future__ import annotations

from collections import deque
from itertools import product
from typing import NamedTuple

import pytest

from labkeeper.core.lifecycle import (
    COMMANDS,
    MAY_EXIST,
    TABLE,
    Action,
    Event,
    Goal,
    Junction,
    State,
    advance,
)

PROVEN_GONE = frozenset(State) - MAY_EXIST
WANTED = frozenset({State.QUEUED, State.STARTING, State.RUNNING, State.BACKOFF, State.FAILED})
"""States that a server leaves immediately when its goal is no longer UP."""

# States of the process. The world may remember how a dead one ended.
NONE, LEFT, DIED, ENDED = "none", "left", "died", "ended"
BOOTING, UP, SILENT, HALF = "booting", "up", "silent", "half-dead"
DEAD = frozenset({NONE, LEFT, DIED, ENDED})
"""LEFT: exited by itself, cleanly. DIED: ended by itself otherwise. ENDED: ended by us."""

# Facts besides LEFT, DIED and ENDED. A silent process that is found again has yet to report READY,
# so it counts as BOOTING.
READY, REFUSED, UNREACHABLE, GONE, ANSWERS, HUSH = (
    "ready",
    "refused",
    "unreachable",
    "gone",
    "seen",
    "seen silent",
)
NOW, LATE = 0, 1
"""Of the current generation, or of an earlier one."""


class Process(NamedTuple):
    shape: str = NONE
    signalled: bool = False
    """Has received SIGTERM or SIGKILL."""
    watched: bool = False
    """Its end and its first answer will be reported."""


class Config(NamedTuple):
    state: State
    goal: Goal
    process: Process = Process()
    jobs: tuple[tuple[Action, int], ...] = ()
    facts: frozenset[tuple[str, int]] = frozenset()


class LawError(Exception):
    """A law is broken."""


class Model:
    """Computes the successors of a configuration; `fair` selects the world."""

    def __init__(self, *, jobs=2, facts=2, late_believed=False, ended_by_us=Event.CRASHED):
        self.most_jobs, self.most_facts = jobs, facts
        self.late_believed = late_believed
        self.ended_by_us = ended_by_us

    # The keeper

    def take(self, config, event, *, retry, free=True, why=None):
        """Handle an event as a controller does; `free` is whether a start slot is free."""
        step = advance(config.state, config.goal, event, may_retry=retry, may_start=free)
        if step is None:
            return config
        process, jobs, facts = config.process, config.jobs, config.facts
        if step.goal is Goal.DOWN is not config.goal and event not in COMMANDS and why != LEFT:
            raise LawError(f"taken for its user's wish: {config} {event} {why}")
        if step.action is Action.LAUNCH:
            if process.shape not in DEAD or (Action.LAUNCH, NOW) in jobs:
                raise LawError(f"launched while a process may exist: {config} {event}")
            process = Process()
            jobs = tuple((action, LATE) for action, _ in jobs)
            facts = (
                frozenset((kind, LATE) for kind, _ in facts) if self.late_believed else frozenset()
            )
        if step.action is not Action.NONE:
            jobs = (*jobs, (step.action, NOW))
        return Config(step.state, step.goal, process, jobs, facts)

    def deliver(self, config, fact, retries):
        """Deliver a fact: late ones are dropped, the others become events."""
        kind, age = fact
        rest = config._replace(facts=config.facts - {fact})
        if age == LATE and not self.late_believed:
            return [rest]
        event = self.event_of(config, kind)
        if event is None:
            return [rest]
        return [
            self.take(rest, event, retry=retry, free=free, why=kind)
            for retry in retries
            for free in (True, False)
        ]

    def event_of(self, config, kind):
        """As `Controller.event_of`."""
        if kind == ENDED:
            return self.ended_by_us if config.goal is Goal.UP else Event.EXITED
        if kind in {ANSWERS, HUSH} and config.state is State.RUNNING:
            return Event.HUNG if kind == HUSH else None
        return _EVENTS[kind]

    def orders(self, config):
        """What callers, timers and the queue may do at any time."""
        forgotten = config.state is State.STOPPED and config.goal is Goal.ABSENT
        for event, free in product((*COMMANDS, Event.DEADLINE, Event.ADMITTED), (True, False)):
            again = event in {Event.START, Event.RESTART}
            if again and config.goal is Goal.ABSENT and not forgotten:
                continue  # Refused: it is being deleted.
            # Under a forgotten name a new server may be created.
            yield self.take(
                config._replace(goal=Goal.DOWN) if forgotten and again else config,
                event,
                retry=True,
                free=free,
            )

    def crash(self, config):
        """Crash the keeper, and start the next one."""
        process = config.process._replace(watched=False, signalled=False)
        if config.state in MAY_EXIST:
            return Config(State.LOST, config.goal, process, ((Action.OBSERVE, NOW),))
        return Config(config.state, config.goal, process)

    # The backend

    def run(self, config, *, fair):
        """Run the oldest queued job, with each possible outcome."""
        (action, age), rest = config.jobs[0], config.jobs[1:]
        after = config._replace(jobs=rest)
        for process, facts in _OUTCOMES[action](config.process, fair):
            found = config.facts | {(kind, age) for kind in facts}
            # The result of an earlier observation says nothing about the current generation.
            yield after._replace(
                process=process, facts=found if self.late_believed or age == NOW else config.facts
            )

    # The world

    def drift(self, config, *, fair):
        """What the process does by itself. In the fair world it may end but not fall silent."""
        shape, signalled, watched = process = config.process
        if shape in DEAD:
            return
        for end in (ENDED,) if signalled else (LEFT, DIED) if shape in {BOOTING, UP} else (DIED,):
            yield config._replace(
                process=Process(end), facts=config.facts | ({(end, NOW)} if watched else set())
            )
        if shape == BOOTING:
            yield config._replace(
                process=process._replace(shape=UP),
                facts=config.facts | ({(READY, NOW)} if watched else set()),
            )
        if shape == SILENT:
            yield config._replace(process=process._replace(shape=UP))
        if fair:
            return
        if shape == UP:
            yield config._replace(process=process._replace(shape=SILENT))
        if shape == HALF:
            if watched:
                gave_up = process._replace(watched=False)
                yield config._replace(process=gave_up, facts=config.facts | {(UNREACHABLE, NOW)})
        else:
            yield config._replace(process=process._replace(shape=HALF))

    # The two worlds

    def hostile(self, config):
        """Every successor within the bounds, where anything may go wrong."""
        every = [self.crash(config), *self.orders(config), *self.drift(config, fair=False)]
        for fact in config.facts:
            every += [*self.deliver(config, fact, (True, False)), *self.unstored(config, fact)]
        if config.jobs:
            every += self.run(config, fair=False)
        return [
            after
            for after in every
            if len(after.jobs) <= self.most_jobs and len(after.facts) <= self.most_facts
        ]

    def unstored(self, config, fact):
        """A fact leads to a launch that cannot be stored, so it does not happen."""
        for after in self.deliver(config, fact, (True,)):
            if after.jobs[-1:] == ((Action.LAUNCH, NOW),) and config.jobs != after.jobs:
                yield self.take(after._replace(jobs=after.jobs[:-1]), Event.REFUSED, retry=True)

    def due(self, config, *, retry):
        """Next steps in the fair world: jobs and facts first, then its turn in the queue, or a
        timer.

        The fleet ensures that its turn comes: see test_fleet_machine.
        """
        if _settled(config):
            return set()
        after = {(then, retry) for then in self.run(config, fair=True)} if config.jobs else set()
        for fact in config.facts:
            for then in self.deliver(config, fact, {retry, False}):
                after.add((then, retry and then.state is not State.BACKOFF))
        if not config.jobs and not config.facts:
            due = Event.ADMITTED if config.state is State.QUEUED else Event.DEADLINE
            after |= {
                (self.take(config, due, retry=retry, free=free), retry) for free in (True, False)
            }
        if after <= {(config, retry)}:
            raise LawError(f"stuck: {config}")
        return after

    def fair(self, config, *, retry):
        """Every successor in the fair world. The process may act by itself, but need not."""
        after = self.due(config, retry=retry)
        return after | {(then, retry) for then in self.drift(config, fair=True)} if after else after


def _launch(process, fair):
    if process.shape not in DEAD:
        raise LawError("launched while a process exists")
    booted = Process(BOOTING, watched=True)
    outcomes = [(booted, ()), (process, (REFUSED,))]
    lost = [(process, (UNREACHABLE,)), (booted._replace(watched=False), (UNREACHABLE,))]
    return outcomes if fair else outcomes + lost


def _terminate(process, fair):
    if process.shape in DEAD:
        return [(process, (ENDED,))] if fair else [(process, (ENDED,)), (process, (UNREACHABLE,))]
    signalled = process._replace(signalled=True, watched=True)
    outcomes = [(signalled, ())]  # It may or may not end: see `drift`.
    return outcomes if fair else [*outcomes, (signalled, (UNREACHABLE,)), (process, (UNREACHABLE,))]


def _kill(process, fair):
    if process.shape in DEAD:
        return _terminate(process, fair)
    outcomes = [(Process(ENDED), (ENDED,))]
    # A process that survives a kill is supervised, and may still end.
    return (
        outcomes
        if fair
        else [*outcomes, (Process(ENDED), (ENDED, UNREACHABLE)), *_terminate(process, fair)]
    )


def _observe(process, fair):
    lost = [] if fair else [(process, (UNREACHABLE,))]
    match process.shape:
        case shape if shape in DEAD:
            return [(process, (GONE,)), *([(process, (shape,))] if shape != NONE else []), *lost]
        case "up":
            return [(process._replace(watched=True), (ANSWERS, READY)), *lost]
        case "half-dead":
            return [(process._replace(watched=True), (HUSH,)), *lost]
        case _:
            return [(process._replace(shape=BOOTING, watched=True), (HUSH,)), *lost]


_OUTCOMES = {
    Action.LAUNCH: _launch,
    Action.TERMINATE: _terminate,
    Action.KILL: _kill,
    Action.OBSERVE: _observe,
}
_EVENTS = {
    READY: Event.READY,
    LEFT: Event.EXITED,
    DIED: Event.CRASHED,
    REFUSED: Event.REFUSED,
    UNREACHABLE: Event.UNREACHABLE,
    GONE: Event.GONE,
    ANSWERS: Event.SEEN,
    HUSH: Event.SEEN,
}
_START = Config(State.STOPPED, Goal.DOWN)


def _settled(config):
    """Return whether nothing is in progress, and the server is at its goal or has failed."""
    if config.jobs or config.facts:
        return False
    if config.state is State.RUNNING:
        return config.goal is Goal.UP and config.process.shape == UP
    if config.state is State.FAILED:
        return config.goal is Goal.UP
    return config.state is State.STOPPED and config.goal in {Goal.DOWN, Goal.ABSENT}


def explore(model):
    """Return the configurations that the hostile world reaches, or raise LawError (laws 1, 2)."""
    seen, waiting = {_START}, deque([_START])
    while waiting:
        config = waiting.popleft()
        for after in model.hostile(config):
            if after in seen:
                continue
            if after.state in PROVEN_GONE and after.process.shape not in DEAD:
                raise LawError(f"reported as gone, but exists: {config} -> {after}")
            if after.state in WANTED and after.goal is not Goal.UP:
                raise LawError(f"state requires the goal up: {config} -> {after}")
            seen.add(after)
            waiting.append(after)
    return seen


def converge(model, configs):
    """Prove that each path through the fair world ends well; return its configurations' number."""
    done, on_path = set(), set()
    for config in configs:
        path = [((config, True), None)]
        while path:
            node, following = path.pop()
            if following is None:
                if node in done:
                    continue
                if node in on_path:
                    raise LawError(f"never comes to rest: {node}")
                on_path.add(node)
                following = iter(model.fair(node[0], retry=node[1]))
            for successor in following:
                path.append((node, following))
                path.append((successor, None))
                break
            else:
                on_path.discard(node)
                done.add(node)
    return len(done)


def rests(model, config):
    """Return where a server comes to rest in the fair world if its process just lives on."""
    found, waiting, seen = set(), [(config, True)], set()
    while waiting:
        node = waiting.pop()
        after = model.due(node[0], retry=node[1]) - seen
        seen |= after
        waiting += after
        if _settled(node[0]):
            found.add((node[0].state, node[0].process.shape))
    return found


def check(model):
    """Prove all three laws; return the number of configurations of either world."""
    reached = explore(model)
    return len(reached), converge(model, reached)


def test_the_laws_hold_for_every_sequence_of_events():
    """Nothing that may exist is reported as gone or launched; every server reaches its goal."""
    hostile, fair = check(Model(jobs=3, facts=2))
    assert hostile > 10_000
    assert fair > hostile


HEALTHY = Process(UP, watched=True)
RUNNING = {(State.RUNNING, UP)}


@pytest.mark.parametrize("state", [State.STARTING, State.RUNNING, State.LOST])
def test_a_healthy_server_survives_a_crash_of_the_keeper(state):
    """Nor is it touched when only an answer of the backend is lost."""
    model = Model()
    assert rests(model, model.crash(Config(state, Goal.UP, HEALTHY))) == RUNNING
    assert (
        rests(
            model,
            Config(state, Goal.UP, HEALTHY, facts=frozenset({(UNREACHABLE, NOW), (READY, NOW)})),
        )
        == RUNNING
    )


def _without(*key):
    return [key, None]


@pytest.mark.parametrize(
    "change",
    [
        # First law: reported as gone without proof.
        [(State.KILLING, Event.DEADLINE), (State.STOPPED, Action.NONE)],
        [(State.STARTING, Event.DEADLINE), (State.BACKOFF, Action.KILL)],
        [(State.STARTING, Event.UNREACHABLE), (State.FAILED, Action.NONE)],
        [(State.RUNNING, Event.UNREACHABLE), (Junction.SETTLE, Action.NONE)],
        [(State.STOPPING, Event.UNREACHABLE), (Junction.SETTLE, Action.NONE)],
        [(State.LOST, Event.SEEN), (Junction.SETTLE, Action.NONE)],
        # Second law: launched while a process may exist.
        [(State.RUNNING, Event.RESTART), (State.STARTING, Action.LAUNCH)],
        [(State.STOPPING, Event.RESTART), (Junction.BEGIN, Action.NONE)],
        [(State.LOST, Event.ADMITTED), (State.STARTING, Action.LAUNCH)],
        [(State.STOPPING, Event.START), (State.STARTING, Action.LAUNCH)],
        [(State.STOPPING, Event.DEADLINE), (State.STARTING, Action.LAUNCH)],
        [(State.LOST, Event.DEADLINE), (State.STARTING, Action.LAUNCH)],
        # Third law: never comes to rest.
        _without(State.STOPPED, Event.START),
        _without(State.BACKOFF, Event.DEADLINE),
        _without(State.BACKOFF, Event.STOP),
        _without(State.QUEUED, Event.ADMITTED),
        _without(State.QUEUED, Event.STOP),
        _without(State.QUEUED, Event.DELETE),
        _without(State.STARTING, Event.DEADLINE),
        _without(State.STARTING, Event.RESTART),
        _without(State.RUNNING, Event.CRASHED),
        _without(State.RUNNING, Event.GONE),
        _without(State.RUNNING, Event.HUNG),
        _without(State.RUNNING, Event.DEADLINE),
        _without(State.STOPPING, Event.DEADLINE),
        _without(State.KILLING, Event.DEADLINE),
        _without(State.LOST, Event.SEEN),
        _without(State.LOST, Event.GONE),
        _without(State.LOST, Event.EXITED),
        _without(State.LOST, Event.DEADLINE),
    ],
    ids=lambda change: (
        " ".join(change[0]) + (" removed" if change[1] is None else f" to {change[1][0]}")
    ),
)
def test_the_check_detects_each_wrong_row(change, monkeypatch):
    """Each of these rows is needed as it is."""
    key, row = change
    if row is None:
        monkeypatch.delitem(TABLE, key)
    else:
        monkeypatch.setitem(TABLE, key, row)
    with pytest.raises(LawError):
        check(Model(jobs=1))


@pytest.mark.parametrize(
    "key", [(State.STARTING, Event.READY), (State.LOST, Event.READY)], ids=" ".join
)
def test_the_check_detects_that_a_healthy_server_is_ended(key, monkeypatch):
    """Without these rows all laws hold, but servers that respond are considered silent."""
    monkeypatch.delitem(TABLE, key)
    model = Model()
    assert rests(model, model.crash(Config(State.RUNNING, Goal.UP, HEALTHY))) != RUNNING


def test_late_facts_must_be_dropped():
    """A keeper that accepts facts of an earlier generation breaks the laws."""
    with pytest.raises(LawError, match="launched while"):
        check(Model(late_believed=True))


def test_an_end_caused_by_the_keeper_is_not_a_shutdown_by_the_user():
    """Otherwise a server that hung, and was ended for it, would stay down."""
    with pytest.raises(LawError, match="taken for its user's wish"):
        check(Model(ended_by_us=Event.EXITED))
