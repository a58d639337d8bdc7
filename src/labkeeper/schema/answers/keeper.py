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


class Library(Answer):
    """A library that LABKEEPER_PRELOAD names."""

    name: str
    loaded: bool | None = Field(
        description="Whether kernels are forked with it; null while that is not known yet."
    )
    reason: str | None = Field(description="Why it is not loaded; null if it is.")


class Readiness(Health):
    """The health of the keeper with its watchers, and what it preloads."""

    preload: list[Library]
