"""Authorization: scopes, token limits, and the rules that combine them. Sees no secrets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Final

from labkeeper.core.errors import NotAllowed, ServerNotFound
from labkeeper.core.messages import HistoryEntry, HistoryKind
from labkeeper.core.server import Snapshot
from labkeeper.core.spec import (
    LOCAL,
    Owner,
    QualifiedName,
    ServerName,
    ServerSpec,
    qualified_name,
    server_name,
)


class Scope(StrEnum):
    """The permissions of a caller. Each scope includes those above it."""

    READ = "read"
    """List servers, logs and history; excludes anything that opens a Lab."""
    MANAGE = "manage"
    """Create, start, stop, delete and open servers."""
    ADMIN = "admin"
    """Everything: tokens, and operations on the machine beyond one server."""

    def covers(self, needed: Scope) -> bool:
        """Whether this scope includes `needed`."""
        order = list(Scope)
        return order.index(self) >= order.index(needed)


@dataclass(frozen=True, slots=True)
class TokenLimits:
    """The servers that a token may access; without limits, all of them and the keeper itself."""

    servers: tuple[str, ...] = ()
    """Name patterns with `*` and `?`; one must match."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that a server must have, all of them."""
    users: tuple[str, ...] = ()
    """Users of the machine, one of which a server must run as; the first one is the default."""

    @property
    def unlimited(self) -> bool:
        """Whether there are no limits."""
        return self == EVERYTHING

    def has_name(self, name: str) -> bool:
        """Whether the name patterns allow this name."""
        return not self.servers or any(fnmatchcase(name, pattern) for pattern in self.servers)

    def has_labels(self, labels: Mapping[str, str]) -> bool:
        """Whether the required labels are among these."""
        return self.labels.items() <= labels.items()

    def has_user(self, user: str | None) -> bool:
        """Whether a server may run as this user."""
        return not self.users or user in self.users

    def holds(self, name: str, labels: Mapping[str, str], user: str | None) -> bool:
        """Whether the limits allow a server with this name, these labels and this user."""
        return self.has_name(name) and self.has_labels(labels) and self.has_user(user)


EVERYTHING: Final = TokenLimits()


@dataclass(frozen=True, slots=True)
class View:
    """The entries of the history that a reader asks for, and may see."""

    server: ServerName | None = None
    """Only those about this server."""
    owner: Owner | None = None
    """Only those of this owner."""
    limits: TokenLimits = EVERYTHING
    """Only those about servers within these; entries without a server if there are none."""
    kind: HistoryKind | None = None
    """Only those of this kind."""
    actor: str = ""
    """Only those of actors whose name contains this."""
    before: int | None = None
    """Only those older than the entry with this id."""

    def shows(self, entry: HistoryEntry) -> bool:
        """Whether an entry is among them."""
        return self._asks_for(entry) and (
            self.limits.unlimited
            or (
                entry.server is not None
                and self.limits.holds(entry.server, entry.labels, entry.user)
            )
        )

    def _asks_for(self, entry: HistoryEntry) -> bool:
        return (
            self.server in {None, entry.server}
            and self.owner in {None, entry.owner}
            and self.kind in {None, entry.kind}
            and self.actor in entry.origin.actor
            and (self.before is None or entry.id < self.before)
        )


