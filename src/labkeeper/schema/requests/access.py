"""Requests for access: tokens, and links that open a Lab."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from labkeeper.core.access import Scope, TokenLimits
from labkeeper.schema.requests.base import ABSENT, Request
from labkeeper.schema.types import Duration, Labels, LandingPage, Name, Pattern, User


class TokenRequest(Request):
    """A new token."""

    name: Name
    scope: Scope = Field(
        strict=False,
        description=(
            "What it allows, each with those before: `read`: to see servers, not to open them; "
            "`manage`: to make, stop and open them; `admin`: everything."
        ),
    )
    servers: Annotated[list[Pattern], Field(max_length=100)] = Field(
        [],
        description=(
            "Patterns of names, as `team-*`: only for servers of which one fits. Default: all."
        ),
    )
    labels: Labels = Field({}, description="Only for servers with all of these labels.")
    users: Annotated[list[User], Field(max_length=100)] = Field(
        [],
        description=(
            "Users of the machine that its servers run as; "
            "the first one where their request names none."
        ),
    )
    expires_in: Annotated[Duration, Field(gt=0)] = Field(
        ABSENT, description="Time until it expires, such as `30d`. Default: never."
    )

    @model_validator(mode="after")
    def _admins_are_not_limited(self) -> TokenRequest:
        if self.scope is Scope.ADMIN and not self.limits.unlimited:
            raise ValueError(
                "scope: an admin's token cannot be limited to some servers; choose `manage`"
            )
        return self

    @property
    def limits(self) -> TokenLimits:
        """The servers that the token may access."""
        return TokenLimits(tuple(self.servers), self.labels, tuple(self.users))


class SessionLinkRequest(Request):
    """A link that signs a browser in."""

    expires_in: Annotated[Duration, Field(gt=0, le=3600)] = Field(
        60.0, description="Time until it expires, used or not; at most `1h`."
    )

    @model_validator(mode="before")
    @classmethod
    def _no_body_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value


class LinkRequest(SessionLinkRequest):
    """A link that opens a Lab."""

    page: LandingPage = Field(
        ABSENT,
        description=(
            "Page to open, below the server's base_url, as `/lab/tree/a.ipynb`. "
            "Default: its default_url."
        ),
    )

    confirm: bool = Field(
        default=False,
        description=(
            "Whether the link first shows a page with a button, "
            "so that programs that follow links, such as mail scanners, do not use it up."
        ),
    )
