"""One server: turns messages about it into steps of the table, and keeps what goes with them.

What goes with them: the snapshot, one timer, the restart budget. Nothing is done here; `Controller.apply` returns what to do.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from labkeeper.core.lifecycle import ENDINGS, KEEPS_KERNELS, MAY_EXIST, Action, Event, Goal, State, Step, advance
from labkeeper.core.messages import Ended, Fact, GatewaySeen, Gone, Job, Ready, Refused, Seen, Unreachable, Vetoed
from labkeeper.core.ports import Clock, Reserve
from labkeeper.core.server import Exit, Failure, FailureClass, OrphanedKernel, OwnKernel, Snapshot, StopMethod, StopReport
from labkeeper.core.spec import ServerSpec


@dataclass(frozen=True, slots=True)
class Policy:
    """The numbers that rule every server. Times in seconds."""

    start_timeout: float = 60.0
    stop_grace: float = 8.0
    kill_wait: float = 2.0
    look_again: float = 2.0
    """Between two observations of a lost server."""
    probe_period: float = 15.0
    """Between two looks at a running server."""
    hung_after: float = 120.0
    """A running server that has not answered for this long is ended and launched again; 0: never."""
    restart_delays: tuple[float, ...] = (0.5, 2.0, 8.0)
    """The wait before each launch after a crash; as many as there are, so often is it tried."""
    restart_window: float = 600.0
    """Crashes that lie further back are forgiven."""
    max_servers: int = 200
    """How many servers may be anything but stopped or failed."""
    max_starts: int = 200
    """How many may be starting at a time; further ones queue."""
    min_free: Reserve = Reserve()  # noqa: RUF009 - frozen
    """Memory that is to stay free; nothing is begun with less."""


@dataclass(slots=True)
class Budget:
    """Restarts after a crash. A server that was seen to end before it ever answered since its start command fails fast."""

    policy: Policy
    earned: bool = False
    spent: list[float] = field(default_factory=list)

    def left(self, now: float, *, blameless: bool = False) -> bool:
        """Whether one more launch is allowed; `blameless` is an end that says nothing against the server."""
        self.spent = [at for at in self.spent if now - at < self.policy.restart_window]
        return (self.earned or blameless) and len(self.spent) < len(self.policy.restart_delays)

    def spend(self, now: float) -> float:
        """Take one launch; give the seconds to wait before it."""
        delay = self.policy.restart_delays[len(self.spent)]
        self.spent.append(now)
        return delay


_KNOWN_CAUSES: Final = frozenset(
    {
        FailureClass.START_TIMEOUT,
        FailureClass.HUNG,
        FailureClass.GATEWAY_UNREACHABLE,
        FailureClass.GATEWAY_TIMEOUT,
        FailureClass.GATEWAY_REFUSED,
        FailureClass.GATEWAY_TLS,
        FailureClass.NOT_A_GATEWAY,
    }
)
"""Classes for which we end a server; they are known before its end."""
_EVENTS: Final[dict[type[Fact], Event]] = {
    Ready: Event.READY,
    Refused: Event.REFUSED,
    Vetoed: Event.VETOED,
    GatewaySeen: Event.GATEWAY,
    Unreachable: Event.UNREACHABLE,
    Gone: Event.GONE,
}
"""The events that facts are, whatever state they find; `Controller.event_of` knows the others."""
TIMERS: Final = {
    State.STARTING: "start_timeout",
    State.RUNNING: "probe_period",
    State.STOPPING: "stop_grace",
    State.KILLING: "kill_wait",
    State.LOST: "look_again",
}
"""The state's timer, by the name of its length in `Policy`; BACKOFF takes its from the budget."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a message to a server leads to, beside its new snapshot."""

    jobs: tuple[Job, ...] = ()
    orphans: tuple[OrphanedKernel, ...] = ()
    """Kernels on its gateway that nobody is to have any more."""


