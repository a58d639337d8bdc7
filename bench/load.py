"""Measure the keeper's API under load: 50 servers, 100 clients that follow logs, and requests.

Throughput is measured with callers that send as fast as they can. Latency is measured at a rate far
below that: at full load it would only restate the throughput.
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

from contenders import Server
from crowd import crowd
from figures import percentiles
from keepers import Labkeeper
from progress import BenchError, say, warn
from web import OK, request_json

SERVERS: Final = 50
FOLLOWERS: Final = 100
RATE: Final = 100.0
"""Requests per second for measurements of latency."""
_SECONDS: Final = 10.0
AT_A_TIME: Final = 10
"""Servers to start at the same time; this does not measure a burst."""
_MAX_CALLER_SHARE: Final = 0.8
"""Share of a core above which the caller limits its own rate."""


def api(keeper: Labkeeper, seconds: float = _SECONDS) -> dict[str, Any]:
    """Measure requests for one server, and for the list of all."""
    with crowd(keeper, SERVERS, AT_A_TIME) as servers, followers(keeper, servers) as streams:
        found = {
            "one": _measure(keeper, f"/api/servers/{servers[0].name}", seconds),
            "list": _measure(keeper, "/api/servers", seconds),
        }
        url = f"{keeper.url}/api/servers"
        listed = request_json("GET", url, keeper.authorization, good=(OK,))["servers"]
        if len(listed) != SERVERS:
            raise BenchError(f"the list has {len(listed)} servers, not {SERVERS}")
        if streams.lost:
            raise BenchError(f"{streams.lost} of {FOLLOWERS} followers were disconnected")
    return {"servers": SERVERS, "followers": FOLLOWERS, "rate": RATE} | found


def _measure(keeper: Labkeeper, path: str, seconds: float) -> dict[str, Any]:
    say(f"{keeper.label}: GET {path}")
    paced = run_caller(keeper, path, seconds, RATE)
    flooded = run_caller(keeper, path, seconds, None)
    return {
        "requests": len(paced["seen"]),
        "latency": percentiles(paced["seen"]),
        "requests_per_second": len(flooded["seen"]) / flooded["seconds"],
        "caller_share_of_a_core": flooded["own_share"],
    }


def run_caller(keeper: Labkeeper, path: str, seconds: float, rate: float | None) -> dict[str, Any]:
    """Run `caller.py` at a rate, or as fast as it can without one; return its results."""
    job = {
        "port": urlsplit(keeper.url).port,
        "path": path,
        "authorization": keeper.authorization,
        "seconds": seconds,
        "rate": rate,
    }
    command = [sys.executable, str(Path(__file__).with_name("caller.py"))]
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchError(f"caller.py failed: {done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout)
    if answer["failed"]:
        raise BenchError(f"a request failed: {answer['failed'][0]}")
    if answer["own_share"] > _MAX_CALLER_SHARE:
        share = f"{answer['own_share']:.0%}"
        warn(f"the caller used {share} of a core: it may have limited the results for {path}")
    return answer


class _Followers:
    """Clients that each follow the log of a server."""

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
        """Close all streams."""
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
        head = (
            f"GET {path} HTTP/1.1\r\n"
            f"Host: 127.0.0.1:{port}\r\nAuthorization: {keeper.authorization}\r\n\r\n"
        )
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
def followers(keeper: Labkeeper, servers: Sequence[Server]) -> Iterator[_Followers]:
    """Follow the logs of servers; yield the streams, which count the disconnected ones."""
    streams = _Followers(keeper, servers)
    time.sleep(1)  # The streams first send the existing lines.
    try:
        yield streams
    finally:
        streams.close()
