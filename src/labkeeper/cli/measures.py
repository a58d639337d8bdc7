"""What servers use: how to request it, and as text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from labkeeper.core.lifecycle import State

if TYPE_CHECKING:
    from labkeeper.client import Server, Usage

MEASURED_WITHIN: Final = 0.5
"""Seconds."""


def measured(ask: Callable[[], Sequence[Server]]) -> Sequence[Server]:
    """Request servers, again if a running one has no sample yet: requests start sampling."""
    servers = ask()
    if any(server.state == State.RUNNING and server.usage is None for server in servers):
        time.sleep(MEASURED_WITHIN)
        servers = ask()
    return servers


def memory_of(usage: Usage) -> int:
    """Return bytes, with shared memory divided: group counts and resident sizes do not compare."""
    return usage.memory if usage.memory_proportional is None else usage.memory_proportional


def mib(size: int) -> str:
    """Return a size as text."""
    return f"{size / 2**20:.0f} MiB"


def cpus(usage: Usage) -> str:
    """Return the number of busy processors as text."""
    return "-" if usage.cpus is None else f"{usage.cpus:.2f}"
