"""The nested fields of a server's resource limits."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from labkeeper.schema.requests.base import ABSENT, Request


class LimitFields(Request):
    """Resource limits of a server with its kernels and terminals."""

    memory: Annotated[int, Field(ge=2**26, le=2**50)] = Field(
        ABSENT,
        description=(
            "Bytes of memory for the server with all its kernels and terminals; at least 64 MiB."
        ),
    )
    cpus: Annotated[float, Field(ge=0.01, le=10_000, allow_inf_nan=False)] = Field(
        ABSENT,
        description=(
            "Processors for the server with all its kernels and terminals; 1.5 is one and a half."
        ),
    )
    processes: Annotated[int, Field(ge=16, le=2**22)] = Field(
        ABSENT,
        description="Processes and threads of the server with all its kernels and terminals.",
    )
