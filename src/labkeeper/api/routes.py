"""The API as one table: method, path, who may, handler, answers. Handlers ask the keeper and wait; they decide nothing."""

from __future__ import annotations

import base64
import binascii
import inspect
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final, TypeVar

from flask import Flask, Response, g, request
from pydantic import BaseModel, ValidationError

from labkeeper.api import problems
from labkeeper.api.access import Access
from labkeeper.api.answers import (
    Health,
    Idle,
    IdleList,
    KernelDebtList,
    KernelList,
    Server,
    ServerList,
    Version,
    debt_model,
    idle_model,
    kernel_model,
    server_model,
)
from labkeeper.api.requests import (
    GetQuery,
    ListQuery,
    LogQuery,
    RestartRequest,
    ServerPath,
    ServerRequest,
    SnoozeRequest,
    StartQuery,
    StopQuery,
    invalid,
    of_query,
)
from labkeeper.api.services import Services
from labkeeper.core.errors import BackendUnavailable, CapacityReached, Conflict, ServerNotFound
from labkeeper.core.lifecycle import MAY_EXIST, RETURNS, Event, State
from labkeeper.core.model import Create, Endpoint, Order, Origin, Reply, ServerName, Snapshot, Snooze
from labkeeper.core.ports import Watch
from labkeeper.core.times import spoken

Answer = tuple[dict[str, Any], int, dict[str, str]]
_SETTLED: Final = frozenset({State.RUNNING, State.FAILED, State.STOPPED})
_WILDCARDS: Final = frozenset({"", "0.0.0.0", "::", "*"})  # noqa: S104 - compared, not bound
_RETRY_AFTER: Final = {"Retry-After": "1"}
_FOLLOW_AGAIN: Final = 10
"""Seconds after which a place to follow in may be free."""
_LOOK_EVERY: Final = 1.0
"""Seconds between two looks at whether a caller still waits."""
_CHUNK: Final = 64 * 1024
"""Characters of a log that are sent together."""


