"""Who may call what. Each route carries one rule, and a route without one does not exist (see `routes.ROUTES`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import structlog
from flask import g, request

from labkeeper.api.rates import Rates
from labkeeper.core.access import Caller, Scope
from labkeeper.core.errors import NotAuthenticated, ServerNotFound
from labkeeper.core.ports import Keeper
from labkeeper.core.server import Snapshot
from labkeeper.core.spec import ServerName
from labkeeper.identity.authenticators import Authenticator, Credentials, authenticate
from labkeeper.identity.peers import PEER

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


class Authorizer:
    """Authenticates requests, and applies the rules of their routes. Thread-safe."""

    def __init__(self, authenticators: Sequence[Authenticator], keeper: Keeper, rates: Rates) -> None:
        self._authenticators = authenticators
        self._keeper = keeper
        self._rates = rates
        self._refused = _Refused()

    def authorize(self, rule: Rule) -> None:
        """Apply a rule to the present request, and note its caller. Raises NotAuthenticated, NotAllowed, ServerNotFound."""
        if rule.scope is None:
            return
        try:
            identity = authenticate(
                self._authenticators, Credentials(request.headers.get("Authorization"), request.environ.get(PEER))
            )
        except NotAuthenticated:
            self._refused.count()
            raise
        g.caller, g.still_valid = identity.caller, identity.still_valid
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
                if caller.limits.labels or caller.limits.users:
                    find(self._keeper, caller, name)
            case Extent.SERVERS | Extent.CALLER:
                pass


def find(keeper: Keeper, caller: Caller, name: str) -> Snapshot:
    """Return a server that the caller's token is for. Raises ServerNotFound, for another's as for one that does not exist."""
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
