"""The little HTTP and websocket that the bench speaks, the same for every contender.

Each request has a connection of its own, on the standard library: about 0.2 ms, in nobody's favour.
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

PATIENCE: Final = 600.0
"""Seconds for anything at all; whoever takes longer has failed, and the bench with it."""
OK: Final = 200
CREATED: Final = 201
_PORTS: Final = itertools.cycle(range(20000, 30000))
"""Below the ports that Linux gives to outgoing connections, so that none of those can take one between choice and use."""


def free_port() -> int:
    """Choose a port that nobody listens on, and that was not chosen just before."""
    for port in _PORTS:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError


def ask(
    method: str, url: str, authorization: str = "", body: Any = None, timeout: float = PATIENCE
) -> tuple[int, bytes]:
    """Send one request; give status and body. Raises OSError and HTTPException where there is no answer."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    headers = {"Authorization": authorization} if authorization else {}
    data = None if body is None else json.dumps(body)
    if data is not None:
        headers["Content-Type"] = "application/json"
    try:
        connection.request(
            method, f"{parts.path}?{parts.query}" if parts.query else parts.path, data, headers
        )
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def ask_json(
    method: str,
    url: str,
    authorization: str = "",
    body: Any = None,
    good: tuple[int, ...] = (OK, CREATED),
) -> Any:
    """Send one request that must succeed; give what it answered."""
    status, data = ask(method, url, authorization, body)
    if status not in good:
        raise BenchError(
            f"{method} {urlsplit(url).path} answered {status}: {data[:2000].decode(errors='replace')}"
        )
    return json.loads(data) if data else None


def lines(url: str, authorization: str) -> Iterator[bytes]:
    """Read a stream line by line until its sender ends it."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=PATIENCE)
    try:
        connection.request(
            "GET",
            parts.path,
            headers={"Authorization": authorization, "Accept": "text/event-stream"},
        )
        yield from connection.getresponse()
    finally:
        connection.close()


def wait_until_answering(
    url: str, authorization: str, *, poll: float, alive: Callable[[], bool] = lambda: True
) -> None:
    """Wait for what counts as ready, for all alike: `api` answers 200, and then `api/me`, which wants the token, too."""
    until = time.monotonic() + PATIENCE
    for path, key in (("api", ""), ("api/me", authorization)):
        while not _answers(url + path, key):
            if not alive():
                raise BenchError("a server ended before it answered")
            if time.monotonic() > until:
                raise BenchError(f"a server did not answer within {PATIENCE:.0f} s")
            time.sleep(poll)


def _answers(url: str, authorization: str) -> bool:
    try:
        return ask("GET", url, authorization, timeout=5)[0] == OK
    except (OSError, http.client.HTTPException):
        return False


def start_kernel(url: str, authorization: str) -> str:
    """Start a kernel; give its id."""
    return str(ask_json("POST", f"{url}api/kernels", authorization, {"name": "python3"})["id"])


def run_cell(url: str, authorization: str, kernel: str, code: str) -> str:
    """Run code in a kernel over the websocket, as the Lab does; give its result as soon as that is there."""
    channel = f"{url}api/kernels/{kernel}/channels".replace("http", "ws", 1)
    stream = websocket.create_connection(
        channel, header=[f"Authorization: {authorization}"], timeout=PATIENCE
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
