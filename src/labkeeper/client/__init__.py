"""The Python client: one method for each route, typed answers, and the errors of `labkeeper.core.errors`.

    with Client("http://127.0.0.1:8000", token="...") as keeper:
        server = keeper.create(name="demo", gateway_url="http://gateway:8888")
        print(server.lab_url)

No exception of httpx or pydantic leaves this package. Foreign errors are translated in two places: `connection.Translated` for
what goes wrong on the way, `answers.checked` for what comes back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypedDict, Unpack

import httpx

from labkeeper.client.connection import IfAsked, Translated, checked_token, checked_url, make_transport
from labkeeper.client.reading import checked, lines_of, parse, parse_text
from labkeeper.core.access import Scope
from labkeeper.core.errors import BackendUnavailable, InvalidSpec, ServerNotFound, SettingsError, TokenNotFound
from labkeeper.core.lifecycle import State
from labkeeper.core.spec import NAME_RULE, server_name
from labkeeper.schema.answers import (
    BulkResult,
    BulkResults,
    Caller,
    Event,
    EventList,
    Exit,
    Failure,
    Gateway,
    Health,
    Holder,
    Idle,
    IdleList,
    IdleRule,
    Kernel,
    KernelList,
    Limit,
    Link,
    NewToken,
    OrphanedKernel,
    OrphanedKernelList,
    Server,
    ServerList,
    StopReport,
    Token,
    TokenList,
    Usage,
    Version,
    Webhook,
    WebhookList,
)

__all__ = [
    "LONGEST_WAIT",
    "TIMEOUT",
    "BulkResult",
    "Caller",
    "Client",
    "Event",
    "Exit",
    "Failure",
    "Fields",
    "Gateway",
    "Holder",
    "Idle",
    "IdleRule",
    "Kernel",
    "Limit",
    "Link",
    "NewToken",
    "OrphanedKernel",
    "Revision",
    "Server",
    "StopReport",
    "Token",
    "Usage",
    "Webhook",
]

TIMEOUT: Final = 35.0
"""Seconds for an answer that need not wait for a server; the keeper itself answers a command within 30."""
LONGEST_WAIT: Final = 3600.0
"""Seconds; the API refuses to wait longer."""
_CONNECT_WITHIN: Final = 5.0

_PathText = str | os.PathLike[str]


class Revision(TypedDict, total=False):
    """What of a server can be otherwise after a restart; the API document tells what each field means."""

    root_dir: _PathText
    base_url: str
    default_url: str
    port: int
    env: Mapping[str, str]
    labels: Mapping[str, str]
    memory_limit: int
    cpu_limit: float
    process_limit: int
    user: str
    idle_timeout: float | str | None
    max_age: float | str | None
    gateway_url: str
    gateway_ws_url: str
    gateway_auth_token: str
    gateway_auth_scheme: str
    gateway_headers: Mapping[str, str]
    gateway_ca_certs: _PathText
    gateway_client_cert: _PathText
    gateway_client_key: _PathText
    gateway_validate_cert: bool
    gateway_connect_timeout: float
    gateway_request_timeout: float
    require_gateway: bool
    kernel_env: Mapping[str, str]
    jupyter_options: Mapping[str, bool | int | float]


class Fields(Revision, total=False):
    """The fields of a request for a server. One that is absent has its default."""

    name: str


class Client:
    """Speaks to one keeper; to be closed, or used as a context manager. Threads may share it.

    `timeout` is in seconds, for connecting and for answers; where the keeper waits for a server, that wait comes on top.
    Where the caller leaves that wait to the keeper it is not limited here: TCP notices when the keeper's machine is gone.

    Proxies of the environment are not used, so that a token for a keeper on this machine never passes through one; give an
    `httpx.HTTPTransport(proxy=...)` as `transport` where one is needed.

    `socket` is the path of the keeper's Unix socket: over it the keeper's own user, and root, need no token; `token_if_asked` is
    shown where the keeper refuses them all the same.
    `ca_file` holds certificates of authorities to trust beside those of the system, for a keeper that speaks TLS.

    Every method raises Unreachable when no keeper answers and BadAnswer when something else does; further errors are those
    of the API. The constructor raises SettingsError for a URL or a token that can be none, and for
    a `ca_file` that cannot be read.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None = None,
        token_if_asked: str | None = None,
        socket: str | None = None,
        timeout: float = TIMEOUT,
        ca_file: _PathText | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.base_url = checked_url(base_url)
        self._timeout = timeout
        headers = {"Accept": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {checked_token(token)}"
        try:
            # Nobody listens in on a Unix socket: there is no TLS on it.
            url = self.base_url if socket is None else self.base_url.replace("https:", "http:", 1)
            transport = transport or make_transport(url, ca_file=ca_file, socket_path=socket)
            auth = None if token_if_asked is None else IfAsked(token_if_asked)
            self._http = httpx.Client(base_url=url, headers=headers, auth=auth, transport=transport, trust_env=False)
        except (httpx.InvalidURL, OSError, ValueError) as error:
            raise SettingsError(f"cannot use the keeper URL {base_url}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._http.close()

    # Servers

    def create(self, spec: Mapping[str, Any] | None = None, /, *, wait: float | None = None, **fields: Unpack[Fields]) -> Server:
        """Make a server of `spec` with `fields` over it, and start it; the same request finds the same server.

        Waits at most `wait` seconds (default: until it is ready or has failed); `state` of the answer tells where it stands.
        Raises InvalidSpec, Conflict, CapacityReached, StartFailed, StartTimeout, BackendError.
        """
        return self._server("POST", "/api/servers", wait=wait, waits=True, body={**(spec or {}), **fields})

    def list(self, *, state: Iterable[State | str] = (), label: Iterable[str] = ()) -> Iterator[Server]:
        """Go through the servers by name: those in one of the states that have all the labels (`key=value`, or `key` alone).

        Asks for one page at a time, as it goes.
        """
        query: dict[str, Any] = {"state": [str(one) for one in state], "label": [*label]}
        while True:
            page = parse(ServerList, self._get("/api/servers", query))
            yield from page.servers
            if page.next is None:
                return
            query["cursor"] = page.next

    def get(self, name: str, *, wait_for: State | str | None = None, wait: float | None = None) -> Server:
        """Tell of one server; with `wait_for`, when it is in that state or `wait` seconds are over. Raises ServerNotFound."""
        query = {} if wait_for is None else {"wait_for": str(wait_for)}
        return self._server("GET", _path(name), wait=wait, waits=wait_for is not None, query=query)

    def delete(self, name: str, *, force: bool = False, wait: float | None = None) -> Server:
        """Stop a server, then forget it; gives the last word on it, with its stop report. Raises ServerNotFound, Conflict."""
        return self._server("DELETE", _path(name), wait=wait, waits=True, query=_force(force))

    def stop(self, name: str, *, force: bool = False, wait: float | None = None) -> Server:
        """Stop a server and keep its spec; `force` kills it at once. Raises ServerNotFound, Conflict."""
        return self._server("POST", _path(name, "/stop"), wait=wait, waits=True, query=_force(force))

    def start(self, name: str, *, wait: float | None = None) -> Server:
        """Start a server that was stopped or has failed. Raises as `create` does, and ServerNotFound."""
        return self._server("POST", _path(name, "/start"), wait=wait, waits=True)

    def start_many(self, names: Sequence[str], *, wait: float | None = None, **fields: Unpack[Revision]) -> Sequence[BulkResult]:
        """Make up to 200 servers of one kind, and start them; tells what became of each, in the order of the names.

        Each is as if `create` had asked for it; what would have been raised is the `error` of its result.
        Waits at most `wait` seconds (default: until all are ready or have failed). Raises InvalidSpec.
        """
        read = None if wait is None else self._timeout + min(max(0.0, wait), LONGEST_WAIT)
        query = {} if wait is None else {"wait": wait}
        request = self._request("POST", "/api/bulk/start", query=query, body={**fields, "names": [*names]}, read=read)
        return parse(BulkResults, self._send(request)).results

    def restart(self, name: str, *, keep_kernels: bool = False, wait: float | None = None, **fields: Unpack[Revision]) -> Server:
        """Stop a server if it runs, and start it, with `fields` otherwise than before; what is not given stays as it is.

        With `keep_kernels` the kernels on its gateway live on, and are the new launch's, with their sessions.
        Raises as `start` does, and InvalidSpec.
        """
        body = {**fields, **({"keep_kernels": True} if keep_kernels else {})}
        return self._server("POST", _path(name, "/restart"), wait=wait, waits=True, body=body or None)

    def rotate_token(self, name: str, *, wait: float | None = None) -> Server:
        """Give a running server another Jupyter token, by another launch; kernels on a gateway live on.

        Raises as `start` does, and Conflict where it is not running.
        """
        return self._server("POST", _path(name, "/rotate-token"), wait=wait, waits=True)

    def link(self, name: str, *, expires_in: float | str | None = None, page: str | None = None) -> Link:
        """Make a link that opens a running server's Lab once, within a minute, or `expires_in`: seconds, or a text as `10m`.

        Raises ServerNotFound, Conflict (not running), InvalidSpec.
        """
        return parse(Link, self._post(_path(name, "/link"), _given(expires_in=expires_in, page=page)))

    def logs(self, name: str, *, tail: int | None = None) -> str:
        """Give the last `tail` lines of a server's log (default: as many as the keeper likes). Raises ServerNotFound."""
        query = {} if tail is None else {"tail": tail}
        return self._get(_path(name, "/logs"), query).text

    def follow(self, name: str, *, tail: int | None = None) -> Iterator[str]:
        """Give the last lines of a server's log, then each new one, without line ends, until the server has ended.

        Asks when the first line is asked for. Raises ServerNotFound.
        """
        query = {"follow": "true"} if tail is None else {"follow": "true", "tail": tail}
        yield from self._lines(_path(name, "/logs"), query)

    def kernels(self, name: str) -> Sequence[Kernel]:
        """List the kernels of a running server. Raises ServerNotFound, Conflict (not running), BackendError."""
        return parse(KernelList, self._get(_path(name, "/kernels"))).kernels

    def orphaned_kernels(self) -> Sequence[OrphanedKernel]:
        """List the kernels of servers that have ended which a gateway still has to end; that is done when it answers."""
        return parse(OrphanedKernelList, self._get("/api/orphaned-kernels")).orphaned_kernels

    def events(self, name: str | None = None, *, after: int | None = None, limit: int = 100) -> Sequence[Event]:
        """Tell what happened, to one server or to all, the oldest first: after an event, or the newest ones.

        Raises ServerNotFound where nothing is known of the name.
        """
        query = {"limit": limit} if after is None else {"limit": limit, "after": after}
        return parse(EventList, self._get(_events_path(name), query)).events

    def follow_events(self, name: str | None = None, *, after: int | None = None) -> Iterator[Event]:
        """Give events as they come, those after one first where it is named. Ends when the keeper does.

        Asks when the first event is asked for. Raises ServerNotFound.
        """
        query = {"follow": "true"} if after is None else {"follow": "true", "after": after}
        for line in self._lines(_events_path(name), query):
            if line.startswith(_EVENT):
                yield parse_text(Event, line.removeprefix("data: "))

    def webhooks(self) -> Sequence[Webhook]:
        """Say how the webhooks fare that events are posted to."""
        return parse(WebhookList, self._get("/api/webhooks")).webhooks

    # Access

    def create_token(
        self,
        name: str,
        scope: Scope | str,
        *,
        servers: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
        users: Sequence[str] = (),
        expires_in: float | str | None = None,
    ) -> NewToken:
        """Make a token: of `scope`, for servers whose names fit one of the patterns and that have all labels, run as those users.

        `token` of the answer is to be shown, and told this once. Raises InvalidSpec, Conflict, NotAllowed.
        """
        body = {"name": name, "scope": scope, "servers": [*servers], "labels": {**(labels or {})}, "users": [*users]}
        return parse(NewToken, self._post("/api/tokens", body | _given(expires_in=expires_in)))

    def tokens(self) -> Sequence[Token]:
        """List the tokens that were made, by name."""
        return parse(TokenList, self._get("/api/tokens")).tokens

    def revoke_token(self, name: str) -> Token:
        """Let a token be good no more, at once. Raises TokenNotFound."""
        try:
            path = f"/api/tokens/{server_name(name)}"
        except ValueError:
            raise TokenNotFound(f"cannot find token {name!r}: a name {NAME_RULE}") from None
        return parse(Token, self._send(self._request("DELETE", path, read=self._timeout)))

    def me(self) -> Caller:
        """Say who this client is to the keeper, and what it may."""
        return parse(Caller, self._get("/api/me"))

    # Culling

    def idle(self, name: str) -> Idle:
        """Explain whether a server would be stopped for want of use, why, and when; it is asked now. Raises ServerNotFound."""
        return parse(Idle, self._get(_path(name, "/idle")))

    def idle_all(self) -> Sequence[Idle]:
        """Explain the same of all servers by the last look at each, those first that would be stopped first."""
        return parse(IdleList, self._get("/api/idle")).servers

    def snooze(self, name: str, time: float | str) -> Idle:
        """Put off the culling of a server for `time`: seconds, or a text as `2h`; 0 ends it. Raises InvalidSpec."""
        return parse(Idle, self._post(_path(name, "/snooze"), {"for": time}))

    # The keeper

    def version(self) -> str:
        """Give the version of the keeper."""
        return parse(Version, self._get("/api/version")).version

    def metrics(self) -> str:
        """Give the keeper's metrics in the form of Prometheus."""
        return self._get("/metrics").text

    def healthy(self) -> bool:
        """Whether the keeper takes commands; where nothing answers, Unreachable is raised."""
        return self._is_well("/healthz")

    def ready(self) -> bool:
        """Whether the keeper takes commands, and watches all that it is to watch."""
        return self._is_well("/readyz")

    # What they share

    def _is_well(self, path: str) -> bool:
        try:
            return parse(Health, self._get(path)).status == "ok"
        except BackendUnavailable:
            return False

    def _server(
        self,
        method: str,
        path: str,
        *,
        wait: float | None,
        waits: bool,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> Server:
        """Send a request whose answer is a server; `waits` says whether the keeper may wait before it answers."""
        read = self._timeout if not waits else None if wait is None else self._timeout + min(max(0.0, wait), LONGEST_WAIT)
        given = {**(query or {}), **({} if wait is None else {"wait": wait})}
        return parse(Server, self._send(self._request(method, path, query=given, body=body, read=read)))

    def _get(self, path: str, query: Mapping[str, Any] | None = None) -> httpx.Response:
        return self._send(self._request("GET", path, query=query, read=self._timeout))

    def _post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        return self._send(self._request("POST", path, body=body, read=self._timeout))

    def _lines(self, path: str, query: Mapping[str, Any]) -> Iterator[str]:
        """Give the lines of an answer that goes on, as they come."""
        with Translated(self.base_url):
            answer = self._http.send(self._request("GET", path, query=query, read=None), stream=True)
            try:
                if not answer.is_success:
                    answer.read()
                checked(answer)
                yield from lines_of(answer.iter_text())
            finally:
                answer.close()

    def _send(self, request: httpx.Request) -> httpx.Response:
        with Translated(self.base_url):
            return checked(self._http.send(request))

    def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        read: float | None,
    ) -> httpx.Request:
        """Build a request that may be silent for `read` seconds at most."""
        timeout = httpx.Timeout(self._timeout, read=read, connect=min(self._timeout, _CONNECT_WITHIN))
        try:
            content = None if body is None else json.dumps(body, default=os.fspath, allow_nan=False)
            headers = None if body is None else {"Content-Type": "application/json"}
            return self._http.build_request(method, path, params=query, content=content, headers=headers, timeout=timeout)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidSpec(f"cannot send the request: {error}") from error


_EVENT: Final = 'data: {"id":'
"""How the line of an event begins; the other lines of the stream are for browsers, and for proxies."""


def _events_path(name: str | None) -> str:
    return "/api/events" if name is None else _path(name, "/events")


def _path(name: str, below: str = "") -> str:
    try:
        return f"/api/servers/{server_name(name)}{below}"
    except ValueError:
        # Asking would only put the text into a path; no server can have this name.
        raise ServerNotFound(f"cannot find server {name!r}: a name {NAME_RULE}") from None


def _given(**fields: Any) -> dict[str, Any]:
    """Leave out what was not given."""
    return {name: value for name, value in fields.items() if value is not None}


def _force(force: bool) -> dict[str, str]:
    return {"force": "true"} if force else {}
