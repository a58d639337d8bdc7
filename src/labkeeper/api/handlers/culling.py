"""Explaining and snoozing the culling of servers."""

from __future__ import annotations

import time

from labkeeper.api.handlers.common import (
    Answer,
    ask,
    caller,
    find_server,
    json_answer,
    origin,
    visible_servers,
)
from labkeeper.api.services import Services
from labkeeper.api.views import idle_model
from labkeeper.core.durations import format_duration
from labkeeper.core.errors import (
    InvalidSpec,
)
from labkeeper.core.messages import Snooze
from labkeeper.schema.answers.culling import IdleList
from labkeeper.schema.queries import (
    ServerPath,
)
from labkeeper.schema.requests.culling import SnoozeRequest


def get_idle(services: Services, path: ServerPath) -> Answer:
    """Poll a server's activity, and explain whether and when it will be stopped as idle."""
    return json_answer(idle_model(services.culler.refresh(find_server(services, path))))


def list_idle(services: Services) -> Answer:
    """Explain the same for all servers by their last poll, the next to be stopped first."""
    listed = [
        idle_model(services.culler.cached(snapshot)) for snapshot in visible_servers(services)
    ]
    return json_answer(
        IdleList(
            servers=sorted(listed, key=lambda one: (one.stops_at is None, one.stops_at, one.name))
        )
    )


def snooze_server(services: Services, path: ServerPath, body: SnoozeRequest) -> Answer:
    """Postpone the culling of a server. Survives restarts of the server and of the keeper."""
    longest = services.max_snooze
    if body.time > longest:
        raise InvalidSpec.of(
            "for", f"must be at most {format_duration(longest)} (LABKEEPER_MAX_SNOOZE)"
        )
    until = time.time() + body.time if body.time else None
    reply = ask(services, Snooze(caller().qualified(path.name), until, origin()))
    return json_answer(idle_model(services.culler.cached(reply.snapshot)))
