"""Requests of keepers to their fork server."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from dataclasses import dataclass
from typing import Any

from . import peers, wire
from .wire import WireError

REQUEST_SECONDS = 1.0
"""Seconds in which a keeper must complete a request."""


@dataclass
class Request:
    """One request, and the connection for its answer."""

    connection: socket.socket
    message: dict[str, Any]
    files: list[int]

    def answer(self, message: dict[str, Any]) -> None:
        """Send an answer, if the keeper is still there."""
        with contextlib.suppress(OSError, WireError):
            wire.send(self.connection, message)

    def close(self) -> None:
        """Close the connection and all files."""
        self.connection.close()
        for file in self.files:
            os.close(file)


def accept(listener: socket.socket) -> Request | None:
    """Accept the next request; None if it is of others, or cannot be understood."""
    try:
        connection, _ = listener.accept()
    except OSError as error:
        print(f"[labkeeper] cannot accept: {error}", file=sys.stderr, flush=True)
        return None
    try:
        peers.check(connection, os.geteuid(), _server_dirs())
        return Request(connection, *wire.receive(connection, within=REQUEST_SECONDS))
    except (OSError, WireError, EOFError) as error:
        print(f"[labkeeper] refused a request: {error!r}", file=sys.stderr, flush=True)
        connection.close()
        return None


def _server_dirs() -> str:
    """Return the keeper's runtime directory; a keeper may itself run in another keeper's server."""
    return os.path.dirname(os.path.dirname(os.getcwd()))
