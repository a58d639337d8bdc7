"""One server: its state, log, kernels, usage, events and settings, and how its last start went."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from flask import Response, request
from pydantic import ValidationError

from labkeeper.api.handlers import culling, links, usage
from labkeeper.api.handlers.common import caller, find_server
from labkeeper.api.problems import invalid_request
from labkeeper.api.services import Services
from labkeeper.core.access import View
from labkeeper.core.durations import format_duration
from labkeeper.core.errors import BackendError
from labkeeper.core.lifecycle import State
from labkeeper.core.messages import HistoryEntry, HistoryKind
from labkeeper.core.server import Kernel, Snapshot
from labkeeper.schema.queries import ServerPath, UsageQuery, of_query
from labkeeper.schema.requests.access import LinkRequest
from labkeeper.schema.requests.culling import SnoozeRequest
from labkeeper.web import log
from labkeeper.web.live import page
from labkeeper.web.pages import (
    Content,
    html,
    notices,
    of_session,
    redirect,
    wants_piece,
    whole,
)
from labkeeper.web.rendering import render
from labkeeper.web.rows import row_of

_EVENTS: Final = 200
"""Events of a server that are looked at."""
_ROW: Final = 300.0
"""Seconds of usage in one row of its table."""
_SHOWN: Final = 20
"""Events of a server that are shown."""


def show_server(services: Services, name: str) -> Response:
    """Show one server, and follow it."""
    path = ServerPath(name=name)
    qualified = find_server(services, path).qualified_name
    return page(
        services,
        lambda: _content(services, find_server(services, path)),
        lambda: log.follow(services, qualified),
    )


def usage_over_time(services: Services, name: str) -> Response:
    """Return the usage of a server as the API does, for a chart."""
    try:
        query = UsageQuery.model_validate(of_query(UsageQuery, request.args))
    except ValidationError as wrong:
        raise invalid_request(wrong) from wrong
    answer, status, _ = usage.get_usage(services, ServerPath(name=name), query)
    return Response(json.dumps(answer), status, content_type="application/json")


def snooze(services: Services, name: str) -> Response:
    """Postpone the culling of a server."""
    body = _valid(SnoozeRequest, {"for": request.form.get("for", "")})
    culling.snooze_server(services, ServerPath(name=name), body)
    what = (
        f"is not stopped as idle for {format_duration(body.time)}" if body.time else "can be idle"
    )
    return _done(services, name, f"Server {name} {what}.")


def make_link(services: Services, name: str) -> Response:
    """Show a new one-time link for someone else."""
    body = _valid(LinkRequest, {"expires_in": "1h", "confirm": True})
    answer, _, _ = links.make_link(services, ServerPath(name=name), body)
    given = {"url": answer["url"], "name": name}
    if wants_piece():
        return html(render("link.html", given))
    return html(whole(services, Content("A link", "link.html", given=given)))


def _valid(model: type[Any], sent: Mapping[str, object]) -> Any:
    try:
        return model.model_validate(sent)
    except ValidationError as error:
        raise invalid_request(error) from error


def _done(services: Services, name: str, text: str) -> Response:
    return notices(services, text) if wants_piece() else redirect(f"/dashboard/servers/{name}")


def _content(services: Services, snapshot: Snapshot) -> Content:
    told = services.culler.cached(snapshot)
    row = row_of(services, snapshot)
    kernels, why = _kernels(services, snapshot)
    spec = snapshot.spec
    view = View(snapshot.name, caller().owner, caller().limits)
    events = services.event_log.latest(view, limit=_EVENTS)
    given: dict[str, Any] = {
        **of_session(),
        "row": row,
        "snapshot": snapshot,
        "sample": services.usage(snapshot),
        "told": told,
        "has_rules": bool(spec.idle_timeout or spec.max_age or spec.sleep_after),
        "kernels": kernels,
        "why_unknown": why,
        "events": events[::-1][:_SHOWN],
        "steps": steps_of(events),
        "past": _past(services, snapshot),
    }
    return Content(
        snapshot.name,
        "server.html",
        {part: render(f"server-{part}.html", given) for part in _PARTS},
        {"name": snapshot.name, "has_rules": given["has_rules"]},
        charts=True,
    )


_PARTS: Final = ("status", "steps", "kernels", "usage", "past", "idle", "facts", "events")
"""The elements that change, each with a template of its own."""


def _kernels(services: Services, snapshot: Snapshot) -> tuple[list[Kernel], str]:
    """Return a server's kernels, or why they are unknown."""
    if snapshot.endpoint is None:
        return [], ""
    try:
        return services.probe.kernels(snapshot.endpoint), ""
    except BackendError as error:
        return [], error.message


@dataclass(frozen=True, slots=True)
class Past:
    """What a server has used in some minutes."""

    begin: float
    """Seconds since the epoch."""
    memory: float
    """The most, in bytes."""
    cpus: float
    """The mean number of busy processors."""


def _past(services: Services, snapshot: Snapshot) -> list[Past]:
    """Return the usage of the last hour as a table shows it, the newest first."""
    found = services.usage_history(snapshot.qualified_name, None)
    size = max(1, round(_ROW / found.resolution))
    rows = []
    for at in range(0, len(found.memory), size):
        memory = [value for value in found.memory_max[at : at + size] if value is not None]
        cpus = [value for value in found.cpus[at : at + size] if value is not None]
        if memory and cpus:
            begin = found.start + at * found.resolution
            rows.append(Past(begin, max(memory), sum(cpus) / len(cpus)))
    return rows[::-1]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a start, or what came after it."""

    entry: HistoryEntry
    seconds: float
    """Since the step before."""


def steps_of(events: Sequence[HistoryEntry]) -> list[Step]:
    """Return what has happened since the last start of a server, by its events, oldest first."""
    changes = [entry for entry in events if entry.kind is HistoryKind.STATE]
    begin = max((at for at, entry in enumerate(changes) if _begins(entry)), default=len(changes))
    if 0 < begin < len(changes) and changes[begin - 1].details.get("to") == State.QUEUED:
        begin -= 1
    since = changes[begin:]
    before = [since[0], *since] if since else []
    return [Step(entry, entry.at - last.at) for last, entry in zip(before, since, strict=False)]


def _begins(entry: HistoryEntry) -> bool:
    return entry.details.get("to") == State.STARTING and not entry.details.get("adopted")
