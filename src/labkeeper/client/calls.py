"""Every route of the API as a request and the parser of its answer; nothing is sent here.

Each method of `Client` and `AsyncClient` is made from one of these: it takes the same arguments and
returns the parsed answer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import httpx
from pydantic import BaseModel

from labkeeper.client.reading import event_of, is_ok, parse, reading, text
from labkeeper.core.access import Scope
from labkeeper.core.errors import InvalidSpec, ServerNotFound, SessionNotFound, TokenNotFound
from labkeeper.core.lifecycle import State
from labkeeper.core.spec import NAME_RULE, server_name
from labkeeper.schema.answers.access import (
    Caller,
    Link,
    NewToken,
    Session,
    SessionList,
    Token,
    TokenList,
)
from labkeeper.schema.answers.culling import Idle, IdleList
from labkeeper.schema.answers.events import Event, EventList, Webhook, WebhookList
from labkeeper.schema.answers.keeper import (
    Library,
    OrphanedKernel,
    OrphanedKernelList,
    Readiness,
    Version,
)
from labkeeper.schema.answers.servers import (
    BulkResult,
    BulkResults,
    Kernel,
    KernelList,
    Server,
    ServerList,
)
from labkeeper.schema.answers.usage import UsageHistory

if TYPE_CHECKING:
    from labkeeper.schema.requests.servers import ServerRequest

_T = TypeVar("_T")
_SESSION_ID: Final = re.compile(r"[0-9a-f]{1,63}")
LONGEST_WAIT: Final = 3600.0
"""Seconds; the API rejects a longer wait."""
PathText = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Call(Generic[_T]):
    """One request."""

    method: str
    path: str
    read: Callable[[httpx.Response], _T]
    """Returns the parsed answer, or raises its error."""
    query: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    patience: float | None = 0.0
    """Seconds that the keeper may wait for a server before it answers; None: unlimited."""


@dataclass(frozen=True, slots=True)
class Stream(Generic[_T]):
    """One request with a streaming answer."""

    path: str
    item: Callable[[str], _T | None]
    """Returns the parsed line; None to skip it."""
    query: Mapping[str, Any]

    def items(self, lines: Iterable[str]) -> Iterator[_T]:
        """Return the parsed lines."""
        return (item for item in map(self.item, lines) if item is not None)


class Calls:
    """The calls; a namespace."""

    # Servers

    def create(
        self,
        request: ServerRequest | Mapping[str, Any] | None = None,
        /,
        *,
        wait: float | None = None,
        **fields: Any,
    ) -> Call[Server]:
        """Create a server from `request`, overridden by `fields`, and start it. Idempotent.

        Waits at most `wait` seconds (default: until it is ready or has failed); see `state` of the
        answer. Raises InvalidSpec, Conflict, CapacityReached, StartFailed, StartTimeout,
        BackendError.
        """
        return _server("POST", "/api/servers", wait, body=_merged(request, fields))

    def get(
        self, name: str, *, wait_for: State | str | None = None, wait: float | None = None
    ) -> Call[Server]:
        """Return a server; with `wait_for`, wait for that state up to `wait` seconds.

        Raises ServerNotFound.
        """
        if wait_for is None:
            return Call("GET", _path(name), reading(Server), query=_given(wait=wait))
        return _server("GET", _path(name), wait, query={"wait_for": str(wait_for)})

    def delete(self, name: str, *, force: bool = False, wait: float | None = None) -> Call[Server]:
        """Stop and delete a server; return its last state. Raises ServerNotFound, Conflict."""
        return _server("DELETE", _path(name), wait, query={"force": force})

    def stop(self, name: str, *, force: bool = False, wait: float | None = None) -> Call[Server]:
        """Stop a server and keep its spec; `force` kills it immediately.

        Raises ServerNotFound, Conflict.
        """
        return _server("POST", _path(name, "/stop"), wait, query={"force": force})

    def start(self, name: str, *, wait: float | None = None) -> Call[Server]:
        """Start a server that was stopped or has failed.

        Raises as `create` does, and ServerNotFound.
        """
        return _server("POST", _path(name, "/start"), wait)

    def start_many(
        self, /, names: Sequence[str], *, wait: float | None = None, **fields: Any
    ) -> Call[Sequence[BulkResult]]:
        """Create and start up to 200 servers with equal fields; return their outcomes in order.

        Each is started as if by `create`; an error that `create` would raise is the `error` of
        its result. Waits at most `wait` seconds (default: until all are ready or have failed).
        Raises InvalidSpec.
        """
        return Call(
            "POST",
            "/api/bulk/start",
            lambda answer: parse(BulkResults, answer).results,
            query=_given(wait=wait),
            body={**fields, "names": [*names]},
            patience=_patience(wait),
        )

    def restart(
        self, /, name: str, *, keep_kernels: bool = False, wait: float | None = None, **fields: Any
    ) -> Call[Server]:
        """Restart a server with `fields` changed, or start it if it is not running.

        With `keep_kernels`, the kernels on its gateway keep running, and the new launch takes them
        over with their sessions. Raises as `start` does, and InvalidSpec.
        """
        body = {**fields, **({"keep_kernels": True} if keep_kernels else {})}
        return _server("POST", _path(name, "/restart"), wait, body=body or None)

    def rotate_token(self, name: str, *, wait: float | None = None) -> Call[Server]:
        """Restart a server with a new Jupyter token; kernels on a gateway keep running.

        Raises as `start` does, and Conflict if it is not running.
        """
        return _server("POST", _path(name, "/rotate-token"), wait)

    def link(
        self,
        name: str,
        *,
        expires_in: float | str | None = None,
        page: str | None = None,
        confirm: bool | None = None,
    ) -> Call[Link]:
        """Create a one-time link to a running server's Lab.

        `expires_in`, by default a minute, is in seconds, or text such as `10m`. With `confirm` it
        first shows a page with a button, so that programs that follow links do not use it up.
        Raises ServerNotFound, Conflict (not running), InvalidSpec.
        """
        return Call(
            "POST",
            _path(name, "/link"),
            reading(Link),
            body=_given(expires_in=expires_in, page=page, confirm=confirm),
        )

    def logs(self, name: str, *, tail: int | None = None) -> Call[str]:
        """Return the last `tail` log lines (default: the keeper's). Raises ServerNotFound."""
        return Call("GET", _path(name, "/logs"), text, query=_given(tail=tail))

    def follow(self, name: str, *, tail: int | None = None) -> Stream[str]:
        """Yield the last lines of a server's log, then new ones, without newlines, until its end.

        The request is sent when the first line is requested. Raises ServerNotFound.
        """
        return Stream(_path(name, "/logs"), str, query={"follow": True, **_given(tail=tail)})

    def kernels(self, name: str) -> Call[Sequence[Kernel]]:
        """List the kernels of a running server.

        Raises ServerNotFound, Conflict (not running), BackendError.
        """
        return Call(
            "GET", _path(name, "/kernels"), lambda answer: parse(KernelList, answer).kernels
        )

    def orphaned_kernels(self) -> Call[Sequence[OrphanedKernel]]:
        """List kernels of ended servers that a gateway still has to end, once it responds."""
        return Call(
            "GET",
            "/api/orphaned-kernels",
            lambda answer: parse(OrphanedKernelList, answer).orphaned_kernels,
        )

    def events(
        self,
        name: str | None = None,
        *,
        after: int | None = None,
        owner: str | None = None,
        limit: int = 100,
    ) -> Call[Sequence[Event]]:
        """Return events of one server or all, oldest first: those after an event, or the newest.

        Raises ServerNotFound if the name is unknown.
        """
        query = {"limit": limit, **_given(after=after, owner=owner)}
        return Call(
            "GET", _events_path(name), lambda answer: parse(EventList, answer).events, query=query
        )

    def follow_events(
        self, name: str | None = None, *, after: int | None = None, owner: str | None = None
    ) -> Stream[Event]:
        """Yield events as they happen, first those after a given one. Ends when the keeper does.

        The request is sent when the first event is requested. Raises ServerNotFound.
        """
        query = {"follow": True, **_given(after=after, owner=owner)}
        return Stream(_events_path(name), event_of, query=query)

    def webhooks(self) -> Call[Sequence[Webhook]]:
        """List the webhooks that events are posted to, and their state."""
        return Call("GET", "/api/webhooks", lambda answer: parse(WebhookList, answer).webhooks)

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
    ) -> Call[NewToken]:
        """Create a token for servers matching a pattern, all labels, and one of the users.

        Only this answer contains the token, as `token`. Raises InvalidSpec, Conflict, NotAllowed.
        """
        body = {
            "name": name,
            "scope": scope,
            "servers": [*servers],
            "labels": {**(labels or {})},
            "users": [*users],
        }
        return Call(
            "POST", "/api/tokens", reading(NewToken), body=body | _given(expires_in=expires_in)
        )

    def tokens(self, *, owner: str | None = None) -> Call[Sequence[Token]]:
        """List all tokens except the owner's, by name."""
        return Call(
            "GET",
            "/api/tokens",
            lambda answer: parse(TokenList, answer).tokens,
            query=_given(owner=owner),
        )

    def revoke_token(self, name: str) -> Call[Token]:
        """Revoke a token immediately. Raises TokenNotFound."""
        try:
            path = f"/api/tokens/{server_name(name)}"
        except ValueError:
            raise TokenNotFound(f"cannot find token {name!r}: a name {NAME_RULE}") from None
        return Call("DELETE", path, reading(Token))

    def sessions(self, *, owner: str | None = None) -> Call[Sequence[Session]]:
        """List the browser sessions at the public address, the oldest first."""
        return Call(
            "GET",
            "/api/sessions",
            lambda answer: parse(SessionList, answer).sessions,
            query=_given(owner=owner),
        )

    def revoke_session(self, id_: str) -> Call[Session]:
        """Revoke a browser's session immediately, with those that follow from it.

        Raises SessionNotFound.
        """
        if not _SESSION_ID.fullmatch(id_):
            raise SessionNotFound(f"cannot find session {id_!r}; the list of sessions has all ids")
        return Call("DELETE", f"/api/sessions/{id_}", reading(Session))

    def session_link(self, *, expires_in: float | str | None = None) -> Call[Link]:
        """Create a one-time link that signs a browser in, with this client's permissions.

        `expires_in`, by default a minute, is in seconds, or text such as `10m`. Raises Conflict
        (there is no host name for it), InvalidSpec.
        """
        return Call("POST", "/api/me/link", reading(Link), body=_given(expires_in=expires_in))

    def me(self) -> Call[Caller]:
        """Return this client's identity and permissions."""
        return Call("GET", "/api/me", reading(Caller))

    # Usage

    def usage(
        self, name: str, *, since: float | str | datetime | None = None
    ) -> Call[UsageHistory]:
        """Return a server's usage over time, by default of the last hour.

        `since` is a time, or a duration before now: seconds, or text such as `7d`. Raises
        ServerNotFound, InvalidSpec, StoreError.
        """
        begin = since.astimezone(UTC).isoformat() if isinstance(since, datetime) else since
        return Call("GET", _path(name, "/usage"), reading(UsageHistory), query=_given(since=begin))

    # Culling

    def idle(self, name: str) -> Call[Idle]:
        """Poll a server; explain if and when it will be stopped as idle. Raises ServerNotFound."""
        return Call("GET", _path(name, "/idle"), reading(Idle))

    def idle_all(self) -> Call[Sequence[Idle]]:
        """Explain the same for all servers by their last poll, the next to be stopped first."""
        return Call("GET", "/api/idle", lambda answer: parse(IdleList, answer).servers)

    def snooze(self, name: str, time: float | str) -> Call[Idle]:
        """Postpone culling for `time`: seconds, or such as `2h`; 0 ends it. Raises InvalidSpec."""
        return Call("POST", _path(name, "/snooze"), reading(Idle), body={"for": time})

    # The keeper

    def version(self) -> Call[str]:
        """Return the version of the keeper."""
        return Call("GET", "/api/version", lambda answer: parse(Version, answer).version)

    def metrics(self) -> Call[str]:
        """Return the metrics in the format of Prometheus."""
        return Call("GET", "/metrics", text)

    def healthy(self) -> Call[bool]:
        """Whether the keeper accepts commands. Raises Unreachable if nothing answers."""
        return Call("GET", "/healthz", is_ok)

    def ready(self) -> Call[bool]:
        """Whether the keeper accepts commands, and all its watchers work."""
        return Call("GET", "/readyz", is_ok)

    def libraries(self) -> Call[Sequence[Library]]:
        """List the libraries that the keeper is to preload for kernels."""
        return Call("GET", "/readyz", lambda answer: parse(Readiness, answer).preload)

    def page(
        self,
        *,
        state: Iterable[State | str],
        label: Iterable[str],
        owner: str | None,
        limit: int | None,
        cursor: str | None,
    ) -> Call[ServerList]:
        """List one page of servers."""
        query = {
            "state": [str(one) for one in state],
            "label": [*label],
            **_given(owner=owner, limit=limit, cursor=cursor),
        }
        return Call("GET", "/api/servers", reading(ServerList), query=query)