class Api:
    """The handlers."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._keeper = services.keeper
        self._places = services.places

    # Servers

    def create_server(self, body: ServerRequest, query: StartQuery) -> Answer:
        """Make a server and start it.

        Idempotent: the same request finds the same server (200); 202 when `wait` ended before it was ready.
        """
        spec = body.spec(self._services.defaults)
        return self._start(spec.name, lambda: self._keeper.ask(Create(spec, _origin())), query)

    def list_servers(self, query: ListQuery) -> Answer:
        """List servers, by name."""
        after = _decode_cursor(query.cursor)
        found = [s for s in self._keeper.all() if s.name > after and _matches(s, query)]
        page, more = found[: query.limit], len(found) > query.limit
        listed = ServerList(servers=[self._model(s) for s in page], next=_encode_cursor(page[-1].name) if more else None)
        return _json(listed)

    def get_server(self, path: ServerPath, query: GetQuery) -> Answer:
        """Tell of one server; with `wait_for`, when it is in that state, or at rest in another, or `wait` is over."""
        name = ServerName(path.name)
        if query.wait_for is None:
            return _json(self._model(self._find(name)))
        rest = {query.wait_for, State.STOPPED, State.FAILED}
        with self._keeper.watch(name) as watch:
            snapshot = self._find(name)
            with self._patience(query.wait) as wait:
                snapshot, _ = self._until(watch, lambda s: s.state in rest, first=snapshot, timeout=wait)
        return _json(self._model(snapshot))

    def delete_server(self, path: ServerPath, query: StopQuery) -> Answer:
        """Stop a server, then forget it; the answer is the last word on it, with its stop report."""
        return self._stop(path, query, Event.DELETE)

    def stop_server(self, path: ServerPath, query: StopQuery) -> Answer:
        """Stop a server and keep its spec, so that it can be started again."""
        return self._stop(path, query, Event.STOP)

    def start_server(self, path: ServerPath, query: StartQuery) -> Answer:
        """Start a server that was stopped or has failed."""
        name = ServerName(path.name)
        return self._start(name, lambda: self._keeper.ask(Order(name, Event.START, origin=_origin())), query)

    def restart_server(self, path: ServerPath, body: RestartRequest, query: StartQuery) -> Answer:
        """Stop a server if it runs, and start it, otherwise than before where the body says so.

        With `keep_kernels` the kernels on its gateway live on, and are the new launch's, with their sessions.
        """
        snapshot = self._find(ServerName(path.name))
        revised = body.revise(snapshot.revised or snapshot.spec, self._services.defaults)
        order = Order(snapshot.name, Event.RENEW if body.keep_kernels else Event.RESTART, revised=revised, origin=_origin())
        return self._start(snapshot.name, lambda: self._keeper.ask(order), query)

    def get_logs(self, path: ServerPath, query: LogQuery) -> Response:
        """Give the log of a server, oldest line first; it is kept after the end of the server."""
        name = self._find(ServerName(path.name)).name
        backend = self._services.backend
        if query.follow:
            return self._follow(name, query.tail)
        text = "".join(f"{line}\n" for line in backend.log(name, query.tail))
        return Response(text, content_type="text/plain; charset=utf-8")

    def list_kernels(self, path: ServerPath) -> Answer:
        """List the kernels of a running server; asking does not count as activity."""
        snapshot = self._find(ServerName(path.name))
        if snapshot.endpoint is None:
            raise Conflict(f"cannot list the kernels of server '{snapshot.name}': it is {snapshot.state}, not running")
        kernels = self._services.probe.kernels(snapshot.endpoint)
        return _json(KernelList(kernels=[kernel_model(kernel) for kernel in kernels]))

    def list_kernel_debts(self) -> Answer:
        """List the kernels of servers that have ended which a gateway still has to end; that is done when it answers."""
        return _json(KernelDebtList(kernel_debts=[debt_model(debt) for debt in self._services.debts()]))

    # Culling

    def get_idle(self, path: ServerPath) -> Answer:
        """Ask a server how it is used, and explain whether it would be stopped for want of use, why, and when."""
        return _json(idle_model(self._services.culler.explain(self._find(ServerName(path.name)))))

    def list_idle(self) -> Answer:
        """Explain the same of all servers by the last look at each, those first that would be stopped first; stops nothing."""
        listed = [idle_model(self._services.culler.foretell(snapshot)) for snapshot in self._keeper.all()]
        return _json(IdleList(servers=sorted(listed, key=lambda one: (one.stops_at is None, one.stops_at, one.name))))

    def snooze_server(self, path: ServerPath, body: SnoozeRequest) -> Answer:
        """Put off the culling of a server from now; it holds over restarts of the server and of the keeper."""
        longest = self._services.max_snooze
        if body.time > longest:
            raise invalid("for", f"must be at most {spoken(longest)} (LABKEEPER_MAX_SNOOZE)")
        until = time.time() + body.time if body.time else None
        reply = _reply(self._keeper.ask(Snooze(ServerName(path.name), until, _origin())))
        return _json(idle_model(self._services.culler.foretell(reply.snapshot)))

    # The keeper

    def health(self) -> Answer:
        """Whether the keeper's process answers."""
        return _json(Health())

    def ready(self) -> Answer:
        """Whether the keeper takes commands."""
        if not self._keeper.alive:
            raise BackendUnavailable("cannot take commands: the keeper's fleet does not run")
        return _json(Health())

    def version(self) -> Answer:
        """Name this software and its version."""
        return _json(Version(version=self._services.version))

    # What they share

    @contextmanager
    def _patience(self, seconds: float) -> Iterator[float]:
        """Take a place to wait in for so long; where all are taken the caller gets its answer now (202), and may ask again."""
        waits = seconds > 0 and self._places.take()
        try:
            yield seconds if waits else 0.0
        finally:
            if waits:
                self._places.give_back()

    def _until(
        self, watch: Watch, holds: Callable[[Snapshot], bool], *, first: Snapshot, timeout: float
    ) -> tuple[Snapshot, bool]:
        """Wait as `Watch.until` does, but no longer than the caller does."""
        end = time.monotonic() + timeout
        gone: Callable[[], bool] = request.environ.get("waitress.client_disconnected", lambda: False)
        last, held = first, False
        while not held:
            left = end - time.monotonic()
            last, held = watch.until(holds, first=last, timeout=max(0.0, min(_LOOK_EVERY, left)))
            if left <= 0 or gone():
                break
        return last, held

    def _follow(self, name: ServerName, tail: int) -> Response:
        if not self._places.take():
            raise CapacityReached(
                f"cannot follow the log of server '{name}': as many callers wait or follow as may; "
                "read it without follow, or try later",
                retry_after=_FOLLOW_AGAIN,
            )
        lines = self._services.backend.follow(name, tail, lambda: self._is_live(name))
        gone: Callable[[], bool] = request.environ.get("waitress.client_disconnected", lambda: False)
        answer = _LiveResponse(_stream(lines, gone), content_type="text/plain; charset=utf-8")
        answer.call_on_close(self._places.give_back)
        return answer

    def _start(self, name: ServerName, command: Callable[[], Reply | None], query: StartQuery) -> Answer:
        patience = self._services.start_wait if query.wait is None else query.wait
        with self._keeper.watch(name) as watch, self._patience(patience) as wait:
            reply = _reply(command())
            snapshot, settled = self._until(watch, _is_settled, first=reply.snapshot, timeout=wait)
        if snapshot.state is State.FAILED:
            raise problems.start_failed(snapshot)
        if settled and snapshot.state is State.STOPPED:
            raise Conflict(f"cannot start server '{name}': it was stopped meanwhile")
        location = {"Location": f"/api/servers/{name}"}
        if not settled:
            return _json(self._model(snapshot), HTTPStatus.ACCEPTED, location | _RETRY_AFTER)
        return _json(self._model(snapshot), HTTPStatus.CREATED if reply.created else HTTPStatus.OK, location)

    def _stop(self, path: ServerPath, query: StopQuery, event: Event) -> Answer:
        name = ServerName(path.name)
        patience = self._services.stop_wait if query.wait is None else query.wait
        with self._keeper.watch(name) as watch, self._patience(patience) as wait:
            first = _reply(self._keeper.ask(Order(name, event, force=query.force, origin=_origin()))).snapshot
            snapshot, ended = self._until(
                watch, lambda s: s.state is State.STOPPED or s.goal in RETURNS, first=first, timeout=wait
            )
        if snapshot.goal in RETURNS:
            raise Conflict(f"cannot stop server '{name}': it was started again meanwhile")
        return _json(self._model(snapshot), HTTPStatus.OK if ended else HTTPStatus.ACCEPTED, {} if ended else _RETRY_AFTER)

    def _find(self, name: ServerName) -> Snapshot:
        snapshot = self._keeper.get(name)
        if snapshot is None:
            raise ServerNotFound(f"cannot find server '{name}'; the list of servers has the names there are")
        return snapshot

    def _is_live(self, name: ServerName) -> bool:
        snapshot = self._keeper.get(name)
        return snapshot is not None and (snapshot.state in MAY_EXIST or snapshot.state is State.BACKOFF)

    def _model(self, snapshot: Snapshot) -> Server:
        endpoint = snapshot.endpoint
        return server_model(snapshot, None if endpoint is None else self._lab_url(snapshot, endpoint))

    def _lab_url(self, snapshot: Snapshot, endpoint: Endpoint) -> str:
        """Make a link that works from where the caller asked: by the name that reached us, if the Lab listens there too."""
        host = self._services.advertised_host
        if host is None:
            bound = endpoint.hostname
            host = _host_of_request() if bound in _WILDCARDS else bound
        host = f"[{host}]" if ":" in host and not host.startswith("[") else host
        scheme = "https" if endpoint.secure else "http"
        page = endpoint.base_url.rstrip("/") + snapshot.spec.default_url
        return f"{scheme}://{host}:{endpoint.port}{page}{'&' if '?' in page else '?'}token={endpoint.token}"


