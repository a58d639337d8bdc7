"""Events and webhooks."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from labkeeper.core.messages import HistoryKind
from labkeeper.schema.answers.base import Answer, known


class Event(Answer):
    """An event."""

    id: int = Field(description="Increasing id, for `after` and `Last-Event-ID`.")
    at: str
    kind: Annotated[HistoryKind, known(HistoryKind)]
    server: str | None
    owner: str = Field(description="Owner of the server, or of the token that it is about.")
    generation: int | None
    message: str = Field(description="Description for people.")
    actor: str = Field(
        description=(
            "Who caused it: `token:NAME`, `user:NAME` of the keeper's machine, "
            "`anybody` if authentication is off, `culler`, or `keeper` if no caller did."
        )
    )
    reason: str = Field(description="Why, unless obvious.")
    request_id: str | None = Field(description="Id of the request that caused it.")
    details: dict[str, Any] = Field(description="Details for programs.")


class EventList(Answer):
    """Events, oldest first."""

    events: list[Event]
    next: int | None = Field(description="`after` of the next page; null if there is none yet.")


class Webhook(Answer):
    """The state of a webhook."""

    place: str = Field(description="Scheme and host of its URL.")
    delivered: int
    dead: int = Field(description="Events that were given up after failed deliveries.")
    pending: int
    error: str | None = Field(description="Why the last POST failed; null if it did not.")


class WebhookList(Answer):
    """All webhooks."""

    webhooks: list[Webhook]