def _server(
    method: str,
    path: str,
    wait: float | None,
    *,
    query: Mapping[str, Any] | None = None,
    body: Mapping[str, Any] | None = None,
) -> Call[Server]:
    """Return a call whose answer is a server, for which the keeper may wait."""
    return Call(
        method, path, reading(Server), {**(query or {}), **_given(wait=wait)}, body, _patience(wait)
    )


def _merged(
    request: ServerRequest | Mapping[str, Any] | None, fields: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return a request's fields, overridden by others. Raises InvalidSpec for duplicates."""
    sent = (
        request.model_dump(mode="json", by_alias=True, exclude_unset=True)
        if isinstance(request, BaseModel)
        else request
    )
    if not sent or not fields:
        return sent or fields
    from labkeeper.schema.requests.flat import merged  # noqa: PLC0415 - late: 4 ms, rarely needed

    try:
        return merged(sent, fields)
    except ValueError as error:
        raise InvalidSpec(f"cannot send the request: {error}") from error


def _patience(wait: float | None) -> float | None:
    return None if wait is None else min(max(0.0, wait), LONGEST_WAIT)


def _events_path(name: str | None) -> str:
    return "/api/events" if name is None else _path(name, "/events")


def _path(name: str, below: str = "") -> str:
    try:
        return f"/api/servers/{server_name(name)}{below}"
    except ValueError:
        # Do not send the text as a path; no server can have this name.
        raise ServerNotFound(f"cannot find server {name!r}: a name {NAME_RULE}") from None


def _given(**fields: Any) -> dict[str, Any]:
    """Return the arguments that are not None."""
    return {name: value for name, value in fields.items() if value is not None}
