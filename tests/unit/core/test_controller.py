"""One server's controller: restart budget, timers, failures, stop reports and kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest

from labkeeper.core.budget import Budget
from labkeeper.core.controller import Controller
from labkeeper.core.lifecycle import Action, Event, Goal, State
from labkeeper.core.messages import (
    Ended,
    GatewaySeen,
    Gone,
    Ready,
    Refused,
    Report,
    Seen,
    Unreachable,
    Vetoed,
)
from labkeeper.core.policy import Policy
from labkeeper.core.server import (
    Exit,
    Failure,
    FailureClass,
    GatewayHealth,
    OrphanedKernel,
    OwnKernel,
    Progress,
    Snapshot,
    Stage,
    StopMethod,
    StopReport,
)
from labkeeper.core.spec import LOCAL, Gateway, Owner, ServerName
from labkeeper.testing.fakes import FakeClock, a_spec
from labkeeper.testing.world import FakeProcess

PROCESS = FakeProcess(a_spec("lab"), generation=1, pid=7, port=8888)
ENDPOINT, INSTANCE = PROCESS.endpoint, PROCESS.instance
OOPS = Failure(
    FailureClass.IMPORT_ERROR,
    "no module named jupyterlab",
    Exit(code=1),
    ("Traceback", "ImportError"),
)
CRASH = Ended(Exit(code=1), failure=OOPS)
POLICY = Policy()


def report(controller, fact):
    """Report a fact of the current generation; some facts only come from observations."""
    return Report(
        ServerName("lab"),
        controller.snapshot.generation,
        fact,
        observation=isinstance(fact, Seen | Gone | Unreachable),
    )


class Bench:
    """A controller, moved by the test as the fleet would."""

    def __init__(self, policy=POLICY, snapshot=None):
        self.clock = FakeClock()
        self.policy, self.saved = policy, snapshot
        self.controller = Controller.new(a_spec("lab"), policy, self.clock)
        if snapshot is not None:
            self.controller = Controller(snapshot, policy, self.clock)

    @property
    def snapshot(self):
        return self.controller.snapshot

    @property
    def state(self):
        return self.snapshot.state

    def order(self, *events):
        """Give commands, and return the actions they lead to."""
        return [
            job.action for event in events for job in self.commit(self.controller.plan(event)).jobs
        ]

    def commit(self, decision):
        self.controller = decision.after
        return decision

    def recover(self):
        """Recover what an earlier keeper left, and return the actions that this leads to."""
        return [
            job.action
            for job in self.commit(Controller.recovered(self.saved, self.policy, self.clock)).jobs
        ]

    def receive(self, *facts):
        """Report facts, and return the actions they lead to."""
        actions = []
        for fact in facts:
            decision = self.commit(self.controller.plan_report(report(self.controller, fact)))
            actions += [job.action for job in decision.jobs]
        return actions

    def wait(self):
        """Advance the clock until the timer fires; return the seconds and the actions."""
        seconds = self.controller.deadline - self.clock.monotonic()
        self.clock.advance(seconds)
        return seconds, self.order(Event.DEADLINE)

    def run(self):
        """Start it, and report it as ready."""
        self.order(Event.START)
        self.receive(Ready(ENDPOINT, INSTANCE))
        return self


def saved(state, goal=Goal.UP, **values):
    """Return a snapshot that an earlier keeper left."""
    return Snapshot(a_spec("lab"), state, goal, since=1.0, created_at=1.0, generation=3, **values)


def test_generations_continue_after_a_predecessor():
    """So late facts about the predecessor are not mistaken for the new server's own."""
    controller = Controller.new(a_spec("lab"), POLICY, FakeClock(), generation=4)
    decision = controller.plan(Event.START)
    assert [(job.action, job.generation) for job in decision.jobs] == [(Action.LAUNCH, 5)]
    assert (decision.after.snapshot.generation, controller.snapshot.generation) == (5, 4)


def test_there_is_an_endpoint_only_while_the_server_runs():
    """READY sets endpoint and start time; leaving the state clears the endpoint."""
    bench = Bench().run()
    assert bench.snapshot.endpoint == ENDPOINT
    assert bench.snapshot.started_at == bench.clock.time()
    bench.order(Event.STOP)
    assert bench.snapshot.endpoint is None


