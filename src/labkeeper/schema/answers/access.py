"""Tokens, the caller, and links that open a Lab."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from labkeeper.core.access import Scope
from labkeeper.schema.answers.base import Answer, known


class Token(Answer):
    """A token, without its secret."""

    name: str
    owner: str = Field(description="Owner of the servers that it is for.")
    scope: Annotated[Scope, known(Scope)]
    servers: list[str] = Field(
        description="Name patterns, one of which must match. Empty: all servers."
    )
    labels: dict[str, str] = Field(description="Labels that a server must have.")
    users: list[str] = Field(
        description="Users that its servers may run as. Empty: the keeper's default."
    )
    created_at: str
    created_by: str
    expires_at: str | None = Field(description="Null: never.")
    expired: bool
    last_used_at: str | None = Field(description="Accurate to a minute; null: never.")


class NewToken(Token):
    """A new token, with its secret."""

    token: str = Field(
        repr=False, description="Sent as `Authorization: Bearer`. Shown only in this answer."
    )


class TokenList(Answer):
    """All tokens except the owner's, by name."""

    tokens: list[Token]


class Session(Answer):
    """A browser that may use one server's Lab, or is signed in at the bare host."""

    id: str
    server: str | None = Field(
        description="Null: it is signed in at the bare host, and so at all Labs of its permissions."
    )
    owner: str = Field(description="Owner of the servers.")
    actor: str = Field(description="Who made the link that the browser opened, as in events.")
    scope: Annotated[Scope, known(Scope)] = Field(
        description="What it may do: `manage` for one Lab, or that of whoever made the link."
    )
    parent: str | None = Field(
        description="Id of the session at the bare host that it follows from, and ends with."
    )
    created_at: str
    last_used_at: str = Field(description="Accurate to some seconds.")
    expires_at: str = Field(description="When it ends, if used until then.")


class SessionList(Answer):
    """All browser sessions, the oldest first."""

    sessions: list[Session]


class Caller(Answer):
    """The caller and their permissions."""

    actor: str = Field(description="Their name in events.")
    owner: str = Field(description="Owner of the servers that they manage.")
    scope: Annotated[Scope, known(Scope)]
    servers: list[str] = Field(description="Name patterns. Empty: all servers.")
    labels: dict[str, str] = Field(description="Labels that a server must have.")
    users: list[str] = Field(
        description="Users that their servers may run as. Empty: the keeper's default."
    )


class Link(Answer):
    """A link that opens a Lab, or signs a browser in, once."""

    url: str = Field(
        repr=False, description="To be opened in a browser, once. Grants access to whoever has it."
    )
    expires_at: str
