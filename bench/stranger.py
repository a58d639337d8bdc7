"""Send requests with wrong tokens to an API, as fast as it refuses them.

Like `caller.py`, this is a program of its own. It reads its target as one line of JSON from stdin,
prints "ready" once each connection has been refused, and continues until stdin ends. Then it writes
its results as JSON. No token is sent twice.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from typing import Any, Final

STRANGERS: Final = 2
"""Number of persistent connections."""
_AT_ONCE: Final = 4
"""Requests in one write; the keeper closes a connection with more than eight unanswered."""


class Stranger:
    """A persistent connection without a valid token."""

    def __init__(self, port: int, path: str, number: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answers = self._socket.makefile("rb")
        self._request = (
            f"GET {path} HTTP/1.1\r\n"
            f"Host: 127.0.0.1:{port}\r\nAuthorization: Bearer lk_0123456789ab_{number}"
        ).encode()
        self.refused = 0

    def send_batch(self) -> None:
        """Send several requests in one write; raise RuntimeError unless each is refused."""
        numbers = range(self.refused, self.refused + _AT_ONCE)
        self._socket.sendall(b"".join(b"%b%042d\r\n\r\n" % (self._request, n) for n in numbers))
        for _ in numbers:
            status = self._read()
            if not status.startswith(b"HTTP/1.1 401"):
                answer = status.decode(errors="replace").strip() or "a closed connection"
                raise RuntimeError(f"a wrong token was answered with {answer}")
            self.refused += 1

    def _read(self) -> bytes:
        """Read a response; return its status line."""
        status, length = self._answers.readline(), 0
        while line := self._answers.readline().strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        self._answers.read(length)
        return status


def main() -> None:
    """Send requests until stdin ends."""
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    strangers = [Stranger(job["port"], job["path"], number) for number in range(STRANGERS)]
    over = threading.Event()
    failed: list[str] = []

    def run(stranger: Stranger) -> None:
        try:
            while not over.is_set():
                stranger.send_batch()
        except (OSError, RuntimeError) as error:
            failed.append(str(error))

    for stranger in strangers:
        stranger.send_batch()
    threads = [threading.Thread(target=run, args=(stranger,)) for stranger in strangers]
    before = sum(each.refused for each in strangers)
    begin, used = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    sys.stdin.read()
    over.set()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    refused = sum(each.refused for each in strangers) - before
    json.dump(
        {
            "seconds": seconds,
            "own_share": (time.process_time() - used) / seconds,
            "refused": refused,
            "failed": failed,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