def test_since_is_the_time_of_the_last_change_of_state():
    """A command that only changes the goal does not affect it."""
    bench = Bench()
    bench.order(Event.START)
    bench.clock.advance(5)
    bench.order(Event.STOP)
    began = bench.clock.time()
    bench.clock.advance(1)
    bench.order(Event.DELETE)
    assert (bench.state, bench.snapshot.goal, bench.snapshot.since) == (
        State.STOPPING,
        Goal.ABSENT,
        began,
    )


# Restart budget


def test_a_server_that_never_became_ready_fails_without_a_restart():
    """The failure is the backend's."""
    bench = Bench()
    bench.order(Event.START)
    bench.receive(CRASH)
    assert bench.state is State.FAILED
    assert bench.snapshot.failure == OOPS
    assert bench.snapshot.exit == Exit(code=1)
    assert bench.controller.deadline is None


def test_each_restart_is_delayed_longer_until_the_budget_is_exhausted():
    """Three delays allow three restarts; after that the server has failed."""
    bench = Bench().run()
    for restarts, delay in enumerate(POLICY.restart_delays, start=1):
        bench.receive(CRASH)
        assert bench.state is State.BACKOFF
        assert bench.wait() == (delay, [Action.LAUNCH])
        assert bench.snapshot.restarts == restarts
        assert bench.snapshot.failure is None
        bench.receive(Ready(ENDPOINT, INSTANCE))
    bench.receive(CRASH)
    assert (bench.state, bench.snapshot.failure) == (State.FAILED, OOPS)


def test_a_crash_during_a_restart_uses_up_budget():
    bench = Bench().run()
    bench.receive(CRASH)
    bench.wait()
    bench.receive(CRASH)
    assert bench.wait()[0] == POLICY.restart_delays[1]


def test_crashes_outside_of_the_window_do_not_count():
    bench = Bench().run()
    for _ in range(5):
        bench.receive(CRASH)
        assert bench.wait()[0] == POLICY.restart_delays[0]
        bench.receive(Ready(ENDPOINT, INSTANCE))
        bench.clock.advance(POLICY.restart_window)


def test_a_start_command_resets_the_budget():
    """It also forgets that the server ever ran."""
    bench = Bench().run()
    bench.receive(CRASH)
    assert bench.order(Event.START) == [Action.LAUNCH]
    assert (bench.snapshot.restarts, bench.snapshot.started_at) == (0, None)
    bench.receive(CRASH)
    assert bench.state is State.FAILED


def test_without_delays_there_are_no_restarts():
    bench = Bench(Policy(restart_delays=())).run()
    bench.receive(CRASH)
    assert bench.state is State.FAILED


def test_the_budget():
    """It must be earned, is spent in order, and recovers over time."""
    policy = Policy(restart_delays=(1.0, 2.0), restart_window=10.0)
    assert not Budget().left(policy, 0.0)
    budget, first = Budget(earned=True).spend(policy, 0.0)
    budget, second = budget.spend(policy, 5.0)
    assert (first, second) == (1.0, 2.0)
    assert not budget.left(policy, 9.0)
    assert budget.left(policy, 10.0)
    assert budget.spend(policy, 10.0)[1] == 2.0


# Starting


def test_a_start_timeout_stays_the_cause_after_the_kill():
    """Exit and log tail are added from the killed process."""
    bench = Bench()
    bench.order(Event.START)
    assert bench.wait() == (POLICY.start_timeout, [Action.KILL])
    killed = Exit(signal="SIGKILL")
    bench.receive(
        Ended(
            killed,
            StopMethod.SIGKILL,
            failure=Failure(FailureClass.KILLED, "killed", killed, ("last",)),
        )
    )
    failure = bench.snapshot.failure
    assert bench.state is State.FAILED
    assert (failure.kind, failure.exit, failure.log_tail) == (
        FailureClass.START_TIMEOUT,
        killed,
        ("last",),
    )
    assert "60 s" in failure.message


