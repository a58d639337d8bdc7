"""The Python client: one method for each route, typed answers, and the errors of `labkeeper.core.errors`.

    with Client("http://127.0.0.1:8000", token="...") as keeper:
        server = keeper.create(name="demo", gateway_url="http://gateway:8888")
        print(server.lab_url)

No exception of httpx or pydantic leaves this module. Foreign errors are translated in two places: `_Translated` for what goes
wrong on the way, `_read` for what comes back.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Annotated, Any, Final, Self, TypedDict, TypeVar, Unpack
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from labkeeper.core.errors import (
    BackendUnavailable,
    BadAnswer,
    ClientError,
    InvalidSpec,
    LabkeeperError,
    RequestError,
    ServerNotFound,
    SettingsError,
    Unreachable,
    tree,
)
from labkeeper.core.lifecycle import Goal, State
from labkeeper.core.model import NAME_RULE, server_name

TIMEOUT: Final = 35.0
"""Seconds for an answer that need not wait for a server; the keeper itself answers a command within 30."""
LONGEST_WAIT: Final = 3600.0
"""Seconds; the API refuses to wait longer."""
_CONNECT_WITHIN: Final = 5.0

_M = TypeVar("_M", bound=BaseModel)
_PathText = str | os.PathLike[str]


class Fields(TypedDict, total=False):
    """The fields of a request for a server; the API document tells what each one means. One that is absent has its default."""

    name: str
    root_dir: _PathText
    base_url: str
    default_url: str
    port: int
    env: Mapping[str, str]
    labels: Mapping[str, str]
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


class _Answer(BaseModel):
    """What a newer keeper tells beyond the fields below is kept, not refused."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Exit(_Answer):
    """How a process ended; both are None when nobody could see it."""

    code: int | None = None
    signal: str | None = None


class Failure(_Answer):
    """Why a server failed."""

    failure_class: str
    message: str
    exit: Exit | None = None
    log_tail: tuple[str, ...] = ()


class StopReport(_Answer):
    """How a server was ended; `method` is `none`, `shutdown`, `sigterm` or `sigkill`, `seconds` how long it took."""

    method: str
    seconds: float
    kernels_stopped: tuple[str, ...] = ()
    kernels_left: tuple[str, ...] = ()


class Server(_Answer):
    """A server. The fields from `base_url` to `launched_by` are None unless it is running. Times are RFC 3339, UTC."""

    base_url: str | None = None
    hostname: str | None = None
    notebook_dir: str | None = None
    password: bool | None = None
    pid: int | None = None
    port: int | None = None
    secure: bool | None = None
    token: str | None = Field(None, repr=False)
    url: str | None = None
    lab_url: str | None = Field(None, repr=False)
    version: str | None = None
    launched_by: str | None = None
    name: str
    # A newer keeper may know more states: those come as plain text.
    state: Annotated[State | str, Field(union_mode="left_to_right")]
    goal: Annotated[Goal | str, Field(union_mode="left_to_right")]
    since: str
    created_at: str
    started_at: str | None = None
    launch: int
    restarts: int
    root_dir: str
    default_url: str
    labels: dict[str, str] = {}
    gateway_url: str | None = None
    exit: Exit | None = None
    failure: Failure | None = None
    stop_report: StopReport | None = None


class Kernel(_Answer):
    """A kernel of a server; `last_activity` is RFC 3339."""

    id: str
    name: str
    execution_state: str
    last_activity: str


class Client:
    """Speaks to one keeper; to be closed, or used as a context manager. Threads may share it.

    `timeout` is in seconds, for connecting and for answers; where the keeper waits for a server, that wait comes on top.
    Where the caller leaves that wait to the keeper it is not limited here: TCP notices when the keeper's machine is gone.

    Proxies of the environment are not used, so that a token for a keeper on this machine never passes through one; give an
    `httpx.HTTPTransport(proxy=...)` as `transport` where one is needed.

    Every method raises Unreachable when no keeper answers and BadAnswer when something else does; further errors are those
    of the API. The constructor raises SettingsError for a URL or a token that can be none.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None = None,
        timeout: float = TIMEOUT,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.base_url = _checked_url(base_url)
        self._timeout = timeout
        headers = {"Accept": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {_checked_token(token)}"
        try:
            self._http = httpx.Client(
                base_url=self.base_url, headers=headers, transport=transport or _transport(self.base_url), trust_env=False
            )
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
            page = _parse(_Page, self._get("/api/servers", query))
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

    def restart(self, name: str, *, wait: float | None = None) -> Server:
        """Stop a server if it runs, and start it. Raises as `start` does."""
        return self._server("POST", _path(name, "/restart"), wait=wait, waits=True)

    def logs(self, name: str, *, tail: int | None = None) -> str:
        """Give the last `tail` lines of a server's log (default: as many as the keeper likes). Raises ServerNotFound."""
        query = {} if tail is None else {"tail": tail}
        return self._get(_path(name, "/logs"), query).text

    def follow(self, name: str, *, tail: int | None = None) -> Iterator[str]:
        """Give the last lines of a server's log, then each new one, without line ends, until the server has ended.

        Asks when the first line is asked for. Raises ServerNotFound.
        """
        query = {"follow": "true"} if tail is None else {"follow": "true", "tail": tail}
        request = self._request("GET", _path(name, "/logs"), query=query, read=None)
        with _Translated(self.base_url):
            answer = self._http.send(request, stream=True)
            try:
                if not answer.is_success:
                    answer.read()
                _read(answer)
                yield from _lines(answer.iter_text())
            finally:
                answer.close()

    def kernels(self, name: str) -> Sequence[Kernel]:
        """List the kernels of a running server. Raises ServerNotFound, Conflict (not running), BackendError."""
        return _parse(_KernelList, self._get(_path(name, "/kernels"))).kernels

    # The keeper

    def version(self) -> str:
        """Give the version of the keeper."""
        return _parse(_Version, self._get("/api/version")).version

    def healthy(self) -> bool:
        """Whether the keeper's process answers; where nothing does, Unreachable is raised."""
        return _parse(_Health, self._get("/healthz")).status == "ok"

    def ready(self) -> bool:
        """Whether the keeper takes commands."""
        try:
            return _parse(_Health, self._get("/readyz")).status == "ok"
        except BackendUnavailable:
            return False

    # What they share

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
        return _parse(Server, self._send(self._request(method, path, query=given, body=body, read=read)))

    def _get(self, path: str, query: Mapping[str, Any] | None = None) -> httpx.Response:
        return self._send(self._request("GET", path, query=query, read=self._timeout))

    def _send(self, request: httpx.Request) -> httpx.Response:
        with _Translated(self.base_url):
            return _read(self._http.send(request))

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


