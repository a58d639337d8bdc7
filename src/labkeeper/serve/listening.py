"""The keeper's listening sockets: its port, its Unix socket, and the file that announces them."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from labkeeper import addresses, discovery
from labkeeper.core.errors import SettingsError
from labkeeper.identity import peers

_log = structlog.get_logger("labkeeper.serve")


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address and a port, and no other. Raises SettingsError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host} port {port}: {error.strerror}; "
            "choose another LABKEEPER_HOST or LABKEEPER_PORT"
        ) from error


def url_of(listener: socket.socket, scheme: str) -> str:
    """Return the URL of a listening socket, as seen from this machine."""
    host, port = listener.getsockname()[:2]
    return addresses.url(scheme, addresses.from_here(host), port)


@contextmanager
def local_socket(path: Path) -> Iterator[socket.socket | None]:
    """Yield the Unix socket for the keeper's user, or None: its path may be too long."""
    with peers.Listener(socket.AF_UNIX, socket.SOCK_STREAM) as unix_socket:
        try:
            path.unlink(missing_ok=True)  # Left by a killed keeper.
            _bind_private(unix_socket, path)
        except OSError as error:
            _log.warning(
                "there is no Unix socket; callers on this machine use the port",
                path=str(path),
                error=str(error),
            )
            yield None
            return
        try:
            yield unix_socket
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def _bind_private(unix_socket: socket.socket, path: Path) -> None:
    """Bind a socket that is created with mode 0600. Raises OSError."""
    before = os.umask(0o177)
    try:
        unix_socket.bind(os.fspath(path))
    finally:
        os.umask(before)


@contextmanager
def address(state_dir: Path, url: str, unix_socket: Path | None) -> Iterator[None]:
    """Announce the keeper's address in the state directory while the block runs."""
    try:
        discovery.write_address(state_dir, url, unix_socket)
    except OSError as error:
        _log.warning(
            "cannot record this keeper's address; the command line needs --url", error=str(error)
        )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Such as a disk that became read-only.
            discovery.remove_address(state_dir)