def test_a_start_timeout_stays_the_cause_if_the_end_brings_no_failure():
    """After a clean exit, and after an end without a known exit."""
    for fact in (Ended(Exit(code=0), StopMethod.SIGTERM), Gone()):
        bench = Bench()
        bench.order(Event.START)
        bench.wait()
        bench.wait()
        assert bench.state is State.LOST
        bench.receive(fact)
        assert (bench.state, bench.snapshot.failure.kind) == (
            State.FAILED,
            FailureClass.START_TIMEOUT,
        )
        assert bench.snapshot.failure.exit == bench.snapshot.exit


def test_a_refused_launch_fails_with_the_backends_failure():
    """Nothing ran, so nothing is retried."""
    bench = Bench()
    bench.order(Event.START)
    bench.receive(Refused(OOPS))
    assert (bench.state, bench.snapshot.failure, bench.snapshot.exit) == (State.FAILED, OOPS, None)


@pytest.mark.parametrize(
    ("kind", "then"),
    [(FailureClass.DISK_FULL, State.BACKOFF), (FailureClass.CONFIG_ERROR, State.FAILED)],
)
def test_a_restart_is_retried_on_a_full_disk_and_on_no_other_refusal(kind, then):
    bench = Bench().run()
    bench.receive(CRASH)
    bench.wait()
    bench.receive(Refused(replace(OOPS, kind=kind)))
    assert (bench.state, bench.snapshot.failure.kind) == (then, kind)


def test_retries_on_a_full_disk_are_limited():
    """A first start is not retried, so that its caller gets an immediate answer."""
    full = Refused(Failure(FailureClass.DISK_FULL, "no room"))
    bench = Bench()
    bench.order(Event.START)
    bench.receive(full)
    assert bench.state is State.FAILED
    bench.run().receive(CRASH)
    for _ in POLICY.restart_delays:
        bench.wait()
        bench.receive(full)
    assert bench.state is State.FAILED


@pytest.mark.parametrize(("port", "then"), [(None, State.BACKOFF), (8888, State.FAILED)])
def test_a_start_is_retried_if_a_port_is_taken_unless_it_was_requested(port, then):
    taken = Ended(
        Exit(code=1), failure=Failure(FailureClass.PORT_IN_USE, "port 8888 is not available")
    )
    bench = Bench(
        snapshot=Snapshot(
            a_spec("lab", port=port), State.STOPPED, Goal.DOWN, since=0.0, created_at=0.0
        )
    )
    bench.order(Event.START)
    bench.receive(taken)
    assert (bench.state, bench.snapshot.failure.kind) == (then, FailureClass.PORT_IN_USE)


def test_an_exit_before_ready_is_a_failure():
    """Even with exit code 0."""
    bench = Bench()
    bench.order(Event.START)
    bench.receive(Ended(Exit(code=0)))
    assert bench.state is State.FAILED
    assert bench.snapshot.failure.message.startswith("cannot start server 'lab'")
    assert "exit code 0" in bench.snapshot.failure.message


def test_a_start_clears_failure_exit_and_stop_report():
    """They belong to one generation."""
    bench = Bench()
    bench.order(Event.START)
    bench.receive(CRASH)
    bench.order(Event.START)
    assert (bench.snapshot.failure, bench.snapshot.exit, bench.snapshot.stop_report) == (
        None,
        None,
        None,
    )


def test_a_stopped_server_has_no_failure():
    """Neither one that had failed before nor one that crashes while stopping."""
    bench = Bench()
    bench.order(Event.START)
    bench.receive(CRASH)
    bench.order(Event.STOP)
    assert (bench.state, bench.snapshot.failure) == (State.STOPPED, None)
    bench.run().order(Event.STOP)
    bench.receive(CRASH)
    assert (bench.state, bench.snapshot.failure) == (State.STOPPED, None)


# Running


def test_a_running_server_is_observed_periodically():
    """An answer changes nothing."""
    bench = Bench().run()
    for _ in range(3):
        assert bench.wait() == (POLICY.probe_period, [Action.OBSERVE])
        assert bench.receive(Seen(answers=True)) == []
        assert bench.state is State.RUNNING