class _Page(_Answer):
    servers: tuple[Server, ...]
    next: str | None = None


class _KernelList(_Answer):
    kernels: tuple[Kernel, ...]


class _Version(_Answer):
    name: str = Field(pattern="^labkeeper$")
    version: str


class _Health(_Answer):
    status: str


class _Problem(_Answer):
    """RFC 9457, with our `code`; the members that are not named here are the error's details."""

    type: str = ""
    title: str = ""
    status: int = 0
    detail: str
    code: str
    request_id: str = ""


class _Translated(AbstractContextManager[None]):
    """Makes our errors of httpx's: all of them, also those that stand beside `httpx.HTTPError`."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        match error:
            case httpx.DecodingError() | httpx.TooManyRedirects() | httpx.InvalidURL() | httpx.CookieConflict():
                raise BadAnswer(f"cannot understand what answers at {self._url}: {error}") from error
            case httpx.TimeoutException():
                why = "no answer in time"
            case httpx.HTTPError() | httpx.StreamError():
                why = str(error) or type(error).__name__
            case _:
                return
        raise Unreachable(f"cannot reach a keeper at {self._url}: {why}; start one with `labkeeper serve`") from error


def _read(answer: httpx.Response) -> httpx.Response:
    """Give a good answer back, and raise what a bad one says."""
    if answer.is_success:
        return answer
    try:
        problem = _Problem.model_validate_json(answer.content)
    except ValidationError as error:
        raise _bad(answer) from error
    known = tree().get(problem.code)
    details = dict(problem.model_extra or {})
    if known is None or issubclass(known, ClientError):
        # The framework's own refusals (405, 413, 415, ...) and bugs (500): what they say is all there is to know.
        known = RequestError if answer.is_client_error else LabkeeperError
        details |= {"code": problem.code, "status": answer.status_code, "request_id": problem.request_id}
    raised = known(problem.detail)
    raised.details = details
    raise raised


def _parse(model: type[_M], answer: httpx.Response) -> _M:
    try:
        return model.model_validate_json(answer.content)
    except ValidationError as error:
        raise _bad(answer) from error


def _bad(answer: httpx.Response) -> BadAnswer:
    url = answer.request.url.copy_with(query=None)
    kind = answer.headers.get("Content-Type", "no content type")
    return BadAnswer(
        f"cannot understand what answers at {url}: status {answer.status_code}, {kind}; is it a keeper?",
        status=answer.status_code,
    )


def _lines(pieces: Iterator[str]) -> Iterator[str]:
    """Cut at line feeds alone: `str.splitlines` would also cut at form feeds and carriage returns, which logs contain."""
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    if rest:
        yield rest


def _path(name: str, below: str = "") -> str:
    try:
        return f"/api/servers/{server_name(name)}{below}"
    except ValueError:
        # Asking would only put the text into a path; no server can have this name.
        raise ServerNotFound(f"cannot find server {name!r}: a name {NAME_RULE}") from None


def _force(force: bool) -> dict[str, str]:
    return {"force": "true"} if force else {}


def _checked_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        fits = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits or "@" in parts.netloc or parts.query or parts.fragment:
        raise SettingsError(f"cannot use {text!r} as the URL of a keeper: it must be such as http://host:port")
    return text.rstrip("/")


def _checked_token(token: str) -> str:
    if not token or not all("!" <= letter <= "~" for letter in token):
        raise SettingsError("cannot use the API token: it must be visible ASCII characters")
    return token


def _transport(url: str) -> httpx.HTTPTransport:
    """Make the real transport."""
    # Plain HTTP needs no certificates, and loading them takes 40 ms; this context trusts nobody.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if url.startswith("http:") else ssl.create_default_context()
    return httpx.HTTPTransport(verify=context, trust_env=False, socket_options=_KEEPALIVE)


_KEEPALIVE: Final = [
    (level, option, value)
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPIDLE", None), 30),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPINTVL", None), 10),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPCNT", None), 3),
    )
    if option is not None
]
"""A peer that vanished is noticed after a minute, however long an answer may take. Seconds, but for the count."""
