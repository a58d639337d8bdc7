"""Knocks at an API with wrong tokens, as fast as it is refused; a program of its own, as `caller.py` is.

It reads where to knock as one line of JSON from stdin, says "ready" on stdout once every connection was refused once, and goes on
until its stdin ends. Then it writes what it saw. No token is shown twice.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from typing import Any, Final

STRANGERS: Final = 2
"""Each with one kept connection."""
_AT_ONCE: Final = 4
"""Requests in one write; a connection on which more than eight wait is closed."""


class Stranger:
    """One connection."""

    def __init__(self, port: int, path: str, number: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answers = self._socket.makefile("rb")
        self._request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer lk_0123456789ab_{number}".encode()
        self.refused = 0

    def knock(self) -> None:
        """Send some requests in one write, and read that each is refused."""
        self._socket.sendall(
            b"".join(
                b"%b%042d\r\n\r\n" % (self._request, self.refused + at) for at in range(_AT_ONCE)
            )
        )
        for _ in range(_AT_ONCE):
            status = self._read()
            if not status.startswith(b"HTTP/1.1 401"):
                raise RuntimeError(
                    f"a wrong token was answered {status.decode(errors='replace').strip() or 'by hanging up'}"
                )
            self.refused += 1

    def _read(self) -> bytes:
        """Return the first line of an answer, and read the rest."""
        status, length = self._answers.readline(), 0
        while line := self._answers.readline().strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        self._answers.read(length)
        return status


def main() -> None:
    """Knock until told to stop."""
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    strangers = [Stranger(job["port"], job["path"], number) for number in range(STRANGERS)]
    over = threading.Event()
    failed: list[str] = []

    def run(stranger: Stranger) -> None:
        try:
            while not over.is_set():
                stranger.knock()
        except (OSError, RuntimeError) as error:
            failed.append(str(error))

    for stranger in strangers:
        stranger.knock()
    threads = [threading.Thread(target=run, args=(stranger,)) for stranger in strangers]
    before, begin, used = (
        sum(each.refused for each in strangers),
        time.perf_counter(),
        time.process_time(),
    )
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
