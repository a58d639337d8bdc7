"""API tokens: created, shown once, recognised by their hashes, revoked.

A token reads `lk_ID_SECRET`. The id finds its record, and the hash is compared in constant time;
the secret is not stored. The owner's token, from the state directory or the settings, is kept apart
and has every permission.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from labkeeper.core.access import Caller, Scope, Session, Token, TokenLimits
from labkeeper.core.errors import (
    CapacityReached,
    Conflict,
    NotAuthenticated,
    StoreError,
    TokenNotFound,
)
from labkeeper.core.messages import KEEPER, HistoryKind, Origin
from labkeeper.core.ports import Clock, EventLog, TokenStore
from labkeeper.core.spec import LOCAL, Owner

OWNER: Final = Caller("token:owner", Scope.ADMIN)
"""The caller that presents the owner's token."""

_FORM: Final = re.compile(r"lk_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
_MOST: Final = 1000
_USE_EVERY: Final = 60.0
"""Minimum interval in seconds between records of a token's use."""
_NO_TOKEN: Final = 64 * "-"
"""Matches the hash of no token."""


class Tokens:
    """All API tokens. Thread-safe."""

    def __init__(
        self, store: TokenStore, clock: Clock, event_log: EventLog, *, owner: str | None
    ) -> None:
        """`owner` is the owner's token, or None for none. Raises StoreError."""
        self._store = store
        self._clock = clock
        self._event_log = event_log
        self._owner = _NO_TOKEN if owner is None else digest_of(owner)
        self._changing = threading.Lock()
        self._known = {token.id: token for token in store.tokens()}
        """By id. Replaced, never modified: it is read without the lock."""
        self._to_forget: dict[str, Token] = {}
        """Revoked tokens that are still in the store."""

    def caller(self, shown: str) -> tuple[Caller, Callable[[], bool]]:
        """Return a token's caller and a check of its validity. Raises NotAuthenticated."""
        token = self._recognise(shown)
        if token is None:
            return OWNER, lambda: True
        self._note_use(token, self._clock.time())
        return token.caller, lambda: self._is_good(token.id)

    def _recognise(self, shown: str) -> Token | None:
        """Return the matching token; None for the owner's. Raises NotAuthenticated."""
        digest = digest_of(shown)
        if hmac.compare_digest(digest, self._owner):
            return None
        found = _FORM.fullmatch(shown)
        token = self._known.get(found[1]) if found else None
        if not hmac.compare_digest(digest, token.digest if token else _NO_TOKEN) or token is None:
            raise NotAuthenticated(
                "cannot authenticate: the token is unknown, or was revoked; "
                "`labkeeper token` shows the owner's on the keeper's machine"
            )
        if token.expired(self._clock.time()):
            raise NotAuthenticated("cannot authenticate: the token has expired")
        return token

    def stands(self, session: Session) -> bool:
        """Whether the token that has made a session was not revoked; True if it is no token's."""
        if not session.actor.startswith("token:") or session.actor == OWNER.actor:
            return True
        # A later token of the same name is another one.
        return any(
            (token.caller.actor, token.owner) == (session.actor, session.owner)
            and token.created_at <= session.created_at
            for token in self._known.values()
        )

    def all(self, owner: Owner = LOCAL) -> list[Token]:
        """Return all tokens of an owner of servers, by name; the keeper's owner's is not listed."""
        return sorted(self._listed(owner), key=lambda token: token.name)

    def make(
        self,
        name: str,
        scope: Scope,
        limits: TokenLimits,
        *,
        lifetime: float | None,
        owner: Owner = LOCAL,
        origin: Origin = KEEPER,
    ) -> tuple[Token, str]:
        """Create a token, valid for `lifetime` seconds or forever; return it with its text.

        The text is not stored. Raises Conflict, CapacityReached, StoreError.
        """
        id_ = secrets.token_hex(6)
        text = f"lk_{id_}_{secrets.token_urlsafe(32)}"
        now = self._clock.time()
        with self._changing:
            if name == "owner" or any(token.name == name for token in self._listed(owner)):
                raise Conflict(
                    f"cannot create token '{name}': the name is taken; "
                    "revoke that one first, or choose another name"
                )
            if len(self._known) + len(self._to_forget) >= _MOST:
                raise CapacityReached(
                    f"cannot create token '{name}': there are {_MOST} already; "
                    "revoke some that are not in use"
                )
            expires_at = None if lifetime is None else now + lifetime
            token = Token(
                id_,
                name,
                digest_of(text),
                scope,
                limits,
                now,
                origin.actor,
                expires_at,
                owner=owner,
            )
            self._store.save_token(token)
            self._known = {**self._known, id_: token}
        self._tell(f"token '{name}' was made, with the scope '{scope}'", token, origin)
        return token, text

    def revoke(self, name: str, *, owner: Owner = LOCAL, origin: Origin = KEEPER) -> Token:
        """Revoke a token immediately; return it.

        Raises TokenNotFound, and StoreError if the next keeper would accept it: revoke it again.
        """
        with self._changing:
            token = next((token for token in self._listed(owner) if token.name == name), None)
            if token is None:
                raise TokenNotFound(f"cannot find token '{name}'; the list of tokens has all names")
            # In memory first: the disk may be full.
            self._known = {id_: other for id_, other in self._known.items() if id_ != token.id}
            self._to_forget[token.id] = token
            self._store.forget_token(token.id)
            del self._to_forget[token.id]
        self._tell(f"token '{name}' was revoked", token, origin)
        return token

    def _listed(self, owner: Owner) -> list[Token]:
        known = (*self._known.values(), *self._to_forget.values())
        return [token for token in known if token.owner == owner]

    def _is_good(self, id_: str) -> bool:
        token = self._known.get(id_)
        return token is not None and not token.expired(self._clock.time())

    def _note_use(self, token: Token, now: float) -> None:
        if token.last_used_at is not None and 0 <= now - token.last_used_at < _USE_EVERY:
            return
        with self._changing:
            if token.id not in self._known:
                return
            used = replace(token, last_used_at=now)
            self._known = {**self._known, token.id: used}
            try:
                self._store.save_token(used)
            except StoreError:
                return  # The store has logged the error, which is no reason to reject the token.

    def _tell(self, message: str, token: Token, origin: Origin) -> None:
        self._event_log.record(
            HistoryKind.TOKEN,
            None,
            message,
            origin=origin,
            details={"name": token.name, "scope": str(token.scope)},
            owner=token.owner,
        )


def digest_of(token: str) -> str:
    """Return the hash by which a token is recognised."""
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()
