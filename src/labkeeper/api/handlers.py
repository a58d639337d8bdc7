"""The handlers of the API: they ask the keeper, wait, and answer; they decide nothing. `routes` has the table of them."""

from __future__ import annotations

import base64
import binascii
import functools
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any, Final, TypeVar
from urllib.parse import quote

from flask import Response, g, request
from pydantic import BaseModel

from labkeeper import addresses
from labkeeper.api import problems
from labkeeper.api.auth import find
from labkeeper.api.browser import host_of
from labkeeper.api.peers import PEER
from labkeeper.api.services import Services
from labkeeper.api.streaming import EVENT_STREAM, LiveResponse, end_of, gone, lines_in_pieces, server_sent
from labkeeper.api.views import (
    debt_model,
    event_model,
    idle_model,
    kernel_model,
    me_model,
    new_token_model,
    server_model,
    token_model,
    webhook_model,
)
from labkeeper.core.access import Caller, Scope
from labkeeper.core.durations import instant, spoken
from labkeeper.core.errors import (
    BackendUnavailable,
    CapacityReached,
    Conflict,
    InvalidSpec,
    LabkeeperError,
    NotAuthenticated,
    ServerNotFound,
)
from labkeeper.core.lifecycle import AT_REST, RETURNS, Event, State
from labkeeper.core.messages import Create, Order, Origin, Reply, Snooze
from labkeeper.core.ports import Watch
from labkeeper.core.server import Endpoint, Snapshot, queue_of
from labkeeper.core.spec import ServerName, ServerSpec
from labkeeper.schema.answers import (
    BulkResult,
    BulkResults,
    EventList,
    Health,
    IdleList,
    KernelDebtList,
    KernelList,
    LinkModel,
    Server,
    ServerList,
    TokenList,
    Version,
    WebhookList,
)
from labkeeper.schema.queries import (
    EventQuery,
    GetQuery,
    ListQuery,
    LogQuery,
    ServerPath,
    StartQuery,
    StopQuery,
    TicketPath,
    TokenPath,
)
from labkeeper.schema.requests import BulkRequest, LinkRequest, RestartRequest, ServerRequest, SnoozeRequest, TokenRequest

Answer = tuple[dict[str, Any], int, dict[str, str]]
_SETTLED: Final = AT_REST | {State.RUNNING}
_RETRY_AFTER: Final = {"Retry-After": "1"}
_FOLLOW_AGAIN: Final = 10
"""Seconds after which a place to follow in may be free."""
_FEW_LINES: Final = 1000
"""Lines of a log that are read at once, for any number of callers."""
_READERS: Final = 2
"""Callers for whom more are read at a time; the next ones wait for their turn."""
_SPENT_LINK: Final = """<!doctype html>
<html lang="en">
<title>This link opens nothing any more</title>
<h1>This link opens nothing any more</h1>
<p>It was used, or it is too old, or its server was launched again. Go back to where it came from, and ask for another.</p>
</html>
"""
_LOOK_EVERY: Final = 1.0
"""Seconds between two looks at whether a caller still waits."""


