"""Send requests to an API as fast as possible, or on a schedule.

This is a program of its own, so that nothing else holds its interpreter lock. It reads a job from
stdin and writes its results to stdout, both as JSON. To cost little, it has four threads, each with
a persistent raw socket and a prepared request, and parses only the status and length of a response.
It reports the share of a core that it used: far below 1, the caller was not the bottleneck.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

CALLERS: Final = 4


class Caller:
    """A persistent connection that repeats one request."""

    def __init__(self, port: int, path: str, authorization: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._request = (
            f"GET {path} HTTP/1.1\r\n"
            f"Host: 127.0.0.1:{port}\r\nAuthorization: {authorization}\r\n\r\n"
        ).encode()

    def call(self) -> None:
        """Send the request and read the whole response."""
        self._socket.sendall(self._request)
        data = bytearray()
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += self._receive()
        head = bytes(data[:end]).lower()
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(head.decode(errors="replace"))
        length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        left = length - (len(data) - end - 4)
        while left > 0:
            left -= len(self._receive())

    def _receive(self) -> bytes:
        piece = self._socket.recv(65536)
        if not piece:
            raise RuntimeError("the server closed a connection")
        return piece


def flood(caller: Caller, seconds: float) -> list[float]:
    """Send a request after each response; return their latencies in seconds."""
    seen: list[float] = []
    until = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < until:
        caller.call()
        seen.append(time.perf_counter() - begin)
    return seen


def pace(caller: Caller, seconds: float, *, number: int, rate: float) -> list[float]:
    """Send this caller's share of the scheduled requests; return their latencies in seconds.

    A latency counts from when its request was due, so a slow response also counts against the
    requests that it delays.
    """
    seen: list[float] = []
    begin = time.perf_counter()
    for place in range(number, int(seconds * rate), CALLERS):
        due = begin + place / rate
        time.sleep(max(0.0, due - time.perf_counter()))
        caller.call()
        seen.append(time.perf_counter() - due)
    return seen


def main() -> None:
    """Run the job on stdin."""
    job = json.load(sys.stdin)
    callers = [Caller(job["port"], job["path"], job["authorization"]) for _ in range(CALLERS)]
    seen: list[float] = []
    failed: list[str] = []

    def run(work: Callable[[], list[float]]) -> None:
        try:
            seen.extend(work())
        except (OSError, RuntimeError) as error:
            failed.append(str(error))

    def work_of(number: int) -> Callable[[], list[float]]:
        if job["rate"] is None:
            return lambda: flood(callers[number], job["seconds"])
        return lambda: pace(callers[number], job["seconds"], number=number, rate=job["rate"])

    for caller in callers:
        caller.call()  # Set up the connection before the clock starts.
    threads = [threading.Thread(target=run, args=(work_of(number),)) for number in range(CALLERS)]
    begin, used = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    json.dump(
        {
            "seconds": seconds,
            "own_share": (time.process_time() - used) / seconds,
            "seen": seen,
            "failed": failed,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
