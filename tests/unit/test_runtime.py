"""Threads around the core: job order per server, replies to commands, the snapshot board."""

from __future__ import annotations

import contextlib
import threading

import pytest
import structlog

from harness import until
from labkeeper.core.errors import BackendUnavailable, ServerNotFound
from labkeeper.core.fleet import Fleet
from labkeeper.core.lifecycle import Event, Goal, State
from labkeeper.core.messages import Change, Create, Order, Ready, Report, Tick, Unreachable
from labkeeper.core.policy import Policy
from labkeeper.core.server import Snapshot
from labkeeper.core.spec import ServerName
from labkeeper.runtime import Keeper, KeyedExecutor, Mailbox, SnapshotBoard, SystemClock
from labkeeper.testing.fakes import FakeClock, MemoryOrphans, MemoryStore, PassingPreflight, a_spec
from labkeeper.testing.world import FakeBackend, World

ONE, TWO = ServerName("one"), ServerName("two")
OF_NOBODY = Report(ServerName("nobody"), 1, Ready(None, None))
"""A report about an unknown server."""


def snapshot(name=ONE, state=State.STARTING, goal=Goal.UP, generation=1):
    return Snapshot(a_spec(name), state, goal, since=0.0, created_at=0.0, generation=generation)


def change(after):
    return Change(Event.START, None, after, 0.0)


@pytest.fixture
def board():
    return SnapshotBoard()


class TestSnapshotBoard:
    def test_it_returns_the_last_snapshot_of_each_server_sorted_by_name(self, board):
        for after in (snapshot(TWO), snapshot(ONE), snapshot(ONE, State.RUNNING)):
            board.changed(change(after))
        assert board.all() == [snapshot(ONE, State.RUNNING), snapshot(TWO)]
        assert board.get(TWO) == snapshot(TWO)
        assert board.get(ServerName("none")) is None

    def test_a_deleted_server_is_removed(self, board):
        board.changed(change(snapshot()))
        board.changed(change(snapshot(state=State.STOPPED, goal=Goal.ABSENT)))
        assert board.all() == []

    def test_a_watch_sees_changes_between_the_command_and_the_wait(self, board):
        """Even if the server has already been deleted when the wait begins."""
        with board.watch(ONE) as watch:
            first = snapshot(state=State.STOPPING)
            for after in (first, snapshot(TWO), snapshot(state=State.STOPPED, goal=Goal.ABSENT)):
                board.wake(change(after))
            last, held = watch.until(lambda s: s.state is State.STOPPED, first=first, timeout=0)
        assert held
        assert last.forgotten

    def test_a_watch_skips_changes_from_before_the_reply(self, board):
        with board.watch(ONE) as watch:
            board.wake(change(snapshot(state=State.RUNNING)))
            first = snapshot(state=State.STOPPING)
            board.wake(change(first))
            last, held = watch.until(lambda s: s.state is State.RUNNING, first=first, timeout=0.01)
        assert (last, held) == (first, False)

    def test_a_watch_wakes_up_at_a_change(self, board):
        with board.watch(ONE) as watch:
            timer = threading.Timer(0.05, board.wake, [change(snapshot(state=State.RUNNING))])
            timer.start()
            _, held = watch.until(lambda s: s.state is State.RUNNING, first=snapshot(), timeout=10)
            timer.join()
        assert held

    def test_a_change_can_be_read_before_those_who_wait_for_it_are_woken(self, board):
        running = snapshot(state=State.RUNNING)
        with board.watch(ONE) as watch:
            board.changed(change(running))
            assert board.get(ONE) == running
            _, held = watch.until(lambda s: s == running, first=snapshot(), timeout=0.01)
            assert not held
            board.wake(change(running))
            assert watch.until(lambda s: s == running, first=snapshot(), timeout=0)[1]

    def test_it_can_wait_for_all_servers(self, board):
        assert board.until(lambda all_: not all_, timeout=0)
        assert not board.until(bool, timeout=0.01)


