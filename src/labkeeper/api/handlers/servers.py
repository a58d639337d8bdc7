"""Servers: create, list, show, start, stop, restart, delete."""

from __future__ import annotations

import base64
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Final

from labkeeper.api import problems
from labkeeper.api.handlers.common import (
    Answer,
    ask,
    caller,
    find_server,
    json_answer,
    origin,
    patience,
    server_answer,
    visible_servers,
    wait_until,
)
from labkeeper.api.services import Services
from labkeeper.core.errors import (
    Conflict,
    InvalidSpec,
    LabkeeperError,
)
from labkeeper.core.lifecycle import AT_REST, RETURNS, Event, State
from labkeeper.core.messages import Create, Order, Reply
from labkeeper.core.server import Snapshot
from labkeeper.core.spec import QualifiedName, ServerName, ServerSpec
from labkeeper.runtime import Watch
from labkeeper.schema.answers.servers import BulkResult, BulkResults, KernelList, Server, ServerList
from labkeeper.schema.queries import (
    GetQuery,
    ListQuery,
    ServerPath,
    StartQuery,
    StopQuery,
)
from labkeeper.schema.requests.servers import BulkRequest, RestartRequest, ServerRequest

_SETTLED: Final = AT_REST | {State.RUNNING}


_RETRY_AFTER: Final = {"Retry-After": "1"}


def create_server(services: Services, body: ServerRequest, query: StartQuery) -> Answer:
    """Create a server and start it.

    Idempotent: the same request finds the same server (200). 202 if `wait` ended before it was
    ready.
    """
    spec = body.spec(services.defaults, caller(), services.backend.validate)
    return _start(services, spec.qualified_name, _creation(services, spec), query)


def list_servers(services: Services, query: ListQuery) -> Answer:
    """List servers, by name."""
    after = _decode_cursor(query.cursor)
    found = [s for s in visible_servers(services) if s.name > after and _matches(s, query)]
    page, more = found[: query.limit], len(found) > query.limit
    listed = ServerList(
        servers=[server_answer(services, s) for s in page],
        next=_encode_cursor(page[-1].name) if more else None,
    )
    return json_answer(listed)


def get_server(services: Services, path: ServerPath, query: GetQuery) -> Answer:
    """Return a server's current state.

    With `wait_for`, wait until it is in that state or at rest, but no longer than `wait`.
    """
    if query.wait_for is None:
        return json_answer(server_answer(services, find_server(services, path)))
    rest = AT_REST | {query.wait_for}
    with services.keeper.watch(caller().qualified(path.name)) as watch:
        snapshot = find_server(services, path)
        with patience(services, query.wait) as wait:
            snapshot, _ = wait_until(watch, lambda s: s.state in rest, first=snapshot, timeout=wait)
    return json_answer(server_answer(services, snapshot))


def delete_server(services: Services, path: ServerPath, query: StopQuery) -> Answer:
    """Stop a server and delete it; the answer is its last state, with its stop report."""
    return _stop(services, path, query, Event.DELETE)


def stop_server(services: Services, path: ServerPath, query: StopQuery) -> Answer:
    """Stop a server and keep its spec, so that it can be started again."""
    return _stop(services, path, query, Event.STOP)


def start_server(services: Services, path: ServerPath, query: StartQuery) -> Answer:
    """Start a server that was stopped or has failed."""
    name = caller().qualified(path.name)
    return _start(services, name, Order(name, Event.START, origin=origin()), query)


def start_many(services: Services, body: BulkRequest, query: StartQuery) -> Answer:
    """Create and start many servers of one kind, as if each were requested alone, within one wait.

    200 if all are ready, 202 if some are still starting, 207 if any could not be started;
    `results` has the outcome of each.
    """
    specs = body.specs(services.defaults, caller(), services.backend.validate)
    seconds = services.start_wait if query.wait is None else query.wait
    with ExitStack() as watching, patience(services, seconds) as wait:
        end = time.monotonic() + wait
        begun = [_begun(services, spec, watching) for spec in specs]
        results = [
            _result(services, spec.name, start, end)
            for spec, start in zip(specs, begun, strict=True)
        ]
    return json_answer(
        BulkResults(results=results), _overall([result.status for result in results])
    )


def restart_server(
    services: Services, path: ServerPath, body: RestartRequest, query: StartQuery
) -> Answer:
    """Restart a server, or start it if it is not running, with the changes that the body asks for.

    With `keep_kernels`, its kernels on a gateway keep running, and the new launch takes them over
    with their sessions.
    """
    snapshot = find_server(services, path)
    known = snapshot.revised or snapshot.spec
    revised = body.revise(known, services.defaults, caller(), services.backend.validate)
    order = Order(
        snapshot.qualified_name,
        Event.RESTART_KEEPING_KERNELS if body.keep_kernels else Event.RESTART,
        revised=revised,
        origin=origin(),
    )
    return _start(services, snapshot.qualified_name, order, query)


def rotate_token(services: Services, path: ServerPath, query: StartQuery) -> Answer:
    """Restart a running server with a new Jupyter token.

    Kernels on a gateway keep running, with their sessions; local kernels end.
    """
    snapshot = find_server(services, path)
    if snapshot.endpoint is None:
        raise Conflict(
            f"cannot rotate the token of server '{snapshot.name}': it is {snapshot.state}, "
            "and its next launch gets a new one anyway"
        )
    event = Event.RESTART if snapshot.spec.gateway is None else Event.RESTART_KEEPING_KERNELS
    order = Order(
        snapshot.qualified_name, event, origin=replace(origin(), reason="its token is rotated")
    )
    return _start(services, snapshot.qualified_name, order, query)


