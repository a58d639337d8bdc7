"""Routes, sessions and revocations survive a kill of keeper and edge in any order."""

from __future__ import annotations

import contextlib
import sys

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from edge_keepers import Nursery
from edge_machine import LONG, EdgeMachine, Labs
from fuzzing import FUZZ

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the edge needs Linux")


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    with contextlib.closing(Nursery(tmp_path_factory.mktemp("keepers") / "log")) as made:
        yield made


@pytest.fixture(scope="module")
def labs():
    with contextlib.closing(Labs()) as made:
        yield made


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("examples", [6, pytest.param(150, marks=pytest.mark.fuzz)])
def test_what_was_answered_stays_true(nursery, labs, examples):
    """Whatever is killed, suspended or started again, in any order."""
    run_state_machine_as_test(
        lambda: EdgeMachine(nursery, labs),
        settings=settings(FUZZ, max_examples=examples, stateful_step_count=30),
    )


@pytest.fixture
def machine(nursery, labs):
    """With a server and a session; what it does is checked as in a random run."""
    made = EdgeMachine(nursery, labs)
    yield made
    made.teardown()


def check(machine):
    machine.sessions_get_where_they_may()
    machine.websockets_stay_as_long_as_they_may()


ACTS = {
    "begin_session": ("a", "ada", LONG),
    "revoke_session": (0,),
    "revoke_token": (0,),
    "delete": (0,),
}
"""What changes sessions, as the machine does it."""
POINTS = {
    "begin_session": ["save_session", "command"],
    "revoke_session": ["command", "forget_sessions"],
    "revoke_token": ["forget_token", "command", "forget_sessions"],
    "delete": ["command", "forget_sessions"],
}


@pytest.mark.parametrize(
    ("act", "point"),
    [
        (act, f"{when} {what}")
        for act, points in POINTS.items()
        for what in points
        for when in ("before", "after")
    ],
)
def test_keeper_that_is_killed_as_it_changes_sessions_leaves_no_lie(machine, act, point):
    """Whatever had reached the disk or an edge, or only one of two edges."""
    machine.open_connection(0, True)
    machine.kill("upgrade")
    machine.observe()
    check(machine)
    getattr(machine, act)(*ACTS[act], (point, 1))
    assert machine._keeper is None, "this point was not reached"
    check(machine)
    machine.start_keeper("two")
    check(machine)
    # Done again, it is done, for the edge, for the next one, and for the next keeper's.
    getattr(machine, act)(*ACTS[act], None)
    check(machine)
    machine.kill("edge")
    check(machine)
    machine.kill("keeper, then edge")
    machine.start_keeper("two")
    check(machine)
    assert act == "begin_session" or machine._sessions[0].ended


def test_a_request_that_has_begun_follows_its_server_through_an_upgrade(machine):
    """The edge that reads its end is not the one for new connections."""
    machine.open_connection(0, False)
    check(machine)
    machine.kill("upgrade")
    machine.launch("a", reuse=False)
    assert len(machine._pids) == 2
    machine.send_the_other_half()
