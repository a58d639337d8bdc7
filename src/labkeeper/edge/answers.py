"""Answers of the edge itself: its errors as problem details (RFC 9457), and redirects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Final

from labkeeper.edge.heads import END, Headers

_HEADERS: Final = (
    b"cache-control: no-store",
    b"content-security-policy: default-src 'none'; frame-ancestors 'none'",
    b"x-content-type-options: nosniff",
    b"referrer-policy: no-referrer",
)
_ALLOW: Final = b"allow: DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"
"""Which of them a path has is for the keeper and Labs to say."""
_RETRY_AFTER: Final = 2
"""Seconds."""
_TRANSPORT_SECURITY: Final = (b"strict-transport-security", b"max-age=15552000")
"""Half a year, and for this host name alone."""
_LOCALHOST: Final = re.compile(rb"(?:.*\.)?localhost\.?(?::[0-9]+)?", re.IGNORECASE)
CONTINUE: Final = b"HTTP/1.1 100 Continue" + END


def problem(status: HTTPStatus, detail: str, *, request_id: str) -> bytes:
    """Return an error after which the connection is closed."""
    title = _title(status)
    code = title.lower().replace(" ", "_")
    body = {
        "type": f"urn:labkeeper:problem:{code}",
        "title": title,
        "status": int(status),
        "detail": detail,
        "code": code,
        "request_id": request_id,
    }
    later = status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}
    more = [b"retry-after: %d" % _RETRY_AFTER] if later else []
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        more.append(_ALLOW)
    return _answer(
        status,
        json.dumps(body).encode(),
        b"application/problem+json",
        [*more, b"x-request-id: " + request_id.encode(), b"connection: close"],
    )


def healthy(*, close: bool) -> bytes:
    """Return the answer to a probe of the edge."""
    return _answer(
        HTTPStatus.OK,
        b'{"status":"ok"}',
        b"application/json",
        [b"connection: close"] if close else [],
    )


def redirect(target: bytes, *, close: bool) -> bytes:
    """Return a redirect that keeps the method."""
    return _answer(
        HTTPStatus.TEMPORARY_REDIRECT,
        b"",
        b"text/plain",
        [b"location: " + target, *([b"connection: close"] if close else [])],
    )


def transport_security(host: bytes) -> Headers:
    """Return the headers that tell a browser to use nothing but TLS for a host (RFC 6797).

    At `localhost` that would hold for all programs of the browser's own machine.
    """
    return [] if _LOCALHOST.fullmatch(host) else [_TRANSPORT_SECURITY]


def with_headers(answer: bytes, headers: Headers) -> bytes:
    """Return an answer with further headers."""
    status, _, rest = answer.partition(b"\r\n")
    return b"\r\n".join([status, *(b"%b: %b" % header for header in headers), rest])


def _title(status: HTTPStatus) -> str:
    # Its phrase depends on the version of Python; the keeper has werkzeug's.
    is_too_large = status is HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    return "Request Entity Too Large" if is_too_large else status.phrase


def _answer(status: HTTPStatus, body: bytes, media_type: bytes, more: Iterable[bytes]) -> bytes:
    lines = [
        b"HTTP/1.1 %d %b" % (status, _title(status).encode()),
        b"content-type: " + media_type,
        b"content-length: %d" % len(body),
        *_HEADERS,
        *more,
    ]
    return b"\r\n".join(lines) + END + body
