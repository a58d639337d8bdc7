"""Events, as pages or as a stream, and the state of webhooks."""

from __future__ import annotations

import re

from flask import Response, request

from labkeeper.api.handlers.common import (
    LOOK_EVERY,
    Answer,
    acquire_stream,
    caller,
    find_server,
    json_answer,
    live_answer,
    visible_owner,
)
from labkeeper.api.services import Services
from labkeeper.api.streaming import EVENT_STREAM, gone, server_sent, wants_stream
from labkeeper.api.views import event_model
from labkeeper.core.access import View
from labkeeper.core.errors import (
    InvalidSpec,
)
from labkeeper.core.spec import ServerName
from labkeeper.schema.answers.events import EventList, WebhookList
from labkeeper.schema.queries import (
    EventQuery,
    ServerPath,
)


def list_events(services: Services, query: EventQuery) -> Answer | Response:
    """List the events of all servers, including deleted ones, or follow them as Server-Sent Events.

    `Last-Event-ID` resumes a stream.
    """
    return _events(services, None, query)


def list_server_events(
    services: Services, path: ServerPath, query: EventQuery
) -> Answer | Response:
    """List or follow the events of one server. They are kept when it is deleted."""
    name = ServerName(path.name)
    caller().needs_name(name)
    if not services.event_log.latest(View(name, caller().owner, caller().limits), limit=1):
        find_server(services, path)
    return _events(services, name, query)


def list_webhooks(services: Services) -> Answer:
    """List the webhooks that events are posted to, and their state."""
    return json_answer(WebhookList(webhooks=services.webhooks()))


def _events(services: Services, server: ServerName | None, query: EventQuery) -> Answer | Response:
    history = services.event_log
    after = _last_event_id(query)
    # Otherwise the id is from another history: ours is new, or an older copy. Then send all of it.
    is_ours = after is None or after <= history.last_id
    after = after if is_ours else 0
    view = View(server, visible_owner(query.owner), caller().limits)
    if wants_stream(asked=query.follow or request.accept_mimetypes.best == EVENT_STREAM):
        return _follow_events(services, view, after, is_ours=is_ours)
    if after is None:
        page = history.latest(view, limit=query.limit)
    else:
        page = history.after(after, view, limit=query.limit)
    more = bool(page) and page[-1].id < history.last_id
    return json_answer(
        EventList(events=[event_model(entry) for entry in page], next=page[-1].id if more else None)
    )


def _follow_events(services: Services, view: View, after: int | None, *, is_ours: bool) -> Response:
    acquire_stream(services, "follow events", "read them without follow")
    history = services.event_log
    # A caller that starts from the first event has missed none.
    missed = (history.forgotten(after) if after else 0) if is_ours else None
    entries = history.follow(history.last_id if after is None else after, view, look=LOOK_EVERY)
    return live_answer(services, server_sent(entries, missed, gone()), EVENT_STREAM)


def _last_event_id(query: EventQuery) -> int | None:
    """Return the last event that the caller has; None for new events only. Raises InvalidSpec."""
    given = request.headers.get("Last-Event-ID", "").strip()
    if not given:
        return query.after
    if not re.fullmatch(r"[0-9]{1,18}", given):
        raise InvalidSpec.of("Last-Event-ID", "must be the id of an event")
    return int(given)
