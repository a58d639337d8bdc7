"""Messages of events: a sentence for each change, and details without secrets."""

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
    StopOrder,
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
    """Return a change, half a second after the first state (None: unknown before)."""
    last = None if before is None else replace(BASE, state=before)
    return Change(event, last, replace(BASE, state=after, since=10.5, **values), at=10.5)


STOPPED = StopReport(StopMethod.SHUTDOWN, 0.34)
LEFT = StopReport(StopMethod.SIGKILL, 8.0, (), ("k1", "k2"))


@pytest.mark.parametrize(
    ("changed", "sentence"),
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
            change(
                Event.EXITED,
                State.STOPPING,
                State.STOPPED,
                stop_report=STOPPED,
                stopped_by=StopOrder("culler", "sleep_after: without kernels"),
            ),
            "has ended by shutdown in 0.34 s, and sleeps until its Lab is visited",
        ),
        (
            change(
                Event.EXITED,
                State.STOPPING,
                State.STOPPED,
                stop_report=STOPPED,
                stopped_by=StopOrder("culler", "max_age: it has run for 1 h"),
            ),
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
def test_each_change_has_its_sentence(changed, sentence):
    assert messages.kind_of(changed) is HistoryKind.STATE
    assert messages.sentence(changed).startswith("server 'lab' ")
    assert messages.sentence(changed).endswith(sentence)


@pytest.mark.parametrize("goal", Goal)
def test_a_change_of_the_goal_alone_has_its_own_kind(goal):
    before = replace(BASE, state=State.STOPPING, goal=Goal.DOWN)
    changed = Change(Event.START, before, replace(before, goal=goal), at=1.0)
    if goal is Goal.DOWN:
        assert messages.kind_of(changed) is None
    else:
        assert messages.kind_of(changed) is HistoryKind.GOAL
        assert "is to" in messages.sentence(changed)


@pytest.mark.parametrize(
    ("until", "expected", "sentence"),
    [
        (60.0, "1970-01-01T00:01:00.000Z", "is snoozed until 1970-01-01T00:01:00.000Z"),
        (None, None, "is snoozed no more"),
    ],
)
def test_a_snooze_has_its_end(until, expected, sentence):
    changed = change(Event.SNOOZE, State.RUNNING, State.RUNNING, snoozed_until=until)
    assert messages.kind_of(changed) is HistoryKind.SNOOZED
    assert messages.sentence(changed) == f"server 'lab' {sentence}"
    assert messages.facts(changed)["until"] == expected


@pytest.mark.parametrize(
    ("error", "sentence"), [(None, "can use its gateway"), (CRASH, f"its gateway: {CRASH.message}")]
)
def test_a_change_of_a_gateways_health_has_its_own_kind(error, sentence):
    before = replace(BASE, state=State.RUNNING)
    changed = Change(
        Event.GATEWAY, before, replace(before, gateway=GatewayHealth(1.0, error)), at=1.0
    )
    assert messages.kind_of(changed) is HistoryKind.GATEWAY
    assert messages.sentence(changed).endswith(sentence)
    assert messages.facts(changed)["gateway"]["reachable"] is (error is None)


def test_details_contain_no_secrets():
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