class TestExecutor:
    def test_jobs_of_one_server_run_in_order_and_those_of_others_concurrently(self):
        executor = KeyedExecutor(lambda report: None, threads=2)
        done, gate, passed = [], threading.Event(), threading.Event()

        def wait():
            gate.wait(10)
            done.append("first")

        executor.submit(ONE, wait)
        executor.submit(ONE, lambda: done.append("second"))
        executor.submit(TWO, passed.set)
        assert passed.wait(10)
        assert done == []
        gate.set()
        executor.close()
        assert done == ["first", "second"]

    def test_a_failing_job_is_logged_and_reported_and_the_next_one_runs(self):
        received = []
        executor = KeyedExecutor(received.append, threads=1)
        report, failed = Report(ONE, 1, Ready(None, None)), Report(ONE, 1, Unreachable("why"))
        with structlog.testing.capture_logs() as log:
            executor.submit(ONE, lambda: 1 / 0)
            executor.submit(ONE, lambda: 1 / 0, failed)
            executor.submit(ONE, lambda: report)
            executor.close()
        assert received == [failed, report]
        assert [entry["server"] for entry in log] == [ONE, ONE]


class Rig:
    def __init__(self, clock, policy):
        self.world, self.store, self.board, self.clock = (
            World(),
            MemoryStore(),
            SnapshotBoard(),
            clock,
        )
        mailbox = Mailbox()
        self.mailbox = mailbox
        executor = KeyedExecutor(mailbox.post, threads=2)
        self.fleet = Fleet(
            backend=FakeBackend(mailbox.post, self.world),
            preflight=PassingPreflight(),
            orphans=MemoryOrphans(),
            store=self.store,
            executor=executor,
            clock=clock,
            policy=Policy(**policy),
            subscribers=(self.board.changed, self.board.wake),
        )
        self.keeper = Keeper(self.fleet, mailbox, executor, self.board, clock)


@pytest.fixture
def make_rig():
    rigs = []

    def make(clock=SystemClock(), **policy):  # noqa: B008 - it has no state
        rig = Rig(clock, policy)
        rigs.append(rig)
        rig.keeper.start()
        return rig

    yield make
    for rig in rigs:
        rig.keeper.close()


@contextlib.contextmanager
def held_up(rig, monkeypatch):
    """Start a silent server and block the fleet's thread; yield what its next timer check sets."""
    rig.world.temper(ONE).boots = False
    rig.keeper.ask(Create(a_spec(ONE)))
    until(lambda: rig.world.living(ONE))
    step, next_deadline = rig.fleet.step, rig.fleet.next_deadline
    held, looks = threading.Event(), threading.Event()
    monkeypatch.setattr(rig.fleet, "step", lambda message: held.wait(60) and step(message))
    monkeypatch.setattr(rig.fleet, "next_deadline", lambda: looks.set() or next_deadline())
    rig.mailbox.post(OF_NOBODY)
    yield looks
    looks.clear()
    held.set()


