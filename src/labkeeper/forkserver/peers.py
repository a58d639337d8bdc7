"""Identity of the process at the other end of a connection, and its permission to ask."""

from __future__ import annotations

import mmap
import os
import socket
import struct

from .marks import MARK, stat

_CREDENTIALS = struct.Struct("3i")
"""pid, uid, gid: `struct ucred` of unix(7)."""
_LARGEST = 8 * 1024 * 1024
"""Maximum bytes of an environment; with the usual stack limit, Linux allows fewer."""


def credentials(connection: socket.socket) -> tuple[int, int, int]:
    """Return the pid, user and group of the process that connected, or that listens."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(found)
    return pid, uid, gid


def check(connection: socket.socket, keeper: int, server_dirs: str) -> None:
    """Raise PermissionError unless the peer is a keeper.

    A keeper runs as the user `keeper` and does not descend from one of its servers, whose private
    directories are below `server_dirs`. May raise other OSErrors.
    """
    pid, uid, _ = credentials(connection)
    if uid != keeper:
        raise PermissionError(f"process {pid} belongs to user {uid}")
    # Descendants of a forked server stay below this process, their subreaper; those of an executed
    # one carry the mark, or their parents do. An ended process is refused too.
    asks = pid
    while pid > 1:
        size, marked = _environment(pid, server_dirs)
        if pid == asks and size == 0:
            raise PermissionError(f"process {pid} has cleared its environment")
        if pid == os.getpid() or marked:
            raise PermissionError("a server must not ask for others")
        pid = stat(pid).parent


def _environment(pid: int, server_dirs: str) -> tuple[int | None, bool]:
    """Return an environment's size in bytes and whether it has a mark; None, False if hidden.

    A keeper hides its own from all but root (`privileges.hide`), and its parent may be another
    user's. The bytes read do not stay: freed memory would be inherited by children, and they hold
    secrets.
    """
    try:
        with (
            open(f"/proc/{pid}/environ", "rb", buffering=0) as stream,
            mmap.mmap(-1, _LARGEST) as memory,
        ):
            # A NUL precedes each variable, including the first.
            end = count = 1
            while count:
                with memoryview(memory) as whole, whole[end:] as rest:
                    count = stream.readinto(rest)
                end += count
            if end == _LARGEST:
                raise OSError(f"process {pid} has too large an environment")
            return end - 1, memory.find(os.fsencode(f"\0{MARK}={server_dirs}/"), 0, end) >= 0
    except PermissionError:
        return None, False