WHOLE: Final = View()


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller."""

    actor: str
    """The actor in the history: `token:NAME`, `user:NAME` of this machine, or `anybody` if access
    control is off."""
    scope: Scope
    limits: TokenLimits = EVERYTHING
    owner: Owner = LOCAL
    """The owner whose servers they manage."""
    until: float | None = None
    """When their credentials expire, in seconds since the epoch; None: never."""

    def qualified(self, name: str) -> QualifiedName:
        """Return the qualified name of a server of theirs. Raises ServerNotFound.

        Any other text names no server: "NAME.OWNER" would be another owner's.
        """
        try:
            return qualified_name(server_name(name), self.owner)
        except ValueError:
            raise ServerNotFound.called(name) from None

    def needs(self, scope: Scope, what: str, **details: str) -> None:
        """Raise NotAllowed unless the scope includes this one; `what` completes "cannot ..."."""
        if not self.scope.covers(scope):
            why = f"that needs the scope '{scope}', and yours is '{self.scope}'"
            raise NotAllowed(f"cannot {what}: {why}", scope=str(scope), **details)

    def needs_everything(self, what: str) -> None:
        """Raise NotAllowed if the caller is limited to some servers."""
        if not self.limits.unlimited:
            raise NotAllowed(
                f"cannot {what}: that needs a token for all servers, and yours is limited to some"
            )

    def needs_name(self, name: str) -> None:
        """Raise NotAllowed if the limits exclude this name, whether or not such a server exists."""
        if not self.limits.has_name(name):
            patterns = ", ".join(self.limits.servers)
            raise NotAllowed(
                f"cannot access server '{name[:63]}': your token is for servers named {patterns}"
            )

    def needs_spec(self, spec: ServerSpec) -> None:
        """Raise NotAllowed if the caller may not create this server."""
        self.needs_name(spec.name)
        if not self.limits.has_labels(spec.labels):
            wanted = ", ".join(f"{key}={value}" for key, value in self.limits.labels.items())
            raise NotAllowed(
                f"cannot create server '{spec.name}': "
                f"your token is for servers with the labels {wanted}"
            )
        if not self.limits.has_user(spec.user):
            raise NotAllowed(
                f"cannot create server '{spec.name}': "
                f"your token is for servers that run as {', '.join(self.limits.users)}"
            )

    def user(self, asked: str | None, default: str | None = None) -> str | None:
        """Return the user of the machine that a server runs as. Raises NotAllowed."""
        if not self.limits.users:
            if asked not in {None, default}:
                self.needs(Scope.ADMIN, f"run a server as user '{asked}'")
            return asked or default
        if asked is not None and asked not in self.limits.users:
            raise NotAllowed(
                f"cannot run a server as user '{asked}': "
                f"your token is for {', '.join(self.limits.users)}"
            )
        return asked or self.limits.users[0]

    def sees(self, snapshot: Snapshot) -> bool:
        """Whether this server is theirs, and within their limits."""
        spec = snapshot.spec
        return spec.owner == self.owner and self.limits.holds(spec.name, spec.labels, spec.user)


ANYBODY: Final = Caller("anybody", Scope.ADMIN)
"""The caller if access control is off."""


@dataclass(frozen=True, slots=True)
class SessionUse:
    """When sessions were last used, by a clock that only runs while uses can be seen."""

    seconds: float
    """What this clock showed."""
    at: float
    """When it did, in seconds since the epoch."""
    used: Mapping[str, float]
    """When each session was last used, by its id."""


@dataclass(frozen=True, slots=True)
class Token:
    """A stored token: its permissions and its digest. Times are seconds since the epoch."""

    id: str
    """Part of the token itself, for lookup by key."""
    name: str
    digest: str = field(repr=False)
    """SHA-256 of the token in hexadecimal; safe, since the token is random enough."""
    scope: Scope
    limits: TokenLimits
    created_at: float
    created_by: str
    expires_at: float | None = None
    """None: never."""
    last_used_at: float | None = None
    """To the minute; None: never."""
    owner: Owner = LOCAL
    """The owner of the servers that it is for."""

    @property
    def caller(self) -> Caller:
        """The caller that presents this token."""
        return Caller(
            f"token:{self.name}", self.scope, self.limits, self.owner, until=self.expires_at
        )

    def expired(self, now: float) -> bool:
        """Whether the token has expired."""
        return self.expires_at is not None and self.expires_at <= now


@dataclass(frozen=True, slots=True)
class Session:
    """A browser that may use one server's Lab, or sign in to Labs, without its cookie.

    Times in seconds since the epoch.
    """

    id: str
    digest: str = field(repr=False)
    """SHA-256 of the cookie in hexadecimal."""
    server: QualifiedName | None
    """None: the browser is signed in at the bare host, and so at all Labs that it may manage."""
    actor: str
    """Who made the link that the browser opened, as in events."""
    created_at: float
    expires_at: float
    owner: Owner = LOCAL
    """The owner of the server, or servers."""
    scope: Scope = Scope.MANAGE
    limits: TokenLimits = EVERYTHING
    """Those of whoever made the link; a session for one Lab has no use for them."""
    parent: str | None = None
    """The id of the session at the bare host that this one follows from, and ends with."""

    @property
    def caller(self) -> Caller:
        """The caller whose permissions a session at the bare host has."""
        return Caller(self.actor, self.scope, self.limits, self.owner, until=self.expires_at)

    def expired(self, now: float) -> bool:
        """Whether the session has expired."""
        return self.expires_at <= now
