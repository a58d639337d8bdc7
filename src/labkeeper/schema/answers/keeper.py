"""The keeper: its version, its health, and the kernels that are still to be ended."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from labkeeper.schema.answers.base import Answer


class OrphanedKernel(Answer):
    """A kernel of an ended server that its gateway still has to end."""

    kernel_id: str
    gateway_url: str
    server: str = Field(
        description=(
            "Server that started it; may have been deleted. "
            "`NAME.OWNER`, unless its owner is `local`."
        )
    )
    since: str


class OrphanedKernelList(Answer):
    """Orphaned kernels, oldest first."""

    orphaned_kernels: list[OrphanedKernel]


class Version(Answer):
    """Name and version of this software."""

    name: Literal["labkeeper"]
    version: str


class Health(Answer):
    """The health of the keeper."""

    status: Literal["ok"]