def list_kernels(services: Services, path: ServerPath) -> Answer:
    """List the kernels of a running server. Does not count as activity."""
    snapshot = find_server(services, path)
    if snapshot.endpoint is None:
        raise Conflict(
            f"cannot list the kernels of server '{snapshot.name}': "
            f"it is {snapshot.state}, not running"
        )
    return json_answer(KernelList(kernels=services.probe.kernels(snapshot.endpoint)))


def _start(
    services: Services, name: QualifiedName, command: Create | Order, query: StartQuery
) -> Answer:
    seconds = services.start_wait if query.wait is None else query.wait
    with services.keeper.watch(name) as watch, patience(services, seconds) as wait:
        begun = _Begun(watch, ask(services, command))
        server, status = _outcome(services, begun, wait)
    location = {"Location": f"/api/servers/{server.name}"}
    return json_answer(
        server, status, location | _RETRY_AFTER if status == HTTPStatus.ACCEPTED else location
    )


def _creation(services: Services, spec: ServerSpec) -> Create:
    """Return the command that creates a server.

    Raises Conflict for one hidden from the caller; reveals only that its name is taken.
    """
    known = services.keeper.get(spec.qualified_name)
    if known is not None and not caller().sees(known):
        raise Conflict(f"cannot start server '{spec.name}': the name is taken; choose another one")
    return Create(spec, origin())


def _begun(services: Services, spec: ServerSpec, watching: ExitStack) -> _Begun | LabkeeperError:
    """Create one of many servers, waiting only for the fleet's reply."""
    watch = watching.enter_context(services.keeper.watch(spec.qualified_name))
    try:
        return _Begun(watch, ask(services, _creation(services, spec)))
    except LabkeeperError as error:
        return error


def _result(
    services: Services, name: ServerName, begun: _Begun | LabkeeperError, end: float
) -> BulkResult:
    """Wait until `end` for one of many; an error is returned, so that it delays no other."""
    if isinstance(begun, LabkeeperError):
        return _refused(name, begun)
    try:
        server, status = _outcome(services, begun, max(0.0, end - time.monotonic()))
    except LabkeeperError as error:
        return _refused(name, error)
    return BulkResult(name=name, status=status, server=server, problem=None)


def _outcome(services: Services, begun: _Begun, wait: float) -> tuple[Server, HTTPStatus]:
    """Return the outcome of a start after `wait` seconds at most. Raises ServerFailed, Conflict."""
    snapshot, settled = wait_until(
        begun.watch,
        lambda s: s.state in _SETTLED,
        first=begun.reply.snapshot,
        timeout=wait,
    )
    if snapshot.state is State.FAILED:
        raise problems.start_failed(snapshot)
    if settled and snapshot.state is State.STOPPED:
        raise Conflict(f"cannot start server '{snapshot.name}': it was stopped meanwhile")
    ready = HTTPStatus.CREATED if begun.reply.created else HTTPStatus.OK
    return server_answer(services, snapshot), ready if settled else HTTPStatus.ACCEPTED


def _stop(services: Services, path: ServerPath, query: StopQuery, event: Event) -> Answer:
    name = caller().qualified(path.name)
    seconds = services.stop_wait if query.wait is None else query.wait
    with services.keeper.watch(name) as watch, patience(services, seconds) as wait:
        order = Order(name, event, force=query.force, origin=origin())
        first = ask(services, order).snapshot
        snapshot, ended = wait_until(
            watch,
            lambda s: s.state is State.STOPPED or s.goal in RETURNS,
            first=first,
            timeout=wait,
        )
    if snapshot.goal in RETURNS:
        raise Conflict(f"cannot stop server '{snapshot.name}': it was started again meanwhile")
    return json_answer(
        server_answer(services, snapshot),
        HTTPStatus.OK if ended else HTTPStatus.ACCEPTED,
        {} if ended else _RETRY_AFTER,
    )


@dataclass(frozen=True, slots=True)
class _Begun:
    """A start that the fleet has accepted."""

    watch: Watch
    reply: Reply


def _refused(name: ServerName, error: LabkeeperError) -> BulkResult:
    problem = problems.body_of(error)
    return BulkResult(name=name, status=problem["status"], server=None, problem=problem)


def _overall(statuses: Collection[int]) -> HTTPStatus:
    """Return the overall status of several results."""
    if any(status >= HTTPStatus.BAD_REQUEST for status in statuses):
        return HTTPStatus.MULTI_STATUS
    return HTTPStatus.ACCEPTED if HTTPStatus.ACCEPTED in statuses else HTTPStatus.OK


def _matches(snapshot: Snapshot, query: ListQuery) -> bool:
    if query.owner not in {None, snapshot.spec.owner}:
        return False
    if query.state and snapshot.state not in query.state:
        return False
    for wanted in query.label:
        key, is_pair, value = wanted.partition("=")
        if key not in snapshot.spec.labels or (is_pair and snapshot.spec.labels[key] != value):
            return False
    return True


def _encode_cursor(name: ServerName) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode().rstrip("=")


def _decode_cursor(cursor: str) -> str:
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        return base64.b64decode(padded, altchars=b"-_", validate=True).decode("ascii")
    except ValueError:
        raise InvalidSpec.of("cursor", "must be the `next` of an earlier page") from None
