"""A small HTTP and websocket client, the same for every contender.

Each request opens a connection with the standard library, which costs each about 0.2 ms.
"""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Final
from urllib.parse import urlsplit

import websocket

from progress import BenchError

TIMEOUT: Final = 600.0
"""Seconds for any single step before the bench fails."""
OK: Final = 200
CREATED: Final = 201
NO_CONTENT: Final = 204
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


def run_cell(url: str, authorization: str, kernel: str, code: str) -> str:
    """Run code in a kernel over the websocket, as JupyterLab does; return its result."""
    channel = f"{url}api/kernels/{kernel}/channels".replace("http", "ws", 1)
    stream = websocket.create_connection(
        channel, header=[f"Authorization: {authorization}"], timeout=TIMEOUT
    )
    try:
        message = uuid.uuid4().hex
        header = {
            "msg_id": message,
            "msg_type": "execute_request",
            "username": "",
            "session": uuid.uuid4().hex,
            "version": "5.3",
        }
        content = {
            "code": code,
            "silent": False,
            "store_history": False,
            "user_expressions": {},
            "allow_stdin": False,
        }
        request = {
            "header": header,
            "parent_header": {},
            "metadata": {},
            "content": content,
            "channel": "shell",
            "buffers": [],
        }
        stream.send(json.dumps(request))
        while True:
            answer = json.loads(stream.recv())
            if answer["parent_header"].get("msg_id") != message:
                continue
            if answer["header"]["msg_type"] == "error":
                raise BenchError(f"a cell failed: {answer['content']}")
            if answer["header"]["msg_type"] == "execute_result":
                return str(answer["content"]["data"]["text/plain"])
    finally:
        stream.close()
