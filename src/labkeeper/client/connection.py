"""The connection to a keeper: its URL, token, transport, and errors."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Generator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from labkeeper.core.errors import BadAnswer, SettingsError, Unreachable


class Translated(AbstractContextManager[None]):
    """Translates all errors of httpx, including those that are no `httpx.HTTPError`, to ours."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        match error:
            case (
                httpx.DecodingError()
                | httpx.TooManyRedirects()
                | httpx.InvalidURL()
                | httpx.CookieConflict()
            ):
                raise BadAnswer(f"cannot understand the answer of {self._url}: {error}") from error
            case httpx.TimeoutException():
                why = "no answer in time"
            case httpx.HTTPError() | httpx.StreamError():
                why = str(error) or type(error).__name__
            case _:
                return
        raise Unreachable(
            f"cannot reach a keeper at {self._url}: {why}; start one with `labkeeper serve`"
        ) from error


def checked_url(text: str) -> str:
    """Return a keeper's URL without a trailing slash. Raises SettingsError if it is invalid."""
    try:
        parts = urlsplit(text)
        fits = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits or "@" in parts.netloc or parts.query or parts.fragment:
        raise SettingsError(
            f"cannot use {text!r} as the URL of a keeper: it must look like http://host:port"
        )
    return text.rstrip("/")


def checked_token(token: str) -> str:
    """Return the token. Raises SettingsError if it is invalid."""
    if not token or not all("!" <= letter <= "~" for letter in token):
        raise SettingsError("cannot use the API token: it must be visible ASCII characters")
    return token


class IfAsked(httpx.Auth):
    """Sends a token only if the keeper does not authenticate the caller without one."""

    def __init__(self, token: str) -> None:
        self._token = checked_token(token)

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Send a request, and again with the token if it was rejected."""
        answer = yield request
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            request.headers["Authorization"] = f"Bearer {self._token}"
            yield request


def transport_options(
    url: str, *, ca_file: str | os.PathLike[str] | None, socket_path: str | None
) -> dict[str, Any]:
    """Return the options of a transport over TCP or the keeper's Unix socket.

    Raises SettingsError if `ca_file` cannot be read.
    """
    return {
        "verify": _context(url, ca_file),
        "trust_env": False,
        "uds": socket_path,
        "socket_options": _KEEPALIVE if socket_path is None else None,
    }


def _context(url: str, ca_file: str | os.PathLike[str] | None) -> ssl.SSLContext:
    # Plain HTTP needs no certificates, which take 40 ms to load; this context trusts no one.
    return (
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if url.startswith("http:") else _trusting(ca_file)
    )


def _trusting(ca_file: str | os.PathLike[str] | None) -> ssl.SSLContext:
    """Return a context that trusts the system's authorities and those in a file."""
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except OSError as error:  # Includes ssl.SSLError.
            raise SettingsError(
                f"cannot read certificates from the file {ca_file}: {error.strerror or error}"
            ) from error
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
"""Detects a vanished peer after a minute, however long an answer may take. In seconds, except the
count."""
