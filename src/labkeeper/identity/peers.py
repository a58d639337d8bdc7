"""The peer of a Unix socket, as reported by the kernel, regardless of the caller's claims."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import psutil

from labkeeper.forkserver.peers import credentials

PEER: Final = "labkeeper.peer"
"""The key in the WSGI environment. Request headers have `HTTP_...` keys, so none can forge it."""
UNREAD: Final = "labkeeper.unread"
"""Another key: the request had a body, which was discarded."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A connected process, with its user and group at the time of the connection."""

    pid: int
    uid: int
    gid: int


def identify(connection: socket.socket) -> Callable[[], Peer | None]:
    """Return a function that returns the peer at each request, or None if it is unknown.

    It is unknown if the system does not report it, or once the process has ended: its pid may have
    been reused while another process keeps the connection.
    """
    if sys.platform != "linux":
        return _nobody
    peer = Peer(*credentials(connection))
    try:
        # It records the start time of the process.
        process = psutil.Process(peer.pid)
    except psutil.Error:
        return _nobody
    return lambda: peer if process.is_running() else None


def _nobody() -> None:
    return None
