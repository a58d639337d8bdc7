"""Reserves the port of a starting server until the server listens there."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path
from typing import Final

from labkeeper.backends.local.accounts import find_user
from labkeeper.core.errors import BackendRefused
from labkeeper.core.server import FailureClass
from labkeeper.core.spec import ServerSpec

_UNPRIVILEGED: Final = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")


def hold_port(spec: ServerSpec) -> socket.socket:
    """Bind the port without listening, so that no program that asks for a free port receives it.

    On Linux, a bound socket that does not listen, with SO_REUSEADDR on both sides, allows another
    socket to bind and listen: Jupyter's, or that of any program that sets the option. Elsewhere it
    would be in the way and is closed at once. Raises BackendRefused if the port is taken, OSError
    if no socket can be created.
    """
    other = find_user(spec)
    family = socket.AF_INET6 if ":" in spec.ip else socket.AF_INET
    hold = socket.socket(family, socket.SOCK_STREAM)
    try:
        hold.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if other is not None and spec.port is not None and spec.port < _first_free_for_all():
            # The keeper is root and may bind it, but the server's user may not.
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        hold.bind((spec.ip, spec.port or 0))
    except PermissionError as error:
        hold.close()
        who = "the keeper's user" if other is None else f"user '{spec.user}'"
        raise BackendRefused(
            f"cannot start server '{spec.name}': {who} has no right to listen on port {spec.port} "
            f"on {spec.ip}; choose port {_first_free_for_all()} or higher",
            failure_class=FailureClass.CONFIG_ERROR,
        ) from error
    except OSError as error:
        hold.close()
        kind = (
            FailureClass.PORT_IN_USE
            if error.errno == errno.EADDRINUSE
            else FailureClass.CONFIG_ERROR
        )
        raise BackendRefused(
            f"cannot start server '{spec.name}': port {spec.port} on {spec.ip} is not available "
            f"({error.strerror}); end the program that holds it, or choose another port",
            failure_class=kind,
        ) from error
    return hold


def _first_free_for_all() -> int:
    """Return the lowest port that any user may listen on (ip(7))."""
    with contextlib.suppress(OSError, ValueError):
        return int(_UNPRIVILEGED.read_text())
    return 1024
