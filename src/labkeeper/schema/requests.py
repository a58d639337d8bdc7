"""Request bodies: the one place where input is validated. Those about servers are in `servers`."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import AliasChoices, AliasGenerator, BaseModel, ConfigDict, Field, model_validator

from labkeeper.core.access import Scope, TokenLimits
from labkeeper.schema.types import Duration, Labels, LandingPage, Name, Pattern, User

# A missing field has its default; a `null` field breaks its type's rule. So these types are not
# optional although the default is None (pydantic does not check defaults), and
# `"gateway-url": null` differs from a missing field.
ABSENT: Final[Any] = None


def such_as(*bodies: Any) -> dict[str, Any]:
    """Return examples for the JSON schema."""
    return {"examples": list(bodies)}


class Request(BaseModel):
    """Accepts each field in snake_case and in kebab-case; rejects unknown ones."""

    model_config = ConfigDict(
        defer_build=True,
        extra="forbid",
        strict=True,
        alias_generator=AliasGenerator(
            validation_alias=lambda name: AliasChoices(name, name.replace("_", "-")),
        ),
    )


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


class LinkRequest(Request):
    """A link that opens a Lab."""

    expires_in: Annotated[Duration, Field(gt=0, le=3600)] = Field(
        60.0, description="Time until it expires, used or not; at most `1h`."
    )
    page: LandingPage = Field(
        ABSENT,
        description=(
            "Page to open, below the server's base_url, as `/lab/tree/a.ipynb`. "
            "Default: its default_url."
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _no_body_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value


class SnoozeRequest(Request):
    """How long to postpone culling."""

    model_config = ConfigDict(json_schema_extra=such_as({"for": "2h"}, {"for": 0}))

    time: Duration = Field(
        validation_alias="for",
        description="Time from now, as `2h`; 0 ends it. At most what the keeper allows.",
    )
