"""The way to a keeper: its URL, the token, the transport, and what can go wrong there."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Generator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Final
from urllib.parse import urlsplit

import httpx

from labkeeper.core.errors import BadAnswer, SettingsError, Unreachable


class Translated(AbstractContextManager[None]):
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


def checked_url(text: str) -> str:
    """Return the URL of a keeper in its plain form. Raises SettingsError for what can be none."""
    try:
        parts = urlsplit(text)
        fits = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits or "@" in parts.netloc or parts.query or parts.fragment:
        raise SettingsError(f"cannot use {text!r} as the URL of a keeper: it must be such as http://host:port")
    return text.rstrip("/")


def checked_token(token: str) -> str:
    """Return the token back. Raises SettingsError for what can be none."""
    if not token or not all("!" <= letter <= "~" for letter in token):
        raise SettingsError("cannot use the API token: it must be visible ASCII characters")
    return token


class IfAsked(httpx.Auth):
    """Shows a token where the keeper does not know its caller without one."""

    def __init__(self, token: str) -> None:
        self._token = checked_token(token)

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Send a request, and again with the token if that was refused."""
        answer = yield request
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            request.headers["Authorization"] = f"Bearer {self._token}"
            yield request


def make_transport(url: str, *, ca_file: str | os.PathLike[str] | None, socket_path: str | None) -> httpx.HTTPTransport:
    """Return the real transport: over TCP, or over the keeper's Unix socket. Raises SettingsError if `ca_file` cannot be read."""
    options = _KEEPALIVE if socket_path is None else None
    return httpx.HTTPTransport(verify=_context(url, ca_file), trust_env=False, uds=socket_path, socket_options=options)


def make_async_transport(
    url: str, *, ca_file: str | os.PathLike[str] | None, socket_path: str | None
) -> httpx.AsyncHTTPTransport:
    """Return the same for asyncio."""
    options = _KEEPALIVE if socket_path is None else None
    return httpx.AsyncHTTPTransport(verify=_context(url, ca_file), trust_env=False, uds=socket_path, socket_options=options)


def _context(url: str, ca_file: str | os.PathLike[str] | None) -> ssl.SSLContext:
    # Plain HTTP needs no certificates, and loading them takes 40 ms; this context trusts nobody.
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if url.startswith("http:") else _trusting(ca_file)


def _trusting(ca_file: str | os.PathLike[str] | None) -> ssl.SSLContext:
    """Make a context that trusts the authorities of the system, and those in a file."""
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except OSError as error:  # Of which ssl.SSLError is one.
            raise SettingsError(f"cannot read certificates from the file {ca_file}: {error.strerror or error}") from error
    return context


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
