"""The life of one server, as a table.

Two variables describe a server. Its *goal* is what its owner wants, and only a command sets it. Its *state* is what is so,
and only this table moves it. Keeping them apart is what makes every command legal in every state: a command that has
no row here still moves the goal, and the next fact then leads where the goal points.

Laws, held by the model check in the tests:

1. `stopped`, `failed`, `backoff` and `queued` are entered only on proof that no process is left.
2. Nothing is launched while a process may exist.
3. When the world answers at last, every server comes to where its goal points, or to `failed` with a cause.

Precedents: Erlang/OTP supervisors for the restart budget, s6 for "up is not ready".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class State(StrEnum):
    """What is so."""

    STOPPED = "stopped"
    """Gone, and should be."""
    QUEUED = "queued"
    """To be launched as soon as fewer servers start; nothing of it exists."""
    STARTING = "starting"
    """Launched, not yet answering."""
    RUNNING = "running"
    """Has answered as itself."""
    BACKOFF = "backoff"
    """Ended on its own; will be launched again."""
    STOPPING = "stopping"
    """Asked to end."""
    KILLING = "killing"
    """Told to end."""
    FAILED = "failed"
    """Gave up; the snapshot carries the cause."""
    LOST = "lost"
    """The backend cannot say; it will be asked again."""


class Goal(StrEnum):
    """What the owner wants."""

    UP = "up"
    DOWN = "down"
    AGAIN = "again"
    """Down first, then up: a restart, or a start that arrived while a stop was under way."""
    RENEW = "renew"
    """Down first, then up with the kernels that it has on its gateway."""
    ABSENT = "absent"
    """Down, then forgotten."""


class Event(StrEnum):
    """Whatever can happen to a server: commands, facts from the backend, its turn in the queue, one timer."""

    START = "START"
    RESTART = "RESTART"
    RESTART_KEEPING_KERNELS = "RESTART_KEEPING_KERNELS"
    """A restart that keeps the kernels on the server's gateway."""
    STOP = "STOP"
    KILL = "KILL"
    DELETE = "DELETE"
    SNOOZE = "SNOOZE"
    """Its culling was put off; that moves neither its goal nor its state."""

    READY = "READY"
    EXITED = "EXITED"
    """Ended by itself with code 0."""
    CRASHED = "CRASHED"
    """Ended any other way."""
    REFUSED = "REFUSED"
    """The backend will not launch it: nothing was started."""
    VETOED = "VETOED"
    """Its gateway was found to be of no use while it started."""
    HUNG = "HUNG"
    """Alive, but has not answered for too long."""
    UNREACHABLE = "UNREACHABLE"
    """The backend cannot say what became of it."""
    SEEN = "SEEN"
    """An observation found a process of it."""
    GONE = "GONE"
    """An observation found no process of it, nor how it ended."""
    GATEWAY = "GATEWAY"
    """Its gateway can be reached, or cannot any more."""

    ADMITTED = "ADMITTED"
    """A place to start in is free, and it is the first that waits for one."""
    DEADLINE = "DEADLINE"


class Action(StrEnum):
    """What the backend is asked to do."""

    NONE = "nothing"
    LAUNCH = "launch"
    TERMINATE = "terminate"
    KILL = "kill"
    OBSERVE = "observe"


class Junction(StrEnum):
    """A step whose next state depends on more than the event; `advance` decides it."""

    BEGIN = "begin"
    """It is to be launched: at once, or in its turn."""
    SETTLE = "settle"
    """Nothing is left of it: stopped, launched again, or given up."""
    RESUME = "resume"
    """It was found alive: taken over, or ended."""
    GREET = "greet"
    """It was found alive and answering: running, or ended."""
    LEAVE = "leave"
    """It ended by itself in good order: somebody shut it down from inside."""


COMMANDS: Final = frozenset({Event.START, Event.RESTART, Event.RESTART_KEEPING_KERNELS, Event.STOP, Event.KILL, Event.DELETE})
ENDINGS: Final = frozenset({Event.EXITED, Event.CRASHED, Event.REFUSED, Event.GONE})
"""The events after which nothing is left of a launch."""
MAY_EXIST: Final = frozenset({State.STARTING, State.RUNNING, State.STOPPING, State.KILLING, State.LOST})
"""The states in which a process of the server may exist."""
AT_REST: Final = frozenset({State.STOPPED, State.FAILED})
"""The states in which nothing is left to happen by itself."""
COMES_BACK: Final = frozenset({Goal.AGAIN, Goal.RENEW})
"""The goals of a server that is to end, and then to run once more."""
RETURNS: Final = COMES_BACK | {Goal.UP}
"""The goals of a server that is to run, now or in the end."""
KEEPS_KERNELS: Final = frozenset({Goal.UP, Goal.RENEW})
"""The goals of a server that is to have its kernels again when it ends now."""