def test_a_server_that_is_silent_for_too_long_is_terminated_and_restarted():
    """HUNG comes after `hung_after` seconds; the failure stays until the next launch."""
    bench = Bench().run()
    bench.receive(Seen(answers=False))
    bench.clock.advance(POLICY.hung_after - 1)
    assert bench.receive(Seen(answers=False)) == []
    bench.clock.advance(1)
    assert bench.receive(Seen(answers=False)) == [Action.TERMINATE]
    assert (bench.state, bench.snapshot.goal) == (State.STOPPING, Goal.UP)
    bench.receive(Ended(Exit(code=0), StopMethod.SIGTERM))
    assert (bench.state, bench.snapshot.failure.kind) == (State.BACKOFF, FailureClass.HUNG)
    assert bench.wait()[1] == [Action.LAUNCH]


def test_an_answer_resets_the_silence():
    """So does a new READY."""
    for answer in (Seen(answers=True), Unreachable("?")):
        bench = Bench().run()
        bench.receive(Seen(answers=False))
        bench.clock.advance(POLICY.hung_after)
        bench.receive(answer, Ready(ENDPOINT, INSTANCE))
        assert bench.receive(Seen(answers=False)) == []
        assert bench.state is State.RUNNING


def test_a_failed_observation_is_not_silence():
    """However often it fails; it also resets a silence that had begun."""
    bench = Bench().run()
    bench.receive(Seen(answers=False))
    for _ in range(3):
        bench.clock.advance(POLICY.hung_after)
        assert bench.receive(Seen(answers=None)) == []
    assert bench.receive(Seen(answers=False)) == []
    assert bench.state is State.RUNNING


def test_detection_of_hung_servers_can_be_disabled():
    """By a `hung_after` of 0."""
    bench = Bench(Policy(hung_after=0)).run()
    for _ in range(3):
        bench.receive(Seen(answers=False))
        bench.clock.advance(10_000)
    assert bench.state is State.RUNNING


def test_the_end_of_a_hung_server_is_not_a_shutdown_by_its_user():
    """The keeper ended it, so it restarts, even after a clean exit seen while lost."""
    bench = Bench().run()
    bench.receive(Seen(answers=False))
    bench.clock.advance(POLICY.hung_after)
    bench.receive(Seen(answers=False), Unreachable("the answer was lost"))
    assert bench.state is State.LOST
    bench.receive(Ended(Exit(code=0), StopMethod.SIGTERM))
    assert (bench.state, bench.snapshot.goal) == (State.BACKOFF, Goal.UP)
    assert bench.snapshot.failure.kind is FailureClass.HUNG


def test_an_end_without_known_exit_is_a_crash():
    """GONE has a failure of its own."""
    bench = Bench().run()
    bench.receive(Gone())
    assert bench.state is State.BACKOFF
    assert (bench.snapshot.exit, bench.snapshot.failure.kind) == (Exit(), FailureClass.KILLED)


def test_the_reason_why_a_server_is_lost_is_kept_until_it_is_found():
    """The backend's first reason stays; READY clears it."""
    bench = Bench().run()
    assert bench.receive(Unreachable("the daemon is away")) == [Action.OBSERVE]
    assert bench.snapshot.failure.message == "the daemon is away"
    assert bench.snapshot.endpoint is None
    bench.receive(Unreachable("it is still away"))
    assert bench.snapshot.failure.message == "the daemon is away"
    assert bench.wait() == (POLICY.look_again, [Action.OBSERVE])
    bench.receive(Seen(answers=True))
    assert bench.state is State.STARTING
    bench.receive(Ready(ENDPOINT, INSTANCE))
    assert (bench.state, bench.snapshot.failure, bench.snapshot.endpoint) == (
        State.RUNNING,
        None,
        ENDPOINT,
    )


def test_an_unwanted_server_that_becomes_ready_gets_no_endpoint():
    """READY while lost, with the goal DOWN, leads to stopping."""
    bench = Bench().run()
    bench.receive(Unreachable("?"))
    bench.order(Event.STOP)
    assert bench.receive(Ready(ENDPOINT, INSTANCE)) == [Action.TERMINATE]
    assert (bench.state, bench.snapshot.endpoint) == (State.STOPPING, None)


