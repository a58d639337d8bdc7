"""The rows of the list of servers. Rows that have not changed are not rendered again."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from markupsafe import Markup

from labkeeper.api.services import Services
from labkeeper.core.culling import CullState, Explanation, wakes
from labkeeper.core.lifecycle import AT_REST, State
from labkeeper.core.server import Snapshot
from labkeeper.core.usage import RecentUsage
from labkeeper.web.rendering import render


@dataclass(frozen=True, slots=True)
class Row:
    """What one row shows. Times in seconds since the epoch."""

    name: str
    description: str
    labels: tuple[tuple[str, str], ...]
    state: State
    detail: str
    """Why it failed, or how far its start has come; may be empty."""
    since: float
    last_used: int | None
    """To the second."""
    memory: int | None
    memory_limit: int | None
    cpus: float | None
    kernels: int | None
    memories: tuple[float | None, ...]
    """The last ones, for a chart."""
    busy: tuple[float | None, ...]
    """Likewise, of `cpus`."""
    fate: str
    """What holds it, or why it is about to be stopped; may be empty."""
    stops_at: int | None
    opens: bool
    """Whether a browser can open its Lab."""
    starts: bool
    """Whether a start command makes sense; else a stop command does."""


def row_of(services: Services, snapshot: Snapshot, recent: RecentUsage | None = None) -> Row:
    """Return the row of a server, with charts of its recent usage."""
    sample, told = services.usage(snapshot), services.culler.cached(snapshot)
    spec, verdict = snapshot.spec, told.verdict
    # Of a server that is never polled only its start is known.
    used = None if told.looked_at is None else verdict.last_used_at
    return Row(
        snapshot.name,
        spec.description,
        tuple(spec.labels.items()),
        snapshot.state,
        detail_of(snapshot),
        snapshot.since,
        _seconds(told, used),
        None if sample is None else sample.usage.memory,
        spec.limits.memory,
        None if sample is None else sample.cpus,
        None if sample is None or sample.load is None else sample.load.kernels,
        () if recent is None else tuple(recent.memory),
        () if recent is None else tuple(recent.cpus),
        fate_of(told),
        None if verdict.next is None else _seconds(told, verdict.next.stops_at),
        snapshot.endpoint is not None or wakes(snapshot),
        snapshot.state in AT_REST,
    )


def detail_of(snapshot: Snapshot) -> str:
    """Return what there is to say about a server's state; may be empty."""
    if snapshot.failure is not None:
        return snapshot.failure.message
    if snapshot.progress is not None and snapshot.state is State.STARTING:
        return snapshot.progress.message
    return ""


def fate_of(told: Explanation) -> str:
    """Return what keeps a server, or stops it; empty if it has no rules, or does not run."""
    silent = {CullState.OFF, CullState.NOT_RUNNING}
    return "" if told.verdict.state in silent else told.verdict.reason


def _seconds(told: Explanation, at: float | None) -> int | None:
    # The offset between the clocks is measured each time, and differs by microseconds.
    return None if at is None else round(at + told.offset)


@functools.lru_cache(maxsize=10_000)
def rendered(row: Row, *, may_manage: bool) -> Markup:
    """Return a row as an element."""
    return render("row.html", {"row": row, "may_manage": may_manage})
