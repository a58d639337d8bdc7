"""The list of servers."""

from __future__ import annotations

from typing import Final

from flask import Response, request

from labkeeper.api.handlers.common import caller, visible_servers
from labkeeper.api.services import Services
from labkeeper.core.access import Scope
from labkeeper.core.lifecycle import State
from labkeeper.web import listing
from labkeeper.web.live import page
from labkeeper.web.pages import Content
from labkeeper.web.rendering import render
from labkeeper.web.rows import rendered, row_of

_ORDER: Final = (
    State.RUNNING,
    State.STARTING,
    State.QUEUED,
    State.BACKOFF,
    State.FAILED,
    State.LOST,
    State.STOPPING,
    State.KILLING,
    State.STOPPED,
)
"""All states, as their counts are shown."""
_POINTS: Final = 36
"""Points of a small chart: three minutes."""


def list_servers(services: Services) -> Response:
    """Show the servers that the caller may see."""
    query = listing.Query.of(request.args)
    return page(services, lambda: _content(services, query))


def _content(services: Services, query: listing.Query) -> Content:
    servers = visible_servers(services)
    found = listing.find(services, servers, query)
    may_manage = caller().scope.covers(Scope.MANAGE)
    recent = services.recent_usage([s.qualified_name for s in found.page], _POINTS)
    rows = {
        f"server-{snapshot.name}": rendered(
            row_of(services, snapshot, recent.get(snapshot.qualified_name)),
            may_manage=may_manage,
        )
        for snapshot in found.page
    }
    counts = render(
        "counts.html",
        {"states": found.states, "count": len(servers), "order": _ORDER, "query": query},
    )
    pages = -(-found.count // listing.PAGE)
    given = {"query": query, "count": found.count, "pages": pages, "any": bool(servers)}
    return Content(
        "Servers", "servers.html", {"counts": counts, **rows}, given, top="servers-top.html"
    )