class Api:
    """The handlers."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._keeper = services.keeper
        self._places = services.places
        self._links = services.links
        self._reading = threading.BoundedSemaphore(_READERS)

    # Servers

    def create_server(self, body: ServerRequest, query: StartQuery) -> Answer:
        """Make a server and start it.

        Idempotent: the same request finds the same server (200); 202 when `wait` ended before it was ready.
        """
        spec = body.spec(self._services.defaults, _caller())
        return self._start(spec.name, lambda: self._create(spec), query)

    def list_servers(self, query: ListQuery) -> Answer:
        """List servers, by name."""
        after = _decode_cursor(query.cursor)
        found = [s for s in self._visible() if s.name > after and _matches(s, query)]
        page, more = found[: query.limit], len(found) > query.limit
        listed = ServerList(servers=[self._model(s) for s in page], next=_encode_cursor(page[-1].name) if more else None)
        return _json(listed)

    def get_server(self, path: ServerPath, query: GetQuery) -> Answer:
        """Tell of one server; with `wait_for`, when it is in that state, or at rest in another, or `wait` is over."""
        name = ServerName(path.name)
        if query.wait_for is None:
            return _json(self._model(self._find(name)))
        rest = AT_REST | {query.wait_for}
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

    def start_many(self, body: BulkRequest, query: StartQuery) -> Answer:
        """Make many servers of one kind and start them: each as if it were asked for alone, all within one wait.

        200 when all are ready, 202 when some still start, 207 when any could not be started; what became of each is in `results`.
        """
        specs = body.specs(self._services.defaults, _caller())
        patience = self._services.start_wait if query.wait is None else query.wait
        with ExitStack() as watching, self._patience(patience) as wait:
            end = time.monotonic() + wait
            begun = [self._begun(spec, watching) for spec in specs]
            results = [self._result(spec.name, start, end) for spec, start in zip(specs, begun, strict=True)]
        return _json(BulkResults(results=results), _overall([result.status for result in results]))

    def restart_server(self, path: ServerPath, body: RestartRequest, query: StartQuery) -> Answer:
        """Stop a server if it runs, and start it, otherwise than before where the body says so.

        With `keep_kernels` the kernels on its gateway live on, and are the new launch's, with their sessions.
        """
        snapshot = self._find(ServerName(path.name))
        revised = body.revise(snapshot.revised or snapshot.spec, self._services.defaults, _caller())
        order = Order(snapshot.name, Event.RENEW if body.keep_kernels else Event.RESTART, revised=revised, origin=_origin())
        return self._start(snapshot.name, lambda: self._keeper.ask(order), query)

    def rotate_token(self, path: ServerPath, query: StartQuery) -> Answer:
        """Give a running server another Jupyter token: by a restart, since each launch has its own.

        Kernels on a gateway live on, with their sessions; those beside the server end with it.
        """
        snapshot = self._find(ServerName(path.name))
        if snapshot.endpoint is None:
            raise Conflict(
                f"cannot rotate the token of server '{snapshot.name}': it is {snapshot.state}, "
                "and its next launch has another one anyway"
            )
        event = Event.RESTART if snapshot.spec.gateway is None else Event.RENEW
        order = Order(snapshot.name, event, origin=replace(_origin(), reason="its token is rotated"))
        return self._start(snapshot.name, lambda: self._keeper.ask(order), query)

    def make_link(self, path: ServerPath, body: LinkRequest) -> Answer:
        """Make a link that opens a running server's Lab once, within a short time, and without the Lab's token in it."""
        snapshot = self._find(ServerName(path.name))
        if snapshot.endpoint is None:
            raise Conflict(f"cannot make a link to server '{snapshot.name}': it is {snapshot.state}, not running")
        page = snapshot.spec.default_url if body.page is None else body.page
        ticket = self._links.make(snapshot.name, snapshot.launch, page, lifetime=body.expires_in)
        base = self._services.url if PEER in request.environ else request.host_url.rstrip("/")
        expires_at = instant(time.time() + body.expires_in)
        return _json(LinkModel(url=f"{base}/open/{ticket}", expires_at=expires_at), HTTPStatus.CREATED)

    def open_link(self, path: TicketPath) -> Response:
        """Open a Lab by a link that was made for it: sends the browser there, which keeps a cookie of the Lab's."""
        link = self._links.use(path.ticket) if request.method == "GET" else None
        snapshot = None if link is None else self._keeper.get(link.server)
        if link is None or snapshot is None or snapshot.endpoint is None or snapshot.launch != link.launch:
            return Response(_SPENT_LINK, HTTPStatus.GONE, content_type="text/html; charset=utf-8")
        # Jupyter takes the token, sets its cookie, and sends the browser on to a page without it.
        root = self._lab_root(snapshot.endpoint)
        # Jupyter would take what stands before a colon for a scheme.
        next_page = (snapshot.endpoint.base_url.rstrip("/") + link.page).replace(":", "%3A")
        target = f"{root}login?token={snapshot.endpoint.token}&next={quote(next_page, safe='')}"
        return Response(status=HTTPStatus.SEE_OTHER, headers={"Location": target})

    def get_logs(self, path: ServerPath, query: LogQuery) -> Response:
        """Give the log of a server, oldest line first; it is kept after the end of the server.

        An answer has the last 2 MiB at most; where more was asked for, its first line says how much was left out.
        """
        name = self._find(ServerName(path.name)).name
        if query.follow:
            return self._follow(name, query.tail)
        with self._turn_to_read(name, query.tail):
            lines = self._services.backend.log(name, query.tail)
        return Response(end_of(lines), content_type="text/plain; charset=utf-8")

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

    # What happened

    def list_events(self, query: EventQuery) -> Answer | Response:
        """Tell what happened, of all servers, also of those that are gone; or follow it, as Server-Sent Events.

        `Last-Event-ID` goes on where a connection broke.
        """
        return self._events(None, query)

    def list_server_events(self, path: ServerPath, query: EventQuery) -> Answer | Response:
        """Tell the same of one server; its history is kept when it is deleted."""
        name = ServerName(path.name)
        _caller().needs_name(name)
        if not self._services.history.latest(server=name, limit=1, reach=_caller().reach):
            self._find(name)
        return self._events(name, query)

    def list_webhooks(self) -> Answer:
        """Say how the webhooks fare that events are posted to."""
        return _json(WebhookList(webhooks=[webhook_model(status) for status in self._services.webhooks()]))

    # Culling

    def get_idle(self, path: ServerPath) -> Answer:
        """Ask a server how it is used, and explain whether it would be stopped for want of use, why, and when."""
        return _json(idle_model(self._services.culler.explain(self._find(ServerName(path.name)))))

    def list_idle(self) -> Answer:
        """Explain the same of all servers by the last look at each, those first that would be stopped first; stops nothing."""
        listed = [idle_model(self._services.culler.foretell(snapshot)) for snapshot in self._visible()]
        return _json(IdleList(servers=sorted(listed, key=lambda one: (one.stops_at is None, one.stops_at, one.name))))

    def snooze_server(self, path: ServerPath, body: SnoozeRequest) -> Answer:
        """Put off the culling of a server from now; it holds over restarts of the server and of the keeper."""
        longest = self._services.max_snooze
        if body.time > longest:
            raise InvalidSpec.of("for", f"must be at most {spoken(longest)} (LABKEEPER_MAX_SNOOZE)")
        until = time.time() + body.time if body.time else None
        reply = _reply(self._keeper.ask(Snooze(ServerName(path.name), until, _origin())))
        return _json(idle_model(self._services.culler.foretell(reply.snapshot)))

    # Tokens

    def create_token(self, body: TokenRequest) -> Answer:
        """Make a token. What it is shown as stands in this answer alone: it is kept as a hash."""
        tokens = self._services.tokens
        token, text = tokens.make(body.name, body.scope, body.reach, lifetime=body.expires_in, origin=_origin())
        return _json(new_token_model(token, text), HTTPStatus.CREATED)

    def list_tokens(self) -> Answer:
        """List all tokens but the owner's, which the state directory or a setting has, and what they allow."""
        now = time.time()
        return _json(TokenList(tokens=[token_model(token, now) for token in self._services.tokens.all()]))

    def revoke_token(self, path: TokenPath) -> Answer:
        """Let a token be good no more, at once: answers that go on end, too."""
        return _json(token_model(self._services.tokens.revoke(path.name, origin=_origin()), time.time()))

    def get_me(self) -> Answer:
        """Say who the caller is to the keeper, and what they may."""
        return _json(me_model(_caller()))

    # The keeper

    def health(self) -> Answer:
        """Whether the keeper takes commands; where it does not, only a new one would."""
        if not self._keeper.alive:
            raise BackendUnavailable("cannot take commands: the keeper's fleet does not run")
        return _json(Health())

    def ready(self) -> Answer:
        """Whether the keeper takes commands, and watches all that it is to watch."""
        self.health()
        if failing := self._services.failing():
            what = "; ".join(f"{watcher}: {why}" for watcher, why in sorted(failing.items()))
            raise BackendUnavailable(f"commands are taken, but not everything is watched: {what}", watchers=sorted(failing))
        return _json(Health())

    def metrics(self) -> Response:
        """Give the keeper's metrics in the form of Prometheus, or of OpenMetrics where that is asked for."""
        text, media_type = self._services.meter.exposition(request.headers.get("Accept", ""))
        return Response(text, content_type=media_type)

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
        caller_is_gone = gone()
        last, held = first, False
        while not held:
            left = end - time.monotonic()
            last, held = watch.until(holds, first=last, timeout=max(0.0, min(_LOOK_EVERY, left)))
            if left <= 0 or caller_is_gone() or not _caller().sees(last):
                break
        return self._still_theirs(last), held

    def _still_theirs(self, snapshot: Snapshot) -> Snapshot:
        """Check that the caller may be told of a server yet; they have waited. Raises NotAuthenticated, ServerNotFound."""
        if not g.still_good():
            raise NotAuthenticated("cannot answer: the token was revoked, or has expired, meanwhile")
        if not _caller().sees(snapshot):
            raise ServerNotFound.called(snapshot.name)
        return snapshot

    def _take_place(self, what: str, instead: str) -> None:
        """Take a place for as long as an answer takes. Raises CapacityReached."""
        if not self._places.take():
            raise CapacityReached(
                f"cannot {what}: as many callers wait or follow as may; {instead}, or try later", retry_after=_FOLLOW_AGAIN
            )

    @contextmanager
    def _turn_to_read(self, name: ServerName, tail: int) -> Iterator[None]:
        """Wait, in a place, until it is our turn to read much of a log: that takes a processor, which all share."""
        if tail <= _FEW_LINES:
            yield
            return
        self._take_place(f"read so much of the log of server '{name}'", f"ask for {_FEW_LINES} lines at most")
        try:
            with self._reading:
                yield
        finally:
            self._places.give_back()

    def _follow(self, name: ServerName, tail: int) -> Response:
        self._take_place(f"follow the log of server '{name}'", "read it without follow")
        lines = self._services.backend.follow(name, tail, functools.partial(self._is_live, name, _caller()))
        return self._live(lines_in_pieces(self._begun_in_turn(lines), gone()), "text/plain; charset=utf-8")

    def _begun_in_turn(self, lines: Iterator[str]) -> Iterator[str]:
        """Give the same lines; what is there already is read before the first of them is given."""
        with self._reading:
            first = next(lines, "")
        yield first
        yield from lines

    def _live(self, pieces: Iterator[str], content_type: str) -> Response:
        """Answer with what goes on, and give the place back that was taken for it."""
        answer = LiveResponse(pieces, content_type=content_type)
        answer.call_on_close(self._places.give_back)
        return answer

    def _events(self, server: ServerName | None, query: EventQuery) -> Answer | Response:
        history = self._services.history
        after = _last_event_id(query)
        # Else it is an event of another history: ours was begun anew, or is an older copy. Then none of it can be left out.
        is_ours = after is None or after <= history.last_id
        after = after if is_ours else 0
        if query.follow or request.accept_mimetypes.best == EVENT_STREAM:
            return self._follow_events(server, after, is_ours=is_ours)
        if after is None:
            page = history.latest(server=server, limit=query.limit, reach=_caller().reach)
        else:
            page = history.after(after, server=server, limit=query.limit, reach=_caller().reach)
        more = bool(page) and page[-1].id < history.last_id
        return _json(EventList(events=[event_model(entry) for entry in page], next=page[-1].id if more else None))

    def _follow_events(self, server: ServerName | None, after: int | None, *, is_ours: bool) -> Response:
        self._take_place("follow events", "read them without follow")
        history = self._services.history
        # From the first one on, nobody has missed any.
        missed = (history.forgotten(after) if after else 0) if is_ours else None
        entries = history.follow(
            history.last_id if after is None else after, server=server, look=_LOOK_EVERY, reach=_caller().reach
        )
        return self._live(server_sent(entries, missed, gone()), EVENT_STREAM)

    def _start(self, name: ServerName, command: Callable[[], Reply | None], query: StartQuery) -> Answer:
        patience = self._services.start_wait if query.wait is None else query.wait
        with self._keeper.watch(name) as watch, self._patience(patience) as wait:
            begun = _Begun(watch, _reply(command()))
            server, status = self._outcome(begun, *self._until(watch, _is_settled, first=begun.reply.snapshot, timeout=wait))
        location = {"Location": f"/api/servers/{name}"}
        return _json(server, status, location | _RETRY_AFTER if status == HTTPStatus.ACCEPTED else location)

    def _create(self, spec: ServerSpec) -> Reply | None:
        """Ask for a server; of one that is none of the caller's business they hear no more than that its name is taken."""
        known = self._keeper.get(spec.name)
        if known is not None and not _caller().sees(known):
            raise Conflict(f"cannot start server '{spec.name}': the name is taken; choose another one")
        return self._keeper.ask(Create(spec, _origin()))

    def _begun(self, spec: ServerSpec, watching: ExitStack) -> _Begun | LabkeeperError:
        """Ask for one of many, and wait for nothing but the fleet's word."""
        watch = watching.enter_context(self._keeper.watch(spec.name))
        try:
            return _Begun(watch, _reply(self._create(spec)))
        except LabkeeperError as error:
            return error

    def _result(self, name: ServerName, begun: _Begun | LabkeeperError, end: float) -> BulkResult:
        """Wait until `end` for one of many; what went wrong with it is told, and holds up nobody."""
        if isinstance(begun, LabkeeperError):
            return _refused(name, begun)
        left = max(0.0, end - time.monotonic())
        try:
            server, status = self._outcome(
                begun, *self._until(begun.watch, _is_settled, first=begun.reply.snapshot, timeout=left)
            )
        except LabkeeperError as error:
            return _refused(name, error)
        return BulkResult(name=name, status=status, server=server, problem=None)

    def _outcome(self, begun: _Begun, snapshot: Snapshot, settled: bool) -> tuple[Server, HTTPStatus]:
        """Say what a start has come to. Raises ServerFailed, Conflict."""
        if snapshot.state is State.FAILED:
            raise problems.start_failed(snapshot)
        if settled and snapshot.state is State.STOPPED:
            raise Conflict(f"cannot start server '{snapshot.name}': it was stopped meanwhile")
        ready = HTTPStatus.CREATED if begun.reply.created else HTTPStatus.OK
        return self._model(snapshot), ready if settled else HTTPStatus.ACCEPTED

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
        return find(self._keeper, _caller(), name)

    def _visible(self) -> list[Snapshot]:
        """Give the servers within the caller's reach, by name."""
        caller = _caller()
        return [snapshot for snapshot in self._keeper.all() if caller.sees(snapshot)]

    def _is_live(self, name: ServerName, caller: Caller) -> bool:
        snapshot = self._keeper.get(name)
        return snapshot is not None and snapshot.state not in AT_REST and caller.sees(snapshot)

    def _model(self, snapshot: Snapshot) -> Server:
        endpoint = snapshot.endpoint
        may_open = endpoint is not None and _caller().scope.covers(Scope.MANAGE)
        lab_url = self._lab_url(snapshot, endpoint) if may_open and endpoint is not None else None
        return server_model(snapshot, lab_url, self._queue_position(snapshot), self._services.usage(snapshot))

    def _queue_position(self, snapshot: Snapshot) -> int | None:
        if snapshot.state is not State.QUEUED:
            return None
        # Of an older snapshot: the place that it would have now.
        others = [other for other in self._keeper.all() if other.name != snapshot.name]
        return [queued.name for queued in queue_of([*others, snapshot])].index(snapshot.name) + 1

    def _lab_url(self, snapshot: Snapshot, endpoint: Endpoint) -> str:
        page, mark, fragment = snapshot.spec.default_url.lstrip("/").partition("#")
        return f"{self._lab_root(endpoint)}{page}{'&' if '?' in page else '?'}token={endpoint.token}{mark}{fragment}"

    def _lab_root(self, endpoint: Endpoint) -> str:
        """Give a URL that works from where the caller asked: by the name that reached us, if the Lab listens there too."""
        host = self._services.advertised_host
        if host is None:
            bound = endpoint.hostname
            # Over the Unix socket a caller may have no name for us.
            host = host_of(request.host) or "127.0.0.1" if addresses.is_wildcard(bound) else bound
        path = f"{endpoint.base_url.rstrip('/')}/"
        return addresses.url("https" if endpoint.secure else "http", host, endpoint.port, path)


