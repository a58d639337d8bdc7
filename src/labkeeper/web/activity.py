"""The activity: who did what, newest first, a hundred events at a time."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlencode

from flask import Response, request
from markupsafe import Markup
from werkzeug.datastructures import MultiDict

from labkeeper.api.handlers.common import caller
from labkeeper.api.services import Services
from labkeeper.core.access import View
from labkeeper.core.lifecycle import State
from labkeeper.core.messages import HistoryEntry, HistoryKind
from labkeeper.core.spec import ServerName, qualified_name
from labkeeper.web.live import page
from labkeeper.web.pages import Content, html, whole
from labkeeper.web.rendering import render

PAGE: Final = 100
"""Events on one page."""
KINDS: Final = {
    HistoryKind.STATE: "State",
    HistoryKind.GOAL: "Goal",
    HistoryKind.GATEWAY: "Gateway",
    HistoryKind.CULL_WARNING: "Warning of a stop",
    HistoryKind.KERNEL_CULLED: "Idle kernel ended",
    HistoryKind.SNOOZED: "Snooze",
    HistoryKind.ORPHANS: "Leftovers ended",
    HistoryKind.TOKEN: "Token",
    HistoryKind.SESSION: "Browser session",
}
"""The kinds of events in words."""
_LONGEST: Final = 100
"""Characters of a filter."""


@dataclass(frozen=True, slots=True)
class Query:
    """The events that are asked for. Wrong values in an address count as missing."""

    server: str = ""
    kind: HistoryKind | None = None
    actor: str = ""
    """A part of the actor's name."""
    before: int | None = None
    """Only events older than the one with this id."""

    @classmethod
    def of(cls, sent: MultiDict[str, str]) -> Query:
        """Return the query of a request."""
        kind, before = sent.get("kind"), sent.get("before", "")
        is_id = before.isascii() and before.isdigit() and len(before) < 19  # noqa: PLR2004
        return cls(
            sent.get("server", "")[:_LONGEST].strip(),
            HistoryKind(kind) if kind in set(HistoryKind) else None,
            sent.get("actor", "")[:_LONGEST].strip(),
            int(before) if is_id else None,
        )

    @property
    def filters(self) -> bool:
        """Whether it asks for some events only, apart from the page."""
        return bool(self.server or self.kind or self.actor)

    def address(self, before: int | None = None) -> str:
        """Return the query of the address of another page of these events; None: the newest."""
        shown = {"server": self.server, "kind": self.kind, "actor": self.actor, "before": before}
        return "?" + urlencode({name: str(value) for name, value in shown.items() if value})

    def view(self) -> View:
        """Return the events that are asked for, and that the caller may see."""
        return View(
            ServerName(self.server) if self.server else None,
            caller().owner,
            caller().limits,
            self.kind,
            self.actor,
            self.before,
        )


@dataclass(frozen=True, slots=True)
class _Row:
    id: int
    at: float
    kind: HistoryKind
    state: State | None
    """The state that the event led to."""
    server: ServerName | None
    exists: bool
    message: str
    actor: str
    reason: str


def list_events(services: Services) -> Response:
    """Show the events that the caller may see; new ones appear unless older ones are shown."""
    query = Query.of(request.args)
    if query.before is not None:
        return html(whole(services, _content(services, query)))
    return page(services, lambda: _content(services, query))


def _content(services: Services, query: Query) -> Content:
    found = services.event_log.latest(query.view(), limit=PAGE + 1)
    shown = found[-PAGE:][::-1]
    given = {
        "query": query,
        "kinds": KINDS,
        "older": shown[-1].id if len(found) > PAGE else None,
    }
    rows = {f"event-{entry.id}": _rendered(_row(services, entry)) for entry in shown}
    return Content("Activity", "activity.html", rows, given, top="activity-top.html")


def _row(services: Services, entry: HistoryEntry) -> _Row:
    to = entry.details.get("to") if entry.kind is HistoryKind.STATE else None
    return _Row(
        entry.id,
        entry.at,
        entry.kind,
        State(to) if isinstance(to, str) and to in set(State) else None,
        entry.server,
        _exists(services, entry),
        # The server has a column of its own.
        entry.message.removeprefix(f"server '{entry.server}' "),
        entry.origin.actor,
        entry.origin.reason,
    )


def _exists(services: Services, entry: HistoryEntry) -> bool:
    """Whether an entry is about a server that the caller can look at now."""
    if entry.server is None:
        return False
    snapshot = services.keeper.get(qualified_name(entry.server, entry.owner))
    return snapshot is not None and caller().sees(snapshot)


@functools.lru_cache(maxsize=2_000)
def _rendered(row: _Row) -> Markup:
    return render("event.html", {"row": row, "kind": KINDS[row.kind]})
