"""Who is at the other end of a connection, and whether it may ask."""

from __future__ import annotations

import mmap
import os
import socket
import struct

from .marks import MARK, stat

_CREDENTIALS = struct.Struct("3i")
"""pid, uid, gid: `struct ucred` of unix(7)."""
_LARGEST = 8 * 1024 * 1024
"""Bytes of an environment; Linux gives a program less, if its stack has the usual limit."""


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
    asks = pid
    while pid > 1:
        size, marked = _environment(pid)
        if pid == asks and size == 0:
            raise PermissionError(f"process {pid} has cleared its environment")
        if pid == os.getpid() or marked:
            raise PermissionError("a server must not ask for others")
        pid = int(stat(pid)[1])


def _environment(pid: int) -> tuple[int | None, bool]:
    """Give the bytes of the environment of a process, and whether our mark is in it; None, and no, where it is closed to us.

    A keeper closes its own (`privileges.hide`) to all but root, and who started it may be of another user. What is read is gone
    afterwards: a copy in memory that is merely free would be our children's, and there are secrets in it.
    """
    try:
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as stream, mmap.mmap(-1, _LARGEST) as memory:
            # A NUL stands before each variable, before the first one too.
            end = count = 1
            while count:
                with memoryview(memory) as whole, whole[end:] as rest:
                    count = stream.readinto(rest)
                end += count
            if end == _LARGEST:
                raise OSError(f"process {pid} has too large an environment")
            return end - 1, memory.find(os.fsencode(f"\0{MARK}={_server_dirs()}/"), 0, end) >= 0
    except PermissionError:
        return None, False


def _server_dirs() -> str:
    """Give the keeper's runtime directory; a keeper may itself run in the server of another one."""
    return os.path.dirname(os.path.dirname(os.getcwd()))
