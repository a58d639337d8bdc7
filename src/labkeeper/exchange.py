"""One HTTP request and its answer, within a time and a size that the other side has no say in.

Not by httpx: that takes five times as long for one request, and the keeper would have to load it at boot.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

_LARGEST_ANSWER: Final = 4 * 1024 * 1024
"""Bytes of an answer that are read; the kernels of a busy server take some thousands."""
_PIECE: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    body: bytes
    location: str = ""
    """Where a redirection points."""


def exchange(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    *,
    headers: Mapping[str, str],
    within: float,
    body: Any = None,
) -> Answer:
    """Send a request, with a body as JSON if there is one, and read its answer within so many seconds.

    Raises OSError, of which TimeoutError is one, and HTTPException.
    """
    until = time.monotonic() + within
    if within <= 0:
        raise TimeoutError(f"no time is left for {path}")
    content = None if body is None else json.dumps(body).encode()
    kind = {} if body is None else {"Content-Type": "application/json"}
    connection.request(method, path, body=content, headers={**headers, **kind})
    answer = connection.getresponse()
    read = bytearray()
    # Each read has the connection's timeout; the whole has this one.
    while piece := answer.read1(_PIECE):
        read += piece
        if time.monotonic() > until or len(read) > _LARGEST_ANSWER:
            raise TimeoutError(f"{path} goes on for too long")
    # Python before 3.13 does not notice that it has read all, and would take no further request on this connection.
    answer.close()
    return Answer(answer.status, bytes(read), answer.headers.get("Location", ""))
