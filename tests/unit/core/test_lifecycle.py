"""Single steps of the table; its laws are proven in test_model_check."""

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


def test_no_event_is_illegal_and_facts_never_move_the_goal():
    """Any event in any state leads to a step or to nothing; without a command the goal only goes where a junction leads."""
    for state, event, goal in product(State, set(Event) - COMMANDS, Goal):
        step = advance(state, goal, event, may_retry=True) or Step(state, goal)
        assert aim(state, goal, event) is goal
        assert step.goal is goal or (goal, step.goal) in {
            (Goal.UP, Goal.DOWN),
            (Goal.AGAIN, Goal.UP),
            (Goal.AGAIN_KEEPING_KERNELS, Goal.UP),
        }


def test_a_command_given_twice_aims_where_it_aimed_at_first():
    """Callers may repeat themselves: two stops are one, and a second restart still leads up."""
    for state, event, goal in product(State, COMMANDS, set(Goal) - {Goal.ABSENT}):
        once = advance(state, goal, event, may_retry=True) or Step(state, goal)
        twice = advance(once.state, once.goal, event, may_retry=True) or once
        assert twice.goal is once.goal or (event, twice.goal) in {
            (Event.RESTART, Goal.AGAIN),
            (Event.RESTART_KEEPING_KERNELS, Goal.AGAIN_KEEPING_KERNELS),
        }


def test_what_is_in_the_table_may_hold():
    """Only states in which a process may exist hear facts; terminate and kill come from those alone; a launch from the others."""
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


def test_a_start_does_not_take_back_that_kernels_are_to_be_kept():
    assert (
        aim(State.STOPPING, Goal.AGAIN_KEEPING_KERNELS, Event.START) is Goal.AGAIN_KEEPING_KERNELS
    )
    assert aim(State.STOPPING, Goal.AGAIN_KEEPING_KERNELS, Event.RESTART) is Goal.AGAIN


@pytest.mark.parametrize("goal", [Goal.DOWN, Goal.AGAIN])
def test_a_start_during_a_stop_means_once_more(goal):
    """START while stopping turns the goal to AGAIN; the end then leads to a launch, and the goal is up."""
    step = advance(State.STOPPING, goal, Event.START, may_retry=False)
    assert step in {None, Step(State.STOPPING, Goal.AGAIN)}
    assert advance(State.STOPPING, Goal.AGAIN, Event.EXITED, may_retry=False) == Step(
        State.STARTING, Goal.UP, Action.LAUNCH
    )


def test_a_start_of_what_runs_changes_nothing():
    """START is idempotent."""
    assert advance(State.RUNNING, Goal.UP, Event.START, may_retry=True) is None


def test_a_stop_takes_back_a_restart():
    """The last command counts: STOP after RESTART leads to stopped."""
    assert aim(State.STOPPING, Goal.AGAIN, Event.STOP) is Goal.DOWN
    assert advance(State.STOPPING, Goal.DOWN, Event.CRASHED, may_retry=True) == Step(
        State.STOPPED, Goal.DOWN
    )


@pytest.mark.parametrize("event", [Event.STOP, Event.KILL])
def test_a_stop_does_not_take_back_a_deletion(event):
    """What is being deleted stays so."""
    assert aim(State.STOPPING, Goal.ABSENT, event) is Goal.ABSENT


@pytest.mark.parametrize(("may_retry", "state"), [(True, State.BACKOFF), (False, State.FAILED)])
def test_a_crash_leads_to_backoff_while_there_is_budget(may_retry, state):
    """The restart budget alone decides between another launch and giving up."""
    assert advance(State.RUNNING, Goal.UP, Event.CRASHED, may_retry=may_retry) == Step(
        state, Goal.UP
    )


def test_who_shuts_it_down_from_inside_is_not_contradicted():
    """EXITED while running turns the goal down."""
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
def test_what_is_found_alive_but_unwanted_is_ended(event, goal):
    """RESUME and GREET ask to end what nobody wants."""
    assert advance(State.LOST, goal, event, may_retry=True) == Step(
        State.STOPPING, goal, Action.TERMINATE
    )


def test_what_is_found_alive_and_wanted_is_taken_over():
    """RESUME adopts without a launch; GREET does not wait for an answer that already came."""
    assert advance(State.LOST, Goal.UP, Event.SEEN, may_retry=True) == Step(State.STARTING, Goal.UP)
    assert advance(State.LOST, Goal.UP, Event.READY, may_retry=True) == Step(State.RUNNING, Goal.UP)


def test_what_survives_a_kill_is_lost_not_stopped():
    """The keeper never says "stopped" of what it could not end."""
    assert advance(State.KILLING, Goal.DOWN, Event.DEADLINE, may_retry=True) == Step(
        State.LOST, Goal.DOWN, Action.OBSERVE
    )


@pytest.mark.parametrize("event", [Event.START, Event.RESTART])
def test_a_start_in_backoff_does_not_wait(event):
    """Who asks for it gets it now."""
    assert advance(State.BACKOFF, Goal.UP, event, may_retry=False) == Step(
        State.STARTING, Goal.UP, Action.LAUNCH
    )


@pytest.mark.parametrize("goal", [Goal.UP, Goal.AGAIN, Goal.AGAIN_KEEPING_KERNELS])
def test_every_launch_queues_where_no_place_is_free(goal):
    """Asked for, after a crash, after a restart's stop: each waits for its turn, and nothing but that launches it."""
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
def test_what_queues_is_stopped_at_once(event, goal):
    """Nothing of it exists, so nothing is to be ended."""
    assert advance(State.QUEUED, Goal.UP, event, may_retry=True) == Step(State.STOPPED, goal)


@pytest.mark.parametrize("event", [Event.START, Event.RESTART, Event.RESTART_KEEPING_KERNELS])
def test_who_asks_again_keeps_the_place(event):
    step = advance(State.QUEUED, Goal.UP, event, may_retry=True)
    assert step in {None, Step(State.QUEUED, Goal.UP)}
