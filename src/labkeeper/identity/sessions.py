"""Browser sessions: whoever opened a link may use its Lab, until the session ends.

The browser keeps a cookie that reads `lk_ID_SECRET`, as tokens do; only its hash is stored. The
edge, which checks cookies of Labs, is notified of every change before the call that made it
returns.

A session at the bare host is for the keeper's own pages there. Those for Labs that follow from it
end with it, and their use counts as its use.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Final

from labkeeper.core.access import Caller, Session
from labkeeper.core.durations import format_duration
from labkeeper.core.errors import NotAuthenticated, SessionNotFound, StoreError
from labkeeper.core.lifecycle import Event
from labkeeper.core.messages import KEEPER, Change, HistoryKind, Origin
from labkeeper.core.ports import Clock, EventLog, SessionStore
from labkeeper.core.spec import LOCAL, Owner, QualifiedName, parse_qualified_name
from labkeeper.identity.idleness import Idleness
from labkeeper.identity.tokens import digest_of

LIFETIME: Final = 7 * 86400.0
"""Seconds after which a session expires."""
_MOST: Final = 10_000
_MOST_SIGN_INS: Final = 100
"""Sessions of one actor at the bare host."""

Publish = Callable[[Collection[Session], Collection[Session]], None]
"""Receives sessions of Labs that begin, and those that end."""


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
        idle_limit: float = 0.0,
        seen: bool = False,
    ) -> None:
        """Publish the sessions that earlier keepers have left, and end those that do not stand.

        `stands` returns whether who made the link could still make it: a keeper may have ended
        after it had revoked a token, and before it ended the sessions. A session also ends if it
        was not used for `idle_limit` seconds; 0: never. `seen`: an edge has seen how they were used
        since the last keeper. Raises StoreError.
        """
        self._store = store
        self._clock = clock
        self._event_log = event_log
        self._publish = publish
        self._idle_limit = idle_limit
        self._idleness = Idleness(store, clock, seen=seen)
        self._changing = threading.Lock()
        stored = store.sessions()
        self._known = {session.digest: session for session in stored if stands(session)}
        """By digest, the oldest first. Replaced, never modified: it is read without the lock."""
        self._to_forget: dict[str, Session] = {}
        """Ended sessions that are still in the store, by id."""
        fallen = [session for session in stored if session.digest not in self._known]
        # An edge that an earlier keeper has left may know them.
        publish(_of_labs(self._known.values()), _of_labs(fallen))
        with suppress(StoreError):  # Logged by the store; they are tried again.
            self._end(fallen)

    def make(
        self,
        server: QualifiedName,
        actor: str,
        *,
        until: float | None = None,
        still_valid: Callable[[], bool] = lambda: True,
        origin: Origin = KEEPER,
    ) -> tuple[Session, str]:
        """Begin a session for a Lab, at most until `until`; return it and its cookie.

        If there are too many sessions, the oldest one ends. `still_valid` says whether the link is:
        what ends the sessions of a token or a server, which is invalid before, ends this one, too.
        Raises NotAuthenticated if it is not, and StoreError.
        """
        session, text = self._new(server, actor, until)
        with self._changing:
            self._begin(session, still_valid)
        self._tell("a browser session began", session, origin)
        return session, text

    def sign_in(
        self,
        caller: Caller,
        *,
        still_valid: Callable[[], bool] = lambda: True,
        origin: Origin = KEEPER,
    ) -> tuple[Session, str]:
        """Begin a session at the bare host, with a caller's permissions; return it and its cookie.

        See `make`. Raises NotAuthenticated, StoreError.
        """
        session, text = self._new(None, caller.actor, caller.until)
        session = replace(session, owner=caller.owner, scope=caller.scope, limits=caller.limits)
        with self._changing:
            self._begin(session, still_valid)
        self._tell("a browser signed in", session, origin)
        return session, text

    def follow(
        self, parent: Session, server: QualifiedName, *, origin: Origin = KEEPER
    ) -> tuple[Session, str]:
        """Begin a session for a Lab that ends with one at the bare host. See `make`.

        Raises NotAuthenticated if that has ended, and StoreError.
        """
        session, text = self._new(server, parent.actor, parent.expires_at)
        session = replace(session, parent=parent.id)
        with self._changing:
            self._begin(session, lambda: parent.digest in self._known)
        self._tell("a browser session began", session, origin)
        return session, text

    def _new(
        self, server: QualifiedName | None, actor: str, until: float | None
    ) -> tuple[Session, str]:
        """Return a session that has not begun, and its cookie."""
        id_ = secrets.token_hex(6)
        text = f"lk_{id_}_{secrets.token_urlsafe(32)}"
        now = self._clock.time()
        expires_at = now + LIFETIME if until is None else min(until, now + LIFETIME)
        owner = LOCAL if server is None else parse_qualified_name(server)[1]
        return Session(id_, digest_of(text), server, actor, now, expires_at, owner), text

    def _begin(self, session: Session, still_valid: Callable[[], bool]) -> None:
        # With the lock: whatever is revoked from now on ends this session, too.
        if not still_valid():
            raise NotAuthenticated("cannot begin a session: it was revoked meanwhile")
        self._store.save_session(session)
        self._known = {**self._known, session.digest: session}
        self._idleness.use([session.id], 0.0)
        self._publish(_of_labs([session]), ())
        now = session.created_at
        valid = [s for s in self._known.values() if not s.expired(now)]
        own = [s for s in valid if s.server is None and s.actor == session.actor]
        # Nobody ends the sessions of others by signing in too often.
        stay = {s.digest for s in valid[-_MOST:]} - {s.digest for s in own[:-_MOST_SIGN_INS]}
        with suppress(StoreError):  # Logged by the store; they are tried again.
            self._end([s for digest, s in self._known.items() if digest not in stay])

    def use(self, session: Session) -> None:
        """Note that a session is used now."""
        with self._changing:
            self._note({session.digest: 0.0})

    def unused_for(self, session: Session) -> float:
        """Return the seconds since a session was last used."""
        with self._changing:
            return self._idleness.age(session.id)

    def observe(self, used: Mapping[str, float], *, complete: bool) -> None:
        """Note the last uses of some sessions, by digest, in seconds before now.

        If all uses so far are known, end the sessions that were not used for too long.
        """
        over: list[Session] = []
        with self._changing, suppress(StoreError):  # Logged by the store.
            self._note(used)
            if complete and self._idle_limit:
                sessions = self._known.values()
                over = [s for s in sessions if self._idleness.age(s.id) >= self._idle_limit]
                self._end(over)
            self._idleness.keep({session.id for session in self._known.values()})
            self._idleness.store()
        for session in over:
            unused = format_duration(self._idle_limit)
            self._tell(f"a browser session ended: it was not used for {unused}", session, KEEPER)

    def _note(self, used: Mapping[str, float]) -> None:
        for digest, ago in used.items():
            if (session := self._known.get(digest)) is not None:
                ids = [session.id] if session.parent is None else [session.id, session.parent]
                self._idleness.use(ids, ago)

    def find(self, text: str) -> Session | None:
        """Return the session of a cookie; None if it is unknown or has ended."""
        session = self._known.get(digest_of(text))
        return None if session is None or session.expired(self._clock.time()) else session

    def stands(self, session: Session) -> bool:
        """Whether a session has not ended."""
        return session.digest in self._known and not session.expired(self._clock.time())

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
        """End sessions, and those that follow from them.

        In memory first, and at the edge: the disk may be full.
        """
        if not ended and not self._to_forget:
            return
        ids, known = {session.id for session in ended}, self._known
        # First, so that a keeper killed in between leaves none whose parent is gone.
        ended = [*(session for session in known.values() if session.parent in ids), *ended]
        digests = {session.digest for session in ended}
        self._known = {d: session for d, session in known.items() if d not in digests}
        self._publish((), _of_labs(known[digest] for digest in digests & known.keys()))
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


def _of_labs(sessions: Iterable[Session]) -> list[Session]:
    """Return the sessions that the edge checks."""
    return [session for session in sessions if session.server is not None]
