"""One-time, short-lived tickets: those in links, and those with which the bare host signs in.

They contain no token.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from labkeeper.core.access import Caller, Session
from labkeeper.core.spec import QualifiedName
from labkeeper.identity.tokens import digest_of

_MOST: Final = 10_000


@dataclass(frozen=True, slots=True)
class Maker:
    """Who has made a link."""

    caller: Caller
    still_valid: Callable[[], bool] = lambda: True
    """Whether their credentials are still valid; if not, the link opens nothing."""


@dataclass(frozen=True, slots=True)
class LabLink:
    """A link that opens a Lab."""

    maker: Maker
    server: QualifiedName
    generation: int
    """The only launch that it opens."""
    page: str
    """Below the server's base_url."""
    confirm: bool
    """Whether it first shows a page with a button."""


@dataclass(frozen=True, slots=True)
class SignInLink:
    """A link that begins a session at the bare host."""

    maker: Maker


@dataclass(frozen=True, slots=True)
class LabTicket:
    """What the bare host issues for a Lab's host, which begins a session there for it."""

    session: Session
    """That at the bare host."""
    server: QualifiedName
    page: str
    """Below the Lab's address."""
    nonce: str
    """The hash of the cookie of the only browser in which it works."""


Target = LabLink | SignInLink | LabTicket


class Links:
    """The valid tickets, by their hashes. Thread-safe. They end with the keeper."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._good: dict[str, tuple[float, Target]] = {}
        """When each expires, by the clock, and its target. Oldest first."""

    def make(self, target: Target, *, lifetime: float) -> str:
        """Return a new ticket, valid for `lifetime` seconds.

        If there are too many tickets, the oldest one is dropped.
        """
        ticket = secrets.token_urlsafe(32)
        now = self._clock()
        with self._lock:
            self._good = {known: other for known, other in self._good.items() if other[0] > now}
            if len(self._good) >= _MOST:
                del self._good[next(iter(self._good))]
            self._good[digest_of(ticket)] = now + lifetime, target
        return ticket

    def look(self, ticket: str) -> Target | None:
        """Return a ticket's target without using it; None if it is unknown, used or not valid."""
        return self._valid(self._good.get(digest_of(ticket)))

    def use(self, ticket: str) -> Target | None:
        """Return a ticket's target, once; None if it is unknown, used or not valid."""
        with self._lock:
            found = self._good.pop(digest_of(ticket), None)
        return self._valid(found)

    def _valid(self, found: tuple[float, Target] | None) -> Target | None:
        if found is None or found[0] <= self._clock():
            return None
        target = found[1]
        valid = isinstance(target, LabTicket) or target.maker.still_valid()
        return target if valid else None
