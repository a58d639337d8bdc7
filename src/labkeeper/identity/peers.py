"""Who is at the other end of a Unix socket, as the kernel says, whatever the caller says."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import psutil

PEER: Final = "labkeeper.peer"
"""The key in the WSGI environment. Headers of a request have keys of their own, `HTTP_...`, so none can forge it."""
UNREAD: Final = "labkeeper.unread"
"""Another one: it says that the request had a body, of which nothing was kept."""
_CREDENTIALS: Final = struct.Struct("3i")
"""pid, uid, gid: `struct ucred` of unix(7)."""


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that has connected, and its user and group at that moment."""

    pid: int
    uid: int
    gid: int


def identify(connection: socket.socket) -> Callable[[], Peer | None]:
    """Find out who has connected; what is given says it for each request, and None where nobody can be named.

    That is so where the system does not tell, and when the process has ended: its pid may be somebody else's by then, while
    another process goes on with its connection.
    """
    if sys.platform != "linux":
        return _nobody
    peer = Peer(*_CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)))
    try:
        # It remembers when the process started.
        process = psutil.Process(peer.pid)
    except psutil.Error:
        return _nobody
    return lambda: peer if process.is_running() else None


def _nobody() -> None:
    return None
