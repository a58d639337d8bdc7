"""Commands to servers: each is confirmed if it ends something, and then given as by the API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from flask import Response, request
from werkzeug.exceptions import NotFound

from labkeeper.api.handlers import servers
from labkeeper.api.handlers.common import Answer, find_server
from labkeeper.api.handlers.sign_in import HOME
from labkeeper.api.services import Services
from labkeeper.core.errors import BackendError, InvalidSpec, LabkeeperError, RequestError
from labkeeper.core.server import Kernel, Snapshot
from labkeeper.schema.queries import ServerPath, StartQuery, StopQuery
from labkeeper.schema.requests.servers import RestartRequest
from labkeeper.web.pages import Content, html, notices, redirect, wants_piece, whole

_AT_ONCE: Final = StopQuery(wait=0)
_MOST: Final = 200
"""Servers in one command, as in a request for many."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command, in the words of its pages."""

    verb: str
    done: str
    """What is true of a server that has got it."""
    give: Callable[[Services, ServerPath], Answer]
    ends: bool = True
    """Whether it ends running kernels, so that somebody is asked first."""
    loses: str = ""
    """What else is lost by it."""


def _start(services: Services, path: ServerPath) -> Answer:
    return servers.start_server(services, path, StartQuery(wait=0))


def _stop(services: Services, path: ServerPath) -> Answer:
    return servers.stop_server(services, path, _AT_ONCE)


def _restart(services: Services, path: ServerPath) -> Answer:
    return servers.restart_server(services, path, RestartRequest(), StartQuery(wait=0))


def _delete(services: Services, path: ServerPath) -> Answer:
    return servers.delete_server(services, path, _AT_ONCE)


COMMANDS: Final = {
    "start": Command("Start", "starts", _start, ends=False),
    "stop": Command("Stop", "is being stopped", _stop),
    "restart": Command("Restart", "restarts", _restart),
    "delete": Command(
        "Delete", "is being deleted", _delete, loses="Its settings and its log are removed."
    ),
}
"""By the last segment of their addresses."""


def confirm(services: Services, name: str, command: str) -> Response:
    """Ask whether to give a command to a server, and say what is lost by it."""
    return _question(services, _command(command), command, [find_server(services, _path(name))])


def give(services: Services, name: str, command: str) -> Response:
    """Give a command to a server."""
    return _given(services, _command(command), [name])


def give_many(services: Services, command: str) -> Response:
    """Give a command to the chosen servers; ask first if something would be lost by it."""
    chosen = _command(command)
    names = list(dict.fromkeys(request.form.getlist("name")))
    if not names:
        raise InvalidSpec.of("name", "choose servers first")
    if len(names) > _MOST:
        raise InvalidSpec.of("name", f"at most {_MOST} servers at once")
    if chosen.ends and "confirmed" not in request.form:
        found = [find_server(services, _path(name)) for name in names]
        return _question(services, chosen, command, found)
    return _given(services, chosen, names)


def _command(name: str) -> Command:
    if name not in COMMANDS:
        raise NotFound
    return COMMANDS[name]


def _path(name: str) -> ServerPath:
    return ServerPath(name=name)


def _question(
    services: Services, command: Command, address: str, found: Sequence[Snapshot]
) -> Response:
    kernels = _kernels(services, found[0]) if len(found) == 1 else None
    counted = [services.usage(snapshot) for snapshot in found]
    given = {
        "command": command,
        "address": address,
        "names": [snapshot.name for snapshot in found],
        "kernels": kernels,
        "count": sum(s.load.kernels for s in counted if s is not None and s.load is not None),
    }
    return html(whole(services, Content(f"{command.verb}?", "confirm.html", given=given)))


def _kernels(services: Services, snapshot: Snapshot) -> list[Kernel] | None:
    """Return a server's kernels; None if they are unknown."""
    if snapshot.endpoint is None:
        return []
    try:
        return services.probe.kernels(snapshot.endpoint)
    except BackendError:
        return None


def _given(services: Services, command: Command, names: Sequence[str]) -> Response:
    errors: list[LabkeeperError] = []
    for name in names:
        try:
            # The rule of a route for many says nothing about each of them.
            find_server(services, _path(name))
            command.give(services, _path(name))
        except (RequestError, BackendError) as error:
            errors.append(error)
    if len(names) == 1 and errors:
        raise errors[0]
    done = len(names) - len(errors)
    text = (
        f"Server {names[0]} {command.done}."
        if done == len(names) == 1
        else (f"{command.verb}: {done} of {len(names)} servers.")
    )
    if wants_piece() or errors:
        return notices(services, text, [error.message for error in errors])
    return redirect(HOME)
