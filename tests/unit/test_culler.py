"""The culler: how often it polls servers, its warnings, the last check, and the stop."""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import replace

import pytest

from harness import until
from labkeeper import culler as module
from labkeeper.core.culling import CullPolicy, CullState
from labkeeper.core.errors import BackendTimeout, BackendUnavailable
from labkeeper.core.lifecycle import Event, Goal, State
from labkeeper.core.messages import KEEPER, Change, HistoryKind, Origin
from labkeeper.core.server import (
    Activity,
    Endpoint,
    KernelUse,
    Snapshot,
    StopOrder,
    TerminalUse,
    Visits,
)
from labkeeper.culler import Culler
from labkeeper.testing.fakes import FakeClock, a_spec
from labkeeper.testing.world import FakeBackend
from labkeeper.threads import ThreadGroup

PERIOD = 30.0
ENDPOINT = Endpoint("http://h:1/", "t", "/", "h", 1, False, False, "/n")


class JumpingClock(FakeClock):
    """A clock whose wall time can jump."""

    def jump(self, seconds):
        self._time += seconds


class Notes:
    """An event log in memory."""

    def __init__(self):
        self.taken = []

    def record(self, kind, server, message, *, origin=KEEPER, generation=None, details=None):
        self.taken.append((kind, server, message, origin, details or {}))


class StubProbe:
    def __init__(self):
        self.answers = {}
        """By port: an activity, an error, or a list of them whose last item repeats."""
        self.asked = []
        self.ended = []
        self.stubborn = False

    def activity(self, endpoint):
        self.asked.append(endpoint.port)
        answer = self.answers[endpoint.port]
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end_kernel(self, endpoint, kernel_id):
        if self.stubborn:
            raise BackendTimeout("it hangs")
        self.ended.append(kernel_id)


class StubVisitors:
    def __init__(self):
        self.answer = Visits(0, None)

    def visits(self, snapshot):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Culled:
    """A culler without its thread, whose loop the test runs, and the orders it gives."""

    def __init__(self, threads, **policy):
        self.clock, self.probe, self.notes, self.given = JumpingClock(), StubProbe(), Notes(), []
        self.backend, self.visitors = FakeBackend(lambda report: None), StubVisitors()
        rules = CullPolicy(**({"grace": 0.0, "warning": 300.0} | policy))
        self.culler = Culler(
            self.given.append,
            backend=self.backend,
            probe=self.probe,
            visitors=self.visitors,
            event_log=self.notes,
            threads=threads,
            clock=self.clock,
            policy=rules,
            period=PERIOD,
        )
        self.servers = {}

    def run(self, name="lab", answer=None, *, port=1, generation=1, up_since=None, **rules):
        now = self.clock.time()
        self.probe.answers[port] = answer or Activity(now)
        spec = replace(a_spec(name), **rules)
        up_since = now if up_since is None else up_since
        endpoint = replace(ENDPOINT, port=port)
        more = {
            "generation": generation,
            "endpoint": endpoint,
            "started_at": now,
            "up_since": up_since,
        }
        return self.update(
            Snapshot(spec, State.RUNNING, Goal.UP, since=now, created_at=now, **more)
        )

    def update(self, snapshot, event=Event.READY):
        self.servers[snapshot.name] = snapshot
        self.culler.changed(Change(event, None, snapshot, self.clock.time()))
        return snapshot

    def look(self):
        for watched in self.culler._due():
            self.culler._look(watched)

    def after(self, seconds):
        """Advance the clock second by second, and check the servers that are due."""
        for _ in range(int(seconds)):
            self.clock.advance(1.0)
            self.look()

    def kinds(self):
        return [kind for kind, *_ in self.notes.taken]

    def state(self, name="lab"):
        return self.culler.cached(self.servers[name]).verdict.state


@pytest.fixture
def threads():
    with closing(ThreadGroup()) as threads:
        yield threads


@pytest.fixture
def culled(threads):
    return Culled(threads)


