"""A small HTTP and websocket client, the same for every contender.

Each request opens a connection with the standard library, which costs each about 0.2 ms.
"""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import struct
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Final, Self
from urllib.parse import urlsplit

import websocket

from progress import BenchError

TIMEOUT: Final = 600.0
"""Seconds for any single step before the bench fails."""
OK: Final = 200
CREATED: Final = 201
NO_CONTENT: Final = 204
_PROTOCOL: Final = "v1.kernel.websocket.jupyter.org"
"""The subprotocol that JupyterLab asks for: a table of offsets, and the parts of a message."""
_PORTS: Final = itertools.cycle(range(20000, 30000))
"""Below Linux's ephemeral ports, so that no outgoing connection takes a port before its use."""


def free_port() -> int:
    """Return a free port that was not returned recently."""
    for port in _PORTS:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError


def request(
    method: str, url: str, authorization: str = "", body: Any = None, timeout: float = TIMEOUT
) -> tuple[int, bytes]:
    """Send a request; return status and body.

    Raises OSError or HTTPException if there is no response.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    headers = {"Authorization": authorization} if authorization else {}
    data = None if body is None else json.dumps(body)
    if data is not None:
        headers["Content-Type"] = "application/json"
    try:
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection.request(method, target, data, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def request_json(
    method: str,
    url: str,
    authorization: str = "",
    body: Any = None,
    good: tuple[int, ...] = (OK, CREATED),
) -> Any:
    """Send a request that must succeed; return the JSON of its response."""
    status, data = request(method, url, authorization, body)
    if status not in good:
        answer = data[:2000].decode(errors="replace")
        raise BenchError(f"{method} {urlsplit(url).path} returned {status}: {answer}")
    return json.loads(data) if data else None


def lines(url: str, authorization: str) -> Iterator[bytes]:
    """Yield the lines of a streamed response."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT)
    try:
        headers = {"Authorization": authorization, "Accept": "text/event-stream"}
        connection.request("GET", parts.path, headers=headers)
        yield from connection.getresponse()
    finally:
        connection.close()


def wait_until_ready(
    url: str, authorization: str, *, poll: float, alive: Callable[[], bool] = lambda: True
) -> None:
    """Wait until a server is ready: `api` returns 200, and so does `api/me`, with the token."""
    until = time.monotonic() + TIMEOUT
    for path, key in (("api", ""), ("api/me", authorization)):
        while not _answers(url + path, key):
            if not alive():
                raise BenchError("a server exited before it responded")
            if time.monotonic() > until:
                raise BenchError(f"a server did not respond within {TIMEOUT:.0f} s")
            time.sleep(poll)


def _answers(url: str, authorization: str) -> bool:
    try:
        return request("GET", url, authorization, timeout=5)[0] == OK
    except (OSError, http.client.HTTPException):
        return False


class KernelSocket:
    """An open websocket of a kernel, over which cells run as in JupyterLab."""

    def __init__(self, url: str, authorization: str, kernel: str) -> None:
        channels = f"{url}api/kernels/{kernel}/channels".replace("http", "ws", 1)
        self._stream = websocket.create_connection(
            channels,
            header=[f"Authorization: {authorization}"],
            subprotocols=[_PROTOCOL],
            timeout=TIMEOUT,
        )
        self._session = uuid.uuid4().hex

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def run(self, code: str) -> str:
        """Run a cell; return its result as soon as it arrives, or "" if it ends without one."""
        for kind, content in self._answers(code):
            if kind == "execute_result":
                return str(content["data"]["text/plain"])
            # It follows any result; the reply takes another channel, and may overtake one.
            if content.get("execution_state") == "idle":
                break
        return ""

    def time(self, code: str) -> tuple[float, float]:
        """Run a cell; return the seconds until its result, and until its end.

        In JupyterLab a cell ends when the kernel is idle again and has replied.
        """
        begin = time.perf_counter()
        waiting, result = {"execute_reply", "idle"}, 0.0
        for kind, content in self._answers(code):
            waiting -= {kind, content.get("execution_state")}
            if kind == "execute_result":
                result = time.perf_counter() - begin
            if not waiting:
                break
        return result, time.perf_counter() - begin

    def wait_for_status(self, *wanted: str) -> str:
        """Return the first status (`execution_state`) that is one of these."""
        while True:
            message = self._receive()
            state = str(message["content"].get("execution_state"))
            if message["header"]["msg_type"] == "status" and state in wanted:
                return state

    def _receive(self) -> dict[str, Any]:
        try:
            return _unframed(self._stream.recv_data()[1])
        except websocket.WebSocketException as error:
            raise BenchError(f"a kernel is lost: {error}") from error

    def _answers(self, code: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Send a cell; yield type and content of the messages that answer it."""
        number = uuid.uuid4().hex
        self._stream.send_binary(_cell(number, self._session, code))
        while True:
            message = self._receive()
            if message["parent_header"].get("msg_id") != number:
                continue
            kind, content = message["header"]["msg_type"], message["content"]
            if kind == "error":
                raise BenchError(f"a cell failed: {content}")
            yield kind, content


def _cell(number: str, session: str, code: str) -> bytes:
    """Return the frame that requests a cell."""
    header = {
        "msg_id": number,
        "msg_type": "execute_request",
        "username": "",
        "session": session,
        "version": "5.3",
    }
    content = {
        "code": code,
        "silent": False,
        "store_history": False,
        "user_expressions": {},
        "allow_stdin": False,
    }
    parent_header: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    parts = [
        b"shell",
        *(json.dumps(part).encode() for part in (header, parent_header, metadata, content)),
    ]
    # The numbers of 8 bytes are their count, the offset of each part, and that of the end.
    offsets = itertools.accumulate(map(len, parts), initial=8 * (len(parts) + 2))
    return struct.pack(f"<{len(parts) + 2}Q", len(parts) + 1, *offsets) + b"".join(parts)


def _unframed(frame: bytes) -> dict[str, Any]:
    """Return header, parent header and content of a message."""
    (count,) = struct.unpack_from("<Q", frame)
    offsets = struct.unpack_from(f"<{count}Q", frame, 8)
    places = {"header": 1, "parent_header": 2, "content": 4}
    return {
        name: json.loads(frame[offsets[place] : offsets[place + 1]])
        for name, place in places.items()
    }