class Controller:
    """One server; the fleet is its only caller."""

    def __init__(self, snapshot: Snapshot, policy: Policy, clock: Clock) -> None:
        self.snapshot = snapshot
        self.deadline: float | None = None
        self._policy = policy
        self._clock = clock
        self._budget = Budget(policy)
        self._stop_began: float | None = None
        self._silent_since: float | None = None

    @classmethod
    def new(cls, spec: ServerSpec, policy: Policy, clock: Clock, launch: int = 0) -> Controller:
        """Make the controller of a server that was never launched; its launches count on from `launch`."""
        now = clock.time()
        return cls(Snapshot(spec, State.STOPPED, Goal.DOWN, since=now, created_at=now, launch=launch), policy, clock)

    def recover(self) -> list[Job]:
        """Take up a server where an earlier keeper left it. What may exist is lost until it has been observed."""
        self._budget.earned = self.snapshot.started_at is not None
        state = self.snapshot.state
        if state in MAY_EXIST:
            self.snapshot = replace(self.snapshot, state=State.LOST, since=self._clock.time(), endpoint=None, gateway=None)
            self._set_timer()
            return [self._job(Action.OBSERVE)]
        if state is State.BACKOFF:
            self.deadline = self._clock.monotonic()
        return []

    def apply(
        self, event: Event, fact: Fact | None = None, revised: ServerSpec | None = None, *, may_start: bool = True
    ) -> Decision:
        """Take one event, with the spec that is to hold from the next launch on; say what it leads to.

        `may_start` says whether a place to start in is free, should it come to that.
        """
        if revised is not None:
            self.snapshot = replace(self.snapshot, revised=None if revised == self.snapshot.spec else revised)
        before = self.snapshot
        step = advance(before.state, before.goal, event, may_retry=self._may_retry(fact), may_start=may_start)
        if step is None:
            return Decision()
        if _begins(step, event) and event is not Event.DEADLINE:
            self._budget = Budget(self._policy)
        self._record(event, fact, step)
        if step.state is not before.state or event is Event.DEADLINE:
            self._set_timer()
        orphans = self._sort_kernels(before, event, fact)
        return Decision(() if step.action is Action.NONE else (self._job(step.action),), orphans)

    def _may_retry(self, fact: Fact | None) -> bool:
        """Say whether the server may be relaunched automatically if this fact ends it."""
        snap, blameless = self.snapshot, False
        match fact:
            case Refused(failure=failure) if failure.kind is not FailureClass.DISK_FULL:
                # Nothing was started, and that would be so again. Room on a disk comes back.
                return False
            case Ended(failure=Failure(kind=FailureClass.PORT_IN_USE)):
                # The keeper chose the port, and another program took it first.
                blameless = snap.spec.port is None
            case Gone():
                # Nobody saw how it ended.
                blameless = snap.failure is None or snap.failure.kind not in _KNOWN_CAUSES
        return self._budget.left(self._clock.monotonic(), blameless=blameless)

    def event_of(self, fact: Fact) -> Event | None:
        """Name the event that a fact is to this server now; None where it is no news."""
        match fact:
            case Ended():
                return Event.EXITED if self._in_order(fact) else Event.CRASHED
            case Seen(answers=answers):
                return self._look(answers)
        return _EVENTS[type(fact)]

    def _in_order(self, end: Ended) -> bool:
        """Say whether it ended as somebody wished. What we ended while its goal was up was hung or late: nobody left it."""
        return end.exit.clean and (end.method is StopMethod.NONE or self.snapshot.goal is not Goal.UP)

    def _look(self, answers: bool | None) -> Event | None:
        if self.snapshot.state is not State.RUNNING:
            return Event.SEEN
        now = self._clock.monotonic()
        if answers is not False:
            # A look that could not be made breaks the silence, too: who was not asked has not been silent.
            self._silent_since = None
        elif self._silent_since is None:
            self._silent_since = now
        elif self._policy.hung_after and now - self._silent_since >= self._policy.hung_after:
            return Event.HUNG
        return None

    def _record(self, event: Event, fact: Fact | None, step: Step) -> None:
        """Bring the snapshot to the step."""
        before, now = self.snapshot, self._clock.time()
        snap = replace(before, state=step.state, goal=step.goal)
        if step.state is not before.state:
            snap = replace(snap, since=now, endpoint=None, gateway=None)
        snap = self._heard(snap, fact)
        if event is Event.HUNG:
            silent = f"server '{snap.name}' had not answered for {self._policy.hung_after:g} s"
            snap = replace(snap, failure=Failure(FailureClass.HUNG, silent))
        elif event is Event.DEADLINE and before.state is State.STARTING:
            snap = replace(snap, failure=self._timeout())
        if _begins(step, event):
            # The only launch that nobody asked for is the one at the end of a wait after a crash.
            if event is Event.DEADLINE:
                snap = replace(snap, restarts=snap.restarts + 1)
            else:
                snap = replace(snap, restarts=0, started_at=None, up_since=None, failure=None)
        if step.action is Action.LAUNCH:
            snap = replace(
                snap,
                spec=snap.revised or snap.spec,
                revised=None,
                launch=snap.launch + 1,
                exit=None,
                failure=None,
                stop_report=None,
            )
        elif step.state is State.STOPPED:
            snap = replace(snap, failure=None)
        elif step.state is State.FAILED and snap.failure is None:
            early = f"cannot start server '{snap.name}': it ended before it was ready ({snap.exit or Exit()})"
            snap = replace(snap, failure=Failure(FailureClass.OTHER, early, snap.exit))
        self.snapshot = snap

    def _heard(self, snap: Snapshot, fact: Fact | None) -> Snapshot:
        """Bring what a fact says into the snapshot of the step that it led to."""
        match fact:
            case Ready(endpoint=endpoint, gateway=gateway) if snap.state is State.RUNNING:
                now = self._clock.time()
                up_since = now if snap.up_since is None else snap.up_since
                snap = replace(snap, endpoint=endpoint, gateway=gateway, started_at=now, up_since=up_since, failure=None)
                self._budget.earned, self._silent_since = True, None
            case Ended():
                snap = self._ended(snap, fact)
            case Refused(failure=failure) | Vetoed(failure=failure):
                snap = replace(snap, failure=failure)
            case GatewaySeen(health=health):
                snap = replace(snap, gateway=health)
            case Unreachable(reason=reason):
                snap = replace(snap, failure=snap.failure or Failure(FailureClass.OTHER, reason))
            case Gone():
                vanished = Failure(FailureClass.KILLED, f"server '{snap.name}' is gone, and nobody saw how it ended")
                # Why it was lost sight of, or was to be ended, says more than that it is gone.
                snap = replace(snap, exit=Exit(), failure=replace(snap.failure or vanished, exit=Exit()))
        return snap

    def _ended(self, snap: Snapshot, end: Ended) -> Snapshot:
        failure = end.failure
        if snap.failure is not None and snap.failure.kind in _KNOWN_CAUSES:
            # Why we ended it is the cause; how it ended, and its last words, come with the end.
            failure = replace(snap.failure, exit=end.exit, log_tail=failure.log_tail if failure else ())
        report = None
        if end.method is not StopMethod.NONE:
            seconds = 0.0 if self._stop_began is None else self._clock.monotonic() - self._stop_began
            left = () if snap.goal in KEEPS_KERNELS else tuple(kernel.id for kernel in end.kernels_left)
            report = StopReport(end.method, round(seconds, 3), end.kernels_stopped, left)
        return replace(snap, exit=end.exit, failure=failure, stop_report=report)

    def _sort_kernels(self, before: Snapshot, event: Event, fact: Fact | None) -> tuple[OrphanedKernel, ...]:
        """Part the kernels on its gateway into those that its next launch is to have, and those that are owed an end."""
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
        self.snapshot = replace(self.snapshot, kernels_kept=kept)
        if not unwanted or before.spec.gateway is None:
            return ()
        now = self._clock.time()
        return tuple(OrphanedKernel(k.id, before.spec.gateway, before.name, now, k.starting) for k in there.values())

    def _timeout(self) -> Failure:
        return Failure(
            FailureClass.START_TIMEOUT,
            f"cannot start server '{self.snapshot.name}': it was not ready within {self._policy.start_timeout:g} s and "
            "was ended; its last log lines say what it was doing (LABKEEPER_START_TIMEOUT gives it longer)",
        )

    def _set_timer(self) -> None:
        """Set the timer of a state that was just entered, or is to be waited in once more."""
        now, state = self._clock.monotonic(), self.snapshot.state
        if state in {State.STOPPING, State.KILLING}:
            self._stop_began = now if self._stop_began is None else self._stop_began
        elif state is not State.LOST:
            self._stop_began = None
        if state is State.BACKOFF:
            self.deadline = now + self._budget.spend(now)
        else:
            length = TIMERS.get(state)
            self.deadline = None if length is None else now + float(getattr(self._policy, length))

    def _job(self, action: Action) -> Job:
        snap = self.snapshot
        return Job(snap.spec, snap.launch, action, keep_kernels=snap.goal in KEEPS_KERNELS, kernels=snap.kernels_kept)


def _begins(step: Step, event: Event) -> bool:
    """Say whether a step decides on a launch, be it done now or queued; its turn in the queue was decided on before."""
    return event is not Event.ADMITTED and (step.action is Action.LAUNCH or step.state is State.QUEUED)
