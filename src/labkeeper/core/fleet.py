"""All servers. `Fleet.step` processes one message and is never run by two threads at once.

Order within a step: decide, save, commit, notify subscribers, queue the jobs. A launch is saved
before it is made, so that the next keeper finds the name and observes it if this one dies.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from labkeeper.core.admission import (
    check_active,
    check_equal,
    check_kernels_can_be_kept,
    check_known,
    check_may_start,
    check_memory,
)
from labkeeper.core.controller import Controller, Decision
from labkeeper.core.errors import ServerNotFound, StoreError
from labkeeper.core.jobs import perform, refusal
from labkeeper.core.lifecycle import (
    AT_REST,
    COMES_BACK,
    COMMANDS,
    MAY_EXIST,
    RETURNS,
    Action,
    Event,
    State,
)
from labkeeper.core.messages import (
    Change,
    Create,
    Gone,
    Job,
    Message,
    Order,
    Origin,
    Reply,
    Report,
    Snooze,
    StopAll,
    Tick,
    Unreachable,
)
from labkeeper.core.policy import Policy
from labkeeper.core.ports import (
    Backend,
    Clock,
    Executor,
    GatewayPreflight,
    OrphanedKernels,
    Store,
    Subscriber,
)
from labkeeper.core.server import Snapshot, queue_of
from labkeeper.core.spec import QualifiedName

SAVE_AGAIN: Final = 5.0
"""Seconds between retries of a failed save."""


class Fleet:
    """The only writer of server states."""

    def __init__(
        self,
        *,
        backend: Backend,
        preflight: GatewayPreflight,
        orphans: OrphanedKernels,
        store: Store,
        executor: Executor,
        clock: Clock,
        policy: Policy,
        subscribers: Sequence[Subscriber] = (),
    ) -> None:
        self._backend = backend
        self._preflight = preflight
        self._orphans = orphans
        self._store = store
        self._executor = executor
        self._clock = clock
        self._policy = policy
        self._subscribers = tuple(subscribers)
        self._servers: dict[QualifiedName, Controller] = {}
        self._deleted: dict[QualifiedName, float] = {}
        """Deleted servers still in the store, with when to retry removing them."""
        self._last_generation = 0
        self._closing = False

    def recover(self) -> None:
        """Adopt an earlier keeper's servers and sweep its leftovers. Call once, before any step.

        Raises StoreError.
        """
        snapshots = self._store.load()
        # Includes names that the store has at rest: it may be outdated. Others are observed.
        known = [snapshot.qualified_name for snapshot in snapshots if snapshot.state in MAY_EXIST]
        for name in self._backend.strays(known):
            # Queued before all other jobs of the name: a launch under it finds nothing left.
            self._executor.submit(name, functools.partial(self._backend.sweep, name))
        for snapshot in snapshots:
            self._commit(Controller.recovered(snapshot, self._policy, self._clock))
        self._give_turns()

    def step(self, message: Message) -> Reply | None:
        """Process one message; commands return a reply.

        Raises RequestError if a command is rejected, StoreError if a launch cannot be stored.
        """
        try:
            return self._take(message)
        finally:
            self._give_turns()

    def _take(self, message: Message) -> Reply | None:
        match message:
            case Create():
                return self._create(message)
            case Order():
                return self._order(message)
            case Snooze():
                return self._snooze(message)
            case StopAll(origin=origin):
                self._closing = True
                self._stop_all(origin)
            case Report():
                self._report(message)
            case Tick():  # pragma: no branch - the last kind of message
                self._tick()
        return None

    def _stop_all(self, origin: Origin) -> None:
        """Stop every server; raise the errors at the end."""
        wrong: list[Exception] = []
        for name, controller in list(self._servers.items()):
            # A failed server has nothing to stop, and its cause must stay readable. One that is
            # stopped, or about to be, stays as it is: it may sleep.
            snapshot = controller.snapshot
            if snapshot.state is not State.FAILED and snapshot.goal in RETURNS:
                try:
                    self._order(Order(name, Event.STOP, origin=origin))
                except Exception as error:  # noqa: BLE001 - any error: the next server must be stopped, too
                    wrong.append(error)
        if wrong:
            raise ExceptionGroup("cannot stop every server", wrong)

    def next_deadline(self) -> float | None:
        """Return when the next timer is due, by the monotonic clock."""
        due = [
            at for c in self._servers.values() for at in (c.deadline, c.save_due) if at is not None
        ]
        return min([*due, *self._deleted.values()], default=None)

    def _create(self, command: Create) -> Reply:
        spec = command.spec
        start = Order(spec.qualified_name, Event.START, origin=command.origin)
        controller = self._servers.get(spec.qualified_name)
        if controller is None:
            check_known(spec.name, len(self._servers), self._policy)
            # A late fact of a deleted server must not be mistaken for its successor's.
            controller = Controller.new(spec, self._policy, self._clock, self._last_generation)
        else:
            check_equal(controller.snapshot, spec)
        return self._command(controller, start)

    def _order(self, order: Order) -> Reply:
        return self._command(self._find(order.name), order)

    def _command(self, controller: Controller, order: Order) -> Reply:
        snapshot, event = controller.snapshot, order.event
        if order.seen is not None and order.seen != snapshot:
            return Reply(snapshot)
        if event in {Event.START, Event.RESTART, Event.RESTART_KEEPING_KERNELS}:
            self._admit(snapshot)
        if event is Event.RESTART_KEEPING_KERNELS:
            check_kernels_can_be_kept(snapshot, order.revised)
        if order.force:
            controller = self._carry_out(
                controller.plan(Event.KILL, origin=order.origin, may_start=self._may_start())
            )
        decision = controller.plan(
            event, revised=order.revised, origin=order.origin, may_start=self._may_start()
        )
        after = self._carry_out(decision).snapshot
        queued = after.state is State.QUEUED and snapshot.state is not State.QUEUED
        turned = after.goal in COMES_BACK and snapshot.goal not in COMES_BACK
        created = after.generation != snapshot.generation or queued or turned
        return Reply(after, created)

    def _snooze(self, command: Snooze) -> Reply:
        """Snooze culling, saved before the reply, so that the next keeper honours it."""
        decision = self._find(command.name).snoozed(command.until, command.origin)
        return Reply(self._carry_out(decision).snapshot)

    def _find(self, name: QualifiedName) -> Controller:
        controller = self._servers.get(name)
        if controller is None:
            raise ServerNotFound.called(name)
        return controller

    def _admit(self, snapshot: Snapshot) -> None:
        """Raise LabkeeperError if a server must not be started now."""
        check_may_start(snapshot, closing=self._closing)
        if snapshot.state in AT_REST:
            active = sum(c.snapshot.state not in AT_REST for c in self._servers.values())
            check_active(snapshot.name, active, self._policy)
            check_memory(snapshot.name, self._backend.capacity(), self._policy)

    def _give_turns(self) -> None:
        """Launch the first servers of the queue up to the concurrency limit.

        Every launch passes here: commands, restarts and crashes queue alike. A server found alive
        takes a slot without queuing, since it is starting already.
        """
        while (
            queue := queue_of(c.snapshot for c in self._servers.values())
        ) and self._starting() < self._policy.max_starts:
            # One that cannot be stored does not start and leaves its slot to the next.
            self._carry_out(self._servers[queue[0].qualified_name].plan(Event.ADMITTED))

    def _starting(self) -> int:
        return sum(c.snapshot.state is State.STARTING for c in self._servers.values())

    def _may_start(self) -> bool:
        """Return whether a start slot is free and the queue is empty."""
        waits = any(c.snapshot.state is State.QUEUED for c in self._servers.values())
        return not waits and self._starting() < self._policy.max_starts

    def _report(self, report: Report) -> None:
        controller = self._servers.get(report.name)
        if controller is None:
            # The backend has removed it.
            self._drop(report.name)
        elif report.generation == controller.snapshot.generation:
            self._carry_out(controller.plan_report(report, may_start=self._may_start()))

    def _tick(self) -> None:
        now = self._clock.monotonic()
        for controller in list(self._servers.values()):
            if controller.deadline is not None and controller.deadline <= now:
                self._carry_out(controller.plan(Event.DEADLINE, may_start=self._may_start()))
        for controller in list(self._servers.values()):
            if controller.save_due is not None and controller.save_due <= now:
                self._save_again(controller)
        for name in [name for name, due in self._deleted.items() if due <= now]:
            self._drop(name)

    def _carry_out(self, decision: Decision) -> Controller:
        """Save a decision, then commit it. Raises StoreError if it must not go unsaved."""
        if decision.after.snapshot != decision.before:
            try:
                self._store.save(decision.after.snapshot)
                decision = replace(decision, after=replace(decision.after, save_due=None))
            except StoreError as error:
                decision = self._unsaved(decision, error)
        return self._commit(decision)

    def _unsaved(self, decision: Decision, error: StoreError) -> Decision:
        """Decide how to proceed if a decision cannot be saved. Raises StoreError."""
        name = decision.after.snapshot.name
        starts = decision.launches or decision.after.snapshot.state is State.QUEUED
        if decision.event is Event.SNOOZE or (decision.event in COMMANDS and starts):
            raise error
        if decision.launches:
            # The next keeper would not know the server: do not launch it either.
            refused = decision.after.plan(
                Event.REFUSED, refusal(error, f"cannot start server '{name}': {error.message}")
            )
            decision = replace(
                decision,
                after=refused.after,
                jobs=refused.jobs,
                orphans=decision.orphans + refused.orphans,
            )
        # A stop must proceed even if the disk is full.
        return replace(
            decision, after=replace(decision.after, save_due=self._clock.monotonic() + SAVE_AGAIN)
        )

    def _commit(self, decision: Decision) -> Controller:
        controller, snapshot = decision.after, decision.after.snapshot
        self._servers[snapshot.qualified_name] = controller
        self._deleted.pop(snapshot.qualified_name, None)
        if decision.orphans:
            self._orphans.add(decision.orphans)
        if snapshot != decision.before:
            change = Change(
                decision.event, decision.before, snapshot, self._clock.time(), decision.origin
            )
            for subscriber in self._subscribers:
                subscriber(change)
        for job in decision.jobs:
            self._submit(job)
        if snapshot.forgotten:
            self._forget(snapshot)
        return controller

    def _submit(self, job: Job) -> None:
        name, is_observation = job.spec.qualified_name, job.action is Action.OBSERVE

        def run() -> Report | None:
            fact = perform(self._backend, self._preflight, job, grace=self._policy.stop_grace)
            return None if fact is None else Report(name, job.generation, fact, is_observation)

        reason = (
            f"cannot {job.action} server '{job.spec.name}': the keeper failed; "
            "its log has the cause"
        )
        self._executor.submit(
            name, run, Report(name, job.generation, Unreachable(reason), is_observation)
        )

    def _forget(self, snapshot: Snapshot) -> None:
        """Remove the data of a deleted server."""
        name = snapshot.qualified_name
        del self._servers[name]
        self._last_generation = max(self._last_generation, snapshot.generation)

        def run() -> Report:
            self._backend.forget(name)
            return Report(name, snapshot.generation, Gone())

        # Its row goes last: after a kill in between, it tells the next keeper what to remove.
        self._executor.submit(name, run)

    def _save_again(self, controller: Controller) -> None:
        due = None
        try:
            self._store.save(controller.snapshot)
        except StoreError:
            due = self._clock.monotonic() + SAVE_AGAIN
        self._servers[controller.snapshot.qualified_name] = replace(controller, save_due=due)

    def _drop(self, name: QualifiedName) -> None:
        """Remove a deleted server from the store, now or later."""
        try:
            self._store.forget(name)
            # As a job: no state change may wait for a disk.
            self._executor.submit(name, self._store.wipe)
            self._deleted.pop(name, None)
        except StoreError:
            self._deleted[name] = self._clock.monotonic() + SAVE_AGAIN