# Stopping


def test_the_stop_report_covers_the_time_from_request_to_proven_end():
    """Across stopping, killing and lost; method and kernels come from the backend."""
    bench = Bench().run()
    bench.order(Event.STOP)
    assert bench.wait() == (POLICY.stop_grace, [Action.KILL])
    assert bench.wait() == (POLICY.kill_wait, [Action.OBSERVE])
    bench.receive(Unreachable("the daemon is away"))
    assert bench.wait() == (POLICY.look_again, [Action.OBSERVE])
    assert bench.receive(Seen(answers=False)) == [Action.TERMINATE]
    bench.receive(Ended(Exit(signal="SIGKILL"), StopMethod.SIGKILL, ("k1",), (OwnKernel("k2"),)))
    seconds = POLICY.stop_grace + POLICY.kill_wait + POLICY.look_again
    assert bench.snapshot.stop_report == StopReport(StopMethod.SIGKILL, seconds, ("k1",), ("k2",))
    assert bench.state is State.STOPPED


def test_each_stop_report_starts_from_zero():
    bench = Bench().run()
    for seconds in (3.0, 1.0):
        bench.order(Event.STOP)
        bench.clock.advance(seconds)
        bench.receive(Ended(Exit(code=0), StopMethod.SHUTDOWN))
        assert bench.snapshot.stop_report == StopReport(StopMethod.SHUTDOWN, seconds)
        bench.run()


def test_an_end_without_a_stop_command_has_no_stop_report():
    bench = Bench().run()
    bench.receive(Ended(Exit(code=0)))
    assert (bench.state, bench.snapshot.goal, bench.snapshot.stop_report) == (
        State.STOPPED,
        Goal.DOWN,
        None,
    )


def test_a_stop_begun_by_an_earlier_keeper_is_reported_with_zero_seconds():
    """This keeper does not know when it began."""
    bench = Bench(snapshot=saved(State.STOPPING, Goal.DOWN))
    bench.recover()
    bench.receive(Ended(Exit(code=0), StopMethod.SIGTERM))
    assert bench.snapshot.stop_report == StopReport(StopMethod.SIGTERM, 0.0)


def test_a_restart_launches_after_the_proven_end():
    """With a fresh budget, and without the old stop report."""
    bench = Bench().run()
    assert bench.order(Event.RESTART) == [Action.TERMINATE]
    assert bench.snapshot.goal is Goal.AGAIN
    assert bench.receive(Ended(Exit(code=0), StopMethod.SHUTDOWN)) == [Action.LAUNCH]
    assert (bench.state, bench.snapshot.goal, bench.snapshot.generation) == (
        State.STARTING,
        Goal.UP,
        2,
    )
    assert (bench.snapshot.stop_report, bench.snapshot.restarts) == (None, 0)


# Recovery


@pytest.mark.parametrize(
    "state", [State.STARTING, State.RUNNING, State.STOPPING, State.KILLING, State.LOST]
)
def test_after_recovery_a_server_that_may_exist_is_lost_until_observed(state):
    """Whatever its recorded state; nothing else is done before the observation."""
    bench = Bench(snapshot=saved(state, endpoint=ENDPOINT))
    assert bench.recover() == [Action.OBSERVE]
    assert (bench.state, bench.snapshot.endpoint, bench.snapshot.generation) == (
        State.LOST,
        None,
        3,
    )
    bench.receive(Unreachable("the daemon is away"))
    assert bench.wait() == (POLICY.look_again, [Action.OBSERVE])


def test_an_observation_is_not_repeated_before_its_result():
    """A second one would only delay the jobs behind it."""
    bench = Bench(snapshot=saved(State.RUNNING))
    assert bench.recover() == [Action.OBSERVE]
    assert bench.wait() == (POLICY.look_again, [])
    bench.commit(
        bench.controller.plan_report(Report(ServerName("lab"), 3, Unreachable("of another call")))
    )
    assert bench.wait() == (POLICY.look_again, [])
    bench.receive(Unreachable("of the observation"))
    assert bench.wait() == (POLICY.look_again, [Action.OBSERVE])


