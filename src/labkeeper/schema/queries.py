"""Path and query parameters as pydantic models."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from werkzeug.datastructures import MultiDict

from labkeeper.core.durations import LONGEST_TEXT, duration, moment
from labkeeper.core.errors import InvalidSpec
from labkeeper.core.lifecycle import State
from labkeeper.core.spec import NAME_PATTERN
from labkeeper.schema.types import OwnerName

_ABSENT: Final[Any] = None
"""See `requests`."""


class _Parameters(BaseModel):
    """Parameters of a path or a query; unknown names are rejected."""

    model_config = ConfigDict(extra="forbid", defer_build=True)


class ServerPath(_Parameters):
    """The server in a path."""

    # A longer name is not rejected; it just matches no server. The request line bounds it.
    name: str = Field(
        description="Name of the server.",
        json_schema_extra={"pattern": NAME_PATTERN, "maxLength": 63, "examples": ["default"]},
    )


class TokenPath(_Parameters):
    """The token in a path."""

    name: str = Field(
        description="Name of the token.",
        json_schema_extra={"pattern": NAME_PATTERN, "maxLength": 63},
    )


class SessionPath(_Parameters):
    """The browser session in a path."""

    id: str = Field(description="Id of the session.", json_schema_extra={"maxLength": 63})


class TicketPath(_Parameters):
    """The ticket in a link."""

    ticket: str = Field(description="What stands in the link.", json_schema_extra={"maxLength": 64})


BODILESS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
"""Request methods whose body is not read."""
Wait = Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)]


def of_query(model: type[BaseModel], args: MultiDict[str, str]) -> dict[str, Any]:
    """Return the query parameters; only fields of list type may repeat. Raises InvalidSpec."""
    lists = {
        name for name, field in model.model_fields.items() if get_origin(field.annotation) is list
    }
    for name, values in args.lists():
        if len(values) > 1 and name not in lists:
            raise InvalidSpec.twice(name)
    return {name: args.getlist(name) if name in lists else args[name] for name in args}


class StartQuery(_Parameters):
    """How long to wait for a server to be ready."""

    wait: Wait = Field(
        _ABSENT,
        description=(
            "Seconds to wait at most; 0: answer at once. Default: until it is ready or has failed."
        ),
    )


class StopQuery(_Parameters):
    """How to stop, and how long to wait for the end."""

    wait: Wait = Field(
        _ABSENT,
        description="Seconds to wait at most; 0: answer at once. Default: until it has ended.",
    )
    force: bool = Field(default=False, description="Kill at once instead of asking.")


class GetQuery(_Parameters):
    """What to wait for before answering."""

    wait_for: State = Field(
        _ABSENT, description="Answer when the server is in this state, or stopped or failed."
    )
    wait: Wait = Field(30.0, description="Seconds to wait for it at most.")


class ListQuery(_Parameters):
    """Which servers to list."""

    state: list[State] = Field(
        [], max_length=32, description="Only servers in one of these states."
    )
    label: list[Annotated[str, Field(max_length=320)]] = Field(
        [],
        max_length=16,
        description="Only servers with all of these labels: `key=value`, or `key` alone.",
    )
    owner: OwnerName = Field(
        _ABSENT, description="Only servers of this owner, among those that the caller may see."
    )
    limit: Annotated[int, Field(ge=1, le=1000)] = Field(200, description="Servers in one page.")
    cursor: Annotated[str, Field(max_length=200)] = Field(
        "", description="`next` of the page before."
    )


class EventQuery(_Parameters):
    """Which events to return."""

    after: Annotated[int, Field(ge=0, le=2**62)] = Field(
        _ABSENT,
        description=(
            "Only events that came after this one; 0 for all. "
            "Default: the newest ones; with `follow`, new ones."
        ),
    )
    owner: OwnerName = Field(
        _ABSENT, description="Only events of this owner, among those that the caller may see."
    )
    limit: Annotated[int, Field(ge=1, le=1000)] = Field(100, description="Events in one page.")
    follow: bool = Field(
        default=False,
        description=(
            "Go on with each new event, as Server-Sent Events; so does `Accept: text/event-stream`."
        ),
    )


class TokenQuery(_Parameters):
    """Which tokens to list."""

    owner: OwnerName = Field(
        _ABSENT, description="Only tokens of this owner, among those that the caller may see."
    )


class SessionQuery(_Parameters):
    """Which browser sessions to list."""

    owner: OwnerName = Field(
        _ABSENT,
        description="Only those for servers of this owner, among those that the caller may see.",
    )


def _since(given: object) -> timedelta | datetime:
    text = str(given)
    with suppress(ValueError):
        return timedelta(seconds=duration(text))
    with suppress(ValueError):
        return moment(text)
    raise ValueError(
        "must be a duration such as '90m', '2h' or '7d', of at most 366 days, "
        "or a time such as '2026-12-01T08:00:00Z'"
    )


class UsageQuery(_Parameters):
    """How much of a history of usage to return."""

    since: Annotated[
        timedelta | datetime,
        BeforeValidator(
            _since, json_schema_input_type=Annotated[str, Field(max_length=LONGEST_TEXT)]
        ),
    ] = Field(
        "1h",
        validate_default=True,
        description=(
            "Where to begin: a time (RFC 3339), or a duration before now, such as `90m` or `7d`."
        ),
    )


class LogQuery(_Parameters):
    """Which part of a log."""

    tail: Annotated[int, Field(ge=0, le=100_000)] = Field(200, description="Lines from the end.")
    follow: bool = Field(
        default=False, description="Go on with each new line until the server has ended."
    )
