"""One HTTP request and its answer, within a time and a size that the other side has no say in.

Not by httpx: that takes five times as long for one request, and the keeper would have to load it at boot.
"""

from __future__ import annotations

import functools
import http.client
import io
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

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
    # Called to make a response, and nothing else.
    connection.response_class = cast("type[http.client.HTTPResponse]", functools.partial(_Response, until=until))
    content = None if body is None else json.dumps(body).encode()
    kind = {} if body is None else {"Content-Type": "application/json"}
    connection.request(method, path, body=content, headers={**headers, **kind})
    # Closed also when all was read: Python before 3.13 does not notice that, and would take no further request here.
    with connection.getresponse() as answer:
        whole, read = answer.length, bytearray()
        while piece := answer.read1(_PIECE):
            read += piece
            if len(read) > _LARGEST_ANSWER:
                raise TimeoutError(f"{path} goes on for too long")
        if whole is not None and len(read) < whole:
            # `read1` takes the end of the connection for that of the answer.
            raise http.client.IncompleteRead(bytes(read), whole - len(read))
    return Answer(answer.status, bytes(read), answer.headers.get("Location", ""))


class _Response(http.client.HTTPResponse):
    """Reads until a moment. A timeout of a socket holds for each read: who sends a byte at a time would be read for hours."""

    def __init__(self, sock: socket.socket, *given: Any, until: float, **named: Any) -> None:
        super().__init__(sock, *given, **named)
        self.fp.close()
        self.fp = io.BufferedReader(_Until(sock, until))


class _Until(io.RawIOBase):
    """What comes over a socket until a moment."""

    def __init__(self, sock: socket.socket, until: float) -> None:
        self._sock = sock
        # Keeps the socket open as long as it is read from, also when its connection is closed.
        self._stream = cast("io.RawIOBase", sock.makefile("rb", buffering=0))
        self._until = until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer goes on for too long")
        self._sock.settimeout(left)
        return self._stream.readinto(buffer)

    def close(self) -> None:
        self._stream.close()
        super().close()
