"""Whether and when a server is culled, and why."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from labkeeper.core.culling import CullState, Rule
from labkeeper.schema.answers.base import Answer, known


class Holder(Answer):
    """Something that currently keeps a server from being idle."""

    kind: str = Field(description="`kernel`, `connection`, `terminal` or `visitor`.")
    id: str
    reason: str


class IdleRule(Answer):
    """The outcome of a rule without further activity."""

    rule: Annotated[Rule, known(Rule)]
    limit: float = Field(description="Timeout, in seconds.")
    since: str | None = Field(
        description="When the timeout began; null while the server is in use."
    )
    warns_at: str | None
    stops_at: str | None


class Idle(Answer):
    """Whether and when a server will be stopped as idle, and why."""

    name: str
    state: Annotated[CullState, known(CullState)]
    reason: str = Field(description="Explanation, one sentence.")
    rule: Annotated[Rule, known(Rule)] | None = Field(
        description="The rule that would stop it first."
    )
    warns_at: str | None = Field(description="When the warning is issued.")
    stops_at: str | None = Field(
        description="When it will be stopped without further activity; null if it will not."
    )
    rules: list[IdleRule]
    held_by: list[Holder]
    last_used_at: str | None
    last_used: str | None = Field(description="What was last active.")
    snoozed_until: str | None
    looked_at: str | None = Field(
        description="When its activity was last polled; null if it is not polled."
    )


class IdleList(Answer):
    """All servers, the next to be stopped first."""

    servers: list[Idle]
