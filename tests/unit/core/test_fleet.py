"""The fleet: commands, capacity, the store, recovery, and translating backend errors to facts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from labkeeper.core.admission import KNOWN_FOR_EACH, RETRY_AFTER
from labkeeper.core.errors import (
    BackendRefused,
    BackendTimeout,
    BackendUnavailable,
    CapacityReached,
    Conflict,
    ServerNotFound,
    StoreError,
)
from labkeeper.core.fleet import SAVE_AGAIN, Fleet
from labkeeper.core.jobs import perform
from labkeeper.core.lifecycle import Action, Event, Goal, State
from labkeeper.core.messages import (
    KEEPER,
    Create,
    Job,
    Order,
    Origin,
    Ready,
    Refused,
    Report,
    Seen,
    Snooze,
    StopAll,
    Tick,
    Unreachable,
)
from labkeeper.core.policy import Policy
from labkeeper.core.ports import Capacity, Reserve
from labkeeper.core.server import Exit, FailureClass, OwnKernel, StopMethod, StopOrder
from labkeeper.core.spec import Gateway
from labkeeper.testing.fakes import (
    FakeClock,
    InlineExecutor,
    MemoryOrphans,
    MemoryStore,
    PassingPreflight,
    Recorder,
    a_spec,
)
from labkeeper.testing.world import FakeBackend, World


class Bench:
    """A fleet in a fake world; `crash` replaces the keeper, over the same world and store."""

    def __init__(self, **policy):
        self.policy = Policy(**policy)
        self.world, self.store, self.clock = World(), MemoryStore(), FakeClock()
        self.executor = InlineExecutor(self.receive)
        self.preflight, self.orphans = PassingPreflight(), MemoryOrphans()
        self.begin()

    def begin(self):
        self.recorder = Recorder()
        self.backend = FakeBackend(self.executor.receive, self.world)
        self.fleet = Fleet(
            backend=self.backend,
            preflight=self.preflight,
            orphans=self.orphans,
            store=self.store,
            executor=self.executor,
            clock=self.clock,
            policy=self.policy,
            subscribers=[self.recorder.changed],
        )
        self.fleet.recover()

    def receive(self, report):
        """Hand a report to the current keeper."""
        self.fleet.step(report)

    def crash(self):
        """Crash the keeper, and start the next one."""
        self.executor.drop()
        self.backend.abandon()
        self.begin()

    def create(self, name="lab", **spec):
        """Create a server without running its jobs."""
        return self.fleet.step(Create(a_spec(name, **spec)))

    def run(self, name="lab"):
        """Create a server, and wait until it is ready."""
        self.create(name)
        self.executor.run_all()
        assert self.state(name) is State.RUNNING
        return self

    def order(self, event, name="lab", *, force=False):
        """Give a command, and run the jobs that follow."""
        reply = self.fleet.step(Order(name, event, force=force))
        self.executor.run_all()
        return reply

    def wait(self):
        """Advance the clock to the next timer, and run the jobs that follow."""
        self.clock.advance(self.fleet.next_deadline() - self.clock.monotonic())
        self.fleet.step(Tick())
        self.executor.run_all()

    def last(self, name="lab"):
        """Return the last snapshot that subscribers received."""
        return [change.after for change in self.recorder.changes if change.after.name == name][-1]

    def state(self, name="lab"):
        return self.last(name).state


@pytest.fixture
def bench():
    return Bench()


# Commands


def test_create_launches_and_publishes_each_change(bench):
    """Subscribers hear of a change after it was stored."""
    reply = bench.create()
    assert (reply.created, reply.snapshot.state, reply.snapshot.generation) == (
        True,
        State.STARTING,
        1,
    )
    assert bench.store.snapshots["lab"] == reply.snapshot
    bench.executor.run_all()
    assert bench.recorder.states("lab") == [State.STARTING, State.RUNNING]
    assert [change.event for change in bench.recorder.changes] == [Event.START, Event.READY]
    assert bench.store.snapshots["lab"] == bench.last()
    assert bench.last().instance.pid == bench.world.living("lab")[0].pid


def test_create_with_an_equal_spec_is_idempotent(bench):
    bench.run()
    reply = bench.create()
    assert (reply.created, reply.snapshot) == (False, bench.last())
    assert bench.executor.waiting == []


def test_create_with_another_spec_is_a_conflict(bench):
    """The fields that differ are named; the running server is unaffected."""
    bench.run()
    with pytest.raises(Conflict, match="differs in root_dir, port") as caught:
        bench.create(root_dir="/elsewhere", port=9)
    assert caught.value.details == {"differs": ["root_dir", "port"]}
    assert bench.state() is State.RUNNING


def test_create_starts_a_stopped_server(bench):
    bench.run().order(Event.STOP)
    assert bench.state() is State.STOPPED
    reply = bench.create()
    assert (reply.created, reply.snapshot.generation) == (True, 2)


@pytest.mark.parametrize(
    "event", [Event.START, Event.RESTART, Event.STOP, Event.KILL, Event.DELETE]
)
def test_a_command_for_an_unknown_server_is_not_found(bench, event):
    with pytest.raises(ServerNotFound, match="cannot find server 'lab'"):
        bench.order(event)


def test_a_stop_ends_cleanly_with_a_report(bench):
    bench.run().order(Event.STOP)
    assert bench.recorder.states("lab")[-2:] == [State.STOPPING, State.STOPPED]
    assert bench.last().stop_report.method is StopMethod.SHUTDOWN
    assert bench.world.living("lab") == []


def test_a_server_that_ignores_sigterm_is_killed(bench):
    """After the grace period."""
    bench.world.temper("lab").obeys = False
    bench.run().order(Event.STOP)
    assert bench.state() is State.STOPPING
    bench.wait()
    assert (bench.state(), bench.last().stop_report.method) == (State.STOPPED, StopMethod.SIGKILL)
    assert bench.last().stop_report.seconds == bench.policy.stop_grace


def test_a_start_while_stopping_launches_again_after_the_end(bench):
    """It is accepted (goal AGAIN), and reported as a new start."""
    bench.world.temper("lab").obeys = False
    bench.run().order(Event.STOP)
    reply = bench.order(Event.START)
    assert (reply.created, reply.snapshot.goal, reply.snapshot.state) == (
        True,
        Goal.AGAIN,
        State.STOPPING,
    )
    assert bench.order(Event.START).created is False
    bench.wait()
    assert (bench.state(), bench.last().generation, bench.last().goal) == (
        State.RUNNING,
        2,
        Goal.UP,
    )


def test_restart_launches_a_new_process_after_the_end_of_the_old_one(bench):
    bench.run()
    first = bench.world.living("lab")[0].pid
    assert bench.order(Event.RESTART).created is True
    assert (bench.state(), bench.last().generation) == (State.RUNNING, 2)
    assert [process.pid for process in bench.world.living("lab")] != [first]


def test_force_kills_without_a_grace_period(bench):
    bench.world.temper("lab").obeys = False
    bench.run().order(Event.RESTART, force=True)
    assert (bench.state(), bench.last().generation) == (State.RUNNING, 2)
    bench.order(Event.DELETE, force=True)
    assert bench.last().forgotten
    assert bench.last().stop_report.method is StopMethod.SIGKILL
    assert bench.last().stop_report.seconds == 0.0


# Deletion


def test_delete_leaves_nothing_behind(bench):
    """No process, log, stored row or name."""
    bench.run().order(Event.DELETE)
    assert bench.last().forgotten
    assert (bench.world.processes, bench.world.logs, bench.store.snapshots) == ([], {}, {})
    with pytest.raises(ServerNotFound):
        bench.order(Event.START)


def test_a_server_being_deleted_cannot_be_started(bench):
    """A start is a conflict until it is gone; a stop does not cancel the deletion."""
    bench.world.temper("lab").obeys = False
    bench.run().order(Event.STOP)
    bench.order(Event.DELETE)
    for message in (Order("lab", Event.START), Order("lab", Event.RESTART), Create(a_spec("lab"))):
        with pytest.raises(Conflict, match="being deleted"):
            bench.fleet.step(message)
    bench.order(Event.STOP)
    bench.wait()
    assert bench.last().forgotten


def test_a_stopped_server_is_deleted_immediately(bench):
    bench.run().order(Event.STOP)
    assert bench.order(Event.DELETE).snapshot.forgotten
    assert bench.store.snapshots == {}


def test_late_facts_are_dropped_by_generation(bench):
    """Facts of another generation, a deleted predecessor or an unknown server change nothing."""
    bench.run().order(Event.DELETE)
    bench.run()
    assert bench.last().generation == 2
    changes = len(bench.recorder.changes)
    for name, generation in (("lab", 1), ("lab", 3), ("other", 1)):
        bench.fleet.step(Report(name, generation, Unreachable("late")))
    assert len(bench.recorder.changes) == changes


# Capacity


def test_only_active_servers_count_against_the_limit(bench):
    """One more start is refused, and leaves no trace."""
    bench = Bench(max_servers=1)
    bench.run("one")
    with pytest.raises(CapacityReached, match="1 of at most 1") as caught:
        bench.create("two")
    assert caught.value.details == {"retry_after": RETRY_AFTER}
    with pytest.raises(ServerNotFound):
        bench.order(Event.START, "two")
    bench.order(Event.STOP, "one")
    bench.run("two")
    with pytest.raises(CapacityReached):
        bench.order(Event.START, "one")


def test_the_number_of_known_servers_is_limited_too(bench):
    """Each takes memory and a row. Known servers can still be started."""
    bench = Bench(max_servers=1)
    for number in range(KNOWN_FOR_EACH):
        bench.run(f"s{number}")
        bench.order(Event.STOP, f"s{number}")
    with pytest.raises(CapacityReached, match="10 servers are known"):
        bench.create("more")
    bench.order(Event.START, "s0")
    bench.order(Event.DELETE, "s0")
    bench.run("more")


def test_an_active_server_can_be_restarted_at_the_limit(bench):
    bench = Bench(max_servers=1).run()
    assert bench.order(Event.RESTART).created is True


# Shutdown of the keeper


def test_stop_all_stops_every_server_and_refuses_new_starts(bench):
    """A pending restart is cancelled."""
    bench.run("one").run("two")
    bench.world.temper("one").obeys = False
    bench.order(Event.RESTART, "one")
    assert bench.fleet.step(StopAll()) is None
    bench.executor.run_all()
    with pytest.raises(BackendUnavailable, match="shutting down"):
        bench.create("three")
    with pytest.raises(BackendUnavailable, match="shutting down"):
        bench.order(Event.START, "two")
    bench.wait()
    assert [bench.state("one"), bench.state("two")] == [State.STOPPED, State.STOPPED]
    assert bench.world.processes == []


def test_stop_all_keeps_the_failure_of_a_failed_server(bench):
    bench.run("one")
    bench.world.crash("one")
    bench.executor.run_all()
    bench.store.failing = True
    bench.wait()
    bench.store.failing = False
    before = bench.last("one")
    assert before.state is State.FAILED
    assert bench.fleet.step(StopAll()) is None
    bench.wait()
    assert bench.last("one") == before


def slept(bench):
    """Have the culler stop a server."""
    bench.fleet.step(Order("lab", Event.STOP, origin=CULLED))
    bench.executor.run_all()
    assert bench.state() is State.STOPPED


CULLED = Origin("culler", reason="sleep_after: without kernels")


def test_who_stopped_a_server_is_known_to_the_next_keeper_until_it_is_started(bench):
    bench.run()
    slept(bench)
    bench.crash()
    assert bench.last().stopped_by == StopOrder("culler", CULLED.reason)
    bench.fleet.step(Order("lab", Event.START, origin=Origin("token:ada")))
    assert bench.last().stopped_by is None
    bench.executor.run_all()
    bench.world.crash("lab", Exit(code=0))
    bench.executor.run_all()
    assert (bench.state(), bench.last().stopped_by) == (State.STOPPED, None)


def test_a_later_stop_command_replaces_the_cullers_and_the_end_of_the_keeper_does_not(bench):
    """The end of a keeper stops nothing that is stopped: what sleeps, sleeps on."""
    bench.run()
    slept(bench)
    bench.fleet.step(StopAll())
    assert bench.last().stopped_by.actor == "culler"
    bench.crash()
    bench.fleet.step(Order("lab", Event.STOP, origin=Origin("token:ada", "1")))
    assert bench.last().stopped_by == StopOrder("token:ada")
    bench.crash()
    assert bench.last().stopped_by == StopOrder("token:ada")


def test_a_server_about_to_sleep_still_does_when_the_keeper_ends(bench):
    bench.run().world.temper("lab").obeys = False
    bench.fleet.step(Order("lab", Event.STOP, origin=CULLED))
    assert bench.state() is State.STOPPING
    bench.fleet.step(StopAll())
    assert bench.last().stopped_by.actor == "culler"
    bench.executor.run_all()
    bench.wait()
    assert (bench.state(), bench.last().stopped_by.actor) == (State.STOPPED, "culler")


def test_a_server_stopped_by_the_end_of_its_keeper_says_so(bench):
    bench.run()
    bench.fleet.step(StopAll())
    bench.executor.run_all()
    assert bench.last().stopped_by == StopOrder("keeper", "the keeper ends")


# The store


def test_a_launch_that_cannot_be_stored_does_not_happen(bench):
    """Create raises the error, and no trace is left."""
    bench.store.failing = True
    with pytest.raises(StoreError):
        bench.create()
    assert (bench.executor.waiting, bench.recorder.changes, bench.fleet.next_deadline()) == (
        [],
        [],
        None,
    )
    bench.store.failing = False
    with pytest.raises(ServerNotFound):
        bench.order(Event.START)
    assert bench.create().snapshot.generation == 1


def test_a_start_that_cannot_be_stored_leaves_the_server_unchanged(bench):
    bench.run().order(Event.STOP)
    before = bench.last()
    bench.store.failing = True
    with pytest.raises(StoreError):
        bench.order(Event.START)
    bench.store.failing = False
    assert bench.order(Event.STOP).snapshot == before
    assert bench.order(Event.START).snapshot.generation == 2


def test_a_stop_continues_without_the_store_and_is_saved_later(bench):
    """A full disk must not prevent a stop."""
    bench.run()
    bench.store.failing = True
    bench.order(Event.STOP)
    assert bench.state() is State.STOPPED
    assert bench.store.snapshots["lab"].state is State.RUNNING
    bench.wait()
    assert bench.fleet.next_deadline() == bench.clock.monotonic() + SAVE_AGAIN
    bench.store.failing = False
    bench.wait()
    assert bench.store.snapshots["lab"] == bench.last()
    assert bench.fleet.next_deadline() is None


def test_a_deletion_continues_without_the_store_and_is_saved_later(bench):
    bench.run()
    bench.store.failing = True
    bench.order(Event.DELETE)
    assert bench.last().forgotten
    bench.wait()
    assert "lab" in bench.store.snapshots
    bench.store.failing = False
    bench.wait()
    assert bench.store.snapshots == {}


def test_a_restart_that_cannot_be_stored_fails(bench):
    """No caller waits for the restart after a crash, so the failure has the error."""
    bench.run()
    bench.world.crash("lab")
    bench.executor.run_all()
    assert bench.state() is State.BACKOFF
    bench.store.failing = True
    bench.wait()
    assert bench.state() is State.FAILED
    assert bench.last().failure.message.startswith(
        "cannot start server 'lab': cannot write the store"
    )
    assert bench.world.launched == [("lab", 1)]


def test_a_restart_that_cannot_be_stored_for_lack_of_disk_space_is_retried(bench):
    bench.run()
    bench.world.crash("lab")
    bench.executor.run_all()
    save = bench.store.save

    def full(_snapshot):
        raise StoreError("cannot write the store", failure_class=FailureClass.DISK_FULL)

    bench.store.save = full
    bench.wait()
    assert (bench.state(), bench.last().failure.kind) == (State.BACKOFF, FailureClass.DISK_FULL)
    assert bench.world.launched == [("lab", 1)]
    bench.store.save = save
    bench.wait()
    assert bench.state() is State.RUNNING
    assert bench.store.snapshots["lab"] == bench.last()


def test_a_keeper_does_not_start_with_an_unreadable_store(bench):
    """It would not know which servers exist."""
    bench.store.failing = True
    with pytest.raises(StoreError):
        bench.crash()


# Crashes, hangs and lost answers


def test_a_crashed_server_restarts_after_its_delay(bench):
    bench.run()
    bench.world.crash("lab", Exit(signal="SIGSEGV"))
    bench.executor.run_all()
    assert (bench.state(), bench.last().exit) == (State.BACKOFF, Exit(signal="SIGSEGV"))
    bench.fleet.step(Tick())
    assert bench.state() is State.BACKOFF
    bench.wait()
    assert (bench.state(), bench.last().restarts) == (State.RUNNING, 1)


def test_a_server_that_cannot_be_killed_is_never_reported_as_stopped(bench):
    """It is lost until its process ends after all."""
    temper = bench.world.temper("lab")
    temper.obeys = temper.killable = False
    bench.run().order(Event.STOP)
    for _ in range(10):
        bench.wait()
        assert bench.state() in {State.STOPPING, State.KILLING, State.LOST}
    bench.world.crash("lab")
    bench.executor.run_all()
    assert bench.state() is State.STOPPED


def test_a_hung_server_is_terminated_and_restarted(bench):
    bench.run()
    bench.world.silence("lab")
    while bench.state() is State.RUNNING:
        bench.wait()
    assert bench.clock.monotonic() >= bench.policy.hung_after
    assert bench.last().failure.kind is FailureClass.HUNG
    bench.wait()
    assert (bench.state(), bench.last().generation) == (State.RUNNING, 2)


def test_a_server_whose_launch_answer_was_lost_is_found_and_adopted(bench):
    """An unknown outcome is not a failure: the server is lost, then observed."""
    bench.world.temper("lab").answers_lost = True
    bench.create()
    bench.executor.run_next("lab")
    bench.executor.deliver()
    assert bench.state() is State.LOST
    bench.world.temper("lab").answers_lost = False
    bench.executor.run_all()
    assert bench.state() is State.RUNNING
    assert len(bench.world.launched) == 1


# Recovery


@pytest.mark.parametrize("moment", ["stored", "launched", "ready"])
def test_the_next_keeper_adopts_a_running_server(bench, moment):
    """A keeper that crashes around a launch leaves at most one process."""
    bench.create()
    if moment != "stored":
        bench.executor.run_next("lab")
    if moment == "ready":
        bench.executor.run_all()
    bench.crash()
    assert bench.state() is State.LOST
    bench.executor.run_all()
    if moment == "stored":
        bench.wait()
    assert bench.state() is State.RUNNING
    assert len(bench.world.living("lab")) == len(bench.world.launched) == 1


def test_the_next_keeper_finds_out_how_a_server_ended(bench):
    """It exited cleanly, crashed, or left no trace."""
    for end, state in (
        (Exit(code=0), State.STOPPED),
        (Exit(code=1), State.BACKOFF),
        (None, State.BACKOFF),
    ):
        bench = Bench().run()
        bench.backend.abandon()
        bench.world.crash("lab", end or Exit(code=1))
        if end is None:
            bench.world.ends.clear()
        bench.crash()
        bench.executor.run_all()
        assert (bench.state(), bench.last().exit) == (state, end or Exit())


def test_the_next_keeper_completes_a_deletion(bench):
    bench.run()
    gone = replace(bench.last(), state=State.STOPPED, goal=Goal.ABSENT, endpoint=None)
    bench.order(Event.STOP)
    bench.store.save(gone)
    bench.crash()
    bench.executor.run_all()
    assert (bench.store.snapshots, bench.world.logs) == ({}, {})


def test_a_crash_while_forgetting_a_server_is_completed_by_the_next_keeper(bench):
    """The row goes last: without it the log would never be deleted."""
    bench.run().order(Event.STOP)
    assert bench.fleet.step(Order("lab", Event.DELETE)).snapshot.forgotten
    assert bench.world.logs
    bench.crash()
    bench.executor.run_all()
    assert (bench.store.snapshots, bench.world.logs) == ({}, {})


def test_a_new_server_keeps_its_row_when_a_deleted_predecessor_is_forgotten(bench):
    """Forgetting may happen after the new server was created."""
    bench.run().order(Event.STOP)
    bench.fleet.step(Order("lab", Event.DELETE))
    bench.run()
    assert [snapshot.state for snapshot in bench.store.snapshots.values()] == [State.RUNNING]


def test_the_next_keeper_launches_a_server_in_backoff(bench):
    bench.run()
    bench.world.crash("lab")
    bench.executor.run_all()
    bench.crash()
    assert bench.state() is State.BACKOFF
    bench.wait()
    assert (bench.state(), bench.last().generation) == (State.RUNNING, 2)


# Jobs


def job(action):
    return Job(a_spec("lab"), 1, action)


def test_a_job_calls_the_backend():
    """Only an observation returns a fact."""
    heard = []
    backend = FakeBackend(heard.append)
    assert perform(backend, PassingPreflight(), job(Action.LAUNCH), grace=1.0) is None
    assert perform(backend, PassingPreflight(), job(Action.OBSERVE), grace=1.0) == Seen(
        answers=True
    )
    assert perform(backend, PassingPreflight(), job(Action.TERMINATE), grace=1.0) is None
    assert perform(backend, PassingPreflight(), job(Action.KILL), grace=1.0) is None
    assert perform(backend, PassingPreflight(), job(Action.NONE), grace=1.0) is None
    assert [type(report.fact).__name__ for report in heard] == ["Ready", "Ready", "Ended", "Ended"]


def test_a_refused_launch_is_a_fact_with_the_backends_failure_class():
    """The last log lines are included."""
    backend = FakeBackend(list)
    backend.world.temper("lab").refusal = BackendRefused(
        "no", failure_class="port-in-use", log_tail=["a", "b"]
    )
    fact = perform(backend, PassingPreflight(), job(Action.LAUNCH), grace=1.0)
    assert isinstance(fact, Refused)
    assert (fact.failure.kind, fact.failure.message) == (FailureClass.PORT_IN_USE, "no")
    assert fact.failure.log_tail == ("a", "b")
    backend.world.temper("lab").refusal = BackendRefused("no")
    assert (
        perform(backend, PassingPreflight(), job(Action.LAUNCH), grace=1.0).failure.kind
        is FailureClass.OTHER
    )


class Broken(FakeBackend):
    """A backend whose calls all raise."""

    error = BackendTimeout("it took too long")

    def _reach(self, _name):
        raise self.error


@pytest.mark.parametrize(
    "error", [BackendTimeout("why"), BackendUnavailable("why"), BackendRefused("why")]
)
@pytest.mark.parametrize("action", [Action.TERMINATE, Action.KILL, Action.OBSERVE])
def test_other_backend_errors_mean_an_unknown_outcome(action, error):
    """Only a launch can be refused."""
    backend = Broken(list)
    backend.error = error
    assert perform(backend, PassingPreflight(), job(action), grace=1.0) == Unreachable("why")


def test_a_repeated_ready_is_not_published(bench):
    bench.run()
    changes = len(bench.recorder.changes)
    bench.fleet.step(Report("lab", 1, Ready(bench.last().endpoint, bench.last().instance)))
    assert len(bench.recorder.changes) == changes


def test_stop_all_reaches_the_other_servers_despite_an_error(bench, monkeypatch):
    """It raises the error afterwards."""
    bench.run("one").run("two")
    save = bench.store.save

    def save_but_one(snapshot):
        if snapshot.name == "one":
            raise ZeroDivisionError
        save(snapshot)

    monkeypatch.setattr(bench.store, "save", save_but_one)
    with pytest.raises(ExceptionGroup) as caught:
        bench.fleet.step(StopAll())
    assert caught.group_contains(ZeroDivisionError)
    bench.executor.run_all()
    assert bench.state("two") is State.STOPPED


def test_a_bug_while_creating_a_server_leaves_no_server(bench, monkeypatch):
    """Any exception, not only one of the store."""
    with monkeypatch.context() as broken:
        broken.setattr(bench.store, "save", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bench.create()
    with pytest.raises(ServerNotFound):
        bench.order(Event.START)
    assert bench.create().created


# Processes unknown to the store


def test_processes_unknown_to_the_store_are_swept_and_others_are_not(bench):
    bench.run("known").run("stray")
    bench.store.forget("stray")
    (known,) = bench.world.living("known")
    bench.crash()
    bench.executor.run_all()
    assert bench.world.living("stray") == []
    assert bench.world.living("known") == [known]
    assert bench.state("known") is State.RUNNING


@pytest.mark.parametrize("rests", [State.STOPPED, State.QUEUED])
def test_a_process_of_a_stopped_or_queued_server_is_swept_before_a_launch(bench, rests):
    """Such a store is a restored backup, for instance."""
    bench.run("lab")
    (stray,) = bench.world.living("lab")
    goal = Goal.DOWN if rests is State.STOPPED else Goal.UP
    bench.store.save(replace(bench.last(), state=rests, goal=goal, endpoint=None))
    bench.crash()
    bench.executor.run_all()
    assert stray not in bench.world.living("lab")
    assert len(bench.world.living("lab")) == (rests is State.QUEUED)
    assert bench.state("lab") is (State.STOPPED if rests is State.STOPPED else State.RUNNING)


def test_a_server_named_like_a_stray_process_is_launched_after_the_sweep(bench):
    """The sweep is queued under the name, ahead of the launch."""
    bench.run("stray")
    (stray,) = bench.world.living("stray")
    bench.store.forget("stray")
    bench.crash()
    bench.create("stray")
    assert bench.world.living("stray") == [stray]
    bench.executor.run_next("stray")
    assert bench.world.living("stray") == []
    bench.executor.run_all()
    (new,) = bench.world.living("stray")
    assert new.pid != stray.pid
    assert bench.state("stray") is State.RUNNING


# Kernels on a gateway

GATEWAY = Gateway("http://gateway:8888", "ws://gateway:8888")


def with_gateway(name="lab", gateway=GATEWAY, **values):
    return replace(a_spec(name), gateway=gateway, **values)


@pytest.fixture
def working():
    """A bench whose server has a kernel on its gateway."""
    rig = Bench()
    rig.fleet.step(Create(with_gateway()))
    rig.executor.run_all()
    rig.world.living("lab")[0].kernels = (OwnKernel("k1"),)
    return rig


def test_the_preflight_begins_for_each_launch_with_its_kernels(working):
    reply = working.fleet.step(Order("lab", Event.RESTART_KEEPING_KERNELS))
    assert reply.created
    working.executor.run_all()
    assert working.state() is State.RUNNING
    assert working.preflight.begun == [("lab", 1, ()), ("lab", 2, (OwnKernel("k1"),))]
    assert working.orphans.orphans == []


def test_kernels_left_by_a_stop_are_orphaned(working):
    working.order(Event.STOP, force=True)
    assert [
        (orphan.kernel_id, orphan.gateway, orphan.server) for orphan in working.orphans.orphans
    ] == [("k1", GATEWAY, "lab")]


def test_local_kernels_cannot_be_kept():
    rig = Bench().run()
    with pytest.raises(Conflict, match="not on a gateway"):
        rig.fleet.step(Order("lab", Event.RESTART_KEEPING_KERNELS))
    assert rig.state() is State.RUNNING


@pytest.mark.parametrize("gateway", [None, replace(GATEWAY, url="http://elsewhere")])
def test_kernels_cannot_be_kept_across_gateways(working, gateway):
    with pytest.raises(Conflict, match="another gateway"):
        working.fleet.step(
            Order("lab", Event.RESTART_KEEPING_KERNELS, revised=with_gateway(gateway=gateway))
        )
    # A restart without them is possible.
    working.fleet.step(Order("lab", Event.RESTART, revised=with_gateway(gateway=gateway)))
    working.executor.run_all()
    assert working.last().spec.gateway == gateway


def test_a_server_with_a_revised_spec_is_compared_by_that_spec(working):
    revised = with_gateway(env={"A": "b"})
    working.fleet.step(Order("lab", Event.RESTART_KEEPING_KERNELS, revised=revised))
    assert working.last().revised == revised
    assert not working.fleet.step(Create(revised)).created
    with pytest.raises(Conflict, match="differs in env"):
        working.fleet.step(Create(with_gateway()))


def test_kernels_are_orphaned_even_if_the_launch_cannot_be_stored(working):
    working.fleet.step(Order("lab", Event.RESTART))
    working.world.temper("lab").obeys = False
    working.executor.run_all()
    working.store.failing = True
    working.world.crash("lab")
    working.executor.run_all()
    assert working.state() is State.FAILED
    assert [orphan.kernel_id for orphan in working.orphans.orphans] == ["k1"]


# Origins


def test_changes_caused_by_a_command_have_its_origin_and_others_the_keepers(
    bench,
):
    """A command's origin applies until it has been carried out."""
    ada, bob = Origin("ada", "1"), Origin("bob", "2", "no more need")
    bench.fleet.step(Create(a_spec("lab"), ada))
    bench.executor.run_all()
    bench.fleet.step(Create(a_spec("lab"), bob))
    bench.world.crash("lab", Exit(code=1))
    bench.executor.run_all()
    bench.wait()
    bench.executor.run_all()
    bench.fleet.step(Order("lab", Event.DELETE, origin=bob))
    bench.executor.run_all()
    origins = [(change.after.state, change.origin) for change in bench.recorder.changes]
    assert origins == [
        (State.STARTING, ada),
        (State.RUNNING, ada),
        (State.BACKOFF, KEEPER),
        (State.STARTING, KEEPER),
        (State.RUNNING, KEEPER),
        (State.STOPPING, bob),
        (State.STOPPED, bob),
    ]