def test_an_idle_server_is_warned_about_once_and_then_stopped(culled):
    snapshot = culled.run(idle_timeout=7200.0)
    culled.after(6899)
    assert (culled.kinds(), culled.given) == ([], [])
    culled.after(300)
    ((kind, name, message, origin, details),) = culled.notes.taken
    assert (kind, name, origin) == (
        HistoryKind.CULL_WARNING,
        "lab",
        Origin("culler", reason="idle_timeout"),
    )
    assert (
        message
        == "server 'lab' will be stopped in 5 min, by idle_timeout, unless it is snoozed or used"
    )
    assert details == {"rule": "idle_timeout", "stops_at": "1970-01-12T15:46:40.000Z"}
    assert culled.given == []
    culled.after(1)
    (order,) = culled.given
    assert (order.name, order.event, order.seen) == ("lab", Event.STOP, snapshot)
    assert order.origin == Origin("culler", reason="idle_timeout: unused for 2 h")


def test_activity_seen_by_the_last_check_prevents_the_stop(culled):
    culled.run(idle_timeout=600.0)
    culled.after(599)
    idle, used = Activity(culled.clock.time() - 599), Activity(culled.clock.time())
    culled.probe.answers[1] = [idle, used]
    culled.after(1)
    assert culled.given == []
    assert culled.state() is CullState.COUNTING


def test_a_change_or_a_failure_during_the_last_check_postpones_the_stop(culled):
    culled.run(idle_timeout=600.0)
    culled.after(599)
    idle = culled.probe.answers[1]
    culled.probe.answers[1] = [idle, replace(idle, kernels=(KernelUse("k", "starting", None),))]
    culled.after(1)
    culled.probe.answers[1] = [idle, BackendUnavailable("gone silent")]
    culled.after(PERIOD)
    assert culled.given == []
    assert culled.state() is CullState.UNKNOWN


def test_a_server_that_nobody_visits_sleeps_after_a_warning(culled):
    snapshot = culled.run(sleep_after=3600.0)
    culled.visitors.answer = Visits(1, 0.0)
    culled.after(3600)
    # The page is open, but sends nothing; then its edge is replaced by another one.
    culled.visitors.answer = Visits(1, 3600.0)
    culled.after(3600)
    assert (culled.state(), culled.kinds()) == (CullState.IN_USE, [])
    culled.visitors.answer = Visits(0, None)
    culled.after(3600 - 300 - PERIOD)
    assert (culled.state(), culled.kinds()) == (CullState.COUNTING, [])
    culled.after(PERIOD)
    ((kind, _, message, origin, _),) = culled.notes.taken
    assert (kind, origin.reason) == (HistoryKind.CULL_WARNING, "sleep_after")
    assert "by sleep_after, unless it is snoozed or used" in message
    assert culled.given == []
    culled.after(300)
    (order,) = culled.given
    assert (order.event, order.seen) == (Event.STOP, snapshot)
    assert order.origin == Origin(
        "culler", reason="sleep_after: without kernels, terminals and visitors for 1 h"
    )
    stopped_by = StopOrder(order.origin.actor, order.origin.reason)
    stopped = replace(snapshot, state=State.STOPPED, endpoint=None, stopped_by=stopped_by)
    assert culled.culler.cached(stopped).verdict.reason == "it sleeps until its Lab is visited"


def test_a_kernel_that_has_ended_since_is_remembered(culled):
    """Jupyter does not tell when; the last time that it was seen counts."""
    culled.run(sleep_after=3600.0, answer=Activity(0.0, (KernelUse("k", "idle", 0.0),)))
    culled.after(7200)
    assert culled.state() is CullState.IN_USE
    culled.probe.answers[1] = Activity(0.0)
    culled.after(3500)
    assert culled.given == []
    culled.after(100 + PERIOD)
    assert culled.given


def test_a_visit_seen_by_the_last_check_prevents_the_sleep(culled):
    culled.run(sleep_after=600.0)
    culled.after(599)
    asked = []

    def visits(snapshot):
        asked.append(snapshot)
        return Visits(0, None if len(asked) == 1 else 0.1)

    culled.visitors.visits = visits
    culled.after(1)
    assert (culled.given, culled.state()) == ([], CullState.COUNTING)


