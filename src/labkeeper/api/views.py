"""Conversion of snapshots, tokens, events and the like into answers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

from labkeeper.core.access import Caller, Session, Token
from labkeeper.core.culling import Explanation
from labkeeper.core.durations import format_time
from labkeeper.core.messages import HistoryEntry
from labkeeper.core.ports import Library
from labkeeper.core.server import Failure, OrphanedKernel, Sample, Snapshot
from labkeeper.core.spec import KERNEL_PREFIX, Limits, ServerSpec
from labkeeper.core.usage import UsageHistory
from labkeeper.schema.answers import access, culling, events, keeper, servers, usage

_OF_ENDPOINT: Final = (
    "base_url",
    "hostname",
    "password",
    "port",
    "secure",
    "token",
    "url",
    "version",
)
_OF_INSTANCE: Final = ("pid", "launched_by", "exec_reason")
"""The fields of an answer taken from these. With `notebook_dir`, nine of them are Jupyter's
server_info."""


_OF_SPEC: Final = frozenset(
    {one.name for one in fields(ServerSpec)} & servers.Server.model_fields.keys()
) - {
    *_OF_ENDPOINT,
    "name",
    "limits",
    "gateway",
}
"""The fields of an answer copied unchanged from the spec."""
_LIMITS: Final = tuple(one.name for one in fields(Limits))


def server_model(
    snapshot: Snapshot,
    lab_url: str | None,
    queue_position: int | None = None,
    sample: Sample | None = None,
) -> servers.Server:
    """Return the answer for a snapshot; without `lab_url`, it omits the Lab's token as well."""
    endpoint, instance, spec = snapshot.endpoint, snapshot.instance, snapshot.spec
    info: dict[str, Any] = {name: getattr(endpoint, name, None) for name in _OF_ENDPOINT}
    info |= {name: getattr(instance, name, None) for name in _OF_INSTANCE}
    if lab_url is None:
        info["token"] = None
    return servers.Server(
        **info,
        notebook_dir=endpoint.root_dir if endpoint else None,
        lab_url=lab_url,
        name=snapshot.name,
        state=snapshot.state,
        goal=snapshot.goal,
        since=format_time(snapshot.since),
        created_at=format_time(snapshot.created_at),
        started_at=_time_or_none(snapshot.started_at),
        generation=snapshot.generation,
        restarts=snapshot.restarts,
        **{field: getattr(spec, field) for field in _OF_SPEC},
        limits=_limit_models(spec.limits, instance.limited_by if instance else {}, sample),
        usage=_usage_model(sample),
        snoozed_until=_time_or_none(snapshot.snoozed_until),
        gateway=_gateway_model(snapshot),
        kernels_kept=[kernel.id for kernel in snapshot.kernels_kept],
        queue_position=queue_position,
        progress=snapshot.progress,
        exit=snapshot.exit,
        failure=_failure_model(snapshot.failure),
        stop_report=snapshot.stop_report,
        stopped_by=snapshot.stopped_by,
    )


def _time_or_none(at: float | None) -> str | None:
    return None if at is None else format_time(at)


def _limit_models(
    limits: Limits, limited_by: Mapping[str, str], sample: Sample | None
) -> dict[str, servers.Limit]:
    given = {name: limit for name in _LIMITS if (limit := getattr(limits, name)) is not None}
    used: dict[str, float | None] = {}
    if sample is not None:
        used = {
            "memory": sample.usage.memory,
            "cpus": sample.cpus,
            "processes": sample.usage.threads,
        }
    return {
        name: servers.Limit(limit=limit, limited_by=limited_by.get(name), used=used.get(name))
        for name, limit in given.items()
    }


def _usage_model(sample: Sample | None) -> servers.Usage | None:
    if sample is None:
        return None
    used, load = sample.usage, sample.load
    return servers.Usage(
        at=format_time(sample.at),
        memory=used.memory,
        memory_proportional=used.proportional,
        cpu_seconds=round(used.cpu_seconds, 3),
        cpus=sample.cpus,
        processes=used.processes,
        threads=used.threads,
        kernels=load.kernels if load else None,
        connections=load.connections if load else None,
    )