@dataclass(frozen=True, slots=True)
class _Begun:
    """A start that the fleet has taken."""

    watch: Watch
    reply: Reply


def _refused(name: ServerName, error: LabkeeperError) -> BulkResult:
    problem = problems.body_of(error)
    return BulkResult(name=name, status=problem["status"], server=None, problem=problem)


def _overall(statuses: Collection[int]) -> HTTPStatus:
    """Give the status of an answer about many."""
    if any(status >= HTTPStatus.BAD_REQUEST for status in statuses):
        return HTTPStatus.MULTI_STATUS
    return HTTPStatus.ACCEPTED if HTTPStatus.ACCEPTED in statuses else HTTPStatus.OK


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
        raise InvalidSpec.of("cursor", "must be the `next` of a page before") from None
    return name


def _last_event_id(query: EventQuery) -> int | None:
    """Give the last event that the caller knows; None where they want new ones only. Raises InvalidSpec."""
    given = request.headers.get("Last-Event-ID", "").strip()
    if not given:
        return query.after
    if not re.fullmatch(r"[0-9]{1,18}", given):
        raise InvalidSpec.of("Last-Event-ID", "must be the id of an event")
    return int(given)


def _caller() -> Caller:
    caller: Caller = g.caller
    return caller


def _origin() -> Origin:
    """Say who asks, for the history."""
    return Origin(_caller().actor, g.request_id)
