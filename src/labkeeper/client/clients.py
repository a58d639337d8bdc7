"""The two clients: `Client`, and `AsyncClient` for asyncio. Their methods are made from `calls`."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import aclosing, closing
from types import TracebackType
from typing import Any, Concatenate, Final, Generic, ParamSpec, Self, TypeVar

import httpx

from labkeeper.client.calls import Call, Calls, PathText, Stream
from labkeeper.client.connection import (
    IfAsked,
    Translated,
    checked_token,
    checked_url,
    transport_options,
)
from labkeeper.client.reading import Lines, checked
from labkeeper.core.errors import InvalidSpec, SettingsError
from labkeeper.core.lifecycle import State
from labkeeper.schema.answers.servers import Server

TIMEOUT: Final = 35.0
"""Seconds for an answer that does not wait for a server; the keeper takes at most 30."""
_CONNECT_WITHIN: Final = 5.0

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _method(
    call: Callable[Concatenate[Calls, _P], Call[_T]],
) -> Callable[Concatenate[Client, _P], _T]:
    @functools.wraps(call)
    def method(client: Client, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return client._do(call(_CALLS, *args, **kwargs))

    return method


def _stream(
    call: Callable[Concatenate[Calls, _P], Stream[_T]],
) -> Callable[Concatenate[Client, _P], Iterator[_T]]:
    @functools.wraps(call)
    def method(client: Client, /, *args: _P.args, **kwargs: _P.kwargs) -> Iterator[_T]:
        yield from client._follow(call(_CALLS, *args, **kwargs))

    return method


def _async_method(
    call: Callable[Concatenate[Calls, _P], Call[_T]],
) -> Callable[Concatenate[AsyncClient, _P], Coroutine[Any, Any, _T]]:
    @functools.wraps(call)
    async def method(client: AsyncClient, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await client._do(call(_CALLS, *args, **kwargs))

    return method


def _async_stream(
    call: Callable[Concatenate[Calls, _P], Stream[_T]],
) -> Callable[Concatenate[AsyncClient, _P], AsyncIterator[_T]]:
    @functools.wraps(call)
    async def method(
        client: AsyncClient, /, *args: _P.args, **kwargs: _P.kwargs
    ) -> AsyncIterator[_T]:
        async for item in client._follow(call(_CALLS, *args, **kwargs)):
            yield item

    return method


_CALLS: Final = Calls()


_Http = TypeVar("_Http")
_Transport = TypeVar("_Transport")


class _Connection(Generic[_Http, _Transport]):
    """What both clients have in common."""

    _http_type: Callable[..., _Http]
    _transport_type: Callable[..., _Transport]

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None = None,
        token_if_asked: str | None = None,
        socket: str | None = None,
        timeout: float = TIMEOUT,
        ca_file: PathText | None = None,
        transport: _Transport | None = None,
    ) -> None:
        self.base_url = checked_url(base_url)
        self._timeout = timeout
        headers = {"Accept": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {checked_token(token)}"
        # A Unix socket cannot be eavesdropped on: it has no TLS.
        url = self.base_url if socket is None else self.base_url.replace("https:", "http:", 1)
        try:
            transport = transport or self._transport_type(
                **transport_options(url, ca_file=ca_file, socket_path=socket)
            )
            self._http = self._http_type(
                base_url=url,
                headers=headers,
                auth=None if token_if_asked is None else IfAsked(token_if_asked),
                transport=transport,
                trust_env=False,
            )
        except (httpx.InvalidURL, OSError, ValueError) as error:
            raise SettingsError(f"cannot use the keeper URL {base_url}: {error}") from error

    def _request(
        self, call: Call[Any] | Stream[Any], build: Callable[..., httpx.Request]
    ) -> httpx.Request:
        """Return the request of a call. Raises InvalidSpec if it cannot be sent."""
        method, body, read = "GET", None, None
        if isinstance(call, Call):
            method, body = call.method, call.body
            read = None if call.patience is None else self._timeout + call.patience
        timeout = httpx.Timeout(
            self._timeout, read=read, connect=min(self._timeout, _CONNECT_WITHIN)
        )
        try:
            content = None if body is None else json.dumps(body, default=os.fspath, allow_nan=False)
            headers = None if body is None else {"Content-Type": "application/json"}
            return build(
                method,
                call.path,
                params=call.query,
                content=content,
                headers=headers,
                timeout=timeout,
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidSpec(f"cannot send the request: {error}") from error


class Client(_Connection[httpx.Client, httpx.BaseTransport]):
    """A client of one keeper; close it, or use it as a context manager. Threads may share it.

    `timeout`, in seconds, applies to connecting and to answers; the keeper's wait for a server is
    added. If the caller leaves that wait to the keeper, it is unlimited here: TCP detects a dead
    machine.

    Proxies from the environment are ignored, so that a token for a local keeper never passes
    through one; pass an `httpx.HTTPTransport(proxy=...)` as `transport` if needed.

    `socket` is the path of the keeper's Unix socket, over which its own user and root need no
    token; `token_if_asked` is sent if the keeper rejects them nevertheless.
    `ca_file` contains certificate authorities to trust besides the system's, for a keeper with TLS.

    Every method raises Unreachable if no keeper answers and BadAnswer if something else does; other
    errors are the API's. The constructor raises SettingsError for an invalid URL or token, and for
    an unreadable `ca_file`.
    """

    _http_type = httpx.Client
    _transport_type = httpx.HTTPTransport

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._http.close()

    def list(
        self,
        *,
        state: Iterable[State | str] = (),
        label: Iterable[str] = (),
        owner: str | None = None,
        page_size: int | None = None,
    ) -> Iterator[Server]:
        """Yield the servers by name: those of the owner, in one of the states, with all labels.

        A label is `key=value`, or `key` alone. Pages are requested one by one, each of at most
        `page_size` servers (default: the keeper's).
        """
        states, labels, cursor = [*state], [*label], None
        while True:
            page = self._do(
                _CALLS.page(state=states, label=labels, owner=owner, limit=page_size, cursor=cursor)
            )
            yield from page.servers
            if (cursor := page.next) is None:
                return

    create = _method(Calls.create)
    get = _method(Calls.get)
    delete = _method(Calls.delete)
    stop = _method(Calls.stop)
    start = _method(Calls.start)
    start_many = _method(Calls.start_many)
    restart = _method(Calls.restart)
    rotate_token = _method(Calls.rotate_token)
    link = _method(Calls.link)
    logs = _method(Calls.logs)
    follow = _stream(Calls.follow)
    kernels = _method(Calls.kernels)
    orphaned_kernels = _method(Calls.orphaned_kernels)
    events = _method(Calls.events)
    follow_events = _stream(Calls.follow_events)
    webhooks = _method(Calls.webhooks)
    create_token = _method(Calls.create_token)
    tokens = _method(Calls.tokens)
    revoke_token = _method(Calls.revoke_token)
    sessions = _method(Calls.sessions)
    revoke_session = _method(Calls.revoke_session)
    session_link = _method(Calls.session_link)
    me = _method(Calls.me)
    usage = _method(Calls.usage)
    idle = _method(Calls.idle)
    idle_all = _method(Calls.idle_all)
    snooze = _method(Calls.snooze)
    version = _method(Calls.version)
    metrics = _method(Calls.metrics)
    healthy = _method(Calls.healthy)
    ready = _method(Calls.ready)
    libraries = _method(Calls.libraries)

    def _do(self, call: Call[_T]) -> _T:
        request = self._request(call, self._http.build_request)
        with Translated(self.base_url):
            answer = self._http.send(request)
        return call.read(answer)

    def _follow(self, stream: Stream[_T]) -> Iterator[_T]:
        request, lines = self._request(stream, self._http.build_request), Lines()
        with Translated(self.base_url), closing(self._http.send(request, stream=True)) as answer:
            if not answer.is_success:
                answer.read()
            checked(answer)
            for piece in answer.iter_text():
                yield from stream.items(lines.feed(piece))
            yield from stream.items(lines.end())


class AsyncClient(_Connection[httpx.AsyncClient, httpx.AsyncBaseTransport]):
    """As `Client`, for asyncio: methods are coroutines, and iterators are asynchronous."""

    _http_type = httpx.AsyncClient
    _transport_type = httpx.AsyncHTTPTransport

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        await self._http.aclose()

    async def list(
        self,
        *,
        state: Iterable[State | str] = (),
        label: Iterable[str] = (),
        owner: str | None = None,
        page_size: int | None = None,
    ) -> AsyncIterator[Server]:
        """Yield the servers by name, as `Client.list` does."""
        states, labels, cursor = [*state], [*label], None
        while True:
            page = await self._do(
                _CALLS.page(state=states, label=labels, owner=owner, limit=page_size, cursor=cursor)
            )
            for server in page.servers:
                yield server
            if (cursor := page.next) is None:
                return

    create = _async_method(Calls.create)
    get = _async_method(Calls.get)
    delete = _async_method(Calls.delete)
    stop = _async_method(Calls.stop)
    start = _async_method(Calls.start)
    start_many = _async_method(Calls.start_many)
    restart = _async_method(Calls.restart)
    rotate_token = _async_method(Calls.rotate_token)
    link = _async_method(Calls.link)
    logs = _async_method(Calls.logs)
    follow = _async_stream(Calls.follow)
    kernels = _async_method(Calls.kernels)
    orphaned_kernels = _async_method(Calls.orphaned_kernels)
    events = _async_method(Calls.events)
    follow_events = _async_stream(Calls.follow_events)
    webhooks = _async_method(Calls.webhooks)
    create_token = _async_method(Calls.create_token)
    tokens = _async_method(Calls.tokens)
    revoke_token = _async_method(Calls.revoke_token)
    sessions = _async_method(Calls.sessions)
    revoke_session = _async_method(Calls.revoke_session)
    session_link = _async_method(Calls.session_link)
    me = _async_method(Calls.me)
    usage = _async_method(Calls.usage)
    idle = _async_method(Calls.idle)
    idle_all = _async_method(Calls.idle_all)
    snooze = _async_method(Calls.snooze)
    version = _async_method(Calls.version)
    metrics = _async_method(Calls.metrics)
    healthy = _async_method(Calls.healthy)
    ready = _async_method(Calls.ready)
    libraries = _async_method(Calls.libraries)

    async def _do(self, call: Call[_T]) -> _T:
        request = self._request(call, self._http.build_request)
        with Translated(self.base_url):
            answer = await self._http.send(request)
        return call.read(answer)

    async def _follow(self, stream: Stream[_T]) -> AsyncIterator[_T]:
        request, lines = self._request(stream, self._http.build_request), Lines()
        with Translated(self.base_url):
            async with aclosing(await self._http.send(request, stream=True)) as answer:
                if not answer.is_success:
                    await answer.aread()
                checked(answer)
                async for piece in answer.aiter_text():
                    for item in stream.items(lines.feed(piece)):
                        yield item
                for item in stream.items(lines.end()):
                    yield item
