"""Answers of the edge itself: its errors as problem details (RFC 9457), and redirects."""

from __future__ import annotations

import json
from collections.abc import Iterable
from http import HTTPStatus
from typing import Final

from labkeeper.edge.heads import END

_HEADERS: Final = (
    b"cache-control: no-store",
    b"content-security-policy: default-src 'none'; frame-ancestors 'none'",
    b"x-content-type-options: nosniff",
    b"referrer-policy: no-referrer",
)
_RETRY_AFTER: Final = 2
"""Seconds."""
CONTINUE: Final = b"HTTP/1.1 100 Continue" + END


def problem(status: HTTPStatus, detail: str, *, request_id: str) -> bytes:
    """Return an error after which the connection is closed."""
    code = status.phrase.lower().replace(" ", "_")
    body = {
        "type": f"urn:labkeeper:problem:{code}",
        "title": status.phrase,
        "status": int(status),
        "detail": detail,
        "code": code,
        "request_id": request_id,
    }
    later = status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}
    more = [b"retry-after: %d" % _RETRY_AFTER] if later else []
    return _answer(
        status,
        json.dumps(body).encode(),
        b"application/problem+json",
        [*more, b"connection: close"],
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


def _answer(status: HTTPStatus, body: bytes, media_type: bytes, more: Iterable[bytes]) -> bytes:
    lines = [
        b"HTTP/1.1 %d %b" % (status, status.phrase.encode()),
        b"content-type: " + media_type,
        b"content-length: %d" % len(body),
        *_HEADERS,
        *more,
    ]
    return b"\r\n".join(lines) + END + body
