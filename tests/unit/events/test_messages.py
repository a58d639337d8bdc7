"""What a change is called: each step of a life has its sentence, and its facts without secrets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from labkeeper.core.lifecycle import Event, Goal, State
from labkeeper.core.messages import Change, HistoryKind
from labkeeper.core.server import (
    Exit,
    Failure,
    FailureClass,
    GatewayHealth,
    Snapshot,
    StopMethod,
    StopReport,
)
from labkeeper.events import messages
from labkeeper.testing.fakes import a_spec
from labkeeper.testing.world import FakeProcess

CRASH = Failure(
    FailureClass.KILLED,
    "server 'lab' ended (killed by SIGKILL)",
    Exit(signal="SIGKILL"),
    ("a line",),
)
BASE = Snapshot(a_spec("lab"), State.STOPPED, Goal.UP, since=10.0, created_at=1.0, generation=2)
PROCESS = FakeProcess(a_spec("lab"), generation=2, pid=7, port=8888)
REACHED = {"endpoint": PROCESS.endpoint, "instance": PROCESS.instance}


def change(event, before, after, **values):
    """From a state (None: none that is known) to another one, half a second later."""
    last = None if before is None else replace(BASE, state=before)
    return Change(event, last, replace(BASE, state=after, since=10.5, **values), at=10.5)


STOPPED = StopReport(StopMethod.SHUTDOWN, 0.34)
LEFT = StopReport(StopMethod.SIGKILL, 8.0, (), ("k1", "k2"))


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        (change(Event.START, State.STOPPED, State.STARTING), "is launched"),
        (change(Event.START, State.STOPPED, State.QUEUED), "waits for its turn to be launched"),
        (change(Event.ADMITTED, State.QUEUED, State.STARTING), "is launched"),
        (
            change(Event.DEADLINE, State.BACKOFF, State.STARTING, restarts=1),
            "is launched again after a crash",
        ),
        (change(Event.SEEN, State.LOST, State.STARTING), "was found alive, and is taken over"),
        (change(Event.READY, State.STARTING, State.RUNNING, **REACHED), "is ready after 0.5 s"),
        (
            change(Event.READY, State.LOST, State.RUNNING, **REACHED),
            "was found alive, and is taken over",
        ),
        (
            change(Event.CRASHED, State.RUNNING, State.BACKOFF, failure=CRASH),
            f"to be launched again: {CRASH.message}",
        ),
        (change(Event.STOP, State.RUNNING, State.STOPPING), "is asked to end"),
        (
            change(Event.HUNG, State.RUNNING, State.STOPPING, failure=CRASH),
            f"is asked to end: {CRASH.message}",
        ),
        (change(Event.KILL, State.RUNNING, State.KILLING), "is killed"),
        (
            change(Event.VETOED, State.STARTING, State.KILLING, failure=CRASH),
            f"is killed: {CRASH.message}",
        ),
        (
            change(Event.DEADLINE, State.STOPPING, State.KILLING),
            "did not end within its grace, and is killed",
        ),
        (
            change(Event.EXITED, State.STOPPING, State.STOPPED, stop_report=STOPPED),
            "has ended by shutdown in 0.34 s",
        ),
        (
            change(Event.EXITED, State.STOPPING, State.STOPPED, stop_report=LEFT),
            "kernels that may be left: k1, k2",
        ),
        (change(Event.EXITED, State.RUNNING, State.STOPPED), "was shut down from inside"),
        (change(Event.STOP, State.FAILED, State.STOPPED), "has stopped"),
        (
            change(Event.DELETE, State.FAILED, State.STOPPED, goal=Goal.ABSENT),
            "has stopped, and is deleted",
        ),
        (
            change(Event.CRASHED, State.STARTING, State.FAILED, failure=CRASH),
            f"has failed: {CRASH.message}",
        ),
        (
            change(Event.CRASHED, State.STARTING, State.FAILED, exit=Exit(code=3)),
            "has failed: exit code 3",
        ),
        (
            change(Event.UNREACHABLE, State.RUNNING, State.LOST, failure=CRASH),
            f"cannot be seen: {CRASH.message}",
        ),
        (
            change(Event.UNREACHABLE, State.RUNNING, State.LOST),
            "cannot be seen: the cause is unknown",
        ),
        (change(Event.UNREACHABLE, None, State.LOST), "is looked for by a new keeper"),
    ],
)
def test_each_step_has_its_sentence(told, sentence):
    assert messages.kind_of(told) is HistoryKind.STATE
    assert messages.sentence(told).startswith("server 'lab' ")
    assert messages.sentence(told).endswith(sentence)


@pytest.mark.parametrize("goal", Goal)
def test_a_goal_that_changes_nothing_at_once_is_told_too(goal):
    before = replace(BASE, state=State.STOPPING, goal=Goal.DOWN)
    told = Change(Event.START, before, replace(before, goal=goal), at=1.0)
    if goal is Goal.DOWN:
        assert messages.kind_of(told) is None
    else:
        assert messages.kind_of(told) is HistoryKind.GOAL
        assert "is to" in messages.sentence(told)


@pytest.mark.parametrize(
    ("until", "said", "sentence"),
    [
        (60.0, "1970-01-01T00:01:00.000Z", "is snoozed until 1970-01-01T00:01:00.000Z"),
        (None, None, "is snoozed no more"),
    ],
)
def test_a_snooze_is_told_with_its_end(until, said, sentence):
    told = change(Event.SNOOZE, State.RUNNING, State.RUNNING, snoozed_until=until)
    assert messages.kind_of(told) is HistoryKind.SNOOZED
    assert messages.sentence(told) == f"server 'lab' {sentence}"
    assert messages.facts(told)["until"] == said


@pytest.mark.parametrize(
    ("error", "sentence"), [(None, "can use its gateway"), (CRASH, f"its gateway: {CRASH.message}")]
)
def test_a_gateway_that_comes_and_goes_is_told(error, sentence):
    before = replace(BASE, state=State.RUNNING)
    told = Change(Event.GATEWAY, before, replace(before, gateway=GatewayHealth(1.0, error)), at=1.0)
    assert messages.kind_of(told) is HistoryKind.GATEWAY
    assert messages.sentence(told).endswith(sentence)
    assert messages.facts(told)["gateway"]["reachable"] is (error is None)


def test_facts_are_for_programs_and_hold_no_secret():
    ready = messages.facts(change(Event.READY, State.STARTING, State.RUNNING, **REACHED))
    assert (ready["from"], ready["to"], "adopted" in ready, ready["seconds"]) == (
        "starting",
        "running",
        False,
        0.5,
    )
    assert (ready["pid"], ready["port"], ready["launched_by"]) == (
        PROCESS.pid,
        PROCESS.port,
        PROCESS.instance.launched_by,
    )
    assert PROCESS.endpoint.token not in str(ready)
    assert (
        messages.facts(change(Event.READY, State.LOST, State.RUNNING, **REACHED))["adopted"] is True
    )
    assert messages.facts(change(Event.SEEN, State.LOST, State.STARTING))["adopted"] is True
    assert "adopted" not in messages.facts(change(Event.GONE, State.LOST, State.STARTING))
    crash = messages.facts(
        change(Event.CRASHED, State.RUNNING, State.BACKOFF, failure=CRASH, exit=CRASH.exit)
    )
    assert crash["failure"] == {"failure_class": "killed", "message": CRASH.message}
    assert crash["exit"] == {"code": None, "signal": "SIGKILL"}
    ended = messages.facts(change(Event.EXITED, State.STOPPING, State.STOPPED, stop_report=LEFT))
    assert ended["stop_report"]["kernels_left"] == ("k1", "k2")
    assert messages.facts(change(Event.UNREACHABLE, None, State.LOST))["from"] is None
