"""Unix sockets in private directories, whatever the length of their paths."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path


def listen(directory: Path, name: str, *, user: tuple[int, int] | None = None) -> socket.socket:
    """Return a listening socket in a directory, accessible to one user only; ours, or `user`.

    A socket of the same name, such as a killed process leaves, is replaced. Raises OSError.
    """
    with _new(directory, name) as (listener, path):
        (directory / name).unlink(missing_ok=True)
        listener.bind(path)
        Path(path).chmod(0o600)
        if user is not None:
            os.chown(path, *user)
        # Whoever serves it may listen again. Until then others can already connect, and wait.
        listener.listen()
        return listener


def connect(directory: Path, name: str, *, timeout: float) -> socket.socket:
    """Return a connection to a socket in a directory, with a timeout in seconds. Raises OSError."""
    with _new(directory, name) as (connection, path):
        connection.settimeout(timeout)
        connection.connect(path)
        return connection


@contextlib.contextmanager
def _new(directory: Path, name: str) -> Iterator[tuple[socket.socket, str]]:
    """Yield a socket and a path for it; if the block raises, close the socket.

    The path is within the limit of Unix socket addresses, 107 bytes.
    """
    created = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        try:
            yield created, f"/proc/self/fd/{descriptor}/{name}"
        finally:
            os.close(descriptor)
    except OSError:
        created.close()
        raise
