"""Who may do what: scopes, the servers that a token is for, and the rules that both make. Decides; knows no secret."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Final

from labkeeper.core.errors import NotAllowed
from labkeeper.core.messages import HistoryEntry
from labkeeper.core.server import Snapshot
from labkeeper.core.spec import ServerName, ServerSpec


class Scope(StrEnum):
    """What a caller may do. Each covers those above it."""

    READ = "read"
    """See servers, their logs and their history; never what opens a Lab."""
    MANAGE = "manage"
    """Make, start, stop and delete servers, and open them."""
    ADMIN = "admin"
    """All: tokens, and what touches the machine beyond one server."""

    def covers(self, needed: Scope) -> bool:
        """Whether who has this scope may do what needs the other."""
        order = list(Scope)
        return order.index(self) >= order.index(needed)


@dataclass(frozen=True, slots=True)
class TokenLimits:
    """The servers that a caller's token is for; without any limit all of them, and the keeper itself."""

    servers: tuple[str, ...] = ()
    """Patterns of names, with `*` and `?`: one must fit."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that a server must have, all of them."""
    users: tuple[str, ...] = ()
    """Users of the machine: one must be whom a server runs as; the first one where its request names none."""

    @property
    def unlimited(self) -> bool:
        """Whether it holds everything."""
        return self == EVERYTHING

    def has_name(self, name: str) -> bool:
        """Whether servers of this name are within it, as far as names tell."""
        return not self.servers or any(fnmatchcase(name, pattern) for pattern in self.servers)

    def has_labels(self, labels: Mapping[str, str]) -> bool:
        """Whether servers with these labels are within it, as far as labels tell."""
        return self.labels.items() <= labels.items()

    def has_user(self, user: str | None) -> bool:
        """Whether servers that run as this user are within it, as far as users tell."""
        return not self.users or user in self.users

    def holds(self, name: str, labels: Mapping[str, str], user: str | None) -> bool:
        """Whether a server of this name, with these labels, that runs as this user is within it."""
        return self.has_name(name) and self.has_labels(labels) and self.has_user(user)


EVERYTHING: Final = TokenLimits()


def concerns(entry: HistoryEntry, server: ServerName | None, within: TokenLimits) -> bool:
    """Whether an entry is of one server, or of any, and within a reach; what is of no server is only for who sees all."""
    if server not in {None, entry.server}:
        return False
    return within.unlimited or (entry.server is not None and within.holds(entry.server, entry.labels, entry.user))


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks."""

    actor: str
    """As the history names them: `token:NAME`, `user:NAME` of this machine, `anybody` where access control is off."""
    scope: Scope
    limits: TokenLimits = EVERYTHING

    def needs(self, scope: Scope, what: str, **details: str) -> None:
        """Raise NotAllowed unless the caller's scope covers this one; `what` ends the sentence "cannot ..."."""
        if not self.scope.covers(scope):
            why = f"that needs the scope '{scope}', and yours is '{self.scope}'"
            raise NotAllowed(f"cannot {what}: {why}", scope=str(scope), **details)

    def needs_everything(self, what: str) -> None:
        """Raise NotAllowed where the caller is limited to some servers."""
        if not self.limits.unlimited:
            raise NotAllowed(f"cannot {what}: that needs a token without limits, and yours is for some servers only")

    def needs_name(self, name: str) -> None:
        """Raise NotAllowed where servers of this name are none of the caller's business, whether there is one or not."""
        if not self.limits.has_name(name):
            patterns = ", ".join(self.limits.servers)
            raise NotAllowed(f"cannot speak of server '{name[:63]}': your token is for servers named {patterns}")

    def needs_spec(self, spec: ServerSpec) -> None:
        """Raise NotAllowed where the caller may not make such a server."""
        self.needs_name(spec.name)
        if not self.limits.has_labels(spec.labels):
            wanted = ", ".join(f"{key}={value}" for key, value in self.limits.labels.items())
            raise NotAllowed(f"cannot make server '{spec.name}': your token is for servers with the labels {wanted}")
        if not self.limits.has_user(spec.user):
            raise NotAllowed(
                f"cannot make server '{spec.name}': your token is for those that run as {', '.join(self.limits.users)}"
            )

    def user(self, asked: str | None, default: str | None = None) -> str | None:
        """Return the user of the machine that a server is to run as. Raises NotAllowed."""
        if not self.limits.users:
            if asked not in {None, default}:
                self.needs(Scope.ADMIN, f"run a server as user '{asked}'")
            return asked or default
        if asked is not None and asked not in self.limits.users:
            raise NotAllowed(f"cannot run a server as user '{asked}': your token is for {', '.join(self.limits.users)}")
        return asked or self.limits.users[0]

    def sees(self, snapshot: Snapshot) -> bool:
        """Whether a server is within the caller's reach."""
        return self.limits.holds(snapshot.name, snapshot.spec.labels, snapshot.spec.user)


ANYBODY: Final = Caller("anybody", Scope.ADMIN)
"""Who asks where access control is off."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token as it is kept: what it allows, and by what it is known again. Times are seconds since the epoch."""

    id: str
    """Stands in the token itself, so that it is found without trying all of them."""
    name: str
    digest: str = field(repr=False)
    """SHA-256 of the token, in hexadecimal digits; it is random enough for that to tell nothing of it."""
    scope: Scope
    limits: TokenLimits
    created_at: float
    created_by: str
    expires_at: float | None = None
    """None: never."""
    last_used_at: float | None = None
    """To the minute; None: never."""

    @property
    def caller(self) -> Caller:
        """Who shows it."""
        return Caller(f"token:{self.name}", self.scope, self.limits)

    def expired(self, now: float) -> bool:
        """Whether its time is over."""
        return self.expires_at is not None and self.expires_at <= now
