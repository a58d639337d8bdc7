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
from labkeeper.core.model import ServerName, Snapshot
from labkeeper.core.ports import Keeper
from labkeeper.tokens import Tokens

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


class Door:
    """Lets requests in by their rules. Thread-safe."""

    def __init__(self, tokens: Tokens, keeper: Keeper, rates: Rates, *, is_open: bool, is_server: Callable[[int], bool]) -> None:
        """`is_open` lets in everybody; `is_server` says whether a process belongs to one of the keeper's servers."""
        self._tokens = tokens
        self._keeper = keeper
        self._rates = rates
        self._is_open = is_open
        self._is_server = is_server
        self._refused = _Refused()

    def enter(self, rule: Rule) -> None:
        """Let the present request in, and note who it is from; or raise NotAuthenticated, NotAllowed, ServerNotFound."""
        if rule.scope is None:
            return
        try:
            g.caller, g.still_good = self._identify()
        except NotAuthenticated:
            self._refused.count()
            raise
        self._rates.take(g.caller.actor)
        self._check(g.caller, rule, rule.scope)

    def _identify(self) -> tuple[Caller, Callable[[], bool]]:
        if self._is_open:
            return ANYBODY, _always
        header = request.headers.get("Authorization")
        if header is not None:
            scheme, _, shown = header.partition(" ")
            if scheme.lower() == "bearer":
                return self._tokens.caller(shown.strip())
        elif (local := self._local(request.environ.get(PEER))) is not None:
            return local, _always
        raise NotAuthenticated(
            "cannot answer without a token: send 'Authorization: Bearer TOKEN'; `labkeeper token` shows the owner's on the "
            "keeper's machine"
        )

    def _local(self, peer: Peer | None) -> Caller | None:
        """Give who is at the other end of the Unix socket, where it is the keeper's user or root, and not a server of ours."""
        if peer is None or peer.uid not in {0, os.geteuid()} or self._is_server(peer.pid):
            return None
        name = str(peer.uid)
        with suppress(KeyError):
            name = pwd.getpwuid(peer.uid).pw_name
        return Caller(f"user:{name}", Scope.ADMIN)

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