@pytest.mark.parametrize("state", [State.STOPPED, State.FAILED])
def test_a_server_that_was_gone_is_recovered_unchanged(state):
    """Without an observation or a timer."""
    snapshot = saved(state, Goal.DOWN)
    bench = Bench(snapshot=snapshot)
    assert bench.recover() == []
    assert (bench.snapshot, bench.controller.deadline) == (snapshot, None)


def test_recovery_ends_a_backoff():
    """The right to restart is kept."""
    bench = Bench(snapshot=saved(State.BACKOFF, started_at=1.0))
    assert bench.recover() == []
    assert bench.wait() == (0.0, [Action.LAUNCH])
    bench.receive(CRASH)
    assert bench.state is State.BACKOFF


@pytest.mark.parametrize(("started_at", "state"), [(None, State.FAILED), (5.0, State.BACKOFF)])
def test_recovery_keeps_the_restart_budget_of_a_server_that_ran(started_at, state):
    """Otherwise a crash is a failure."""
    bench = Bench(snapshot=saved(State.RUNNING, started_at=started_at))
    bench.recover()
    bench.receive(CRASH)
    assert bench.state is state


def test_an_interrupted_start_is_retried_a_limited_number_of_times():
    """How the process ended is not known, so it does not count as a failure."""
    bench = Bench(snapshot=saved(State.STARTING))
    bench.recover()
    bench.receive(Gone())
    for delay in POLICY.restart_delays:
        assert bench.wait() == (delay, [Action.LAUNCH])
        bench.receive(Unreachable("the backend is away"), Gone())
    assert bench.state is State.FAILED


def test_recovery_continues_a_stop():
    bench = Bench(snapshot=saved(State.KILLING, Goal.ABSENT))
    bench.recover()
    assert bench.receive(Seen(answers=True)) == [Action.TERMINATE]
    bench.receive(Ended(Exit(code=0), StopMethod.SHUTDOWN))
    assert bench.snapshot.forgotten


def test_an_event_without_a_row_changes_nothing():
    """Snapshot and timer stay as they are."""
    bench = Bench().run()
    before, deadline = bench.snapshot, bench.controller.deadline
    assert bench.receive(Ready(replace(ENDPOINT, port=1), INSTANCE)) == []
    assert bench.order(Event.START) == []
    assert (bench.snapshot, bench.controller.deadline) == (before, deadline)


# Gateways and the kernels on them

GATEWAY = Gateway("http://gateway:8888", "ws://gateway:8888", "token")
UNFIT = Failure(FailureClass.GATEWAY_REFUSED, "the gateway refuses the token")
K1, K2, K3 = OwnKernel("k1"), OwnKernel("k2"), OwnKernel("k3")


class GatewayBench(Bench):
    """A bench whose server has a gateway; it collects orphaned kernels."""

    def __init__(self, **values):
        spec = replace(a_spec("lab"), gateway=GATEWAY, owner=values.pop("owner", LOCAL))
        state, goal = values.pop("state", State.STOPPED), values.pop("goal", Goal.DOWN)
        super().__init__(
            snapshot=Snapshot(spec, state, goal, since=1.0, created_at=1.0, generation=3, **values)
        )
        self.orphans = []

    def order(self, *events, revised=None):
        decisions = [self.commit(self.controller.plan(event, revised=revised)) for event in events]
        self.orphans += [orphan.kernel_id for decision in decisions for orphan in decision.orphans]
        return [job for decision in decisions for job in decision.jobs]

    def receive(self, *facts):
        jobs = []
        for fact in facts:
            decision = self.commit(self.controller.plan_report(report(self.controller, fact)))
            self.orphans += [orphan.kernel_id for orphan in decision.orphans]
            jobs += decision.jobs
        return jobs

    @property
    def kept(self):
        return self.snapshot.kernels_kept