def test_unknown_visitors_keep_a_server_awake(culled):
    culled.run(sleep_after=600.0)
    culled.visitors.answer = BackendUnavailable("the edge is gone")
    culled.after(7200)
    assert (culled.given, culled.state()) == ([], CullState.UNKNOWN)
    explained = culled.culler.cached(culled.servers["lab"])
    assert explained.verdict.reason.endswith("which counts as use: the edge is gone")
    culled.culler._visitors = None
    assert "it is off" in culled.culler.refresh(culled.servers["lab"]).verdict.reason


def test_visitors_are_not_asked_for_without_need(culled):
    culled.visitors.answer = AssertionError("asked")
    culled.run(idle_timeout=600.0)
    culled.after(1000)
    assert len(culled.given) > 0


def test_a_jump_of_the_wall_clock_stops_no_server(culled):
    culled.run("idle", idle_timeout=7200.0)
    culled.run("aged", port=2, max_age=7200.0)
    culled.run("fresh", port=3, idle_timeout=7200.0)
    culled.after(PERIOD)
    culled.clock.jump(30 * 86400.0)
    culled.probe.answers[3] = Activity(culled.clock.time() - 30 * 86400.0)
    culled.after(6000)
    assert (culled.given, culled.kinds()) == ([], [])
    culled.after(7200)
    assert {order.name for order in culled.given} == {"idle", "aged", "fresh"}


def test_max_age_counts_from_the_first_ready_across_crashes_and_keepers(culled):
    culled.run(max_age=3600.0, generation=2, up_since=culled.clock.time() - 3000.0)
    culled.after(599)
    assert culled.kinds() == [HistoryKind.CULL_WARNING]
    culled.after(PERIOD)
    assert culled.given[0].origin.reason.startswith("max_age: it has run for 1 h")


def test_a_snooze_postpones_the_stop_and_survives_a_clock_jump(culled):
    snapshot = culled.run(idle_timeout=600.0)
    culled.after(400)
    snoozed = replace(snapshot, snoozed_until=culled.clock.time() + 3600.0)
    culled.update(snoozed, Event.SNOOZE)
    culled.clock.jump(86400.0)
    culled.after(3200)
    assert (culled.given, culled.state()) == ([], CullState.SNOOZED)
    culled.update(replace(snoozed, snoozed_until=None), Event.SNOOZE)
    culled.after(330)
    assert len(culled.given) > 0


def test_a_server_snoozed_during_the_last_check_is_not_stopped(culled):
    snapshot = culled.run(max_age=600.0)
    culled.after(599)
    ask, asked = culled.probe.activity, []

    def snooze(endpoint):
        asked.append(endpoint)
        if len(asked) == 2:
            culled.update(replace(snapshot, snoozed_until=culled.clock.time() + 60.0), Event.SNOOZE)
        return ask(endpoint)

    culled.probe.activity = snooze
    culled.after(1)
    assert (len(asked), culled.given) == (2, [])


def test_servers_without_a_rule_are_not_polled_and_others_once_per_period(culled):
    culled.run("free", port=2)
    culled.run(idle_timeout=86400.0)
    culled.after(PERIOD * 10)
    assert set(culled.probe.asked) == {1}
    assert 9 <= len(culled.probe.asked) <= 11
    assert culled.state("free") is CullState.OFF


def test_polls_are_spread_over_the_period(culled):
    for port in range(1, 201):
        culled.run(f"lab{port}", port=port, idle_timeout=86400.0)
    culled.after(PERIOD / 2)
    assert 50 < len(culled.probe.asked) < 150


def test_a_stop_or_a_new_launch_discards_the_idle_time(culled):
    snapshot = culled.run(idle_timeout=600.0)
    culled.after(500)
    culled.run(idle_timeout=600.0, generation=2)
    culled.after(599)
    assert culled.given == []
    culled.update(replace(snapshot, state=State.STOPPING, endpoint=None), Event.STOP)
    culled.after(100)
    assert (culled.given, culled.state()) == ([], CullState.NOT_RUNNING)


