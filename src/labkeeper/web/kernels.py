"""Commands to the kernels of a server."""

from __future__ import annotations

from typing import Final

from flask import Response
from werkzeug.exceptions import NotFound

from labkeeper.api.handlers.common import find_server
from labkeeper.api.services import Services
from labkeeper.core.errors import Conflict
from labkeeper.core.server import Endpoint, Kernel
from labkeeper.schema.queries import ServerPath
from labkeeper.web.pages import ask, notices, redirect, wants_piece

_DONE: Final = {"interrupt": "was interrupted", "restart": "was restarted", "end": "was shut down"}
_VERBS: Final = {"restart": "Restart", "end": "Shut down"}
"""Of the commands that lose something."""


def confirm(services: Services, name: str, kernel: str, command: str) -> Response:
    """Ask whether to give a command to a kernel, and say what is lost by it."""
    if command not in _VERBS:
        raise NotFound
    _, found = _find(services, name, kernel, command)
    verb = _VERBS[command]
    return ask(
        services,
        f"{verb} the kernel {found.name[:80]} of {name}?",
        [f"It is {found.execution_state[:40]}. What it holds in memory is lost. Files stay."],
        verb=verb,
        back=f"/dashboard/servers/{name}",
        stays=True,
    )


def give(services: Services, name: str, kernel: str, command: str) -> Response:
    """Interrupt, restart or end a kernel."""
    if command not in _DONE:
        raise NotFound
    endpoint, found = _find(services, name, kernel, command)
    probe = services.probe
    match command:
        case "interrupt":
            probe.interrupt_kernel(endpoint, found.id)
        case "restart":
            probe.restart_kernel(endpoint, found.id)
        case _:
            probe.end_kernel(endpoint, found.id)
    if wants_piece():
        return notices(services, f"The kernel {_DONE[command]}.")
    return redirect(f"/dashboard/servers/{name}")


def _find(services: Services, name: str, kernel: str, command: str) -> tuple[Endpoint, Kernel]:
    """Return a kernel and its server. Raises Conflict if the server does not have it."""
    snapshot = find_server(services, ServerPath(name=name))
    if snapshot.endpoint is None:
        raise Conflict(f"cannot {command} a kernel of server '{name}': it is {snapshot.state}")
    found = next((k for k in services.probe.kernels(snapshot.endpoint) if k.id == kernel), None)
    if found is None:
        raise Conflict(f"cannot {command} this kernel: server '{name}' does not have it any more")
    return snapshot.endpoint, found
