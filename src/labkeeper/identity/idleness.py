"""When browser sessions were last used, across restarts of the keeper and the edge.

Ages are counted by a clock of our own, which only runs while uses can be seen. It stands still
while the machine is suspended, and while there is no keeper if the edge has ended, too: no session
ends because of a time in which it could not be used, or in which its uses were not seen. What is
stored is a few minutes old at most, so after a kill of both, ages may be wrong by as much.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from labkeeper.core.access import SessionUse
from labkeeper.core.ports import Clock, SessionStore

_STORE_EVERY: Final = 300.0
"""Seconds."""


class Idleness:
    """The ages of sessions' last uses. Not thread-safe."""

    def __init__(self, store: SessionStore, clock: Clock, *, seen: bool) -> None:
        """Go on from what is stored; `seen`: an edge has seen all uses since. Raises StoreError."""
        self._store = store
        self._clock = clock
        self._stored = store.session_use() or SessionUse(0.0, clock.time(), {})
        meanwhile = max(0.0, clock.time() - self._stored.at) if seen else 0.0
        self._ahead = self._stored.seconds + meanwhile - clock.monotonic()
        self._used = dict(self._stored.used)
        self._is_new = False
        """Whether a use is to be stored at once: the one that is stored is much older."""

    @property
    def _now(self) -> float:
        return self._ahead + self._clock.monotonic()

    def use(self, ids: Iterable[str], ago: float) -> None:
        """Note that sessions were used, so many seconds ago."""
        at = self._now - ago
        for id_ in ids:
            self._used[id_] = max(self._used.get(id_, 0.0), at)
            self._is_new |= at - self._stored.used.get(id_, -_STORE_EVERY) >= _STORE_EVERY

    def age(self, id_: str) -> float:
        """Return the seconds since the last use of a session; one that is not known is used now."""
        return self._now - self._used.setdefault(id_, self._now)

    def keep(self, ids: Collection[str]) -> None:
        """Forget all other sessions."""
        self._used = {id_: at for id_, at in self._used.items() if id_ in ids}

    def store(self) -> None:
        """Store it, if it is time. Raises StoreError; it is tried again then."""
        now = self._now
        if self._is_new or (self._used and now - self._stored.seconds >= _STORE_EVERY):
            use = SessionUse(now, self._clock.time(), dict(self._used))
            self._store.save_session_use(use)
            self._stored, self._is_new = use, False
