"""A server's log file: written by the server, read, followed and rotated by the keeper.

The server holds the file open for appending and outlives the keeper, so rotation copies the file
aside and truncates it; lines written in between are lost (a millisecond for a file of 10 MiB). The
server can make the file any length, even a sparse terabyte, so only its end is ever read.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

from labkeeper.scrub import Secrets, scrub

_LOOK_EVERY: Final = 0.25
"""A follower's polling interval in seconds."""
_LINE_LIMIT: Final = 64 * 1024
"""Maximum bytes per piece; longer lines are split."""
_LEAST: Final = 1024 * 1024
"""Minimum bytes kept of a log, however small its limit: between checks it can exceed any limit."""


class LogFile:
    """One server's log, with one older part after a rotation."""

    def __init__(self, path: Path, *, max_bytes: int, secrets: Secrets | None = None) -> None:
        """`secrets` of the server are scrubbed from everything that is read."""
        self.path = path
        self._secrets = secrets or Secrets()
        self._older = path.with_name(path.name + ".1")
        self._spare = path.with_name(path.name + ".tmp")
        self._max_bytes = max_bytes
        self._most = max(max_bytes, _LEAST)
        """Maximum bytes of a part that are read and kept."""

    @property
    def size(self) -> int:
        """Its present size in bytes."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def open(self, headline: str = "") -> IO[bytes]:
        """Open the log, write a headline such as that of a launch, and return the stream.

        Raises OSError.
        """
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(
            self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        stream = os.fdopen(descriptor, "ab", buffering=0)
        if not headline:
            return stream
        try:
            stream.write(f"{headline}\n".encode())
        except OSError:
            stream.close()
            raise
        return stream

    def rotate(self) -> None:
        """Rotate the log if it exceeds its limit."""
        try:
            if self.path.stat().st_size <= self._max_bytes:
                return
            self._copy_end()
            os.truncate(self.path, 0)
            self._spare.replace(self._older)
        except OSError:
            # Without space for the copy, the newest lines matter more than the older ones.
            with contextlib.suppress(OSError):
                os.truncate(self.path, 0)
            with contextlib.suppress(OSError):
                self._spare.unlink(missing_ok=True)

    def _copy_end(self) -> None:
        """Copy the end that is kept. Raises OSError."""
        descriptor = os.open(self._spare, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as spare, self.path.open("rb") as log:
            spare.writelines(self._last_lines(log))

    def _last_lines(self, stream: IO[bytes]) -> Iterator[bytes]:
        """Yield the lines from here to the present end; only the last ones if over the limit."""
        size, begin = os.fstat(stream.fileno()).st_size, stream.tell()
        if size - begin > self._most:
            stream.seek(size - self._most)
            # A partial line may hold part of a secret, which scrubbing would miss.
            stream.readline(_LINE_LIMIT)
        left = size - stream.tell()
        while left > 0 and (line := stream.readline(min(left, _LINE_LIMIT))):
            left -= len(line)
            yield line

    def tail(self, count: int | None) -> list[str]:
        """Return the last `count` lines, or all that are kept."""
        lines: deque[bytes] = deque(maxlen=count)
        for part in (self._older, self.path):
            try:
                with part.open("rb") as stream:
                    lines.extend(self._last_lines(stream))
            except FileNotFoundError:
                continue
        # Only now: scrubbing takes longer than reading.
        return [self._text(line).removesuffix("\n") for line in lines]

    def news(self, since: int, most: int) -> tuple[list[str], int, int]:
        """Return the complete lines after offset `since`, the bytes skipped before, and their end.

        Reads at most `most` bytes, the newest ones. Raises OSError.
        """
        with self.path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            # A file that has shrunk was rotated.
            since = since if since <= size else 0
            begin = max(since, size - most)
            stream.seek(begin)
            new = stream.read(most)
        cut = new.find(b"\n") + 1 if begin > since else 0
        # An unfinished line waits for its end, up to the limit.
        end = new.rfind(b"\n") + 1 or (len(new) if len(new) == most else 0)
        lines = [self._text(line) for line in new[cut:end].splitlines()]
        return lines, begin - since + cut, begin + end

    def follow(self, count: int | None, live: Callable[[], bool]) -> Iterator[str]:
        """Yield the last `count` lines, then each new one; "" means that there is nothing new yet.

        Ends when `live` returns False or the log was removed: the next log of this name belongs to
        another server.
        """
        try:
            stream = self.path.open("rb")
        except FileNotFoundError:
            return
        with stream:
            end = stream.seek(0, os.SEEK_END)
            yield from (f"{line}\n" for line in self.tail(count))
            while True:
                # Before reading, so that what was written before the end is still read.
                more = live() and os.fstat(stream.fileno()).st_nlink > 0
                size = os.fstat(stream.fileno()).st_size
                if size < end:
                    stream.seek(0)
                yield from map(self._text, self._last_lines(stream))
                end = stream.tell()
                if not more:
                    return
                yield ""
                time.sleep(_LOOK_EVERY)

    def remove(self) -> None:
        """Remove all parts. Idempotent."""
        for part in (self.path, self._older, self._spare):
            part.unlink(missing_ok=True)

    def _text(self, line: bytes) -> str:
        """Return a line as text, without secrets."""
        return scrub(line.decode("utf-8", errors="replace"), self._secrets)
