"""Browser sessions: whoever opened a link may use its Lab, until the session ends.

The browser keeps a cookie that reads `lk_ID_SECRET`, as tokens do; only its hash is stored. The
edge, which checks cookies, is notified of every change before the call that made it returns.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Final

from labkeeper.core.access import Session
from labkeeper.core.errors import NotAuthenticated, SessionNotFound, StoreError
from labkeeper.core.lifecycle import Event
from labkeeper.core.messages import KEEPER, Change, HistoryKind, Origin
from labkeeper.core.ports import Clock, EventLog, SessionStore
from labkeeper.core.spec import LOCAL, Owner, QualifiedName, parse_qualified_name
from labkeeper.identity.tokens import digest_of

LIFETIME: Final = 7 * 86400.0
"""Seconds after which a session expires."""
_MOST: Final = 10_000

Publish = Callable[[Collection[Session], Collection[Session]], None]
"""Receives sessions that begin, and sessions that end."""


class Sessions:
    """All browser sessions. Thread-safe."""

    def __init__(
        self,
        store: SessionStore,
        clock: Clock,
        event_log: EventLog,
        publish: Publish,
        *,
        stands: Callable[[Session], bool] = lambda _session: True,
    ) -> None:
        """Publish the sessions that earlier keepers have left, and end those that do not stand.

        `stands` returns whether who made the link could still make it: a keeper may have ended
        after it had revoked a token, and before it ended the sessions. Raises StoreError.
        """
        self._store = store
        self._clock = clock
        self._event_log = event_log
        self._publish = publish
        self._changing = threading.Lock()
        stored = store.sessions()
        self._known = {session.digest: session for session in stored if stands(session)}
        """By digest, the oldest first. Replaced, never modified: it is read without the lock."""
        self._to_forget: dict[str, Session] = {}
        """Ended sessions that are still in the store, by id."""
        fallen = [session for session in stored if session.digest not in self._known]
        # An edge that an earlier keeper has left may know them.
        publish(self._known.values(), fallen)
        with suppress(StoreError):  # Logged by the store; they are tried again.
            self._end(fallen)

    def make(
        self,
        server: QualifiedName,
        actor: str,
        *,
        until: float | None = None,
        valid: Callable[[], bool] = lambda: True,
        origin: Origin = KEEPER,
    ) -> tuple[Session, str]:
        """Begin a session for a Lab, at most until `until`; return it and its cookie.

        If there are too many sessions, the oldest one ends. Raises StoreError, and
        NotAuthenticated unless `valid()`: what ends the sessions of a token or a server, which is
        invalid before, ends this one, too.
        """
        id_ = secrets.token_hex(6)
        text = f"lk_{id_}_{secrets.token_urlsafe(32)}"
        now = self._clock.time()
        expires_at = now + LIFETIME if until is None else min(until, now + LIFETIME)
        _, owner = parse_qualified_name(server)
        session = Session(id_, digest_of(text), server, actor, now, expires_at, owner)
        with self._changing:
            if not valid():
                raise NotAuthenticated("cannot begin a session: the link is valid no longer")
            self._store.save_session(session)
            self._known = {**self._known, session.digest: session}
            self._publish([session], ())
            current = [digest for digest, s in self._known.items() if not s.expired(now)]
            stay = set(current[-_MOST:])
            with suppress(StoreError):  # Logged by the store; they are tried again.
                self._end([s for digest, s in self._known.items() if digest not in stay])
        self._tell("a browser session began", session, origin)
        return session, text

    def find(self, text: str) -> Session | None:
        """Return the session of a cookie; None if it is unknown or has ended."""
        session = self._known.get(digest_of(text))
        return None if session is None or session.expired(self._clock.time()) else session

    def all(self, owner: Owner = LOCAL) -> list[Session]:
        """Return the sessions for an owner's servers, the oldest first."""
        now = self._clock.time()
        return [s for s in self._known.values() if s.owner == owner and not s.expired(now)]

    def revoke(self, id_: str, *, owner: Owner = LOCAL, origin: Origin = KEEPER) -> Session:
        """End a session immediately; return it.

        Raises SessionNotFound, and StoreError if the next keeper would accept it: revoke it again.
        """
        with self._changing:
            listed = (*self.all(owner), *self._to_forget.values())
            session = next((s for s in listed if (s.id, s.owner) == (id_, owner)), None)
            if session is None:
                raise SessionNotFound(
                    f"cannot find session '{id_[:63]}'; the list of sessions has all ids"
                )
            self._end([session])
        self._tell("a browser session was revoked", session, origin)
        return session

    def revoke_made_by(self, actor: str, owner: Owner) -> None:
        """End the sessions whose links an actor has made, such as a token. Raises StoreError."""
        with self._changing:
            self._end([s for s in self._known.values() if (s.actor, s.owner) == (actor, owner)])

    def changed(self, change: Change) -> None:
        """End the sessions of a deleted server; a subscriber of the fleet.

        Those that the store has kept nevertheless are not for the next server of the name.
        """
        after = change.after
        if not after.forgotten and change.event is not Event.START:
            return
        until = math.inf if after.forgotten else after.created_at
        with self._changing, suppress(StoreError):  # Logged by the store.
            self._end(
                [
                    s
                    for s in self._known.values()
                    if s.server == after.qualified_name and s.created_at < until
                ]
            )

    def _end(self, ended: Collection[Session]) -> None:
        """End sessions in memory first, and at the edge: the disk may be full."""
        if not ended and not self._to_forget:
            return
        digests = {session.digest for session in ended}
        known = self._known
        self._known = {d: session for d, session in known.items() if d not in digests}
        self._publish((), [known[digest] for digest in digests & known.keys()])
        self._to_forget |= {session.id: session for session in ended}
        self._store.forget_sessions(self._to_forget.keys())
        self._to_forget = {}

    def _tell(self, what: str, session: Session, origin: Origin) -> None:
        self._event_log.record(
            HistoryKind.SESSION,
            session.server,
            what,
            origin=origin,
            details={"id": session.id, "actor": session.actor},
            owner=session.owner,
        )
