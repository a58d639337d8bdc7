"""One server: the outcome of each event, by the table, the restart budget and the timers.

Nothing changes or runs here: `Controller.plan` returns a decision with the successor controller.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from labkeeper.core.budget import Budget
from labkeeper.core.lifecycle import (
    ENDINGS,
    KEEPS_KERNELS,
    MAY_EXIST,
    Action,
    Event,
    Goal,
    State,
    Step,
    advance,
)
from labkeeper.core.merging import merge
from labkeeper.core.messages import (
    KEEPER,
    Ended,
    Fact,
    GatewaySeen,
    Gone,
    Job,
    Origin,
    Ready,
    Refused,
    Report,
    Seen,
    Unreachable,
    Vetoed,
)
from labkeeper.core.policy import TIMERS, Policy
from labkeeper.core.ports import Clock
from labkeeper.core.server import (
    KNOWN_CAUSES,
    Exit,
    Failure,
    FailureClass,
    OrphanedKernel,
    OwnKernel,
    Progress,
    Snapshot,
    StopMethod,
    StopOrder,
)
from labkeeper.core.spec import ServerSpec

_EVENTS: Final[dict[type[Fact], Event]] = {
    Ready: Event.READY,
    Refused: Event.REFUSED,
    Vetoed: Event.VETOED,
    Progress: Event.PROGRESS,
    GatewaySeen: Event.GATEWAY,
    Unreachable: Event.UNREACHABLE,
    Gone: Event.GONE,
}
"""Events of facts that do not depend on the state; `Controller.plan_report` maps the others."""
_UNKNOWN: Final[dict[str, Any]] = dict.fromkeys(("endpoint", "instance", "progress", "gateway"))
"""What is known in one state only, as it is on entering another."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome of an event. The fleet has yet to save it, commit it and run its jobs."""

    event: Event
    before: Snapshot | None
    after: Controller
    origin: Origin
    """Who gave the command that this is, or follows from."""
    jobs: tuple[Job, ...] = ()
    orphans: tuple[OrphanedKernel, ...] = ()
    """Kernels on its gateway that the server abandons."""

    @property
    def launches(self) -> bool:
        """Whether a launch is among the jobs."""
        return any(job.action is Action.LAUNCH for job in self.jobs)


