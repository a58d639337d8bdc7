"""Who is at the other end of the Unix socket, as the kernel tells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PEER: Final = "labkeeper.peer"
"""Where the WSGI environment of a request over the Unix socket has its `Peer`. No header can set it."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A process that connected."""

    pid: int
    uid: int
    gid: int
