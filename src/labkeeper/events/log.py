"""The event log: stores each server change and other events, and streams them to callers.

Callers read at their own pace: the newest entries from memory, older ones from the store. They
delay no writer.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from labkeeper.core.access import WHOLE, View
from labkeeper.core.errors import StoreError
from labkeeper.core.messages import KEEPER, Change, HistoryEntry, HistoryKind, Origin
from labkeeper.core.ports import Clock, HistoryStore
from labkeeper.core.spec import (
    LOCAL,
    Owner,
    QualifiedName,
    ServerSpec,
    parse_qualified_name,
)
from labkeeper.events import messages

_IN_MEMORY: Final = 1000
"""Entries kept in memory: for streaming callers, and all that are not stored yet."""
_PAGE: Final = 500
"""Entries read from the store at a time, for callers that are further behind."""


class EventLog:
    """See `core.ports.EventLog` and `core.ports.Subscriber`. Thread-safe."""

    def __init__(
        self,
        store: HistoryStore,
        clock: Clock,
        *,
        size: int,
        subscribers: Sequence[Callable[[HistoryEntry], None]] = (),
    ) -> None:
        """`size` is the number of entries to keep; subscribers must not block or raise.

        Raises StoreError.
        """
        self._store = store
        self._clock = clock
        self._size = size
        self._subscribers = tuple(subscribers)
        self._news = threading.Condition()
        self._last = store.last_id()
        self._recent: deque[HistoryEntry] = deque(maxlen=min(_IN_MEMORY, size))
        self._stored = self._last
        """All entries up to this id are stored."""
        self._closed = False
        self._specs: dict[QualifiedName, ServerSpec] = {}
        """The specs of the existing servers as of their last change."""

    @property
    def last_id(self) -> int:
        """The id of the newest entry."""
        return self._last

    def forgotten(self, after: int) -> int:
        """Return the number of dropped entries newer than an id. Raises StoreError."""
        return self._store.forgotten(after)

    def changed(self, change: Change) -> None:
        """Record a change of a server."""
        kind, after = messages.kind_of(change), change.after
        self._specs[after.qualified_name] = after.spec
        if kind is not None:
            self._add(
                HistoryEntry(
                    0,
                    change.at,
                    kind,
                    after.name,
                    messages.sentence(change),
                    change.origin,
                    after.generation,
                    details=messages.facts(change),
                    labels=after.spec.labels,
                    user=after.spec.user,
                    owner=after.spec.owner,
                )
            )
        if after.forgotten:
            del self._specs[after.qualified_name]

    def record(
        self,
        kind: HistoryKind,
        server: QualifiedName | None,
        message: str,
        *,
        origin: Origin = KEEPER,
        generation: int | None = None,
        details: Mapping[str, object] | None = None,
        owner: Owner = LOCAL,
    ) -> None:
        """Record another event."""
        name, owner = (None, owner) if server is None else parse_qualified_name(server)
        spec = None if server is None else self._specs.get(server)
        self._add(
            HistoryEntry(
                0,
                self._clock.time(),
                kind,
                name,
                message,
                origin,
                generation,
                details=dict(details or {}),
                labels={} if spec is None else spec.labels,
                user=None if spec is None else spec.user,
                owner=owner,
            )
        )

    def orphans(self, server: QualifiedName, pids: Collection[int]) -> None:
        """Record the leftovers of an earlier keeper."""
        many = f"{len(pids)} process{'es' if len(pids) > 1 else ''}"
        message = f"{many} of server '{server}' were left by an earlier keeper, and were ended"
        self.record(HistoryKind.ORPHANS, server, message, details={"pids": len(pids)})

    def latest(self, view: View = WHOLE, *, limit: int) -> list[HistoryEntry]:
        """Return the newest entries, oldest first. Raises StoreError."""
        with self._news:
            unsaved = [e for e in self._recent if e.id > self._stored and view.shows(e)]
        return [
            *self._store.latest(view, limit=limit),
            *unsaved,
        ][-limit:]

    def after(self, after: int, view: View = WHOLE, *, limit: int) -> list[HistoryEntry]:
        """Return the oldest entries newer than an id. Raises StoreError."""
        with self._news:
            recent = list(self._recent)
        # Ids have no gaps: if the next one is in memory, so are all later ones.
        if after >= self._last or (recent and recent[0].id <= after + 1):
            return [e for e in recent if e.id > after and view.shows(e)][:limit]
        return self._store.remembered(view, after=after, limit=limit)

    def follow(
        self,
        after: int,
        view: View = WHOLE,
        *,
        look: float,
    ) -> Iterator[HistoryEntry | None]:
        """Yield entries newer than an id as they arrive; None after `look` seconds without one.

        Ends after `close`. Raises StoreError.
        """
        while True:
            newest = self._last
            page = self.after(after, view, limit=_PAGE)
            yield from page
            # Entries up to `newest` that are not in the page do not concern this caller.
            after = (
                page[-1].id
                if len(page) == _PAGE
                else max(after, newest, *(entry.id for entry in page[-1:]))
            )
            with self._news:
                if self._last > after:
                    continue
                if self._closed:
                    return
                came = self._news.wait(look)
            if not came:
                yield None

    def close(self) -> None:
        """End all streams."""
        with self._news:
            self._closed = True
            self._news.notify_all()

    def _add(self, entry: HistoryEntry) -> None:
        with self._news:
            entry = replace(entry, id=self._last + 1)
            self._last = entry.id
            self._recent.append(entry)
            self._save()
            self._news.notify_all()
        for hear in self._subscribers:
            hear(entry)

    def _save(self) -> None:
        """Save new entries; those that cannot be written now are saved with the next entry."""
        try:
            self._store.remember(
                [entry for entry in self._recent if entry.id > self._stored], keep=self._size
            )
        except StoreError:
            return  # The store has logged it; the change itself matters more than its record.
        self._stored = self._last
