"""A server's log file: written by the server itself, read, followed and rotated by us.

The server holds the file open for appending and outlives us, so rotation copies the file aside and empties it; lines written
between the two are lost (a millisecond for a file of 10 MiB). It can make the file as long as it likes, a terabyte of nothing
even, so no more than the end of it is ever read.
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
"""Seconds between two looks of a follower."""
_LINE_LIMIT: Final = 64 * 1024
"""A line is given in pieces of at most so many bytes."""
_LEAST: Final = 1024 * 1024
"""Bytes that are kept of a log however short its parts are to be: between two looks it grows past any limit."""


class LogFile:
    """One server's log and, after a rotation, one older part of it."""

    def __init__(self, path: Path, *, max_bytes: int, secrets: Secrets | None = None) -> None:
        """`secrets` are those of the server; what is read of its log is without them."""
        self.path = path
        self._secrets = secrets or Secrets()
        self._older = path.with_name(path.name + ".1")
        self._spare = path.with_name(path.name + ".tmp")
        self._max_bytes = max_bytes
        self._most = max(max_bytes, _LEAST)
        """Bytes of a part that are read, and kept."""

    @property
    def size(self) -> int:
        """Bytes that it has now."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def open(self, headline: str) -> IO[bytes]:
        """Open it for a launch, write a headline, and give it for the server to write to. Raises OSError."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        stream = os.fdopen(descriptor, "ab", buffering=0)
        try:
            stream.write(f"{headline}\n".encode())
        except OSError:
            stream.close()
            raise
        return stream

    def rotate(self) -> None:
        """Set the log aside when it has grown past its limit."""
        try:
            if self.path.stat().st_size <= self._max_bytes:
                return
            self._copy_end()
            os.truncate(self.path, 0)
            self._spare.replace(self._older)
        except OSError:
            # Without room for the copy the newest lines matter more than the older ones.
            with contextlib.suppress(OSError):
                os.truncate(self.path, 0)
            with contextlib.suppress(OSError):
                self._spare.unlink(missing_ok=True)

    def _copy_end(self) -> None:
        """Copy what is kept of it. Raises OSError."""
        descriptor = os.open(self._spare, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as spare, self.path.open("rb") as log:
            spare.writelines(self._last_lines(log))

    def _last_lines(self, stream: IO[bytes]) -> Iterator[bytes]:
        """Return the lines from here to where it ends now, or the last ones if those are more than is kept."""
        size, begin = os.fstat(stream.fileno()).st_size, stream.tell()
        if size - begin > self._most:
            stream.seek(size - self._most)
            # The rest of a line may be a part of a secret, which nobody would know as one.
            stream.readline(_LINE_LIMIT)
        left = size - stream.tell()
        while left > 0 and (line := stream.readline(min(left, _LINE_LIMIT))):
            left -= len(line)
            yield line

    def tail(self, count: int | None) -> list[str]:
        """Return the last `count` lines, or all that is kept."""
        lines: deque[bytes] = deque(maxlen=count)
        for part in (self._older, self.path):
            try:
                with part.open("rb") as stream:
                    lines.extend(self._last_lines(stream))
            except FileNotFoundError:
                continue
        # Only now: to look for secrets takes longer than to read.
        return [self._text(line).removesuffix("\n") for line in lines]

    def news(self, since: int, most: int) -> tuple[list[str], int, int]:
        """Return the whole lines after `since` bytes, how many bytes before them were left out, and where they end.

        No more than `most` bytes are read, and the newest where there are more. Raises OSError.
        """
        with self.path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            # It has been rotated where it is shorter than it was.
            since = since if since <= size else 0
            begin = max(since, size - most)
            stream.seek(begin)
            new = stream.read(most)
        cut = new.find(b"\n") + 1 if begin > since else 0
        # A line without an end waits for it, as long as it may.
        end = new.rfind(b"\n") + 1 or (len(new) if len(new) == most else 0)
        lines = [self._text(line) for line in new[cut:end].splitlines()]
        return lines, begin - since + cut, begin + end

    def follow(self, count: int | None, live: Callable[[], bool]) -> Iterator[str]:
        """Return the last `count` lines, then each new one; "" means nothing new yet.

        Ends when `live` says no, or the log was removed: the next one of this name is another server's.
        """
        try:
            stream = self.path.open("rb")
        except FileNotFoundError:
            return
        with stream:
            end = stream.seek(0, os.SEEK_END)
            yield from (f"{line}\n" for line in self.tail(count))
            while True:
                # Asked before reading: what was written before the end is still read after it.
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