def _gateway_model(snapshot: Snapshot) -> servers.Gateway | None:
    spec, health = snapshot.spec, snapshot.gateway
    if spec.gateway is None:
        return None
    passed = [name for name in spec.kernel_env if name.startswith(KERNEL_PREFIX)]
    return servers.Gateway(
        url=spec.gateway.url,
        required=spec.gateway.required,
        reachable=health.reachable if health else None,
        since=format_time(health.since) if health else None,
        error=_failure_model(health.error if health else None),
        kernelspecs=health.kernelspecs if health else None,
        kernel_env_passed=sorted(passed),
        kernel_env_if_allowed=sorted(spec.kernel_env.keys() - set(passed)),
    )


def token_model(token: Token, now: float) -> access.Token:
    """Return the answer for a token."""
    return access.Token(
        name=token.name,
        owner=token.owner,
        scope=token.scope,
        servers=token.limits.servers,
        labels=token.limits.labels,
        users=token.limits.users,
        created_at=format_time(token.created_at),
        created_by=token.created_by,
        expires_at=_time_or_none(token.expires_at),
        expired=token.expired(now),
        last_used_at=_time_or_none(token.last_used_at),
    )


def new_token_model(token: Token, text: str) -> access.NewToken:
    """Return the answer for a new token, including its text."""
    return access.NewToken(**token_model(token, token.created_at).model_dump(), token=text)


def session_model(session: Session, unused_for: float) -> access.Session:
    """Return the answer for a browser session that was last used so many seconds ago."""
    return access.Session(
        id=session.id,
        server=session.server,
        owner=session.owner,
        actor=session.actor,
        scope=session.scope,
        parent=session.parent,
        created_at=format_time(session.created_at),
        last_used_at=format_time(time.time() - unused_for),
        expires_at=format_time(session.expires_at),
    )


def me_model(caller: Caller) -> access.Caller:
    """Return the answer for the caller."""
    limits = caller.limits
    return access.Caller(
        actor=caller.actor,
        owner=caller.owner,
        scope=caller.scope,
        servers=limits.servers,
        labels=limits.labels,
        users=limits.users,
    )


def orphaned_kernel_model(orphan: OrphanedKernel) -> keeper.OrphanedKernel:
    """Return the answer for an orphaned kernel."""
    return keeper.OrphanedKernel(
        kernel_id=orphan.kernel_id,
        gateway_url=orphan.gateway.url,
        server=orphan.server,
        since=format_time(orphan.since),
    )


def library_model(library: Library) -> keeper.Library:
    """Return the answer for a library to preload."""
    return keeper.Library(name=library.name, loaded=library.loaded, reason=library.reason)


def event_model(entry: HistoryEntry) -> events.Event:
    """Return the answer for a history entry."""
    return events.Event(
        id=entry.id,
        at=format_time(entry.at),
        kind=entry.kind,
        server=entry.server,
        owner=entry.owner,
        generation=entry.generation,
        message=entry.message,
        actor=entry.origin.actor,
        reason=entry.origin.reason,
        request_id=entry.origin.request_id,
        details=entry.details,
    )


def idle_model(told: Explanation) -> culling.Idle:
    """Return the answer for an explanation of culling."""
    verdict, first = told.verdict, told.verdict.next

    def at(moment: float | None) -> str | None:
        return None if moment is None else format_time(moment + told.offset)

    return culling.Idle(
        name=told.snapshot.name,
        state=verdict.state,
        reason=verdict.reason,
        rule=first.rule if first else None,
        warns_at=at(first.warns_at if first else None),
        stops_at=at(first.stops_at if first else None),
        rules=[
            culling.IdleRule(
                rule=o.rule,
                limit=o.limit,
                since=at(o.since),
                warns_at=at(o.warns_at),
                stops_at=at(o.stops_at),
            )
            for o in verdict.outlooks
        ],
        held_by=verdict.holders,
        last_used_at=at(verdict.last_used_at),
        last_used=verdict.last_used,
        snoozed_until=_time_or_none(told.snapshot.snoozed_until),
        looked_at=at(told.looked_at),
    )


def usage_history_model(found: UsageHistory) -> usage.UsageHistory:
    """Return the answer for a history of usage."""
    return usage.UsageHistory(
        since=format_time(found.since),
        until=format_time(found.until),
        resolution=found.resolution,
        start=format_time(found.start),
        memory=found.memory,
        memory_max=found.memory_max,
        cpus=found.cpus,
        cpus_max=found.cpus_max,
        kernels=found.kernels,
        generation=found.generation,
    )


def _failure_model(failure: Failure | None) -> servers.Failure | None:
    if failure is None:
        return None
    return servers.Failure(
        failure_class=failure.kind,
        message=failure.message,
        exit=failure.exit,
        log_tail=failure.log_tail,
    )
