"""Single rows of the transition table; test_model_check proves its laws."""

from __future__ import annotations

from itertools import product

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
    Step,
    advance,
    aim,
)


def test_every_event_is_legal_and_facts_do_not_change_the_goal():
    """Without a command, the goal changes only where a junction changes it."""
    for state, event, goal in product(State, set(Event) - COMMANDS, Goal):
        step = advance(state, goal, event, may_retry=True) or Step(state, goal)
        assert aim(state, goal, event) is goal
        assert step.goal is goal or (goal, step.goal) in {
            (Goal.UP, Goal.DOWN),
            (Goal.AGAIN, Goal.UP),
            (Goal.AGAIN_KEEPING_KERNELS, Goal.UP),
        }


def test_repeated_commands_have_the_same_goal():
    """Two stops equal one, and a second restart still leads to goal up."""
    for state, event, goal in product(State, COMMANDS, set(Goal) - {Goal.ABSENT}):
        once = advance(state, goal, event, may_retry=True) or Step(state, goal)
        twice = advance(once.state, once.goal, event, may_retry=True) or once
        assert twice.goal is once.goal or (event, twice.goal) in {
            (Event.RESTART, Goal.AGAIN),
            (Event.RESTART_KEEPING_KERNELS, Goal.AGAIN_KEEPING_KERNELS),
        }


def test_rows_of_the_table_match_whether_a_process_may_exist():
    """Facts, terminate and kill need a process that may exist; a launch needs the opposite."""
    for (state, event), (target, action) in TABLE.items():
        if event not in COMMANDS and event not in {Event.DEADLINE, Event.ADMITTED}:
            assert state in MAY_EXIST
        if action in {Action.TERMINATE, Action.KILL, Action.OBSERVE}:
            assert state in MAY_EXIST
            assert target in MAY_EXIST
        if action is Action.LAUNCH:
            assert state not in MAY_EXIST
            assert target is State.STARTING
        if target is Junction.BEGIN:
            assert state not in MAY_EXIST
        if target is Junction.SETTLE:
            assert event in {Event.EXITED, Event.CRASHED, Event.REFUSED, Event.GONE}


def test_a_start_does_not_cancel_keeping_kernels():
    assert (
        aim(State.STOPPING, Goal.AGAIN_KEEPING_KERNELS, Event.START) is Goal.AGAIN_KEEPING_KERNELS
    )
    assert aim(State.STOPPING, Goal.AGAIN_KEEPING_KERNELS, Event.RESTART) is Goal.AGAIN


@pytest.mark.parametrize("goal", [Goal.DOWN, Goal.AGAIN])
def test_a_start_while_stopping_launches_again_after_the_end(goal):
    """The goal becomes AGAIN, and UP when the launch begins."""
    step = advance(State.STOPPING, goal, Event.START, may_retry=False)
    assert step in {None, Step(State.STOPPING, Goal.AGAIN)}
    assert advance(State.STOPPING, Goal.AGAIN, Event.EXITED, may_retry=False) == Step(
        State.STARTING, Goal.UP, Action.LAUNCH
    )


def test_a_start_of_a_running_server_changes_nothing():
    assert advance(State.RUNNING, Goal.UP, Event.START, may_retry=True) is None


def test_a_stop_cancels_a_restart():
    """The last command counts."""
    assert aim(State.STOPPING, Goal.AGAIN, Event.STOP) is Goal.DOWN
    assert advance(State.STOPPING, Goal.DOWN, Event.CRASHED, may_retry=True) == Step(
        State.STOPPED, Goal.DOWN
    )


@pytest.mark.parametrize("event", [Event.STOP, Event.KILL])
def test_a_stop_does_not_cancel_a_deletion(event):
    assert aim(State.STOPPING, Goal.ABSENT, event) is Goal.ABSENT


@pytest.mark.parametrize(("may_retry", "state"), [(True, State.BACKOFF), (False, State.FAILED)])
def test_a_crash_leads_to_backoff_while_restarts_are_left(may_retry, state):
    assert advance(State.RUNNING, Goal.UP, Event.CRASHED, may_retry=may_retry) == Step(
        state, Goal.UP
    )


def test_a_shutdown_from_inside_changes_the_goal_to_down():
    assert advance(State.RUNNING, Goal.UP, Event.EXITED, may_retry=True) == Step(
        State.STOPPED, Goal.DOWN
    )
    assert advance(State.LOST, Goal.UP, Event.EXITED, may_retry=True) == Step(
        State.STOPPED, Goal.DOWN
    )
    assert advance(State.LOST, Goal.AGAIN, Event.EXITED, may_retry=False) == Step(
        State.STARTING, Goal.UP, Action.LAUNCH
    )


@pytest.mark.parametrize("event", [Event.SEEN, Event.READY])
@pytest.mark.parametrize("goal", [Goal.DOWN, Goal.AGAIN, Goal.ABSENT])
def test_a_server_found_alive_but_unwanted_is_terminated(event, goal):
    assert advance(State.LOST, goal, event, may_retry=True) == Step(
        State.STOPPING, goal, Action.TERMINATE
    )


def test_a_server_found_alive_and_wanted_is_adopted():
    """SEEN waits for READY; READY alone is enough."""
    assert advance(State.LOST, Goal.UP, Event.SEEN, may_retry=True) == Step(State.STARTING, Goal.UP)
    assert advance(State.LOST, Goal.UP, Event.READY, may_retry=True) == Step(State.RUNNING, Goal.UP)


def test_a_server_that_survives_a_kill_is_lost_not_stopped():
    assert advance(State.KILLING, Goal.DOWN, Event.DEADLINE, may_retry=True) == Step(
        State.LOST, Goal.DOWN, Action.OBSERVE
    )


@pytest.mark.parametrize("event", [Event.START, Event.RESTART])
def test_a_start_in_backoff_launches_immediately(event):
    assert advance(State.BACKOFF, Goal.UP, event, may_retry=False) == Step(
        State.STARTING, Goal.UP, Action.LAUNCH
    )


@pytest.mark.parametrize("goal", [Goal.UP, Goal.AGAIN, Goal.AGAIN_KEEPING_KERNELS])
def test_every_launch_queues_while_no_start_slot_is_free(goal):
    """Also after a crash and after the stop of a restart; only ADMITTED launches it then."""
    for state, event in product(State, Event):
        step = advance(state, goal, event, may_retry=True, may_start=False)
        if step is not None and event is not Event.ADMITTED:
            assert step.action is not Action.LAUNCH
            unhindered = advance(state, goal, event, may_retry=True)
            assert (step == unhindered) == (unhindered.action is not Action.LAUNCH)
            assert step.state is State.QUEUED or unhindered.action is not Action.LAUNCH
    assert advance(State.QUEUED, Goal.UP, Event.ADMITTED, may_retry=False) == Step(
        State.STARTING, Goal.UP, Action.LAUNCH
    )


@pytest.mark.parametrize(
    ("event", "goal"),
    [(Event.STOP, Goal.DOWN), (Event.KILL, Goal.DOWN), (Event.DELETE, Goal.ABSENT)],
)
def test_a_queued_server_stops_immediately(event, goal):
    """No process exists that would have to end."""
    assert advance(State.QUEUED, Goal.UP, event, may_retry=True) == Step(State.STOPPED, goal)


@pytest.mark.parametrize("event", [Event.START, Event.RESTART, Event.RESTART_KEEPING_KERNELS])
def test_a_repeated_start_keeps_its_position_in_the_queue(event):
    step = advance(State.QUEUED, Goal.UP, event, may_retry=True)
    assert step in {None, Step(State.QUEUED, Goal.UP)}
