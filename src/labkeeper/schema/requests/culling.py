"""The request to postpone culling."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from labkeeper.schema.requests.base import Request, such_as
from labkeeper.schema.types import Duration


class SnoozeRequest(Request):
    """How long to postpone culling."""

    model_config = ConfigDict(json_schema_extra=such_as({"for": "2h"}, {"for": 0}))

    time: Duration = Field(
        validation_alias="for",
        description="Time from now, as `2h`; 0 ends it. At most what the keeper allows.",
    )
