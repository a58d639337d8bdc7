"""Cull decisions: what counts as use, when a rule stops a server, and the reasons given."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkeeper.core.culling import (
    ActivityHistory,
    CullPolicy,
    CullState,
    Facts,
    Rule,
    Terminals,
    decide,
    idle_kernels,
    limits_of,
    wakes,
    warned_at,
)
from labkeeper.core.lifecycle import Goal, State
from labkeeper.core.server import Activity, KernelUse, Snapshot, StopOrder, TerminalUse, Visits
from labkeeper.testing.fakes import a_spec

IDLE, AGE, SLEEP = Rule.IDLE_TIMEOUT, Rule.MAX_AGE, Rule.SLEEP_AFTER
POLICY = CullPolicy(grace=0.0, warning=300.0)
QUIET = Activity(0.0)


def facts(activity=QUIET, **more):
    return Facts(
        **(
            {"limits": {IDLE: 7200.0}, "up_since": 0.0, "ready_at": 0.0, "activity": activity}
            | more
        )
    )


def kernel(state="idle", at=0.0, connections=0):
    return KernelUse("k", state, at, connections)


@pytest.mark.parametrize(
    ("activity", "policy", "held"),
    [
        (QUIET, {}, ""),
        (Activity(0.0, (kernel("busy"),)), {}, "kernel k is busy"),
        (Activity(0.0, (kernel("busy"),)), {"cull_busy": True}, ""),
        (
            Activity(0.0, (kernel("unknown"),)),
            {},
            "kernel k does not tell its state, which counts as busy",
        ),
        (Activity(0.0, (kernel("starting"),)), {}, ""),
        (Activity(0.0, (kernel(connections=2),)), {}, ""),
        (
            Activity(0.0, (kernel(connections=2),)),
            {"cull_connected": False},
            "connection k 2 open to kernel k",
        ),
        (Activity(0.0, (kernel(),)), {"cull_connected": False}, ""),
        (Activity(0.0, terminals=(TerminalUse("1", 0.0, "sleep"),)), {}, "terminal 1 runs sleep"),
        (Activity(0.0, terminals=(TerminalUse("1", 0.0, ""),)), {}, ""),
        (Activity(0.0, terminals=(TerminalUse("1", 0.0, None),)), {}, ""),
        (
            Activity(0.0, terminals=(TerminalUse("1", 0.0, ""),)),
            {"terminals": Terminals.OPEN},
            "terminal 1 is open",
        ),
        (
            Activity(0.0, terminals=(TerminalUse("1", 0.0, "sleep"),)),
            {"terminals": Terminals.IGNORE},
            "",
        ),
    ],
)
def test_what_counts_as_use_depends_on_the_policy(activity, policy, held):
    verdict = decide(facts(activity), replace(POLICY, **policy), 10.0)
    assert verdict.state is (CullState.IN_USE if held else CullState.COUNTING)
    if held:
        assert verdict.reason == f"it is in use: {held}"
        assert (verdict.next, verdict.outlooks[0].stops_at, verdict.outlooks[0].since) == (
            None,
            None,
            None,
        )
    else:
        assert verdict.next.stops_at == 7200.0


@pytest.mark.parametrize(
    ("now", "state", "stops", "warns"),
    [
        (10.0, CullState.COUNTING, 7200.0, 6900.0),
        (6899.0, CullState.COUNTING, 7200.0, 6900.0),
        (6900.0, CullState.WARNED, 7200.0, 6900.0),
        (7300.0, CullState.WARNED, 7600.0, 7300.0),
    ],
)
def test_no_server_is_stopped_without_a_warning(now, state, stops, warns):
    verdict = decide(facts(), POLICY, now)
    assert (verdict.state, verdict.next.stops_at, verdict.next.warns_at) == (state, stops, warns)


def test_a_warned_server_is_due_after_the_warning_and_is_warned_once():
    warned = warned_at(decide(facts(), POLICY, 6900.0), {}, 6900.0)
    assert warned == {IDLE: 6900.0}
    again = decide(facts(warned=warned), POLICY, 7000.0)
    assert warned_at(again, warned, 7000.0) == warned
    due = decide(facts(warned=warned), POLICY, 7380.0)
    assert (due.state, due.reason) == (CullState.DUE, "idle_timeout: unused for 2 h 3 min")
    used = decide(facts(Activity(7000.0), warned=warned), POLICY, 7001.0)
    assert warned_at(used, warned, 7001.0) == {}


@pytest.mark.parametrize(("limit", "ahead"), [(7200.0, 300.0), (60.0, 30.0)])
def test_the_warning_takes_at_most_half_of_the_limit(limit, ahead):
    outlook = decide(facts(limits={IDLE: limit}), POLICY, 0.0).next
    assert outlook.stops_at - outlook.warns_at == ahead


def test_without_a_warning_a_server_is_due_immediately():
    verdict = decide(facts(), replace(POLICY, warning=0.0), 7200.0)
    assert (verdict.state, verdict.next.warns_at) == (CullState.DUE, None)
    assert warned_at(verdict, {}, 7200.0) == {}


def test_the_grace_period_counts_from_ready_and_does_not_apply_to_max_age():
    grace = replace(POLICY, grace=600.0, warning=0.0)
    short = facts(limits={IDLE: 10.0, AGE: 300.0}, ready_at=100.0, up_since=50.0)
    verdict = decide(short, grace, 200.0)
    assert {o.rule: o.stops_at for o in verdict.outlooks} == {IDLE: 700.0, AGE: 350.0}
    assert verdict.next.rule is AGE


def test_max_age_applies_to_servers_in_use_and_to_silent_ones():
    for activity in (None, Activity(0.0, (kernel("busy"),))):
        verdict = decide(
            facts(activity, limits={IDLE: 10.0, AGE: 3600.0}), replace(POLICY, warning=0.0), 3700.0
        )
        assert (verdict.state, verdict.reason) == (
            CullState.DUE,
            "max_age: it has run for 1 h 1 min",
        )


def test_unknown_activity_counts_as_use_and_the_reason_is_given():
    verdict = decide(facts(None, unknown="it hangs"), POLICY, 99999.0)
    assert (verdict.state, verdict.next) == (CullState.UNKNOWN, None)
    assert verdict.reason.endswith("which counts as use: it hangs")


def test_a_snooze_postpones_both_rules():
    verdict = decide(facts(limits={IDLE: 10.0, AGE: 10.0}, snoozed_until=5000.0), POLICY, 1400.0)
    assert {o.stops_at for o in verdict.outlooks} == {5000.0}
    assert (verdict.state, verdict.reason) == (CullState.SNOOZED, "it is snoozed for another 1 h")


def test_without_rules_culling_is_off():
    assert decide(facts(limits={}), POLICY, 1.0).state is CullState.OFF
    assert limits_of(a_spec()) == {}
    assert limits_of(replace(a_spec(), idle_timeout=5.0)) == {IDLE: 5.0}


@pytest.mark.parametrize(
    ("activity", "policy", "used"),
    [
        (None, {}, (5.0, "its start")),
        (Activity(None), {}, (5.0, "its start")),
        (Activity(9.0), {}, (9.0, "its API")),
        (Activity(3.0), {}, (3.0, "its API")),
        (Activity(9.0, (kernel(at=9.0),)), {}, (9.0, "kernel k")),
        (Activity(9.0, (kernel(at=None),), (TerminalUse("1", 11.0),)), {}, (11.0, "terminal 1")),
        (
            Activity(9.0, (), (TerminalUse("1", 11.0),)),
            {"terminals": Terminals.IGNORE},
            (9.0, "its API"),
        ),
    ],
)
def test_the_source_of_the_last_activity_is_named(activity, policy, used):
    verdict = decide(facts(activity, ready_at=5.0), replace(POLICY, **policy), 20.0)
    assert (verdict.last_used_at, verdict.last_used) == used


@pytest.mark.parametrize(
    ("one", "policy", "ended"),
    [
        (kernel(), {}, True),
        (kernel(at=50.0), {}, False),
        (kernel(at=None), {}, False),
        (kernel("busy"), {}, False),
        (kernel("busy"), {"cull_busy": True}, True),
        (kernel(connections=1), {}, True),
        (kernel(connections=1), {"cull_connected": False}, False),
        (kernel(), {"kernel_idle_timeout": None}, False),
    ],
)
def test_idle_kernels_are_culled_independently_of_their_server(one, policy, ended):
    rule = replace(POLICY, **({"kernel_idle_timeout": 60.0} | policy))
    terminal = TerminalUse("k", 0.0, "sleep")
    found = idle_kernels(facts(Activity(0.0, (one,), (terminal,)), limits={}), rule, 100.0)
    assert found == (((one, 100.0),) if ended else ())


def test_no_kernel_is_culled_while_activity_is_unknown_or_the_server_snoozed():
    rule = replace(POLICY, kernel_idle_timeout=60.0)
    assert idle_kernels(facts(None), rule, 100.0) == ()
    assert idle_kernels(facts(Activity(0.0, (kernel(),)), snoozed_until=101.0), rule, 100.0) == ()


# Clocks

WALL = 1_000_000.0


def test_timestamps_are_converted_once_so_wall_clock_jumps_do_not_matter():
    memory = ActivityHistory()
    seen = Activity(WALL - 60, (kernel(at=WALL - 50),), (TerminalUse("1", WALL - 40, ""),))
    first = memory.take(seen, now=100.0, wall=WALL)
    assert (
        first.last_activity,
        first.kernels[0].last_activity,
        first.terminals[0].last_activity,
    ) == (40.0, 50.0, 60.0)
    for jump in (86400.0, -86400.0):
        assert memory.take(seen, now=130.0, wall=WALL + jump) == first


@pytest.mark.parametrize(
    ("at", "wall", "ours"),
    [
        (WALL + 20, WALL + 30, 120.0),
        (WALL + 20, WALL + 90000, 130.0),
        (WALL + 90000, WALL + 30, 130.0),
        (None, WALL + 30, None),
    ],
)
def test_new_activity_lies_between_two_polls_or_counts_from_the_later_one(at, wall, ours):
    memory = ActivityHistory()
    memory.take(Activity(WALL - 60), now=100.0, wall=WALL)
    assert memory.take(Activity(at), now=130.0, wall=wall).last_activity == ours


def test_activity_from_before_the_launch_is_ignored():
    assert (
        ActivityHistory(floor=90.0).take(Activity(WALL - 60), now=100.0, wall=WALL).last_activity
        == 100.0
    )


def sleeper(activity=QUIET, **more):
    return facts(activity, **({"limits": {SLEEP: 3600.0}, "visits": Visits(0, None)} | more))


@pytest.mark.parametrize(
    ("activity", "open_", "held"),
    [
        (QUIET, 0, ""),
        (QUIET, 2, "visitor browser has the Lab open"),
        (Activity(0.0, (kernel(),)), 0, "kernel k exists"),
        (Activity(0.0, (kernel("busy"),)), 0, "kernel k is busy"),
        (Activity(0.0, terminals=(TerminalUse("1", 0.0, ""),)), 0, "terminal 1 is open"),
        (Activity(0.0, terminals=(TerminalUse("1", 0.0, "vi"),)), 0, "terminal 1 runs vi"),
    ],
)
def test_a_server_sleeps_only_without_kernels_terminals_and_visitors(activity, open_, held):
    verdict = decide(sleeper(activity, visits=Visits(open_, None)), POLICY, 10.0)
    found = ", ".join(f"{holder.kind} {holder.id} {holder.reason}" for holder in verdict.holders)
    assert found == held
    assert verdict.state is (CullState.IN_USE if held else CullState.COUNTING)
    # Whatever counts as use for other rules: sleep ends no kernels and no terminals.
    ignores = replace(POLICY, terminals=Terminals.IGNORE, cull_busy=True)
    assert decide(sleeper(activity, visits=Visits(open_, None)), ignores, 10.0).state is (
        verdict.state
    )


@pytest.mark.parametrize(
    ("more", "stops_at"),
    [
        ({}, 3600.0),
        ({"ready_at": 50.0}, 3650.0),
        ({"occupied_at": 100.0}, 3700.0),
        ({"activity": Activity(200.0)}, 3800.0),
        ({"snoozed_until": 9000.0}, 9000.0),
    ],
)
def test_sleep_counts_from_the_last_use_or_visit(more, stops_at):
    verdict = decide(sleeper(**more), POLICY, 300.0)
    assert verdict.next.stops_at == stops_at
    assert decide(sleeper(**more), replace(POLICY, grace=9100.0), 300.0).next.stops_at >= 9100.0


def test_the_reason_of_sleep_is_what_was_missing():
    known = sleeper(occupied_at=100.0, warned={SLEEP: 3000.0})
    verdict = decide(known, POLICY, 3700.0)
    assert (verdict.state, verdict.reason) == (
        CullState.DUE,
        "sleep_after: without kernels, terminals and visitors for 1 h",
    )


def test_unknown_visitors_count_as_use_for_sleep_only():
    known = sleeper(visits=None, visits_unknown="the edge is off")
    verdict = decide(known, POLICY, 10.0)
    assert (verdict.state, verdict.next) == (CullState.UNKNOWN, None)
    assert verdict.reason.endswith("cannot be known, which counts as use: the edge is off")
    both = replace(known, limits={SLEEP: 3600.0, IDLE: 7200.0})
    assert decide(both, POLICY, 10.0).next.rule is IDLE


def test_an_idle_kernel_that_keeps_a_server_awake_does_not_keep_it_from_being_idle():
    both = {"limits": {SLEEP: 3600.0, IDLE: 7200.0}}
    verdict = decide(sleeper(Activity(0.0, (kernel(),)), **both), POLICY, 10.0)
    assert (verdict.state, verdict.next.rule) == (CullState.COUNTING, IDLE)
    assert [holder.reason for holder in verdict.holders] == ["exists"]


@pytest.mark.parametrize(
    ("order", "goal", "expected"),
    [
        (StopOrder("culler", "sleep_after: without kernels"), Goal.DOWN, True),
        (StopOrder("culler", "idle_timeout: unused for 2 h"), Goal.DOWN, True),
        (StopOrder("culler", "max_age: it has run for 2 h"), Goal.DOWN, False),
        (StopOrder("token:culler", "sleep_after: without kernels"), Goal.DOWN, False),
        (StopOrder("keeper"), Goal.DOWN, False),
        (StopOrder("culler", "sleep_after: without kernels"), Goal.AGAIN, False),
        (StopOrder("culler", "sleep_after: without kernels"), Goal.ABSENT, False),
        (None, Goal.DOWN, False),
    ],
)
def test_a_visit_wakes_what_was_stopped_as_unused(order, goal, expected):
    snapshot = Snapshot(a_spec("lab"), State.STOPPED, goal, 0.0, 0.0, stopped_by=order)
    assert wakes(snapshot) is expected


# Properties

times = st.floats(0, 1e5)
activities = st.none() | st.builds(
    Activity,
    st.none() | times,
    st.lists(
        st.builds(
            KernelUse,
            st.just("k"),
            st.sampled_from(["idle", "busy", "unknown"]),
            st.none() | times,
            st.integers(0, 2),
        )
    ).map(tuple),
    st.lists(st.builds(TerminalUse, st.just("1"), times, st.sampled_from([None, "", "vi"]))).map(
        tuple
    ),
)
policies = st.builds(
    CullPolicy,
    times,
    st.just(0.0) | st.floats(1, 1000),
    st.booleans(),
    st.booleans(),
    st.sampled_from(list(Terminals)),
    st.none() | times,
)
many_facts = st.builds(
    Facts,
    limits=st.dictionaries(st.sampled_from(list(Rule)), st.floats(1, 1e5)),
    up_since=times,
    ready_at=times,
    activity=activities,
    visits=st.none() | st.builds(Visits, st.integers(0, 2), st.none() | times),
    occupied_at=st.just(-math.inf) | times,
    snoozed_until=st.just(-math.inf) | times,
    warned=st.dictionaries(st.sampled_from(list(Rule)), times),
)


@given(many_facts, policies, st.floats(0, 2e5))
def test_a_server_in_use_or_with_unknown_activity_is_never_culled_as_idle(known, policy, now):
    for rule in (IDLE, SLEEP):
        verdict = decide(replace(known, limits={rule: 60.0}), policy, now)
        if verdict.holders or known.activity is None:
            assert verdict.next is None
        assert verdict.reason


@given(many_facts, policies, st.floats(0, 2e5))
def test_sleep_never_ends_a_kernel_a_terminal_or_a_visit(known, policy, now):
    verdict = decide(replace(known, limits={SLEEP: 60.0}), policy, now)
    there, visits = known.activity, known.visits
    if there is None or there.kernels or there.terminals or visits is None or visits.open:
        assert verdict.next is None
    else:
        assert verdict.next.stops_at >= known.occupied_at + 60.0


@given(many_facts, policies, st.floats(0, 2e5))
def test_no_server_is_due_before_its_warning_is_over(known, policy, now):
    verdict = decide(known, policy, now)
    if verdict.state is CullState.DUE:
        first = verdict.next
        ahead = min(policy.warning, first.limit / 2)
        assert not ahead or now >= known.warned[first.rule] + ahead - 1e-6
        assert known.snoozed_until <= now


@given(many_facts, policies, st.floats(0, 2e5), st.floats(0, 1e5))
def test_more_activity_grace_or_snooze_never_brings_the_stop_forward(known, policy, now, more):
    def ends(facts, policy):
        return [
            math.inf if o.stops_at is None else o.stops_at
            for o in decide(facts, policy, now).outlooks
        ]

    before = ends(known, policy)
    used = known.activity
    if used is not None and used.last_activity is not None:
        used = replace(used, last_activity=used.last_activity + more)
    for later in (
        ends(replace(known, activity=used), policy),
        ends(replace(known, occupied_at=max(0.0, known.occupied_at) + more), policy),
        ends(known, replace(policy, grace=policy.grace + more)),
        ends(replace(known, snoozed_until=max(0.0, known.snoozed_until) + more), policy),
    ):
        assert all(one >= other for one, other in zip(later, before, strict=True))
