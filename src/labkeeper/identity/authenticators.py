"""Ways in which a caller can prove who they are. Each is an `Authenticator`; the keeper asks one after the other."""

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
    """What a request shows of its caller."""

    authorization: str | None
    """The Authorization header."""
    peer: Peer | None
    """The process at the other end of a Unix socket."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller who has been authenticated."""

    caller: Caller
    still_valid: Callable[[], bool] = lambda: True
    """Whether the credentials are still valid: an answer may take long."""


class Authenticator(Protocol):
    """One way to authenticate callers. Thread-safe."""

    def authenticate(self, shown: Credentials) -> Identity | None:
        """Return the caller, or None for credentials of another kind. Raises NotAuthenticated if they are invalid."""

    def may_accept(self, shown: Credentials) -> bool:
        """Whether it may accept the credentials, as far as that can be told without blocking."""


class OpenAuthenticator:
    """Accepts every request: access control is off."""

    def authenticate(self, _: Credentials) -> Identity:
        """See `Authenticator`."""
        return Identity(ANYBODY)

    def may_accept(self, _: Credentials) -> bool:
        """See `Authenticator`."""
        return True


class TokenAuthenticator:
    """Accepts the owner's token, and scoped ones, as bearer tokens (RFC 6750)."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def authenticate(self, shown: Credentials) -> Identity | None:
        """See `Authenticator`."""
        token = _bearer(shown)
        return None if token is None else Identity(*self._tokens.caller(token))

    def may_accept(self, shown: Credentials) -> bool:
        """See `Authenticator`."""
        token = _bearer(shown)
        return token is not None and self._tokens.knows(token)


class PeerAuthenticator:
    """Accepts the keeper's own user and root over the Unix socket, without a token; but no process of a server."""

    def __init__(self, is_server: Callable[[int], bool]) -> None:
        """`is_server` says whether a process belongs to one of the keeper's servers."""
        self._is_server = is_server

    def authenticate(self, shown: Credentials) -> Identity | None:
        """See `Authenticator`."""
        peer = shown.peer
        if peer is None or not self.may_accept(shown) or self._is_server(peer.pid):
            return None
        name = str(peer.uid)
        with suppress(KeyError):
            name = pwd.getpwuid(peer.uid).pw_name
        return Identity(Caller(f"user:{name}", Scope.ADMIN))

    def may_accept(self, shown: Credentials) -> bool:
        """See `Authenticator`. Whether the peer is a server is not checked: a process can block readers of its files in /proc."""
        return shown.authorization is None and shown.peer is not None and shown.peer.uid in {0, os.geteuid()}


def authenticate(authenticators: Iterable[Authenticator], shown: Credentials) -> Identity:
    """Return who is asking. Raises NotAuthenticated."""
    for authenticator in authenticators:
        if (identity := authenticator.authenticate(shown)) is not None:
            return identity
    raise NotAuthenticated(
        "cannot answer without a token: send 'Authorization: Bearer TOKEN'; `labkeeper token` shows the owner's on the "
        "keeper's machine"
    )


def _bearer(shown: Credentials) -> str | None:
    """Return the bearer token of an Authorization header; None if there is none."""
    scheme, _, token = (shown.authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None
