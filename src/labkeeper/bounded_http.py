"""One HTTP request and its answer, with limits of time and size that the other side cannot exceed.

The timeouts of httpx, urllib3 and requests hold for each read, not for the whole answer: see
docs/explanation/decisions/measured.md.
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
"""Maximum bytes of an answer; the kernels of a busy server take some thousands."""
_PIECE: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response."""

    status: int
    body: bytes
    location: str = ""
    """Target of a redirect."""
    date: str = ""
    """When the other side answered, by its own clock."""


def exchange(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    *,
    headers: Mapping[str, str],
    within: float,
    body: Any = None,
) -> Answer:
    """Send a request, with `body` as JSON if given, and return its answer within `within` seconds.

    Raises OSError, including TimeoutError, and HTTPException.
    """
    until = time.monotonic() + within
    if within <= 0:
        raise TimeoutError(f"no time is left for {path}")
    # Only called to create a response.
    connection.response_class = cast(
        "type[http.client.HTTPResponse]", functools.partial(_Response, until=until)
    )
    content = None if body is None else json.dumps(body).encode()
    kind = {} if body is None else {"Content-Type": "application/json"}
    connection.request(method, path, body=content, headers={**headers, **kind})
    # Close it even when all was read: Python before 3.13 does not notice, and would refuse further
    # requests on this connection.
    with connection.getresponse() as answer:
        whole, read = answer.length, bytearray()
        while piece := answer.read1(_PIECE):
            read += piece
            if len(read) > _LARGEST_ANSWER:
                raise TimeoutError(f"{path} takes too long")
        if whole is not None and len(read) < whole:
            # `read1` takes the end of the connection for the end of the answer.
            raise http.client.IncompleteRead(bytes(read), whole - len(read))
    location, date = (answer.headers.get(name, "") for name in ("Location", "Date"))
    return Answer(answer.status, bytes(read), location, date)


class _Response(http.client.HTTPResponse):
    """Reads until a deadline: a socket's timeout holds per read, so a trickle could take hours."""

    def __init__(self, sock: socket.socket, *given: Any, until: float, **named: Any) -> None:
        super().__init__(sock, *given, **named)
        self.fp.close()
        self.fp = io.BufferedReader(_Until(sock, until))


class _Until(io.RawIOBase):
    """A socket's stream with a deadline."""

    def __init__(self, sock: socket.socket, until: float) -> None:
        self._sock = sock
        # Keeps the socket open while it is read, even if its connection is closed.
        self._stream = cast("io.RawIOBase", sock.makefile("rb", buffering=0))
        self._until = until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer takes too long")
        self._sock.settimeout(left)
        return self._stream.readinto(buffer)

    def close(self) -> None:
        self._stream.close()
        super().close()