TABLE: Final[dict[tuple[State, Event], tuple[State | Junction, Action]]] = {
    (State.STOPPED, Event.START): (Junction.BEGIN, Action.NONE),
    (State.STOPPED, Event.RESTART): (Junction.BEGIN, Action.NONE),
    (State.STOPPED, Event.RESTART_KEEPING_KERNELS): (Junction.BEGIN, Action.NONE),
    (State.FAILED, Event.START): (Junction.BEGIN, Action.NONE),
    (State.FAILED, Event.RESTART): (Junction.BEGIN, Action.NONE),
    (State.FAILED, Event.RESTART_KEEPING_KERNELS): (Junction.BEGIN, Action.NONE),
    (State.FAILED, Event.STOP): (State.STOPPED, Action.NONE),
    (State.FAILED, Event.KILL): (State.STOPPED, Action.NONE),
    (State.FAILED, Event.DELETE): (State.STOPPED, Action.NONE),
    (State.BACKOFF, Event.DEADLINE): (Junction.BEGIN, Action.NONE),
    (State.BACKOFF, Event.START): (Junction.BEGIN, Action.NONE),
    (State.BACKOFF, Event.RESTART): (Junction.BEGIN, Action.NONE),
    (State.BACKOFF, Event.RESTART_KEEPING_KERNELS): (Junction.BEGIN, Action.NONE),
    (State.BACKOFF, Event.STOP): (State.STOPPED, Action.NONE),
    (State.BACKOFF, Event.KILL): (State.STOPPED, Action.NONE),
    (State.BACKOFF, Event.DELETE): (State.STOPPED, Action.NONE),
    (State.QUEUED, Event.ADMITTED): (State.STARTING, Action.LAUNCH),
    # It keeps its place; the kernels that it was to have again are given up.
    (State.QUEUED, Event.RESTART): (State.QUEUED, Action.NONE),
    (State.QUEUED, Event.STOP): (State.STOPPED, Action.NONE),
    (State.QUEUED, Event.KILL): (State.STOPPED, Action.NONE),
    (State.QUEUED, Event.DELETE): (State.STOPPED, Action.NONE),
    (State.STARTING, Event.READY): (State.RUNNING, Action.NONE),
    (State.STARTING, Event.EXITED): (Junction.SETTLE, Action.NONE),
    (State.STARTING, Event.CRASHED): (Junction.SETTLE, Action.NONE),
    (State.STARTING, Event.REFUSED): (Junction.SETTLE, Action.NONE),
    (State.STARTING, Event.VETOED): (State.KILLING, Action.KILL),
    (State.STARTING, Event.DEADLINE): (State.KILLING, Action.KILL),
    (State.STARTING, Event.STOP): (State.STOPPING, Action.TERMINATE),
    (State.STARTING, Event.DELETE): (State.STOPPING, Action.TERMINATE),
    (State.STARTING, Event.RESTART): (State.STOPPING, Action.TERMINATE),
    (State.STARTING, Event.RESTART_KEEPING_KERNELS): (State.STOPPING, Action.TERMINATE),
    (State.STARTING, Event.KILL): (State.KILLING, Action.KILL),
    (State.STARTING, Event.UNREACHABLE): (State.LOST, Action.OBSERVE),
    (State.RUNNING, Event.EXITED): (Junction.LEAVE, Action.NONE),
    (State.RUNNING, Event.CRASHED): (Junction.SETTLE, Action.NONE),
    (State.RUNNING, Event.GONE): (Junction.SETTLE, Action.NONE),
    (State.RUNNING, Event.HUNG): (State.STOPPING, Action.TERMINATE),
    (State.RUNNING, Event.STOP): (State.STOPPING, Action.TERMINATE),
    (State.RUNNING, Event.DELETE): (State.STOPPING, Action.TERMINATE),
    (State.RUNNING, Event.RESTART): (State.STOPPING, Action.TERMINATE),
    (State.RUNNING, Event.RESTART_KEEPING_KERNELS): (State.STOPPING, Action.TERMINATE),
    (State.RUNNING, Event.KILL): (State.KILLING, Action.KILL),
    (State.RUNNING, Event.UNREACHABLE): (State.LOST, Action.OBSERVE),
    (State.RUNNING, Event.GATEWAY): (State.RUNNING, Action.NONE),
    (State.RUNNING, Event.DEADLINE): (State.RUNNING, Action.OBSERVE),
    (State.STOPPING, Event.EXITED): (Junction.SETTLE, Action.NONE),
    (State.STOPPING, Event.CRASHED): (Junction.SETTLE, Action.NONE),
    (State.STOPPING, Event.REFUSED): (Junction.SETTLE, Action.NONE),
    (State.STOPPING, Event.KILL): (State.KILLING, Action.KILL),
    (State.STOPPING, Event.DEADLINE): (State.KILLING, Action.KILL),
    (State.STOPPING, Event.UNREACHABLE): (State.LOST, Action.OBSERVE),
    (State.KILLING, Event.EXITED): (Junction.SETTLE, Action.NONE),
    (State.KILLING, Event.CRASHED): (Junction.SETTLE, Action.NONE),
    (State.KILLING, Event.REFUSED): (Junction.SETTLE, Action.NONE),
    (State.KILLING, Event.DEADLINE): (State.LOST, Action.OBSERVE),
    (State.KILLING, Event.UNREACHABLE): (State.LOST, Action.OBSERVE),
    (State.LOST, Event.SEEN): (Junction.RESUME, Action.NONE),
    # What an observation sets off may overtake its answer: dropped here, this READY would never come again.
    (State.LOST, Event.READY): (Junction.GREET, Action.NONE),
    (State.LOST, Event.EXITED): (Junction.LEAVE, Action.NONE),
    (State.LOST, Event.CRASHED): (Junction.SETTLE, Action.NONE),
    (State.LOST, Event.GONE): (Junction.SETTLE, Action.NONE),
    (State.LOST, Event.KILL): (State.KILLING, Action.KILL),
    (State.LOST, Event.DEADLINE): (State.LOST, Action.OBSERVE),
}
"""(state, event) -> (next state or junction, action). A pair that is absent changes no state; a command still moves the goal."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one event leads to."""

    state: State
    goal: Goal
    action: Action = Action.NONE


