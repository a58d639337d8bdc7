"""The keeper's API while much goes on: fifty servers, a hundred callers that follow a log, and requests.

Latency is measured on a schedule well below what the keeper can do: measured under flood it would say nothing that the rate does
not say. The rate is measured under flood.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from contenders import Labkeeper, Server
from crowd import crowd
from figures import percentiles
from progress import BenchError, say, shout
from web import OK, ask_json

SERVERS: Final = 50
FOLLOWERS: Final = 100
RATE: Final = 100.0
"""Requests a second on schedule."""
_SECONDS: Final = 10.0
_AT_A_TIME: Final = 10
"""Servers that are asked for together; this measures no burst."""
_BUSY: Final = 0.8
"""Share of a core from which on the caller would measure itself."""


def api(keeper: Labkeeper, seconds: float = _SECONDS) -> dict[str, Any]:
    """Ask for one server, and for the list of all."""
    with crowd(keeper, SERVERS, _AT_A_TIME) as servers, _followers(keeper, servers) as followers:
        found = {
            "one": _measure(keeper, f"/api/servers/{servers[0].name}", seconds),
            "list": _measure(keeper, "/api/servers", seconds),
        }
        if (
            len(
                ask_json("GET", f"{keeper.url}/api/servers", keeper.authorization, good=(OK,))[
                    "servers"
                ]
            )
            != SERVERS
        ):
            raise BenchError("the list has not all servers")
        if followers.lost:
            raise BenchError(f"{followers.lost} of {FOLLOWERS} followers were cut off")
    return {"servers": SERVERS, "followers": FOLLOWERS, "rate": RATE} | found


def _measure(keeper: Labkeeper, path: str, seconds: float) -> dict[str, Any]:
    say(f"{keeper.label}: GET {path}")
    paced, flooded = call(keeper, path, seconds, RATE), call(keeper, path, seconds, None)
    return {
        "requests": len(paced["seen"]),
        "latency": percentiles(paced["seen"]),
        "requests_per_second": len(flooded["seen"]) / flooded["seconds"],
        "caller_share_of_a_core": flooded["own_share"],
    }


def call(keeper: Labkeeper, path: str, seconds: float, rate: float | None) -> dict[str, Any]:
    """Run the caller, on a schedule or, without a rate, as fast as it can; return what it saw."""
    port = urlsplit(keeper.url).port
    job = {
        "port": port,
        "path": path,
        "authorization": keeper.authorization,
        "seconds": seconds,
        "rate": rate,
    }
    program = Path(__file__).with_name("caller.py")
    done = subprocess.run(
        [sys.executable, program],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchError(f"the caller broke: {done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout)
    if answer["failed"]:
        raise BenchError(f"a request failed: {answer['failed'][0]}")
    if answer["own_share"] > _BUSY:
        shout(
            f"the caller used {answer['own_share']:.0%} of a core: the figures for {path} are in part its own"
        )
    return answer


class _Followers:
    """Callers that hold a log's stream open, and read what comes."""

    def __init__(self, keeper: Labkeeper, servers: Sequence[Server]) -> None:
        self.lost = 0
        self._over = threading.Event()
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        for number in range(FOLLOWERS):
            stream = self._open(keeper, servers[number % len(servers)])
            self._sockets[stream.fileno()] = stream
            self._poll.register(stream, select.EPOLLIN)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hang up."""
        self._over.set()
        self._thread.join()
        self._poll.close()
        for stream in self._sockets.values():
            stream.close()

    @staticmethod
    def _open(keeper: Labkeeper, server: Server) -> socket.socket:
        port = urlsplit(keeper.url).port
        stream = socket.create_connection(("127.0.0.1", port or 0), timeout=30)
        path = f"/api/servers/{server.name}/logs?follow=true"
        head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: {keeper.authorization}\r\n\r\n"
        stream.sendall(head.encode())
        if b" 200 " not in stream.recv(65536):
            raise BenchError("cannot follow a log")
        return stream

    def _read(self) -> None:
        while not self._over.is_set():
            for number, _ in self._poll.poll(timeout=0.2):
                if not self._sockets[number].recv(65536):
                    self.lost += 1
                    self._poll.unregister(number)


@contextlib.contextmanager
def _followers(keeper: Labkeeper, servers: Sequence[Server]) -> Iterator[_Followers]:
    followers = _Followers(keeper, servers)
    time.sleep(1)  # All streams have sent what was there already.
    try:
        yield followers
    finally:
        followers.close()
