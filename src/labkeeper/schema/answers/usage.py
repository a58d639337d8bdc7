"""The usage of a server over time."""

from __future__ import annotations

from pydantic import Field

from labkeeper.schema.answers.base import Answer


class UsageHistory(Answer):
    """The usage of a server over time, in columns of equal length.

    A value is null if the server was not measured in the interval, for example because it or the
    keeper did not run. Columns begin with the first interval that has values, and end with the
    last.
    """

    since: str = Field(
        description="Where the answer begins: what was asked for, or as far back as it is kept."
    )
    until: str = Field(description="When the answer was made (RFC 3339, UTC).")
    resolution: int = Field(description="Length of an interval, in seconds.")
    start: str = Field(description="When the first interval of the columns began.")
    memory: list[int | None] = Field(
        description="Mean memory in each interval, in bytes, counted as in `usage` of a server."
    )
    memory_max: list[int | None] = Field(description="The most memory that was measured.")
    cpus: list[float | None] = Field(description="Mean number of busy processors.")
    cpus_max: list[float | None] = Field(
        description="The most busy processors, on average between two measurements."
    )
    kernels: list[int | None] = Field(
        description=(
            "The most kernels; null also if they were not asked for, "
            "as servers are only while their usage is requested."
        )
    )
    generation: list[int | None] = Field(
        description="Number of the launch; a new number means that the server was launched again."
    )
