"""The fleet in a hostile world, at random: commands, jobs, reports, time, a failing store, crashes.

test_model_check proves the transition table; this checks what surrounds it (generations, timers,
restart budget, store, recovery) against the laws.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from labkeeper.core.errors import BackendRefused, RequestError, StoreError
from labkeeper.core.fleet import Fleet
from labkeeper.core.lifecycle import COMMANDS, MAY_EXIST, Goal, State
from labkeeper.core.messages import Create, Order, Tick
from labkeeper.core.policy import Policy
from labkeeper.core.server import Exit, OwnKernel
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
from labkeeper.testing.world import FakeBackend, Temper, World

EVERY = ("one", "two", "three")
NAMES = st.sampled_from(EVERY)
POLICY = Policy(max_servers=3, max_starts=1, restart_delays=(1.0, 2.0))
GATEWAY = Gateway("http://gateway:8888", "ws://gateway:8888")
PATIENCE = 60
"""Rounds of jobs and timers after which a fair world must be at rest."""
AT_REST = {
    Goal.UP: {State.RUNNING, State.FAILED},
    Goal.DOWN: {State.STOPPED},
}


class HandoverBackend(FakeBackend):
    """Its servers take over the kernels that the preflight was told about."""

    def __init__(self, report, world, preflight, unknown):
        super().__init__(report, world)
        self.preflight = preflight
        self.unknown = unknown

    def launch(self, spec, generation):
        launched = len(self.world.launched)
        # A process that is in the way of a launch ends without a report.
        self.unknown |= {
            kernel.id for process in self.world.living(spec.name) for kernel in process.kernels
        }
        try:
            super().launch(spec, generation)
        finally:
            for process in (
                self.world.living(spec.name) if len(self.world.launched) > launched else ()
            ):
                process.kernels = self.preflight.begun[-1][2]


class FleetMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.kernels = []
        """The ids of all kernels ever started."""
        self.unknown = set()
        """Kernels about which a record was lost; nothing is guaranteed for them."""
        self.world, self.store, self.clock = World(), MemoryStore(), FakeClock()
        self.executor = InlineExecutor(self.receive)
        self.preflight, self.orphans = PassingPreflight(), MemoryOrphans()
        self.begin()

    def receive(self, report):
        """Hand a report to the current keeper."""
        self.fleet.step(report)

    def begin(self):
        self.recorder = Recorder()
        self.backend = HandoverBackend(
            self.executor.receive, self.world, self.preflight, self.unknown
        )
        self.fleet = Fleet(
            backend=self.backend,
            preflight=self.preflight,
            orphans=self.orphans,
            store=self.store,
            executor=self.executor,
            clock=self.clock,
            policy=POLICY,
            subscribers=[self.recorder.changed],
        )
        self.fleet.recover()

    @property
    def known(self):
        """The last snapshot of each server that subscribers received."""
        last = {change.after.name: change.after for change in self.recorder.changes}
        return [snapshot for snapshot in last.values() if not snapshot.forgotten]

    # Callers

    @rule(name=NAMES)
    def create(self, name):
        with contextlib.suppress(RequestError, StoreError):
            self.fleet.step(Create(replace(a_spec(name), gateway=GATEWAY)))

    @rule(name=NAMES, event=st.sampled_from(sorted(COMMANDS)))
    def order(self, name, event):
        with contextlib.suppress(RequestError, StoreError):
            self.fleet.step(Order(name, event))

    # The keeper's threads

    @rule(name=NAMES)
    def work(self, name):
        self.executor.run_next(name)

    @rule()
    def deliver(self):
        self.executor.deliver()

    @rule()
    def catch_up(self):
        self.executor.run_all()

    @precondition(lambda self: self.fleet.next_deadline() is not None)
    @rule(late=st.sampled_from([0.0, 0.1, 200.0]))
    def jump(self, late):
        self.clock.advance(max(0.0, self.fleet.next_deadline() - self.clock.monotonic()) + late)
        self.fleet.step(Tick())

    @rule(failing=st.booleans())
    def touch_store(self, failing):
        self.store.failing = failing

    @rule()
    def crash_keeper(self):
        self.store.failing = False
        if self.fleet._deleted or any(
            controller.save_due is not None for controller in self.fleet._servers.values()
        ):
            self.unknown |= set(self.kernels)
        self.executor.drop()
        self.backend.abandon()
        self.begin()

    # The world

    @rule(
        name=NAMES,
        what=st.sampled_from(["boots", "obeys", "killable", "reachable", "answers_lost"]),
        on=st.booleans(),
    )
    def change_temper(self, name, what, on):
        setattr(self.world.temper(name), what, on)

    @rule(name=NAMES, refuses=st.booleans())
    def change_mind(self, name, refuses):
        self.world.temper(name).refusal = (
            BackendRefused("cannot start: told to refuse") if refuses else None
        )

    @rule(name=NAMES)
    def answer(self, name):
        self.world.answer(name)

    @rule(name=NAMES)
    def hang(self, name):
        self.world.silence(name)

    @rule(name=NAMES, end=st.sampled_from([Exit(code=0), Exit(code=1), Exit(signal="SIGKILL")]))
    def end(self, name, end):
        self.world.crash(name, end)

    @rule(name=NAMES)
    def start_kernel(self, name):
        """Start a kernel in a running server, which random steps alone would seldom reach."""
        self.create(name)
        self.executor.run_all()
        for process in self.world.living(name):
            self.kernels.append(f"k{len(self.kernels) + 1}")
            process.kernels = (*process.kernels, OwnKernel(self.kernels[-1]))

    @rule()
    def forget_ends(self):
        self.unknown |= {
            kernel.id for _, end in self.world.ends.values() for kernel in end.kernels_left
        }
        self.world.ends.clear()

    # Invariants

    @invariant()
    def never_two_processes(self):
        for name in EVERY:
            assert len(self.world.living(name)) <= 1

    @invariant()
    def proven_gone_is_gone(self):
        alive = {process.name for process in self.world.processes}
        known = {snapshot.name: snapshot.state for snapshot in self.known}
        for name in alive:
            assert known.get(name) in MAY_EXIST

    @invariant()
    def subscribers_are_up_to_date(self):
        held = {name: controller.snapshot for name, controller in self.fleet._servers.items()}
        assert {snapshot.name: snapshot for snapshot in self.known} == held

    @invariant()
    def no_kernel_in_use_is_orphaned(self):
        orphans = {orphan.kernel_id for orphan in self.orphans.orphans} - self.unknown
        for snapshot in self.known:
            assert not orphans & {kernel.id for kernel in snapshot.kernels_kept}
            if snapshot.goal in {Goal.UP, Goal.AGAIN_KEEPING_KERNELS}:
                for process in self.world.living(snapshot.name):
                    assert not orphans & {kernel.id for kernel in process.kernels}

    @invariant()
    def never_more_starts_than_slots(self):
        """Adopted servers may be starting, too; nothing is launched while all slots are taken."""
        states = {}
        for change in self.recorder.changes:
            before = change.before
            if before is not None and change.after.generation > before.generation:
                starting = [
                    name
                    for name, state in states.items()
                    if state is State.STARTING and name != change.after.name
                ]
                assert len(starting) < POLICY.max_starts
            states[change.after.name] = change.after.state

    @invariant()
    def no_server_queues_while_a_slot_is_free(self):
        states = [snapshot.state for snapshot in self.known]
        assert State.QUEUED not in states or states.count(State.STARTING) >= POLICY.max_starts

    @invariant()
    def endpoint_while_it_runs(self):
        for snapshot in self.known:
            assert (snapshot.endpoint is not None) == (snapshot.state is State.RUNNING)

    @invariant()
    def failed_has_a_cause(self):
        for snapshot in self.known:
            assert snapshot.state is not State.FAILED or snapshot.failure is not None

    @invariant()
    def every_process_is_stored(self):
        """The next keeper would look for every process that exists."""
        for process in self.world.processes:
            assert self.store.snapshots[process.name].state in MAY_EXIST
            assert self.store.snapshots[process.name].generation >= process.generation

    def teardown(self):
        """Make the world fair: every server must reach its goal."""
        self.store.failing = False
        for name in EVERY:
            temper, fair = self.world.temper(name), Temper()
            for what in Temper.__slots__:
                setattr(temper, what, getattr(fair, what))
        for _ in range(PATIENCE):
            self.executor.run_all()
            due = self.fleet.next_deadline()
            if due is None:
                break
            self.clock.advance(max(0.0, due - self.clock.monotonic()))
            self.fleet.step(Tick())
        self.executor.run_all()
        self.at_rest()

    def at_rest(self):
        for snapshot in self.known:
            assert snapshot.state in AT_REST[snapshot.goal]
            living = self.world.living(snapshot.name)
            assert bool(living) == (snapshot.state is State.RUNNING)
            assert [process.endpoint for process in living] == (
                [snapshot.endpoint] if living else []
            )
            if snapshot.state is State.STOPPED:
                assert snapshot.kernels_kept == ()
        assert {snapshot.name: snapshot for snapshot in self.known} == self.store.snapshots
        self.no_kernel_is_lost()

    def no_kernel_is_lost(self):
        """Each one has a server, is kept for one, is orphaned, or has ended."""
        accounted = (
            {orphan.kernel_id for orphan in self.orphans.orphans}
            | self.world.kernels_ended
            | self.unknown
        )
        accounted |= {kernel.id for process in self.world.processes for kernel in process.kernels}
        accounted |= {kernel.id for snapshot in self.known for kernel in snapshot.kernels_kept}
        assert set(self.kernels) <= accounted


FleetMachine.TestCase.settings = settings(
    max_examples=300,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestFleetMachine = FleetMachine.TestCase
