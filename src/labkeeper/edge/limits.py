"""Limits of the edge, and its numbers."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import Final

_RESERVE: Final = 64
"""Descriptors for everything but connections."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may take. Times in seconds, sizes in bytes."""

    connections: int = 16_000
    connections_of_address: int = 2_000
    """Of one client's address."""
    requests_of_session: int = 512
    """Requests in progress and websockets of one browser session; a browser opens up to 255
    websockets."""
    head_within: float = 15.0
    """From the first byte of a head to its last."""
    idle: float = 75.0
    """Between two requests."""
    stalled: float = 60.0
    """Without progress of a body, or until a client that does not keep up with an answer has read
    enough of it: about 3 KB a second."""
    body_within: float = 60.0
    """From the head of a request to the keeper to the last byte of its body."""
    large_bodies: int = 64
    """Bodies of over 4 KiB that arrive for the keeper at once; each is kept in memory."""
    large_bodies_of_address: int = 16
    linger: float = 5.0
    """For which the rest of a refused body is read, so that its sender reads the answer."""
    upstream_idle: float = 5.0
    """After which an unused connection to the keeper or a Lab is closed."""
    hold: float = 5.0
    """For which requests wait for a keeper that restarts."""
    most_held: int = 512
    """Requests that wait at once."""
    ahead: int = 64 * 1024
    """Of a connection's input that are read before the current request is answered."""
    untaken: int = 256 * 1024
    """Of output above which the other side is not read."""


def allow_descriptors(limits: Limits) -> int:
    """Raise the limit of descriptors; return how many connections are possible: each needs two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * limits.connections + _RESERVE
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    else:
        allowed = wanted if soft == resource.RLIM_INFINITY else soft
    return max(16, min(limits.connections, (allowed - _RESERVE) // 2))