def test_a_veto_ends_the_start_with_its_failure():
    """Not the kill's. It had not been ready yet, so there is no restart."""
    bench = GatewayBench()
    bench.order(Event.START)
    assert [job.action for job in bench.receive(Vetoed(UNFIT))] == [Action.KILL]
    killed = Exit(signal="SIGKILL")
    bench.receive(
        Ended(
            killed,
            StopMethod.SIGKILL,
            failure=Failure(FailureClass.KILLED, "killed", killed, ("last",)),
        )
    )
    assert (bench.state, bench.snapshot.failure) == (
        State.FAILED,
        replace(UNFIT, exit=killed, log_tail=("last",)),
    )


def test_progress_is_known_while_the_server_starts():
    bench = Bench()
    pulling, starting = Progress(Stage.PULLING, "pulling"), Progress(Stage.STARTING, "loading")
    bench.order(Event.START)
    deadline = bench.controller.deadline
    for progress in (pulling, starting):
        assert bench.receive(progress) == []
        assert (bench.state, bench.snapshot.progress) == (State.STARTING, progress)
    assert bench.controller.deadline == deadline
    bench.receive(Ready(ENDPOINT, INSTANCE))
    assert bench.snapshot.progress is None
    bench.receive(pulling)
    assert (bench.state, bench.snapshot.progress) == (State.RUNNING, None)


def test_gateway_health_is_known_while_the_server_runs():
    bench = GatewayBench()
    well, ill = GatewayHealth(1.0, kernelspecs=2), GatewayHealth(2.0, UNFIT)
    bench.order(Event.START)
    bench.receive(GatewaySeen(ill))
    assert bench.snapshot.gateway is None
    bench.receive(Ready(ENDPOINT, INSTANCE, gateway=well))
    assert bench.snapshot.gateway == well
    assert bench.receive(GatewaySeen(ill)) == []
    assert (bench.state, bench.snapshot.gateway, bench.snapshot.failure) == (
        State.RUNNING,
        ill,
        None,
    )
    bench.order(Event.STOP)
    assert bench.snapshot.gateway is None
    assert [ill.reachable, well.reachable] == [False, True]


def test_a_restart_that_keeps_kernels_passes_them_to_the_next_launch():
    bench = GatewayBench().run()
    (job,) = bench.order(Event.RESTART_KEEPING_KERNELS)
    assert (job.action, job.keep_kernels, bench.snapshot.goal) == (
        Action.TERMINATE,
        True,
        Goal.AGAIN_KEEPING_KERNELS,
    )
    (job,) = bench.receive(Ended(Exit(code=0), StopMethod.SHUTDOWN, kernels_left=(K1, K2)))
    assert (job.action, job.kernels, job.generation) == (Action.LAUNCH, (K1, K2), 5)
    assert bench.kept == (K1, K2)
    bench.receive(Ready(ENDPOINT, INSTANCE, not_taken_over=("k2",)))
    assert (bench.kept, bench.orphans) == ((K2,), [])
    # The kernel is still recorded when the server ends.
    bench.order(Event.STOP)
    bench.receive(Ended(Exit(code=0), StopMethod.SHUTDOWN))
    assert (bench.kept, bench.orphans) == ((), ["k2"])


def test_a_restart_that_does_not_keep_kernels_orphans_those_left():
    bench = GatewayBench().run()
    (job,) = bench.order(Event.RESTART)
    assert not job.keep_kernels
    (job,) = bench.receive(Ended(Exit(code=0), StopMethod.SHUTDOWN, ("k1",), kernels_left=(K2,)))
    assert (job.kernels, bench.kept, bench.orphans) == ((), (), ["k2"])


@pytest.mark.parametrize(("owner", "name"), [(LOCAL, "lab"), (Owner("ada"), "lab.ada")])
def test_an_orphaned_kernel_names_its_server_and_owner(owner, name):
    bench = GatewayBench(owner=owner).run()
    bench.order(Event.RESTART)
    left = Ended(Exit(code=0), StopMethod.SHUTDOWN, kernels_left=(K2,))
    decision = bench.controller.plan_report(report(bench.controller, left))
    assert [orphan.server for orphan in decision.orphans] == [name]


