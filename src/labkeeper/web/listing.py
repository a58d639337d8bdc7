"""Which servers the list shows, and in which order, a hundred at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlencode

from werkzeug.datastructures import MultiDict

from labkeeper.api.services import Services
from labkeeper.core.lifecycle import State
from labkeeper.core.server import Snapshot

PAGE: Final = 100
"""Servers on one page."""
_SORTS: Final = ("name", "state", "since", "used", "memory", "cpus")
_MOST_FIRST: Final = ("memory", "cpus")
"""Orders that begin with the largest, which is what people look for."""
_MOST_WORDS: Final = 200
"""Characters of a search."""


@dataclass(frozen=True, slots=True)
class Query:
    """What somebody asks the list for. Wrong values in an address count as missing."""

    search: str = ""
    """Words, each of which is in the name, the description, a label, or the user."""
    state: State | None = None
    sort: str = "name"
    descending: bool = False
    page: int = 1

    @classmethod
    def of(cls, sent: MultiDict[str, str]) -> Query:
        """Return the query of a request."""
        state, sort, page = sent.get("state"), sent.get("sort", ""), sent.get("page", "")
        return cls(
            sent.get("q", "")[:_MOST_WORDS].strip(),
            State(state) if state in set(State) else None,
            sort if sort in _SORTS else "name",
            sent.get("order") == "descending",
            max(1, int(page)) if page.isascii() and page.isdigit() and len(page) < 6 else 1,  # noqa: PLR2004
        )

    def address(self, **changed: object) -> str:
        """Return the query of an address, with some values changed; None: without this one."""
        shown = {
            "q": self.search or None,
            "state": self.state,
            "sort": None if self.sort == "name" else self.sort,
            "order": "descending" if self.descending else None,
            "page": None if self.page == 1 else self.page,
        } | changed
        return "?" + urlencode({name: str(value) for name, value in shown.items() if value})

    def sorted_by(self, sort: str) -> str:
        """Return the query of an address for another order, or the opposite one."""
        descending = not self.descending if sort == self.sort else sort in _MOST_FIRST
        order = "descending" if descending else None
        return self.address(sort=None if sort == "name" else sort, order=order, page=None)

    def holds(self, snapshot: Snapshot) -> bool:
        """Whether a server is asked for."""
        if self.state not in {None, snapshot.state}:
            return False
        spec = snapshot.spec
        if not self.search:
            return True
        labels = (part for pair in spec.labels.items() for part in pair)
        text = "\n".join((spec.name, spec.description, spec.user or "", *labels)).lower()
        return all(word in text for word in self.search.lower().split())


@dataclass(frozen=True, slots=True)
class Found:
    """The servers that a query finds."""

    page: Sequence[Snapshot]
    count: int
    """Of all pages."""
    states: Counter[State]
    """How many servers are in each state, found or not."""


def find(services: Services, servers: Sequence[Snapshot], query: Query) -> Found:
    """Return what a query finds among servers."""
    found = [snapshot for snapshot in servers if query.holds(snapshot)]
    if query.sort != "name" or query.descending:
        found.sort(key=_key(services, query.sort), reverse=query.descending)
    begin = (query.page - 1) * PAGE
    return Found(
        found[begin : begin + PAGE],
        len(found),
        Counter(snapshot.state for snapshot in servers),
    )


def _key(services: Services, sort: str) -> Callable[[Snapshot], tuple[object, str]]:
    states = list(State)

    def value(snapshot: Snapshot) -> object:
        match sort:
            case "state":
                return states.index(snapshot.state)
            case "since":
                return snapshot.since
            case "used":
                told = services.culler.cached(snapshot)
                used = None if told.looked_at is None else told.verdict.last_used_at
                return (used or float("-inf")) + told.offset
            case "memory":
                sample = services.usage(snapshot)
                return 0 if sample is None else sample.usage.memory
            case "cpus":
                sample = services.usage(snapshot)
                return 0.0 if sample is None else sample.cpus or 0.0
        return snapshot.name

    return lambda snapshot: (value(snapshot), snapshot.name)
