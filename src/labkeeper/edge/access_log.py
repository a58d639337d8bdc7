"""The access log: a line of JSON for each answer, without secrets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from urllib.parse import unquote_to_bytes

from labkeeper.edge.sessions import Session

_WRITE_EVERY: Final = 0.2
"""Seconds for which lines are collected."""
_LINKS: Final = b"/open/"
"""What follows in a path is a secret."""


def new_id() -> str:
    """Return a request id, which has to be unique, not secret."""
    return f"{random.getrandbits(128):032x}"


@dataclass(slots=True)
class Record:
    """One request and what became of it."""

    client: str
    """The client's address."""
    id: str
    """The request id."""
    began: float
    """By the loop's clock."""
    method: bytes = b""
    """Empty: no request could be read."""
    host: bytes = b""
    target: bytes = b""
    to: str = "edge"
    """Who answered, or should have: `edge`, `keeper` or `lab`."""
    server: str | None = None
    session: Session | None = None
    status: int | None = None
    """None: the client was gone before an answer."""
    sent: int = 0
    """Bytes of the answer, with its head."""
    cut: bool = False
    """Whether the connection ended before the answer did."""

    def line(self, now: float) -> str:
        """Return it as a line; `now` is by the loop's clock."""
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": self.id,
            "client": self.client,
            "method": self.method.decode(),
            "host": self.host.decode(),
            "path": _shown(self.target).decode(),
            "to": self.to,
            "server": self.server,
            "user": None if self.session is None else self.session.user,
            "status": self.status,
            "bytes": self.sent,
            "seconds": round(now - self.began, 4),
            "cut": self.cut,
        }
        return json.dumps(entry) + "\n"


def _shown(target: bytes) -> bytes:
    """Return the path of a target. Queries and links have secrets."""
    path = target.partition(b"?")[0]
    return _LINKS + b"..." if unquote_to_bytes(path).startswith(_LINKS) else path


class AccessLog:
    """Collects lines, and writes them together. A full disk loses them."""

    def __init__(self, file: int | None, loop: asyncio.AbstractEventLoop) -> None:
        """`file` is a descriptor, open for appending; None: nothing is written."""
        self.on = False
        """Whether the settings want it."""
        self._file = file
        self._loop = loop
        self._lines: list[str] = []

    def add(self, record: Record) -> None:
        """Add a request that has ended."""
        if not self.on or self._file is None:
            return
        if not self._lines:
            self._loop.call_later(_WRITE_EVERY, self.write)
        self._lines.append(record.line(self._loop.time()))

    def write(self) -> None:
        """Write what was collected."""
        lines, self._lines = self._lines, []
        if lines and self._file is not None:
            with contextlib.suppress(OSError):
                os.write(self._file, "".join(lines).encode())
