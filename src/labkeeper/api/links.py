"""One-time, short-lived links to a Lab. They do not contain the Lab's token."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from labkeeper.core.spec import QualifiedName
from labkeeper.identity.tokens import digest_of

_MOST: Final = 10_000


@dataclass(frozen=True, slots=True)
class Link:
    """The target of a link."""

    server: QualifiedName
    generation: int
    """The only launch that it opens."""
    page: str
    """Below the server's base_url."""
    expires_at: float
    """By the monotonic clock."""
    confirm: bool
    """Whether it first shows a page with a button."""
    actor: str
    """Who made it."""
    until: float | None
    """When the maker's credentials expire, in seconds since the epoch; None: never."""
    valid: Callable[[], bool]
    """Whether they are still valid."""


class Links:
    """The valid links, by the hashes of their tickets. Thread-safe. They end with the keeper."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._good: dict[str, Link] = {}
        """Oldest first."""

    def make(
        self,
        server: QualifiedName,
        generation: int,
        page: str,
        *,
        lifetime: float,
        confirm: bool,
        actor: str,
        until: float | None,
        valid: Callable[[], bool],
    ) -> str:
        """Return the ticket of a new link, valid for `lifetime` seconds.

        If there are too many links, the oldest one is dropped.
        """
        ticket = secrets.token_urlsafe(32)
        now = self._clock()
        with self._lock:
            self._good = {
                known: other for known, other in self._good.items() if other.expires_at > now
            }
            if len(self._good) >= _MOST:
                del self._good[next(iter(self._good))]
            self._good[digest_of(ticket)] = Link(
                server, generation, page, now + lifetime, confirm, actor, until, valid
            )
        return ticket

    def look(self, ticket: str) -> Link | None:
        """Return the link of a ticket without using it; None if it opens nothing any more."""
        return self._if_good(self._good.get(digest_of(ticket)))

    def use(self, ticket: str) -> Link | None:
        """Return the link of a ticket, once; None if it opens nothing any more."""
        with self._lock:
            link = self._good.pop(digest_of(ticket), None)
        return self._if_good(link)

    def _if_good(self, link: Link | None) -> Link | None:
        """Return a link unless it has expired, or its maker's credentials are invalid."""
        good = link is not None and link.expires_at > self._clock() and link.valid()
        return link if good else None