def test_foreground_programs_of_terminals_come_from_the_backend_if_the_counts_match(
    culled,
):
    two = Activity(culled.clock.time(), (), (TerminalUse("3", 0.0), TerminalUse("1", 0.0)))
    snapshot = culled.run(answer=two, idle_timeout=600.0)
    assert culled.culler.refresh(snapshot).verdict.holders == ()
    culled.backend.world.programs["lab"] = ("", "vi")
    (holder,) = culled.culler.refresh(snapshot).verdict.holders
    assert (holder.kind, holder.id, holder.reason) == ("terminal", "1", "runs vi")
    culled.backend.world.programs["lab"] = ("vi",)
    assert culled.culler.refresh(snapshot).verdict.holders == ()


def test_idle_kernels_are_culled_unless_the_last_check_sees_activity(threads):
    culled = Culled(threads, kernel_idle_timeout=600.0)
    begun = culled.clock.time()
    old, other = KernelUse("old", "idle", begun), KernelUse("other", "idle", begun)
    both, later = (
        Activity(begun, (old, other)),
        Activity(begun, (old, replace(other, last_activity=begun + 600))),
    )
    culled.run(answer=both)
    culled.after(599)
    culled.probe.answers[1] = [both, later]
    culled.after(PERIOD)
    assert culled.probe.ended == ["old"]
    kind, name, _, origin, details = culled.notes.taken[0]
    assert (kind, name, details) == (HistoryKind.KERNEL_CULLED, "lab", {"kernel": "old"})
    assert origin.reason.startswith("kernel_idle_timeout: unused for 10 min")
    assert culled.state() is CullState.OFF
    culled.probe.stubborn = True
    culled.after(PERIOD)
    culled.probe.answers[1] = [later, BackendUnavailable("silent")]
    culled.after(PERIOD)
    assert len(culled.notes.taken) == 1


def test_a_server_that_hangs_does_not_delay_others(threads, monkeypatch):
    monkeypatch.setattr(module, "_LOOK_EVERY", 0.01)
    culled, free = Culled(threads), threading.Event()
    ask = culled.probe.activity

    def hang(endpoint):
        if endpoint.port == 1:
            free.wait(30)
        return ask(endpoint)

    culled.probe.activity = hang
    culled.run("hangs", port=1, idle_timeout=600.0)
    culled.run("other", port=2, idle_timeout=600.0)
    culled.clock.advance(PERIOD)
    culled.culler.start()
    until(lambda: culled.probe.asked == [2], what="the other server to be polled")
    free.set()
    until(lambda: sorted(culled.probe.asked) == [1, 2], what="both servers to be polled")


def test_a_kernel_opened_during_the_last_check_is_not_culled(threads):
    culled = Culled(threads, kernel_idle_timeout=600.0)
    one = KernelUse("one", "idle", culled.clock.time())
    idle = Activity(culled.clock.time(), (one,))
    culled.run(answer=idle)
    culled.after(599)
    culled.probe.answers[1] = [idle, replace(idle, kernels=(replace(one, connections=1),)), idle]
    culled.after(PERIOD)
    assert culled.probe.ended == []


def test_without_a_rule_no_request_is_sent_and_unrelated_changes_keep_the_idle_time(
    culled,
):
    assert culled.culler.refresh(culled.run("free", port=2)).verdict.state is CullState.OFF
    assert culled.probe.asked == []
    snapshot = culled.run(idle_timeout=600.0)
    culled.after(400)
    culled.update(replace(snapshot, restarts=1), Event.GATEWAY)
    culled.after(201)
    assert culled.given[0].seen.restarts == 1


def test_idle_time_counts_across_keepers_and_the_new_keeper_warns_again(culled):
    """For the new keeper the server became ready just now; its last activity is older."""
    begun = culled.clock.time() - 7000.0
    culled.run(answer=Activity(begun), up_since=begun, idle_timeout=7200.0)
    culled.after(PERIOD)
    assert culled.kinds() == [HistoryKind.CULL_WARNING]
    culled.after(269)
    assert culled.given == []
    culled.after(2 * PERIOD)
    assert culled.given[0].origin.reason.startswith("idle_timeout: unused for 2 h")