def test_kernels_of_a_crashed_server_are_kept_during_backoff_and_after_failure():
    bench = GatewayBench().run()
    bench.receive(Ended(Exit(signal="SIGSEGV"), kernels_left=(K1,)))
    assert (bench.state, bench.kept) == (State.BACKOFF, (K1,))
    while bench.state is State.BACKOFF:
        bench.clock.advance(10)
        bench.order(Event.DEADLINE)
        bench.receive(Ended(Exit(signal="SIGSEGV"), kernels_left=(K2,)))
    assert (bench.state, bench.kept, bench.orphans) == (State.FAILED, (K1, K2), [])
    (job,) = bench.order(Event.START)
    assert job.kernels == (K1, K2)


@pytest.mark.parametrize("event", [Event.STOP, Event.DELETE, Event.KILL, Event.RESTART])
@pytest.mark.parametrize("state", [State.FAILED, State.BACKOFF])
def test_kept_kernels_are_orphaned_when_the_server_is_no_longer_wanted(state, event):
    bench = GatewayBench(state=state, goal=Goal.UP, kernels_kept=(K1,))
    bench.order(event)
    assert (bench.kept, bench.orphans) == ((), ["k1"])


@pytest.mark.parametrize("event", [Event.STOP, Event.KILL, Event.DELETE])
def test_a_stop_orphans_and_reports_the_kernels_left(event):
    bench = GatewayBench().run()
    (job,) = bench.order(event)
    assert not job.keep_kernels
    bench.receive(Ended(Exit(signal="SIGKILL"), StopMethod.SIGKILL, ("k1",), (K2, K3)))
    assert (bench.kept, bench.orphans) == ((), ["k2", "k3"])
    assert bench.snapshot.stop_report.kernels_left == ("k2", "k3")


def test_a_stop_cancels_keeping_kernels():
    bench = GatewayBench().run()
    bench.order(Event.RESTART_KEEPING_KERNELS, Event.STOP)
    bench.receive(Ended(Exit(code=0), StopMethod.SHUTDOWN, kernels_left=(K1,)))
    assert (bench.state, bench.orphans) == (State.STOPPED, ["k1"])


def test_the_kernels_of_a_hung_server_are_kept():
    bench = GatewayBench().run()
    (job,) = bench.order(Event.HUNG)
    assert (job.action, job.keep_kernels) == (Action.TERMINATE, True)
    bench.receive(Ended(Exit(signal="SIGKILL"), StopMethod.SIGKILL, kernels_left=(K1,)))
    assert (bench.state, bench.kept) == (State.BACKOFF, (K1,))
    # No kernel is left that was supposed to end.
    assert bench.snapshot.stop_report.kernels_left == ()


def test_a_shutdown_from_inside_orphans_the_kernels_left():
    bench = GatewayBench().run()
    bench.receive(Ended(Exit(code=0), kernels_left=(K1,)))
    assert (bench.state, bench.orphans) == (State.STOPPED, ["k1"])


def test_an_orphaned_kernel_has_its_gateway_server_and_time():
    bench = GatewayBench().run()
    bench.order(Event.STOP)
    end = Ended(Exit(code=0), StopMethod.SHUTDOWN, kernels_left=(K1,))
    decision = bench.controller.plan_report(report(bench.controller, end))
    assert decision.orphans == (
        OrphanedKernel("k1", GATEWAY, bench.snapshot.name, bench.clock.time()),
    )


def test_a_revised_spec_applies_from_the_next_launch():
    bench = GatewayBench().run()
    old, new = bench.snapshot.spec, replace(bench.snapshot.spec, env={"A": "b"})
    bench.order(Event.RESTART_KEEPING_KERNELS, revised=new)
    assert (bench.snapshot.spec, bench.snapshot.revised) == (old, new)
    (job,) = bench.receive(Ended(Exit(code=0), StopMethod.SHUTDOWN))
    assert (job.spec, bench.snapshot.spec, bench.snapshot.revised) == (new, new, None)
    # An equal spec is not a revision.
    bench.order(Event.RESTART, revised=new)
    assert bench.snapshot.revised is None
