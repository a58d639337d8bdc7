"""The life of one server, as a table.

Two variables describe a server. Its *goal* is what its owner wants; only commands set it. Its
*state* is what is true; only this table changes it. This separation makes every command legal in
every state: a command without a row here still sets the goal, and the next fact leads towards it.

Laws, held by the model check in the tests:

1. `stopped`, `failed`, `backoff` and `queued` are entered only on proof that no process is left.
2. Nothing is launched while a process may exist.
3. Once the backend answers, every server reaches its goal, or `failed` with a cause.

Precedents: Erlang/OTP supervisors for the restart budget, s6 for "up is not ready".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class State(StrEnum):
    """The actual state of a server."""

    STOPPED = "stopped"
    """Not running, as intended."""
    QUEUED = "queued"
    """Waiting for a start slot; no process exists."""
    STARTING = "starting"
    """Launched, not yet answering."""
    RUNNING = "running"
    """Has answered as itself."""
    BACKOFF = "backoff"
    """Ended on its own; will be relaunched after a delay."""
    STOPPING = "stopping"
    """Asked to shut down."""
    KILLING = "killing"
    """Being killed."""
    FAILED = "failed"
    """Given up; the snapshot carries the cause."""
    LOST = "lost"
    """The backend cannot report its state and will be asked again."""


class Goal(StrEnum):
    """The state that the owner wants."""

    UP = "up"
    DOWN = "down"
    AGAIN = "again"
    """Down, then up: a restart, or a start during a stop."""
    AGAIN_KEEPING_KERNELS = "again-keeping-kernels"
    """Down, then up with the kernels that it has on its gateway."""
    ABSENT = "absent"
    """Down, then forgotten."""


class Event(StrEnum):
    """All that can happen to a server: commands, backend facts, a start slot, one timer."""

    START = "START"
    RESTART = "RESTART"
    RESTART_KEEPING_KERNELS = "RESTART_KEEPING_KERNELS"
    """A restart that keeps the kernels on the server's gateway."""
    STOP = "STOP"
    KILL = "KILL"
    DELETE = "DELETE"
    SNOOZE = "SNOOZE"
    """Its culling was postponed; goal and state do not change."""

    READY = "READY"
    EXITED = "EXITED"
    """Ended by itself with code 0."""
    CRASHED = "CRASHED"
    """Ended in any other way."""
    PROGRESS = "PROGRESS"
    """Its start has come further."""
    REFUSED = "REFUSED"
    """The backend will not launch it: nothing was started."""
    VETOED = "VETOED"
    """Its gateway was found unusable during the start."""
    HUNG = "HUNG"
    """Alive, but has not answered for too long."""
    UNREACHABLE = "UNREACHABLE"
    """The backend cannot determine its state."""
    SEEN = "SEEN"
    """An observation found a process of the server."""
    GONE = "GONE"
    """An observation found neither a process nor how it ended."""
    GATEWAY = "GATEWAY"
    """Its gateway has become reachable or unreachable."""

    ADMITTED = "ADMITTED"
    """A start slot is free, and the server is first in the queue."""
    DEADLINE = "DEADLINE"


class Action(StrEnum):
    """A request to the backend."""

    NONE = "nothing"
    LAUNCH = "launch"
    TERMINATE = "terminate"
    KILL = "kill"
    OBSERVE = "observe"


class Junction(StrEnum):
    """A step whose next state depends on more than the event; `advance` resolves it."""

    BEGIN = "begin"
    """To be launched: at once, or queued."""
    SETTLE = "settle"
    """No process is left: stopped, relaunched, or given up."""
    RESUME = "resume"
    """Found alive: adopted, or ended."""
    GREET = "greet"
    """Found alive and answering: running, or ended."""
    LEAVE = "leave"
    """Ended by itself with code 0: it was shut down from inside."""


COMMANDS: Final = frozenset(
    {
        Event.START,
        Event.RESTART,
        Event.RESTART_KEEPING_KERNELS,
        Event.STOP,
        Event.KILL,
        Event.DELETE,
    }
)
ENDINGS: Final = frozenset({Event.EXITED, Event.CRASHED, Event.REFUSED, Event.GONE})
"""The events after which no process of a launch is left."""
MAY_EXIST: Final = frozenset(
    {State.STARTING, State.RUNNING, State.STOPPING, State.KILLING, State.LOST}
)
"""The states in which a process of the server may exist."""
AT_REST: Final = frozenset({State.STOPPED, State.FAILED})
"""The states that only a command ends."""
COMES_BACK: Final = frozenset({Goal.AGAIN, Goal.AGAIN_KEEPING_KERNELS})
"""The goals of a server that ends and then runs again."""
RETURNS: Final = COMES_BACK | {Goal.UP}
"""The goals of a server that runs, now or eventually."""
KEEPS_KERNELS: Final = frozenset({Goal.UP, Goal.AGAIN_KEEPING_KERNELS})
"""The goals of a server that keeps its kernels if it ends now."""

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
    # It keeps its place; the kernels kept for it are abandoned.
    (State.QUEUED, Event.RESTART): (State.QUEUED, Action.NONE),
    (State.QUEUED, Event.STOP): (State.STOPPED, Action.NONE),
    (State.QUEUED, Event.KILL): (State.STOPPED, Action.NONE),
    (State.QUEUED, Event.DELETE): (State.STOPPED, Action.NONE),
    (State.STARTING, Event.PROGRESS): (State.STARTING, Action.NONE),
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
    # A READY that follows an observation may overtake its result; if dropped, it would be lost.
    (State.LOST, Event.READY): (Junction.GREET, Action.NONE),
    (State.LOST, Event.EXITED): (Junction.LEAVE, Action.NONE),
    (State.LOST, Event.CRASHED): (Junction.SETTLE, Action.NONE),
    (State.LOST, Event.GONE): (Junction.SETTLE, Action.NONE),
    (State.LOST, Event.KILL): (State.KILLING, Action.KILL),
    (State.LOST, Event.DEADLINE): (State.LOST, Action.OBSERVE),
}
"""(state, event) -> (next state or junction, action). A missing pair changes no state; a command
still sets the goal."""


@dataclass(frozen=True, slots=True)
class Step:
    """The outcome of one event."""

    state: State
    goal: Goal
    action: Action = Action.NONE


def advance(
    state: State, goal: Goal, event: Event, *, may_retry: bool, may_start: bool = True
) -> Step | None:
    """Return the step that `event` leads to, or None if it changes nothing.

    `may_retry`: the restart budget allows one more launch; `may_start`: a start slot is free.
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
    """Return the goal after `event`; only commands change it."""
    if event in {Event.STOP, Event.KILL}:
        return Goal.ABSENT if goal is Goal.ABSENT else Goal.DOWN
    if event is Event.DELETE:
        return Goal.ABSENT
    if event is Event.RESTART:
        return Goal.AGAIN if state in MAY_EXIST else Goal.UP
    if event is Event.RESTART_KEEPING_KERNELS:
        return Goal.AGAIN_KEEPING_KERNELS if state in MAY_EXIST else Goal.UP
    if event is Event.START and goal not in RETURNS:
        # The existing process is already ending: a start can only mean "then once more".
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