@dataclass(frozen=True, slots=True)
class Controller:
    """One server: its snapshot and private state. Immutable: `plan` returns its successor.

    Times are seconds by the monotonic clock.
    """

    snapshot: Snapshot
    policy: Policy
    clock: Clock
    deadline: float | None = None
    """When the timer of its state expires."""
    save_due: float | None = None
    """When to retry saving its snapshot; None if the store has it."""
    budget: Budget = Budget()  # noqa: RUF009 - frozen
    origin: Origin = KEEPER
    """The origin of the command in progress."""
    observing: bool = False
    """Whether an observation is in progress. A second one would queue behind it, and any job that
    ends the server behind both."""
    stop_began: float | None = None
    silent_since: float | None = None

    @classmethod
    def new(cls, spec: ServerSpec, policy: Policy, clock: Clock, generation: int = 0) -> Controller:
        """Return the controller of a server never launched, counting on from `generation`."""
        now = clock.time()
        first = Snapshot(
            spec, State.STOPPED, Goal.DOWN, since=now, created_at=now, generation=generation
        )
        return cls(first, policy, clock)

    @classmethod
    def recovered(cls, snapshot: Snapshot, policy: Policy, clock: Clock) -> Decision:
        """Resume a server of an earlier keeper. If it may exist, it is lost until observed."""
        found = cls(snapshot, policy, clock, budget=Budget(earned=snapshot.started_at is not None))
        jobs: tuple[Job, ...] = ()
        if snapshot.state in MAY_EXIST:
            lost = found._with(state=State.LOST, since=clock.time(), **_UNKNOWN)
            found, jobs = lost._timed()._acting(Action.OBSERVE)
        elif snapshot.state is State.BACKOFF:
            found = replace(found, deadline=clock.monotonic())
        return Decision(Event.UNREACHABLE, None, found, KEEPER, jobs)

    def plan(
        self,
        event: Event,
        fact: Fact | None = None,
        *,
        revised: ServerSpec | None = None,
        origin: Origin | None = None,
        may_start: bool = True,
    ) -> Decision:
        """Decide the outcome of one event.

        `revised` is the spec for the next launch; `origin` is who gave the command, if it is one;
        `may_start` is whether a launch would be within the limit of concurrent starts.
        """
        before, after = self.snapshot, self
        if revised is not None:
            after = after._with(revised=None if revised == before.spec else revised)
        if origin is not None:
            after = replace(after, origin=origin)._stopped_by(event, origin)
        following = after.origin
        jobs: tuple[Job, ...] = ()
        orphans: tuple[OrphanedKernel, ...] = ()
        step = advance(
            before.state, before.goal, event, may_retry=self._may_retry(fact), may_start=may_start
        )
        if step is not None:
            if _begins(step, event) and event is not Event.DEADLINE:
                after = replace(after, budget=Budget())
            after = after._stepped(event, fact, step)
            if step.state is not before.state or event is Event.DEADLINE:
                after = after._timed()
            after, orphans = after._sort_kernels(before, event, fact)
            after, jobs = after._acting(step.action)
        begins = after.snapshot.state in {State.QUEUED, State.STARTING}
        if after.snapshot.goal is Goal.UP and not begins:
            # The command has succeeded or failed: what happens next is the keeper's doing.
            after = replace(after, origin=KEEPER)
        return Decision(event, before, after, following, jobs, orphans)

    def plan_report(self, report: Report, *, may_start: bool = True) -> Decision:
        """Decide the outcome of a report on this launch."""
        known = replace(self, observing=False) if report.observation else self
        match report.fact:
            case Ended():
                event = Event.EXITED if self._in_order(report.fact) else Event.CRASHED
            case Seen(answers=answers) if self.snapshot.state is State.RUNNING:
                known = known._looked(answers)
                if not known._is_hung():
                    return Decision(Event.SEEN, self.snapshot, known, self.origin)
                event = Event.HUNG
            case Seen():
                event = Event.SEEN
            case _:
                event = _EVENTS[type(report.fact)]
        return known.plan(event, report.fact, may_start=may_start)

    def snoozed(self, until: float | None, origin: Origin) -> Decision:
        """Decide to snooze culling until a time in seconds since the epoch; None ends it."""
        return Decision(Event.SNOOZE, self.snapshot, self._with(snoozed_until=until), origin)

    def _with(self, **changes: Any) -> Controller:
        return replace(self, snapshot=replace(self.snapshot, **changes))

    def _stopped_by(self, event: Event, origin: Origin) -> Controller:
        """Note who stops it, so that the next keeper knows it, too."""
        stops = event in {Event.STOP, Event.KILL}
        return self._with(stopped_by=StopOrder(origin.actor, origin.reason) if stops else None)

    def _may_retry(self, fact: Fact | None) -> bool:
        snap, blameless = self.snapshot, False
        match fact:
            case Refused(failure=failure) if failure.kind is not FailureClass.DISK_FULL:
                # Nothing was started, and a retry would fail alike. Disk space may be freed.
                return False
            case Ended(failure=Failure(kind=FailureClass.PORT_IN_USE)):
                # The keeper chose the port, and another program took it first.
                blameless = snap.spec.port is None
            case Gone():
                # How it ended is unknown.
                blameless = snap.failure is None or snap.failure.kind not in KNOWN_CAUSES
        return self.budget.left(self.policy, self.clock.monotonic(), blameless=blameless)

    def _in_order(self, end: Ended) -> bool:
        """Whether it ended as intended. If we ended it with the goal up, it was hung or late."""
        return end.exit.clean and (
            end.method is StopMethod.NONE or self.snapshot.goal is not Goal.UP
        )

    def _looked(self, answers: bool | None) -> Controller:
        if answers is not False:
            # A probe that could not be made also breaks the silence: it proves no missing answer.
            return replace(self, silent_since=None)
        if self.silent_since is not None:
            return self
        return replace(self, silent_since=self.clock.monotonic())

    def _is_hung(self) -> bool:
        if self.silent_since is None or not self.policy.hung_after:
            return False
        return self.clock.monotonic() - self.silent_since >= self.policy.hung_after

    def _stepped(self, event: Event, fact: Fact | None, step: Step) -> Controller:
        before, now = self.snapshot, self.clock.time()
        snap = replace(before, state=step.state, goal=step.goal)
        if step.state is not before.state:
            snap = replace(snap, since=now, **_UNKNOWN)
        stopping_for = 0.0 if self.stop_began is None else self.clock.monotonic() - self.stop_began
        snap = merge(snap, fact, now=now, stopping_for=stopping_for)
        if event is Event.HUNG:
            silent = f"server '{snap.name}' had not answered for {self.policy.hung_after:g} s"
            snap = replace(snap, failure=Failure(FailureClass.HUNG, silent))
        elif event is Event.DEADLINE and before.state is State.STARTING:
            snap = replace(snap, failure=self._timeout())
        if _begins(step, event):
            # The only launch without a command is the one at the end of a backoff.
            if event is Event.DEADLINE:
                snap = replace(snap, restarts=snap.restarts + 1)
            else:
                snap = replace(snap, restarts=0, started_at=None, up_since=None, failure=None)
        if step.action is Action.LAUNCH:
            snap = replace(
                snap,
                spec=snap.revised or snap.spec,
                revised=None,
                generation=snap.generation + 1,
                exit=None,
                failure=None,
                stop_report=None,
            )
        elif step.state is State.STOPPED:
            snap = replace(snap, failure=None)
        elif step.state is State.FAILED and snap.failure is None:
            early = (
                f"cannot start server '{snap.name}': "
                f"it ended before it was ready ({snap.exit or Exit()})"
            )
            snap = replace(snap, failure=Failure(FailureClass.OTHER, early, snap.exit))
        if isinstance(fact, Ready) and snap.state is State.RUNNING:
            return replace(
                self, snapshot=snap, budget=replace(self.budget, earned=True), silent_since=None
            )
        return replace(self, snapshot=snap)

    def _sort_kernels(
        self, before: Snapshot, event: Event, fact: Fact | None
    ) -> tuple[Controller, tuple[OrphanedKernel, ...]]:
        """Split the kernels on its gateway into those for its next launch, and orphans."""
        there = {kernel.id: kernel for kernel in before.kernels_kept}
        match fact:
            case Ready(not_taken_over=ids) if self.snapshot.state is State.RUNNING:
                there = {id_: kernel for id_, kernel in there.items() if id_ in ids}
            case Ended(kernels_left=left):
                there |= {kernel.id: kernel for kernel in left}
        if self.snapshot.state is State.STOPPED:
            unwanted = True
        elif before.state in MAY_EXIST:
            unwanted = event in ENDINGS and before.goal not in KEEPS_KERNELS
        else:
            unwanted = event is Event.RESTART
        kept: tuple[OwnKernel, ...] = () if unwanted else tuple(there.values())
        after = self._with(kernels_kept=kept)
        if not unwanted or before.spec.gateway is None:
            return after, ()
        now, gateway = self.clock.time(), before.spec.gateway
        return after, tuple(
            OrphanedKernel(k.id, gateway, before.qualified_name, now, k.starting)
            for k in there.values()
        )

    def _timeout(self) -> Failure:
        return Failure(
            FailureClass.START_TIMEOUT,
            f"cannot start server '{self.snapshot.name}': "
            f"it was not ready within {self.policy.start_timeout:g} s and was ended; "
            "its last log lines say what it was doing (LABKEEPER_START_TIMEOUT gives it longer)",
        )

    def _timed(self) -> Controller:
        """Set the timer of a state that was just entered, or whose wait begins again."""
        now, state = self.clock.monotonic(), self.snapshot.state
        stop_began = self.stop_began if state is State.LOST else None
        if state in {State.STOPPING, State.KILLING}:
            stop_began = now if self.stop_began is None else self.stop_began
        if state is State.BACKOFF:
            budget, delay = self.budget.spend(self.policy, now)
            return replace(self, budget=budget, deadline=now + delay, stop_began=stop_began)
        length = TIMERS.get(state)
        deadline = None if length is None else now + float(getattr(self.policy, length))
        return replace(self, deadline=deadline, stop_began=stop_began)

    def _acting(self, action: Action) -> tuple[Controller, tuple[Job, ...]]:
        if action is Action.NONE or (action is Action.OBSERVE and self.observing):
            return self, ()
        # An observation of an earlier launch does not count for a new one.
        observing = action is Action.OBSERVE or (self.observing and action is not Action.LAUNCH)
        snap = self.snapshot
        kept = snap.goal in KEEPS_KERNELS
        job = Job(snap.spec, snap.generation, action, keep_kernels=kept, kernels=snap.kernels_kept)
        return replace(self, observing=observing), (job,)


def _begins(step: Step, event: Event) -> bool:
    """Whether a step decides on a launch, now or queued; ADMITTED was decided before."""
    return event is not Event.ADMITTED and (
        step.action is Action.LAUNCH or step.state is State.QUEUED
    )