# Free memory


@pytest.mark.parametrize("reserve", [Reserve(amount=101), Reserve(share=0.11)])
def test_starts_are_refused_while_too_little_memory_is_free(reserve):
    """The error has the figures; active servers can be restarted."""
    bench = Bench(min_free=reserve)
    bench.world.capacity = Capacity(1000, 500)
    bench.run("runs").run("rests")
    bench.order(Event.STOP, "rests")
    bench.world.capacity = Capacity(1000, 100)
    for command in (
        Create(a_spec("new")),
        Order("rests", Event.START),
        Order("rests", Event.RESTART),
    ):
        with pytest.raises(CapacityReached, match="LABKEEPER_MIN_FREE_MEMORY") as caught:
            bench.fleet.step(command)
        assert caught.value.details == {
            "retry_after": RETRY_AFTER,
            "available": 100,
            "reserve": reserve.of(1000),
        }
    assert bench.order(Event.START, "runs").created is False
    bench.order(Event.RESTART, "runs")
    assert bench.state("runs") is State.RUNNING
    bench.world.capacity = None
    bench.run("new")


# The queue


def test_launches_queue_first_in_first_out():
    bench = Bench(max_starts=1)
    for name in ("c", "a", "b"):
        bench.clock.advance(1)
        bench.world.temper(name).boots = False
        assert bench.create(name).created
    assert [bench.state(name) for name in "cab"] == [State.STARTING, State.QUEUED, State.QUEUED]
    assert bench.create("a").created is False
    for name, following in ("ca", "ab"):
        bench.executor.run_all()
        assert (bench.state(name), bench.state(following)) == (State.STARTING, State.QUEUED)
        bench.world.answer(name)
        bench.executor.deliver()
        assert (bench.state(name), bench.state(following)) == (State.RUNNING, State.STARTING)
    assert bench.fleet.next_deadline() is not None


