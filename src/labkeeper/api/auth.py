"""Authorization. Every route carries a rule; none exists without one (see `routes.ROUTES`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import structlog
from flask import g, request

from labkeeper.api.rates import Rates
from labkeeper.core.access import Caller, Scope
from labkeeper.core.errors import NotAuthenticated, ServerNotFound
from labkeeper.core.server import Snapshot
from labkeeper.identity.authenticators import (
    Authenticator,
    Credentials,
    Identity,
    authenticate,
)
from labkeeper.identity.peers import PEER
from labkeeper.runtime import Keeper

_TELL_EVERY: Final = 60.0
"""Interval in seconds between log lines about rejected requests; each has their number."""

_log = structlog.get_logger("labkeeper.api")


class Extent(StrEnum):
    """The subject of a route, which decides how limited callers are treated."""

    SERVER = "server"
    """The server in its path: rejected if outside the caller's limits."""
    SERVERS = "servers"
    """Any servers: the handler omits those outside the caller's limits."""
    KEEPER = "keeper"
    """More than servers: limited callers are rejected."""
    CALLER = "caller"
    """Only the caller."""


@dataclass(frozen=True, slots=True)
class Rule:
    """The requirements for calling a route."""

    scope: Scope | None
    """The required scope; None: public, even without a token."""
    extent: Extent
    of_page: bool = False
    """Whether it is for a page of the dashboard, which accepts the session of a browser at the bare
    host, and nothing else; the API does not accept it."""


PUBLIC: Final = Rule(None, Extent.KEEPER)
SEE_SERVER: Final = Rule(Scope.READ, Extent.SERVER)
SEE_SERVERS: Final = Rule(Scope.READ, Extent.SERVERS)
SEE_KEEPER: Final = Rule(Scope.READ, Extent.KEEPER)
SEE_CALLER: Final = Rule(Scope.READ, Extent.CALLER)
MANAGE_SERVER: Final = Rule(Scope.MANAGE, Extent.SERVER)
MANAGE_SERVERS: Final = Rule(Scope.MANAGE, Extent.SERVERS)
ADMINISTER: Final = Rule(Scope.ADMIN, Extent.KEEPER)


class Authorizer:
    """Authenticates requests and applies the rules of their routes. Thread-safe."""

    def __init__(
        self,
        authenticators: Sequence[Authenticator],
        keeper: Keeper,
        rates: Rates,
        session: Callable[[], Identity | None] = lambda: None,
    ) -> None:
        """`session` returns whose session the browser of the current request has."""
        self._authenticators = authenticators
        self._session = session
        self._keeper = keeper
        self._rates = rates
        self._refused = _Refused()

    def authorize(self, rule: Rule) -> None:
        """Apply a rule to the current request and store its caller.

        Raises NotAuthenticated, NotAllowed, ServerNotFound.
        """
        if rule.scope is None:
            return
        try:
            identity = self._identity(rule)
        except NotAuthenticated:
            self._refused.count()
            raise
        g.caller, g.still_valid = identity.caller, identity.still_valid
        self._rates.take(g.caller.actor)
        self._check(g.caller, rule, rule.scope)

    def _identity(self, rule: Rule) -> Identity:
        """Return whose request it is. Raises NotAuthenticated."""
        if not rule.of_page:
            shown = Credentials(request.headers.get("Authorization"), request.environ.get(PEER))
            return authenticate(self._authenticators, shown)
        # Without a session, only a keeper without access control knows the caller.
        return self._session() or authenticate(self._authenticators, Credentials(None, None))

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
    """Return a server that the caller may see. Raises ServerNotFound, alike if it exists or not."""
    snapshot = keeper.get(caller.qualified(name))
    if snapshot is None or not caller.sees(snapshot):
        raise ServerNotFound.called(name)
    return snapshot


class _Refused:
    """Logs the number of rejected requests instead of each, so that they cannot fill a disk."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._told_at = -_TELL_EVERY

    def count(self) -> None:
        """Count a rejected request."""
        with self._lock:
            self._count += 1
            now = time.monotonic()
            if now - self._told_at < _TELL_EVERY:
                return
            told, self._count, self._told_at = self._count, 0, now
        _log.warning(
            "requests without a valid token were refused", count=told, address=request.remote_addr
        )
