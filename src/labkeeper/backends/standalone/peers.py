"""Who is at the other end of a connection, and whether it may ask."""

from __future__ import annotations

import os
import socket
import struct

from .child import MARK

_CREDENTIALS = struct.Struct("3i")
"""pid, uid, gid: `struct ucred` of unix(7)."""


def check(connection: socket.socket) -> None:
    """Let only a keeper in: a process of our own user that does not stem from a server. Raises PermissionError."""
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid != os.geteuid():
        raise PermissionError(f"process {pid} belongs to user {uid}")
    # What stems from a server that was forked here stays below us, since we are its subreaper; what stems from one that was
    # executed carries the mark, or its parents do. A process that is gone already is not let in either.
    if not _environment(pid):
        raise PermissionError(f"process {pid} hides its environment")
    while pid > 1:
        if pid == os.getpid() or _is_marked(pid):
            raise PermissionError("a server must not ask for others")
        pid = int(_stat(pid)[1])


def _environment(pid: int) -> bytes:
    with open(f"/proc/{pid}/environ", "rb") as stream:
        return stream.read()


def _is_marked(pid: int) -> bool:
    variables = _environment(pid).split(b"\0")
    return any(variable.startswith(os.fsencode(f"{MARK}={_rooms()}/")) for variable in variables)


def _rooms() -> str:
    """Give the keeper's runtime directory; a keeper may itself run in the server of another one."""
    return os.path.dirname(os.path.dirname(os.getcwd()))


def _stat(pid: int) -> list[str]:
    """Give the fields of proc(5) stat from the third one on; the name before them may hold spaces and parentheses."""
    with open(f"/proc/{pid}/stat", errors="replace") as stream:
        return stream.read().rpartition(")")[2].split()


def started(pid: int) -> str:
    """Give the moment a process started, in ticks since boot; with its pid that is its identity."""
    return _stat(pid)[19]