def advance(state: State, goal: Goal, event: Event, *, may_retry: bool, may_start: bool = True) -> Step | None:
    """Return the step that `event` leads to, or None where it changes nothing.

    `may_retry` says whether the restart budget would allow one more launch, `may_start` whether a place to start in is free.
    """
    aimed = aim(state, goal, event)
    row = TABLE.get((state, event))
    if row is None:
        return None if aimed is goal else Step(state, aimed)
    target, action = row
    if isinstance(target, State):
        return Step(target, aimed, action)
    return _JUNCTIONS[target](aimed, may_retry, may_start)


def aim(state: State, goal: Goal, event: Event) -> Goal:
    """Return the goal after `event`; only commands move it."""
    if event in {Event.STOP, Event.KILL}:
        return Goal.ABSENT if goal is Goal.ABSENT else Goal.DOWN
    if event is Event.DELETE:
        return Goal.ABSENT
    if event is Event.RESTART:
        return Goal.AGAIN if state in MAY_EXIST else Goal.UP
    if event is Event.RESTART_KEEPING_KERNELS:
        return Goal.RENEW if state in MAY_EXIST else Goal.UP
    if event is Event.START and goal not in RETURNS:
        # What still exists was told to end: a start can only mean "and then once more".
        return Goal.AGAIN if state in MAY_EXIST else Goal.UP
    return goal


def _begin(goal: Goal, _may_retry: bool, may_start: bool) -> Step:
    return Step(State.STARTING, goal, Action.LAUNCH) if may_start else Step(State.QUEUED, goal)


def _settle(goal: Goal, may_retry: bool, may_start: bool) -> Step:
    if goal in COMES_BACK:
        return _begin(Goal.UP, may_retry, may_start)
    if goal is Goal.UP:
        return Step(State.BACKOFF if may_retry else State.FAILED, goal)
    return Step(State.STOPPED, goal)


def _resume(goal: Goal, _may_retry: bool, _may_start: bool) -> Step:
    if goal is Goal.UP:
        return Step(State.STARTING, goal)
    return Step(State.STOPPING, goal, Action.TERMINATE)


def _greet(goal: Goal, may_retry: bool, may_start: bool) -> Step:
    return Step(State.RUNNING, goal) if goal is Goal.UP else _resume(goal, may_retry, may_start)


def _leave(goal: Goal, may_retry: bool, may_start: bool) -> Step:
    if goal is Goal.UP:
        return Step(State.STOPPED, Goal.DOWN)
    return _settle(goal, may_retry, may_start)


_JUNCTIONS: Final = {
    Junction.BEGIN: _begin,
    Junction.SETTLE: _settle,
    Junction.RESUME: _resume,
    Junction.GREET: _greet,
    Junction.LEAVE: _leave,
}