class _LiveResponse(Response):
    """Sends its headers at once: a WSGI server holds them back until the first line, which may be long in coming."""

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        def start(*given: Any) -> Any:
            write = start_response(*given)
            try:
                write(b"")
            except BaseException:
                # The caller has gone already: nobody will ask for the body, nor close it.
                self.close()
                raise
            return write

        return super().__call__(environ, start)


@dataclass(frozen=True, slots=True)
class Route:
    """One line of the API."""

    method: str
    path: str
    access: Access
    handler: Callable[..., Answer | Response]
    tag: str
    answers: dict[int, type[BaseModel] | str]
    """The model or the media type of each good answer."""
    problems: tuple[int, ...] = field(default=())


_START: Final = (404, 409, 429, 502, 503, 504)
ROUTES: Final = (
    Route("POST", "/api/servers", Access.TOKEN, Api.create_server, "servers", {201: Server, 200: Server, 202: Server},
          (400, 409, 413, 415, 429, 502, 503, 504)),
    Route("GET", "/api/servers", Access.TOKEN, Api.list_servers, "servers", {200: ServerList}),
    Route("GET", "/api/servers/<name>", Access.TOKEN, Api.get_server, "servers", {200: Server}, (404,)),
    Route("DELETE", "/api/servers/<name>", Access.TOKEN, Api.delete_server, "servers", {200: Server, 202: Server},
          (404, 409, 503)),
    Route("POST", "/api/servers/<name>/stop", Access.TOKEN, Api.stop_server, "servers", {200: Server, 202: Server},
          (400, 404, 409, 413, 415, 503)),
    Route("POST", "/api/servers/<name>/start", Access.TOKEN, Api.start_server, "servers",
          {201: Server, 200: Server, 202: Server}, (400, 413, 415, *_START)),
    Route("POST", "/api/servers/<name>/restart", Access.TOKEN, Api.restart_server, "servers",
          {201: Server, 200: Server, 202: Server}, (400, 413, 415, *_START)),
    Route("GET", "/api/servers/<name>/logs", Access.TOKEN, Api.get_logs, "servers", {200: "text/plain"}, (404, 429)),
    Route("GET", "/api/servers/<name>/kernels", Access.TOKEN, Api.list_kernels, "servers", {200: KernelList},
          (404, 409, 503, 504)),
    Route("GET", "/api/kernel-debts", Access.TOKEN, Api.list_kernel_debts, "servers", {200: KernelDebtList}),
    Route("GET", "/api/servers/<name>/idle", Access.TOKEN, Api.get_idle, "culling", {200: Idle}, (404,)),
    Route("POST", "/api/servers/<name>/snooze", Access.TOKEN, Api.snooze_server, "culling", {200: Idle},
          (400, 404, 413, 415, 503)),
    Route("GET", "/api/idle", Access.TOKEN, Api.list_idle, "culling", {200: IdleList}),
    Route("GET", "/healthz", Access.PUBLIC, Api.health, "keeper", {200: Health}),
    Route("GET", "/readyz", Access.PUBLIC, Api.ready, "keeper", {200: Health}, (503,)),
    Route("GET", "/api/version", Access.PUBLIC, Api.version, "keeper", {200: Version}),
)  # fmt: skip