def test_position_and_failure_of_a_queued_server_survive_the_keeper():
    """Restarts after crashes and commands queue as well; a restart command resets the count."""
    bench = Bench(max_starts=1).run("crashes").run("restarts")
    bench.world.temper("slow").boots = False
    bench.create("slow")
    bench.executor.run_all()
    bench.world.crash("crashes")
    bench.executor.run_all()
    bench.clock.advance(1)
    bench.fleet.step(Tick())
    bench.clock.advance(1)
    bench.order(Event.RESTART, "restarts")
    assert (bench.state("crashes"), bench.last("crashes").restarts) == (State.QUEUED, 1)
    assert bench.last("crashes").failure.kind is FailureClass.KILLED
    assert bench.state("restarts") is State.QUEUED
    bench.crash()
    assert [bench.state(name) for name in ("crashes", "restarts")] == [State.STARTING, State.QUEUED]
    bench.order(Event.RESTART, "crashes")
    bench.world.answer("slow")
    bench.executor.run_all()
    assert {bench.state(name) for name in ("crashes", "restarts", "slow")} == {State.RUNNING}


def test_if_a_queued_launch_cannot_be_stored_the_next_in_the_queue_starts():
    bench = Bench(max_starts=1)
    bench.world.temper("first").boots = False
    for name in ("first", "second", "third"):
        bench.clock.advance(1)
        bench.create(name)
    bench.executor.run_all()
    save = bench.store.save

    def fails_for_one(snapshot):
        if snapshot.name == "second":
            raise StoreError("cannot write the store")
        save(snapshot)

    bench.store.save = fails_for_one
    bench.world.answer("first")
    bench.executor.deliver()
    assert (bench.state("second"), bench.state("third")) == (State.FAILED, State.STARTING)
    bench.executor.run_all()
    assert bench.state("third") is State.RUNNING