class TestKeeper:
    def test_a_command_gets_a_reply_and_a_watch_its_outcome(self, make_rig):
        keeper = make_rig().keeper
        with keeper.watch(ONE) as watch:
            reply = keeper.ask(Create(a_spec(ONE)))
            assert reply.created
            last, held = watch.until(
                lambda s: s.state is State.RUNNING, first=reply.snapshot, timeout=10
            )
        assert held
        assert keeper.get(ONE) == last
        assert keeper.all() == [last]
        assert keeper.alive

    def test_a_refused_command_raises_in_the_calling_thread(self, make_rig):
        with pytest.raises(ServerNotFound):
            make_rig().keeper.ask(Order(ONE, Event.STOP))

    def test_timers_fire_while_messages_keep_arriving(self, make_rig):
        rig = make_rig(start_timeout=0.2)
        rig.world.temper(ONE).boots = False
        rig.keeper.ask(Create(a_spec(ONE)))
        until(lambda: rig.keeper.ask(Tick()) or rig.keeper.get(ONE).state is State.FAILED)

    def test_messages_received_before_a_timer_was_due_are_handled_first(
        self, make_rig, monkeypatch
    ):
        rig = make_rig(FakeClock(), start_timeout=1)
        with held_up(rig, monkeypatch):
            rig.world.answer(ONE)
            rig.clock.advance(1)
        until(lambda: rig.keeper.get(ONE).state is not State.STARTING)
        assert rig.keeper.get(ONE).state is State.RUNNING

    def test_after_a_suspension_reports_are_awaited_before_overdue_timers_fire(
        self, make_rig, monkeypatch
    ):
        rig = make_rig(FakeClock(), start_timeout=10)
        with held_up(rig, monkeypatch) as looks:
            rig.clock.advance(60)
        until(looks.is_set)
        assert rig.keeper.get(ONE).state is State.STARTING
        rig.world.answer(ONE)
        until(lambda: rig.keeper.get(ONE).state is State.RUNNING)

    def test_an_overdue_timer_fires_eventually(self, make_rig, monkeypatch):
        rig = make_rig(FakeClock(), start_timeout=10)
        with held_up(rig, monkeypatch) as looks:
            rig.clock.advance(60)
        until(looks.is_set)
        rig.clock.advance(60)
        # A report about an unknown server wakes the fleet.
        rig.mailbox.post(OF_NOBODY)
        until(lambda: rig.keeper.get(ONE).state is State.FAILED)

    def test_stop_all_waits_for_the_last_server(self, make_rig):
        rig = make_rig(stop_grace=0.1)
        rig.keeper.ask(Create(a_spec(ONE)))
        rig.world.temper(ONE).obeys = False
        assert rig.keeper.stop_all(within=10)
        assert rig.keeper.get(ONE).state is State.STOPPED
        with pytest.raises(BackendUnavailable, match="shutting down"):
            rig.keeper.ask(Create(a_spec(TWO)))

    def test_stop_all_returns_false_if_a_server_is_left(self, make_rig):
        rig = make_rig(stop_grace=0.05, kill_wait=0.05)
        rig.keeper.ask(Create(a_spec(ONE)))
        rig.world.temper(ONE).obeys = rig.world.temper(ONE).killable = False
        assert not rig.keeper.stop_all(within=0.3)

    def test_a_bug_in_a_step_raises_in_the_caller_and_affects_no_one_else(
        self, make_rig, monkeypatch
    ):
        rig = make_rig()
        monkeypatch.setattr(rig.store, "save", lambda _: 1 / 0)
        with structlog.testing.capture_logs() as log, pytest.raises(ZeroDivisionError):
            rig.keeper.ask(Create(a_spec(ONE)))
        assert log[0]["log_level"] == "error"
        monkeypatch.undo()
        assert rig.keeper.ask(Create(a_spec(TWO))).created

    def test_a_bug_while_observing_a_server_does_not_lose_it(self, make_rig, monkeypatch):
        rig = make_rig(probe_period=0.02, look_again=0.02)
        failures, states = [], []
        observe = FakeBackend.observe

        def fail_once(backend, name, generation):
            if not failures:
                failures.append(name)
                raise ZeroDivisionError
            states.append(rig.keeper.get(name).state)
            return observe(backend, name, generation)

        monkeypatch.setattr(FakeBackend, "observe", fail_once)
        with structlog.testing.capture_logs() as log:
            rig.keeper.ask(Create(a_spec(ONE)))
            until(lambda: states)
            until(lambda: rig.keeper.get(ONE).state is State.RUNNING)
        assert (failures, states[0]) == ([ONE], State.LOST)
        assert [entry["event"] for entry in log if entry["log_level"] == "error"] == [
            "a job failed"
        ]

    def test_a_fleet_that_does_not_reply_in_time_is_busy(self, make_rig, monkeypatch):
        monkeypatch.setattr("labkeeper.runtime._ANSWER_WITHIN", 0.05)
        rig = make_rig()
        held = threading.Event()
        monkeypatch.setattr(rig.fleet, "step", lambda _: held.wait(10))
        with pytest.raises(BackendUnavailable, match="busy"):
            rig.keeper.ask(Tick())
        held.set()


def test_the_system_clock_advances():
    clock = SystemClock()
    monotonic, wall = clock.monotonic(), clock.time()
    until(lambda: clock.monotonic() > monotonic, what="the monotonic clock to advance")
    until(lambda: clock.time() > wall, what="the wall clock to advance")
    assert wall > 1_700_000_000