RULES: Final[dict[str | None, Access]] = {route.handler.__name__: route.access for route in ROUTES}
"""The rule of each endpoint. The API document and its page are public and stand beside the table."""


def install(app: Flask, api: Api) -> None:
    """Put the table into an application."""
    for route in ROUTES:
        app.add_url_rule(route.path, route.handler.__name__, _view(route.handler, api), methods=[route.method])


def _view(handler: Callable[..., Answer | Response], api: Api) -> Callable[..., Answer | Response]:
    """Make a view that hands a handler the models that its annotations ask for: `path`, `query`, `body`."""
    asked: dict[str, type[BaseModel]] = inspect.get_annotations(handler, eval_str=True)
    models = {name: model for name, model in asked.items() if name != "return"}

    def view(**in_path: str) -> Answer | Response:
        sent: dict[str, Callable[[type[BaseModel]], Any]] = {
            "path": lambda _: in_path,
            "query": lambda model: of_query(model, request.args),
            "body": lambda _: request.get_json(silent=True),
        }
        try:
            given = {name: model.model_validate(sent[name](model)) for name, model in models.items()}
        except ValidationError as error:
            raise problems.invalid_request(error) from error
        return handler(api, **given)

    return view


def _is_settled(snapshot: Snapshot) -> bool:
    return snapshot.state in _SETTLED


_T = TypeVar("_T")


def _reply(reply: _T | None) -> _T:
    if reply is None:
        raise TypeError("a command was not answered")
    return reply


def _json(model: BaseModel, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None) -> Answer:
    return model.model_dump(mode="json"), int(status), headers or {}


def _matches(snapshot: Snapshot, query: ListQuery) -> bool:
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
        name = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, UnicodeError, ValueError):
        raise invalid("cursor", "must be the `next` of a page before") from None
    return name


def _stream(lines: Iterator[str], gone: Callable[[], bool]) -> Iterator[str]:
    """Send lines in pieces; an empty text means that nothing new is there, and is the time to see whether the caller still is."""
    waiting: list[str] = []
    size = 0
    for line in lines:
        if line:
            waiting.append(line)
            size += len(line)
        if waiting and (not line or size > _CHUNK):
            yield "".join(waiting)
            waiting, size = [], 0
        if not line and gone():
            return
    yield "".join(waiting)


def _origin() -> Origin:
    """Say who asks, for the history."""
    return Origin("api", g.request_id)


def _host_of_request() -> str:
    """Give the host name by which the caller reached us, without its port; loopback when it is not fit for a link."""
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:\d+)?", request.host)
    return found[1] if found else "127.0.0.1"