def test_a_start_that_would_queue_is_refused_if_it_cannot_be_stored():
    bench = Bench(max_starts=1)
    bench.create("first")
    bench.store.failing = True
    with pytest.raises(StoreError):
        bench.create("second")
    bench.store.failing = False
    bench.executor.run_all()
    assert [
        change.after.name for change in bench.recorder.changes if change.after.name == "second"
    ] == []
    bench.run("second")


# Culling


def test_a_snooze_is_stored_and_published_and_changes_nothing_else(bench):
    ada = Origin("ada", "1")
    bench.fleet.step(Create(a_spec("lab")))
    bench.executor.run_all()
    before = bench.store.snapshots["lab"]
    reply = bench.fleet.step(Snooze("lab", 5.0, ada))
    assert reply.snapshot == bench.store.snapshots["lab"] == replace(before, snoozed_until=5.0)
    change = bench.recorder.changes[-1]
    assert (change.event, change.before, change.after, change.origin) == (
        Event.SNOOZE,
        before,
        reply.snapshot,
        ada,
    )
    bench.fleet.step(Order("lab", Event.RESTART))
    bench.executor.run_all()
    assert bench.store.snapshots["lab"].snoozed_until == 5.0
    assert bench.fleet.step(Snooze("lab", None)).snapshot.snoozed_until is None


