"""Who is at the other end of a connection, and whether it may ask."""

from __future__ import annotations

import os
import socket
import struct
from typing import Optional

from .identity import MARK, stat

_CREDENTIALS = struct.Struct("3i")
"""pid, uid, gid: `struct ucred` of unix(7)."""


def peer(connection: socket.socket) -> tuple[int, int]:
    """Give the pid and the user of the process that has connected, or that listens."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(credentials)
    return pid, uid


def check(connection: socket.socket) -> None:
    """Let only a keeper in: a process of our own user that does not stem from a server. Raises OSError (PermissionError)."""
    pid, uid = peer(connection)
    if uid != os.geteuid():
        raise PermissionError(f"process {pid} belongs to user {uid}")
    # What stems from a server that was forked here stays below us, since we are its subreaper; what stems from one that was
    # executed carries the mark, or its parents do. A process that is gone already is not let in either.
    if _environment(pid) == b"":
        raise PermissionError(f"process {pid} has cleared its environment")
    while pid > 1:
        if pid == os.getpid() or _is_marked(pid):
            raise PermissionError("a server must not ask for others")
        pid = int(stat(pid)[1])


def _environment(pid: int) -> Optional[bytes]:
    """Give the environment of a process; None where it is closed to us.

    A keeper closes its own (`privileges.hide`), and who started it may be of another user.
    """
    try:
        with open(f"/proc/{pid}/environ", "rb") as stream:
            return stream.read()
    except PermissionError:
        return None


def _is_marked(pid: int) -> bool:
    variables = (_environment(pid) or b"").split(b"\0")
    return any(variable.startswith(os.fsencode(f"{MARK}={_rooms()}/")) for variable in variables)


def _rooms() -> str:
    """Give the keeper's runtime directory; a keeper may itself run in the server of another one."""
    return os.path.dirname(os.path.dirname(os.getcwd()))
