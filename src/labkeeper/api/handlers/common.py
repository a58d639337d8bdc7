"""Helpers that handlers share: the caller, waiting for a state, JSON answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlsplit

from flask import Response, g, request
from pydantic import BaseModel

from labkeeper import addresses
from labkeeper.api.auth import find
from labkeeper.api.services import Services
from labkeeper.api.streaming import LiveResponse, gone
from labkeeper.api.views import server_model
from labkeeper.core.access import Caller, Scope
from labkeeper.core.errors import (
    CapacityReached,
    NotAuthenticated,
    ServerNotFound,
)
from labkeeper.core.lifecycle import State
from labkeeper.core.messages import Create, Order, Origin, Reply, Snooze
from labkeeper.core.server import Endpoint, Snapshot, queue_of
from labkeeper.core.spec import Owner, QualifiedName
from labkeeper.edge.hosts import host_of
from labkeeper.identity.peers import PEER
from labkeeper.runtime import Watch
from labkeeper.schema.answers.servers import Server
from labkeeper.schema.queries import ServerPath

Answer = tuple[dict[str, Any], int, dict[str, str]]


_NO_OWNER: Final = Owner("")


_RETRY_AFTER: Final = 10
"""Seconds."""


LOOK_EVERY: Final = 1.0
"""Interval in seconds between checks whether a waiting caller is still connected."""


@contextmanager
def patience(services: Services, seconds: float) -> Iterator[float]:
    """Yield how long to wait: 0 if too many callers already wait, so that this one gets a 202."""
    waits = seconds > 0 and services.concurrency.acquire()
    try:
        yield seconds if waits else 0.0
    finally:
        if waits:
            services.concurrency.release()


def wait_until(
    watch: Watch, holds: Callable[[Snapshot], bool], *, first: Snapshot, timeout: float
) -> tuple[Snapshot, bool]:
    """Wait as `Watch.until` does, but no longer than the caller stays connected."""
    end = time.monotonic() + timeout
    caller_is_gone = gone()
    last, held = first, False
    while not held:
        left = end - time.monotonic()
        last, held = watch.until(holds, first=last, timeout=max(0.0, min(LOOK_EVERY, left)))
        if left <= 0 or caller_is_gone() or not caller().sees(last):
            break
    return _still_theirs(last), held


def _still_theirs(snapshot: Snapshot) -> Snapshot:
    """Check after a wait that the caller may still see the server.

    Raises NotAuthenticated, ServerNotFound.
    """
    if not g.still_valid():
        raise NotAuthenticated(
            "cannot authenticate: the token was revoked or has expired meanwhile"
        )
    if not caller().sees(snapshot):
        raise ServerNotFound.called(snapshot.name)
    return snapshot


def acquire_stream(services: Services, what: str, instead: str) -> None:
    """Take a slot for a long answer, until `concurrency.release`. Raises CapacityReached."""
    if not services.concurrency.acquire():
        raise CapacityReached(
            f"cannot {what}: too many callers are waiting or streaming; {instead}, or try later",
            retry_after=_RETRY_AFTER,
        )


def live_answer(services: Services, pieces: Iterator[str], content_type: str) -> Response:
    """Return a streaming answer; its end releases the slot that `acquire_stream` took."""
    answer = LiveResponse(pieces, content_type=content_type)
    answer.call_on_close(services.concurrency.release)
    return answer


def find_server(services: Services, path: ServerPath) -> Snapshot:
    """Return the server in a path. Raises ServerNotFound, even if only hidden from the caller."""
    return find(services.keeper, caller(), path.name)


def visible_owner(asked: str | None) -> Owner:
    """Return the owner to filter by: the caller's, or for another's an owner of nothing."""
    return caller().owner if asked in {None, caller().owner} else _NO_OWNER


def visible_servers(services: Services) -> list[Snapshot]:
    """Return the servers that the caller may see, by name."""
    sees = caller().sees
    return [snapshot for snapshot in services.keeper.all() if sees(snapshot)]


def server_answer(services: Services, snapshot: Snapshot) -> Server:
    """Return a server as its caller may see it: readers get no link to its Lab."""
    endpoint = snapshot.endpoint
    may_open = endpoint is not None and caller().scope.covers(Scope.MANAGE)
    lab_url = _lab_url(services, snapshot, endpoint) if may_open and endpoint is not None else None
    return server_model(
        snapshot, lab_url, _queue_position(services, snapshot), services.usage(snapshot)
    )


def _queue_position(services: Services, snapshot: Snapshot) -> int | None:
    if snapshot.state is not State.QUEUED:
        return None
    # For an outdated snapshot: the position that it would have now.
    others = [
        other for other in services.keeper.all() if other.qualified_name != snapshot.qualified_name
    ]
    return queue_of([*others, snapshot]).index(snapshot) + 1


def _lab_url(services: Services, snapshot: Snapshot, endpoint: Endpoint) -> str:
    page, mark, fragment = snapshot.spec.default_url.lstrip("/").partition("#")
    root = lab_root(services, snapshot.qualified_name, endpoint)
    if services.labs.serves(snapshot.qualified_name, endpoint):
        # The edge asks for a session, and no browser for the token.
        return f"{root}{page}{mark}{fragment}"
    query = f"{'&' if '?' in page else '?'}token={endpoint.token}"
    return f"{root}{page}{query}{mark}{fragment}"


def public_url(services: Services) -> str:
    """Return the URL, without a path, by which the caller reached the keeper, or could reach it."""
    return services.url if PEER in request.environ else request.host_url.rstrip("/")


def lab_root(services: Services, server: QualifiedName, endpoint: Endpoint) -> str:
    """Return the Lab's URL: at the edge, or the Lab's own.

    The latter has the host name of the request if the Lab listens there too.
    """
    if services.labs.serves(server, endpoint):
        return f"{lab_origin(services, server)}{endpoint.base_url.rstrip('/')}/"
    host = services.advertised_host
    if host is None:
        bound = endpoint.hostname
        # Over the Unix socket the request may have no host name.
        host = host_of(request.host) or "127.0.0.1" if addresses.is_wildcard(bound) else bound
    path = f"{endpoint.base_url.rstrip('/')}/"
    return addresses.url("https" if endpoint.secure else "http", host, endpoint.port, path)


def lab_origin(services: Services, server: QualifiedName) -> str:
    """Return the URL, without a path, at which the edge serves a Lab."""
    url = public_url(services)
    if services.advertised_host is not None:
        parts = urlsplit(url)
        url = addresses.url(parts.scheme, services.advertised_host, parts.port)
    return services.labs.origin(server, url)


def home_url(services: Services) -> str | None:
    """Return the URL, without a path, of the bare host; None if there is none."""
    return services.labs.home(public_url(services))


def ask(services: Services, command: Create | Order | Snooze) -> Reply:
    """Return the fleet's reply to a command; every command has one. Raises LabkeeperError."""
    reply = services.keeper.ask(command)
    if reply is None:
        raise TypeError("a command was not answered")
    return reply


def json_answer(
    model: BaseModel, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None
) -> Answer:
    """Return a model as a JSON answer."""
    return model.model_dump(mode="json"), int(status), headers or {}


def caller() -> Caller:
    """Return the caller of the current request."""
    found: Caller = g.caller
    return found


def origin() -> Origin:
    """Return the origin for events that follow from the current request."""
    return Origin(caller().actor, g.request_id)
