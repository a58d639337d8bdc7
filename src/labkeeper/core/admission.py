"""Whether a command may start a server. Each check raises an error with the reason if not."""

from __future__ import annotations

from typing import Final

from labkeeper.core.errors import BackendUnavailable, CapacityReached, Conflict
from labkeeper.core.lifecycle import Goal
from labkeeper.core.policy import Policy
from labkeeper.core.ports import Capacity
from labkeeper.core.server import Snapshot
from labkeeper.core.spec import ServerName, ServerSpec

RETRY_AFTER: Final = 5
"""`Retry-After` in seconds if the maximum of servers is reached."""
KNOWN_FOR_EACH: Final = 10
"""Maximum number of known servers, at rest or not, for each that may be active."""


def check_may_start(snapshot: Snapshot, *, closing: bool) -> None:
    """Reject a start of a server that is being deleted, and one during shutdown."""
    if snapshot.goal is Goal.ABSENT:
        raise Conflict(
            f"cannot start server '{snapshot.name}': it is being deleted; retry when it is gone"
        )
    if closing:
        raise BackendUnavailable(
            f"cannot start server '{snapshot.name}': the keeper is shutting down"
        )


def check_equal(known: Snapshot, spec: ServerSpec) -> None:
    """Reject a spec that differs from that of the server with its name."""
    differs = (known.revised or known.spec).differs(spec)
    if differs:
        raise Conflict(
            f"cannot start server '{spec.name}': "
            f"the name is taken by a server that differs in {', '.join(differs)}; "
            "delete that one first, or choose another name",
            differs=list(differs),
        )


def check_known(name: ServerName, known: int, policy: Policy) -> None:
    """Reject a new name if too many are known: failed servers take memory, too."""
    most = KNOWN_FOR_EACH * policy.max_servers
    if known >= most:
        raise CapacityReached(
            f"cannot start server '{name}': {most} servers are known, running or not "
            f"({KNOWN_FOR_EACH} for each of LABKEEPER_MAX_SERVERS); DELETE some",
            retry_after=RETRY_AFTER,
        )


def check_active(name: ServerName, active: int, policy: Policy) -> None:
    """Reject a start if too many servers are neither stopped nor failed."""
    if active >= policy.max_servers:
        raise CapacityReached(
            f"cannot start server '{name}': "
            f"{active} of at most {policy.max_servers} are active; "
            "stop one, or try later",
            retry_after=RETRY_AFTER,
        )


def check_memory(name: ServerName, memory: Capacity | None, policy: Policy) -> None:
    """Reject a start with less memory free than must stay free; None: memory is unknown."""
    if memory is None:
        return
    reserve = policy.min_free.of(memory.total)
    if memory.available < reserve:
        raise CapacityReached(
            f"cannot start server '{name}': "
            f"{memory.available >> 20} MiB of memory are available, "
            f"and {reserve >> 20} MiB must stay free (LABKEEPER_MIN_FREE_MEMORY); "
            "stop a server, or try later",
            retry_after=RETRY_AFTER,
            available=memory.available,
            reserve=reserve,
        )


def check_kernels_can_be_kept(snapshot: Snapshot, revised: ServerSpec | None) -> None:
    """Reject a restart that is to keep kernels if no kernel can outlive its server."""
    gateway = snapshot.spec.gateway
    if gateway is None:
        raise Conflict(
            f"cannot keep the kernels of server '{snapshot.name}': they run beside it, "
            "not on a gateway, and end with it; restart without keep_kernels"
        )
    if revised is not None and (revised.gateway is None or revised.gateway.url != gateway.url):
        raise Conflict(
            f"cannot keep the kernels of server '{snapshot.name}': "
            f"they cannot move from {gateway.url} to another gateway; restart without keep_kernels"
        )
