"""The ways to authenticate a caller. Each is an `Authenticator`; the keeper tries them in turn."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from labkeeper.core.access import ANYBODY, Caller, Scope
from labkeeper.core.errors import NotAuthenticated
from labkeeper.identity.peers import Peer
from labkeeper.identity.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Credentials:
    """The credentials that a request presents."""

    authorization: str | None
    """The Authorization header."""
    peer: Peer | None
    """The process at the other end of a Unix socket."""


@dataclass(frozen=True, slots=True)
class Identity:
    """An authenticated caller."""

    caller: Caller
    still_valid: Callable[[], bool] = lambda: True
    """Whether the credentials are still valid: an answer may take long."""


class Authenticator(Protocol):
    """One way to authenticate callers. Thread-safe."""

    def authenticate(self, shown: Credentials) -> Identity | None:
        """Return the caller, or None for other kinds of credentials. Raises NotAuthenticated."""


class OpenAuthenticator:
    """Accepts every request: access control is off."""

    def authenticate(self, _: Credentials) -> Identity:
        """See `Authenticator`."""
        return Identity(ANYBODY)


class TokenAuthenticator:
    """Accepts the owner's token and scoped tokens as bearer tokens (RFC 6750)."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def authenticate(self, shown: Credentials) -> Identity | None:
        """See `Authenticator`."""
        token = _bearer(shown)
        return None if token is None else Identity(*self._tokens.caller(token))


class PeerAuthenticator:
    """Accepts the keeper's own user and root over the Unix socket, except processes of servers."""

    def __init__(self, is_server: Callable[[int], bool]) -> None:
        """`is_server` returns whether a process belongs to one of the keeper's servers."""
        self._is_server = is_server

    def authenticate(self, shown: Credentials) -> Identity | None:
        """See `Authenticator`."""
        peer = shown.peer
        if peer is None or shown.authorization is not None:
            return None
        if peer.uid not in {0, os.geteuid()} or self._is_server(peer.pid):
            return None
        name = str(peer.uid)
        with suppress(KeyError):
            name = pwd.getpwuid(peer.uid).pw_name
        return Identity(Caller(f"user:{name}", Scope.ADMIN))


def authenticate(authenticators: Iterable[Authenticator], shown: Credentials) -> Identity:
    """Return the caller's identity. Raises NotAuthenticated."""
    for authenticator in authenticators:
        if (identity := authenticator.authenticate(shown)) is not None:
            return identity
    raise NotAuthenticated(
        "cannot answer without a token: send 'Authorization: Bearer TOKEN'; "
        "`labkeeper token` shows the owner's on the keeper's machine"
    )


def _bearer(shown: Credentials) -> str | None:
    """Return the bearer token of an Authorization header; None if there is none."""
    scheme, _, token = (shown.authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None
