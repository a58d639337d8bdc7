"""Who may call what. Each route carries one rule, and a route without one does not exist (see `routes.ROUTES`)."""

from __future__ import annotations

import os
import pwd
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import structlog
from flask import g, request

from labkeeper.api.peers import PEER, Peer
from labkeeper.api.rates import Rates
from labkeeper.core.access import ANYBODY, Caller, Scope
from labkeeper.core.errors import NotAuthenticated, ServerNotFound
from labkeeper.core.ports import Keeper
from labkeeper.core.server import Snapshot
from labkeeper.core.spec import ServerName
from labkeeper.identity.tokens import Tokens

_TELL_EVERY: Final = 60.0
"""Seconds between two lines of the log about requests that were refused; each says how many."""

_log = structlog.get_logger("labkeeper.api")


class Extent(StrEnum):
    """What a route speaks of, and so what becomes of a caller who is limited to some servers."""

    SERVER = "server"
    """The server that its path names: refused where that is not within the caller's reach."""
    SERVERS = "servers"
    """Any servers: the handler leaves out those beyond the caller's reach."""
    KEEPER = "keeper"
    """More than servers: refused to whoever is limited."""
    CALLER = "caller"
    """The caller alone."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Who may call a route."""

    scope: Scope | None
    """The scope that it takes; None: anybody may, also without a token."""
    extent: Extent


PUBLIC: Final = Rule(None, Extent.KEEPER)
SEE_SERVER: Final = Rule(Scope.READ, Extent.SERVER)
SEE_SERVERS: Final = Rule(Scope.READ, Extent.SERVERS)
SEE_KEEPER: Final = Rule(Scope.READ, Extent.KEEPER)
SEE_CALLER: Final = Rule(Scope.READ, Extent.CALLER)
MANAGE_SERVER: Final = Rule(Scope.MANAGE, Extent.SERVER)
MANAGE_SERVERS: Final = Rule(Scope.MANAGE, Extent.SERVERS)
ADMINISTER: Final = Rule(Scope.ADMIN, Extent.KEEPER)


class Callers:
    """Knows who asks, by what they show and by where they come from. Thread-safe."""

    def __init__(self, tokens: Tokens, *, is_open: bool, is_server: Callable[[int], bool]) -> None:
        """`is_open` lets in everybody; `is_server` says whether a process belongs to one of the keeper's servers."""
        self._tokens = tokens
        self._is_open = is_open
        self._is_server = is_server

    def identify(self, authorization: str | None, peer: Peer | None) -> tuple[Caller, Callable[[], bool]]:
        """Return who is asking, and a function that tells whether they still may. Raises NotAuthenticated."""
        if self._is_open:
            return ANYBODY, _always
        if authorization is not None:
            if (shown := _bearer(authorization)) is not None:
                return self._tokens.caller(shown)
        elif peer is not None and _is_local(peer) and not self._is_server(peer.pid):
            return _user(peer), _always
        raise NotAuthenticated(
            "cannot answer without a token: send 'Authorization: Bearer TOKEN'; `labkeeper token` shows the owner's on the "
            "keeper's machine"
        )

    def knows(self, authorization: str | None, peer: Peer | None) -> bool:
        """Whether a request may come from a known caller, as far as that can be told without waiting; else its body is not kept.

        Whether the peer is one of our servers is not checked here: a process can hold up whoever reads its files in /proc.
        """
        if self._is_open:
            return True
        if authorization is None:
            return peer is not None and _is_local(peer)
        shown = _bearer(authorization)
        return shown is not None and self._tokens.knows(shown)


def _bearer(authorization: str) -> str | None:
    """Return the bearer token in an Authorization header; None if there is none."""
    scheme, _, shown = authorization.partition(" ")
    return shown.strip() if scheme.lower() == "bearer" else None


def _is_local(peer: Peer) -> bool:
    """Whether the keeper's user or root is at the other end of the Unix socket."""
    return peer.uid in {0, os.geteuid()}


def _user(peer: Peer) -> Caller:
    name = str(peer.uid)
    with suppress(KeyError):
        name = pwd.getpwuid(peer.uid).pw_name
    return Caller(f"user:{name}", Scope.ADMIN)


class Authenticator:
    """Lets requests in by their rules. Thread-safe."""

    def __init__(self, callers: Callers, keeper: Keeper, rates: Rates) -> None:
        self._callers = callers
        self._keeper = keeper
        self._rates = rates
        self._refused = _Refused()

    def enter(self, rule: Rule) -> None:
        """Let the present request in, and note who it is from; or raise NotAuthenticated, NotAllowed, ServerNotFound."""
        if rule.scope is None:
            return
        try:
            g.caller, g.still_good = self._callers.identify(request.headers.get("Authorization"), request.environ.get(PEER))
        except NotAuthenticated:
            self._refused.count()
            raise
        self._rates.take(g.caller.actor)
        self._check(g.caller, rule, rule.scope)

    def _check(self, caller: Caller, rule: Rule, scope: Scope) -> None:
        what = f"{request.method} {request.url_rule}"
        caller.needs(scope, what)
        match rule.extent:
            case Extent.KEEPER:
                caller.needs_everything(what)
            case Extent.SERVER:
                name = (request.view_args or {})["name"]
                caller.needs_name(name)
                if caller.reach.labels or caller.reach.users:
                    find(self._keeper, caller, name)
            case Extent.SERVERS | Extent.CALLER:
                pass


def find(keeper: Keeper, caller: Caller, name: str) -> Snapshot:
    """Give a server that the caller's token is for. Raises ServerNotFound, for another's as for one that does not exist."""
    snapshot = keeper.get(ServerName(name))
    if snapshot is None or not caller.sees(snapshot):
        raise ServerNotFound.called(name)
    return snapshot


class _Refused:
    """Tells in the log how many were refused, and not of each: nobody is to fill a disk by knocking."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._told_at = -_TELL_EVERY

    def count(self) -> None:
        """Take in one."""
        with self._lock:
            self._count += 1
            now = time.monotonic()
            if now - self._told_at < _TELL_EVERY:
                return
            told, self._count, self._told_at = self._count, 0, now
        _log.warning("requests without a valid token were refused", count=told, address=request.remote_addr)


def _always() -> bool:
    return True
