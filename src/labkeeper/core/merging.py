"""How a fact changes what is known of a server: its snapshot."""

from __future__ import annotations

from dataclasses import replace

from labkeeper.core.lifecycle import KEEPS_KERNELS, State
from labkeeper.core.messages import (
    Ended,
    Fact,
    GatewaySeen,
    Gone,
    Ready,
    Refused,
    Unreachable,
    Vetoed,
)
from labkeeper.core.server import (
    KNOWN_CAUSES,
    Exit,
    Failure,
    FailureClass,
    Progress,
    Snapshot,
    StopMethod,
    StopReport,
)


def merge(snap: Snapshot, fact: Fact | None, *, now: float, stopping_for: float) -> Snapshot:
    """Merge a fact into the snapshot of the step that it led to.

    `now` is in seconds since the epoch; `stopping_for` is how many seconds its stop has taken.
    """
    match fact:
        case Ready(endpoint=endpoint, instance=instance, gateway=gateway) if (
            snap.state is State.RUNNING
        ):
            up_since = now if snap.up_since is None else snap.up_since
            snap = replace(
                snap,
                endpoint=endpoint,
                instance=instance,
                gateway=gateway,
                started_at=now,
                up_since=up_since,
                failure=None,
            )
        case Ended():
            snap = _ended(snap, fact, stopping_for)
        case Refused(failure=failure) | Vetoed(failure=failure):
            snap = replace(snap, failure=failure)
        case Progress() if snap.state is State.STARTING:
            snap = replace(snap, progress=fact)
        case GatewaySeen(health=health):
            snap = replace(snap, gateway=health)
        case Unreachable(reason=reason):
            snap = replace(snap, failure=snap.failure or Failure(FailureClass.OTHER, reason))
        case Gone():
            vanished = Failure(
                FailureClass.KILLED, f"server '{snap.name}' is gone; how it ended is unknown"
            )
            # The reason for losing or ending it explains more than its absence does.
            snap = replace(
                snap, exit=Exit(), failure=replace(snap.failure or vanished, exit=Exit())
            )
    return snap


def _ended(snap: Snapshot, end: Ended, stopping_for: float) -> Snapshot:
    failure = end.failure
    if snap.failure is not None and snap.failure.kind in KNOWN_CAUSES:
        # Our reason for ending it is the cause; the end adds its exit and last log lines.
        failure = replace(snap.failure, exit=end.exit, log_tail=failure.log_tail if failure else ())
    report = None
    if end.method is not StopMethod.NONE:
        left = () if snap.goal in KEEPS_KERNELS else tuple(kernel.id for kernel in end.kernels_left)
        report = StopReport(end.method, round(stopping_for, 3), end.kernels_stopped, left)
    return replace(snap, exit=end.exit, failure=failure, stop_report=report)
