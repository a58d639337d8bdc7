"""Server changes as history entries: a sentence for people, facts for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Final

from labkeeper.core.culling import Rule, rule_of_stop
from labkeeper.core.durations import format_time
from labkeeper.core.lifecycle import Event, Goal, State
from labkeeper.core.messages import Change, HistoryKind
from labkeeper.core.server import Failure, Snapshot, StopMethod

_GOALS: Final = {
    Goal.UP: "is to run",
    Goal.DOWN: "is to stop",
    Goal.AGAIN: "is to be started when it has ended",
    Goal.AGAIN_KEEPING_KERNELS: "is to be started with its kernels when it has ended",
    Goal.ABSENT: "is to be deleted",
}

_KINDS: Final = {Event.GATEWAY: HistoryKind.GATEWAY, Event.SNOOZE: HistoryKind.SNOOZED}
"""The kinds of events that change neither the state nor the goal."""


def kind_of(change: Change) -> HistoryKind | None:
    """Return the kind of a change; None if it is not recorded."""
    before, after = change.before, change.after
    if before is None or before.state is not after.state:
        return HistoryKind.STATE
    if change.event in _KINDS:
        return _KINDS[change.event]
    return HistoryKind.GOAL if before.goal is not after.goal else None


def sentence(change: Change) -> str:
    """Return a description of the change for people."""
    match kind_of(change):
        case HistoryKind.GATEWAY:
            what = _gateway(change.after)
        case HistoryKind.SNOOZED:
            what = _snoozed(change.after)
        case HistoryKind.GOAL:
            what = _GOALS[change.after.goal]
        case _:
            what = _SENTENCES[change.after.state](change)
    return f"server '{change.after.name}' {what}"


def facts(change: Change) -> dict[str, object]:
    """Return the facts for programs, omitting those that do not apply."""
    before, after = change.before, change.after
    told: dict[str, object] = {
        "event": str(change.event),
        "from": None if before is None else str(before.state),
        "to": str(after.state),
        "goal": str(after.goal),
        "restarts": after.restarts,
    }
    if _adopted(change):
        told["adopted"] = True
    if after.endpoint is not None and after.instance is not None:
        told |= {
            "launched_by": after.instance.launched_by,
            "pid": after.instance.pid,
            "port": after.endpoint.port,
        }
    if change.event is Event.READY:
        told["seconds"] = _seconds(change)
    if change.event is Event.SNOOZE:
        told["until"] = _until(after)
    if after.failure is not None:
        told["failure"] = _failure(after.failure)
    if after.exit is not None:
        told["exit"] = asdict(after.exit)
    if after.stop_report is not None:
        told["stop_report"] = asdict(after.stop_report)
    if after.gateway is not None:
        error = after.gateway.error
        told["gateway"] = {
            "reachable": after.gateway.reachable,
            "error": None if error is None else _failure(error),
        }
    return told


def _failure(failure: Failure) -> dict[str, str]:
    return {"failure_class": str(failure.kind), "message": failure.message}


def _adopted(change: Change) -> bool:
    """Whether it was found alive after being lost, mostly by a new keeper."""
    return (
        change.before is not None
        and change.before.state is State.LOST
        and change.event in {Event.SEEN, Event.READY}
    )


def _seconds(change: Change) -> float:
    """Return how long the previous state lasted, in seconds."""
    return (
        0.0
        if change.before is None
        else round(max(0.0, change.after.since - change.before.since), 3)
    )


def _gateway(after: Snapshot) -> str:
    if after.gateway is None or after.gateway.error is None:
        return "can use its gateway"
    return f"cannot use its gateway: {after.gateway.error.message}"


def _until(after: Snapshot) -> str | None:
    return None if after.snoozed_until is None else format_time(after.snoozed_until)


def _snoozed(after: Snapshot) -> str:
    until = _until(after)
    return "is snoozed no more" if until is None else f"is snoozed until {until}"


def _starting(change: Change) -> str:
    if _adopted(change):
        return "was found alive, and is taken over"
    return "is launched again after a crash" if change.after.restarts else "is launched"


def _running(change: Change) -> str:
    return (
        "was found alive, and is taken over"
        if _adopted(change)
        else f"is ready after {_seconds(change):g} s"
    )


def _backoff(change: Change) -> str:
    return f"has ended by itself, and is to be launched again: {_cause(change)}"


def _stopping(change: Change) -> str:
    return f"is asked to end: {_cause(change)}" if change.event is Event.HUNG else "is asked to end"


def _killing(change: Change) -> str:
    if (
        change.event is Event.DEADLINE
        and change.before is not None
        and change.before.state is State.STOPPING
    ):
        return "did not end within its grace, and is killed"
    return f"is killed: {_cause(change)}" if change.after.failure is not None else "is killed"


def _stopped(change: Change) -> str:
    after = change.after
    report = after.stop_report
    then = ", and is deleted" if after.goal is Goal.ABSENT else _sleeps(after)
    if change.before is not None and change.before.state is State.RUNNING:
        return f"was shut down from inside{then}"
    if report is None or report.method is StopMethod.NONE:
        return f"has stopped{then}"
    left = (
        f"; kernels that may be left: {', '.join(report.kernels_left)}"
        if report.kernels_left
        else ""
    )
    return f"has ended by {report.method} in {report.seconds:g} s{left}{then}"


def _sleeps(after: Snapshot) -> str:
    sleeps = rule_of_stop(after) is Rule.SLEEP_AFTER
    return ", and sleeps until its Lab is visited" if sleeps else ""


def _failed(change: Change) -> str:
    return f"has failed: {_cause(change)}"


def _lost(change: Change) -> str:
    return (
        "is looked for by a new keeper"
        if change.before is None
        else f"cannot be seen: {_cause(change)}"
    )


def _cause(change: Change) -> str:
    after = change.after
    return (
        after.failure.message
        if after.failure is not None
        else str(after.exit or "the cause is unknown")
    )


def _queued(_change: Change) -> str:
    return "waits for its turn to be launched"


_SENTENCES: Final = {
    State.QUEUED: _queued,
    State.STARTING: _starting,
    State.RUNNING: _running,
    State.BACKOFF: _backoff,
    State.STOPPING: _stopping,
    State.KILLING: _killing,
    State.STOPPED: _stopped,
    State.FAILED: _failed,
    State.LOST: _lost,
}
