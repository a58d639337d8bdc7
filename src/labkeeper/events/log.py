"""The event log: stores each change of a server, and whatever else happens, and lets callers follow.

Whoever follows reads at a pace of their own: the newest entries from memory, older ones from the store. Nobody waits for them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from labkeeper.core.access import EVERYTHING, TokenLimits, concerns
from labkeeper.core.errors import StoreError
from labkeeper.core.messages import KEEPER, Change, HistoryEntry, HistoryKind, Origin
from labkeeper.core.ports import Clock, HistoryStore
from labkeeper.core.spec import ServerName, ServerSpec
from labkeeper.events import messages

_IN_MEMORY: Final = 1000
"""Entries that are kept at hand: those that who follows reads, and all that are not stored yet."""
_PAGE: Final = 500
"""Entries that are read from the store together, for whoever is further behind."""


class EventLog:
    """See `core.ports.EventLog` and `core.ports.Listener`. Thread-safe."""

    def __init__(
        self, store: HistoryStore, clock: Clock, *, size: int, subscribers: Sequence[Callable[[HistoryEntry], None]] = ()
    ) -> None:
        """`size` is how many entries are kept; subscribers, called with each, must not block or raise. Raises StoreError."""
        self._store = store
        self._clock = clock
        self._size = size
        self._subscribers = tuple(subscribers)
        self._news = threading.Condition()
        self._last = store.last_id()
        self._recent: deque[HistoryEntry] = deque(maxlen=min(_IN_MEMORY, size))
        self._stored = self._last
        """The id up to which all is in the store."""
        self._closed = False
        self._specs: dict[ServerName, ServerSpec] = {}
        """Of the servers that there are, as the last change has them."""

    @property
    def last_id(self) -> int:
        """The id of the newest entry."""
        return self._last

    def forgotten(self, after: int) -> int:
        """Count the entries newer than an id that are known no more. Raises StoreError."""
        return self._store.forgotten(after)

    def changed(self, change: Change) -> None:
        """Write down one change of a server."""
        kind, after = messages.kind_of(change), change.after
        self._specs[after.name] = after.spec
        if kind is not None:
            told = HistoryEntry(0, change.at, kind, after.name, messages.sentence(change), change.origin, after.generation)
            self._add(replace(told, details=messages.facts(change)))
        if after.forgotten:
            del self._specs[after.name]

    def record(
        self,
        kind: HistoryKind,
        server: ServerName | None,
        message: str,
        *,
        origin: Origin = KEEPER,
        generation: int | None = None,
        details: Mapping[str, object] | None = None,
    ) -> None:
        """Write down something else."""
        self._add(HistoryEntry(0, self._clock.time(), kind, server, message, origin, generation, dict(details or {})))

    def orphans(self, server: ServerName, pids: Collection[int]) -> None:
        """Write down what an earlier keeper had left."""
        many = f"{len(pids)} process{'es' if len(pids) > 1 else ''}"
        message = f"{many} of server '{server}' were left by an earlier keeper, and were ended"
        self.record(HistoryKind.ORPHANS, server, message, details={"pids": len(pids)})

    def latest(self, *, server: ServerName | None, limit: int, within: TokenLimits = EVERYTHING) -> list[HistoryEntry]:
        """Return the newest entries, the oldest of them first. Raises StoreError."""
        with self._news:
            unsaved = [e for e in self._recent if e.id > self._stored and concerns(e, server, within)]
        return [*self._store.latest(server=server, limit=limit, within=within), *unsaved][-limit:]

    def after(self, after: int, *, server: ServerName | None, limit: int, within: TokenLimits = EVERYTHING) -> list[HistoryEntry]:
        """Return the oldest entries that are newer than an id. Raises StoreError."""
        with self._news:
            recent = list(self._recent)
        # Ids have no gaps: when the one that follows is at hand, all that follow are.
        if after >= self._last or (recent and recent[0].id <= after + 1):
            return [e for e in recent if e.id > after and concerns(e, server, within)][:limit]
        return self._store.remembered(after=after, server=server, limit=limit, within=within)

    def follow(
        self, after: int, *, server: ServerName | None, look: float, within: TokenLimits = EVERYTHING
    ) -> Iterator[HistoryEntry | None]:
        """Return entries newer than an id as they come; None each `look` seconds in which none does. Ends when this is closed.

        Raises StoreError.
        """
        while True:
            newest = self._last
            page = self.after(after, server=server, limit=_PAGE, within=within)
            yield from page
            # What is no newer than that, and not in the page, is somebody else's.
            after = page[-1].id if len(page) == _PAGE else max(after, newest, *(entry.id for entry in page[-1:]))
            with self._news:
                if self._last > after:
                    continue
                if self._closed:
                    return
                came = self._news.wait(look)
            if not came:
                yield None

    def close(self) -> None:
        """Let all who follow come to their end."""
        with self._news:
            self._closed = True
            self._news.notify_all()

    def _add(self, entry: HistoryEntry) -> None:
        with self._news:
            entry = replace(entry, id=self._last + 1)
            if entry.server is not None and (spec := self._specs.get(entry.server)) is not None:
                entry = replace(entry, labels=spec.labels, user=spec.user)
            self._last = entry.id
            self._recent.append(entry)
            self._save()
            self._news.notify_all()
        for hear in self._subscribers:
            hear(entry)

    def _save(self) -> None:
        """Bring the store up to date; what cannot be written now is written with the next entry."""
        try:
            self._store.remember([entry for entry in self._recent if entry.id > self._stored], keep=self._size)
        except StoreError:
            return  # It has logged it; the change itself counts more than its story.
        self._stored = self._last
