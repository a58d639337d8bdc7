"""The peer of a Unix socket, as reported by the kernel, regardless of the caller's claims."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import psutil

from labkeeper.forkserver.peers import credentials

PEER: Final = "labkeeper.peer"
"""The key in the WSGI environment. Request headers have `HTTP_...` keys, so none can forge it."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A connected process, with its user and group at the time of the connection."""

    pid: int
    uid: int
    gid: int


class Listener(socket.socket):
    """A listening Unix socket that identifies its peers as soon as it accepts them."""

    def accept(self) -> tuple[Connection, Any]:
        """See `socket.socket`. Raises OSError."""
        accepted, address = super().accept()
        return Connection(fileno=accepted.detach()), address


class Connection(socket.socket):
    """A connection of a Unix socket with a known peer."""

    def __init__(self, fileno: int) -> None:
        """Take over an accepted connection. Raises OSError."""
        super().__init__(fileno=fileno)
        try:
            self.peer = identify(self)
        except OSError:
            self.close()
            raise


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