def test_a_snooze_that_cannot_be_stored_is_refused(bench):
    bench.fleet.step(Create(a_spec("lab")))
    bench.executor.run_all()
    count = len(bench.recorder.changes)
    bench.store.failing = True
    with pytest.raises(StoreError):
        bench.fleet.step(Snooze("lab", 5.0))
    bench.store.failing = False
    bench.fleet.step(Order("lab", Event.STOP))
    assert {change.after.snoozed_until for change in bench.recorder.changes[count:]} == {None}
    with pytest.raises(ServerNotFound):
        bench.fleet.step(Snooze("nobody", 5.0))


def test_an_order_based_on_an_outdated_snapshot_is_ignored(bench):
    bench.fleet.step(Create(a_spec("lab")))
    bench.executor.run_all()
    seen = bench.store.snapshots["lab"]
    bench.fleet.step(Snooze("lab", 5.0))
    assert bench.fleet.step(Order("lab", Event.STOP, seen=seen)).snapshot.goal is Goal.UP
    bench.fleet.step(Order("lab", Event.RESTART))
    assert bench.fleet.step(Order("lab", Event.STOP, seen=seen)).snapshot.goal is Goal.AGAIN
    bench.executor.run_all()
    now = bench.store.snapshots["lab"]
    assert bench.fleet.step(Order("lab", Event.STOP, seen=now)).snapshot.state is State.STOPPING


def test_up_since_survives_crashes_and_keepers_and_is_reset_by_a_command(bench):
    bench.fleet.step(Create(a_spec("lab")))
    bench.executor.run_all()
    begun = bench.store.snapshots["lab"].up_since
    bench.clock.advance(10.0)
    bench.world.crash("lab")
    bench.executor.run_all()
    bench.wait()
    bench.executor.run_all()
    crashed = bench.store.snapshots["lab"]
    assert (crashed.up_since, crashed.started_at > begun) == (begun, True)
    bench.fleet.step(Order("lab", Event.RESTART))
    bench.executor.run_all()
    assert bench.store.snapshots["lab"].up_since == bench.clock.time() > begun
