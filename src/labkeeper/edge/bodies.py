"""Bodies of HTTP/1 messages, as they arrive in pieces (RFC 9112, 6 and 7).

llhttp does not report where in a piece a body ends, and what follows may be the next request. So
chunks are decoded here; the form is narrower than the grammar: no space around a size.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Final, Protocol

from labkeeper.edge.heads import END, TRAILERS

_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[^\x00-\x08\x0a-\x1f\x7f]*+)?\r\n")
_LONGEST_LINE: Final = 1024
"""Maximum bytes of a line with a chunk's size and extensions, which are dropped."""
_LONGEST_TRAILERS: Final = 8192
"""Maximum bytes of the headers after the last chunk, which are dropped."""

LAST_CHUNK: Final = b"0\r\n\r\n"


class BadBody(Exception):  # noqa: N818 - as BadHead
    """A body is not framed as it must be; the message is the reason."""

    status = HTTPStatus.BAD_REQUEST


class Body(Protocol):
    """The body of one message."""

    ended: bool
    """Whether nothing more belongs to it."""

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Return the content in a piece of a connection's data, and what follows the body.

        Raises BadBody.
        """


class Sized:
    """A body of known length."""

    def __init__(self, length: int) -> None:
        self._left = length
        self.ended = length == 0

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """See `Body`."""
        content = data if len(data) <= self._left else data[: self._left]
        self._left -= len(content)
        self.ended = self._left == 0
        return content, data[len(content) :]


class UntilClosed:
    """A body that ends with its connection."""

    ended = False

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """See `Body`."""
        return data, b""


class Chunked:
    """A body in chunks."""

    def __init__(self) -> None:
        self.ended = False
        self._line = b""
        """The part of a line that has arrived."""
        self._left: int | None = None
        """Bytes of the current chunk that are missing, with its line end; None between chunks."""
        self._trailers = False
        """Whether the last chunk has arrived."""

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """See `Body`."""
        # An offset advances: to cut off each of many small chunks would copy the rest each time.
        data, at, pieces = self._line + data if self._line else data, 0, []
        self._line = b""
        while at < len(data) and not self.ended:
            if self._trailers:
                at = self._end(data, at)
            elif self._left is None:
                at = self._begin_chunk(data, at)
            else:
                piece, at = self._within_chunk(data, at, self._left)
                pieces.append(piece)
        return b"".join(pieces), data[at:] if self.ended else b""

    def _begin_chunk(self, data: bytes, at: int) -> int:
        end = data.find(b"\n", at) + 1
        if not end:
            return self._keep(data, at, _LONGEST_LINE)
        found = _SIZE.fullmatch(data, at, end)
        if found is None or end - at > _LONGEST_LINE:
            raise BadBody("the size of a chunk is malformed")
        size = int(found[1], 16)
        self._left, self._trailers = (None, True) if size == 0 else (size + 2, False)
        return end

    def _within_chunk(self, data: bytes, at: int, left: int) -> tuple[bytes, int]:
        """Return content, and where it ends; the last two bytes of a chunk are its line end."""
        content = data[at : at + max(0, left - 2)]
        closing = data[at + len(content) : at + left]
        if not b"\r\n"[-min(left, 2) :].startswith(closing):
            raise BadBody("a chunk is longer than its size")
        taken = len(content) + len(closing)
        self._left = (left - taken) or None
        return content, at + taken

    def _end(self, data: bytes, at: int) -> int:
        found = data.find(END, at)
        if data.startswith(b"\r\n", at):
            end = at + 2
        elif found >= 0:
            end = found + len(END)
        else:
            return self._keep(data, at, _LONGEST_TRAILERS)
        if not TRAILERS.fullmatch(data, at, end) or end - at > _LONGEST_TRAILERS:
            raise BadBody("the headers after the last chunk are malformed")
        self.ended = True
        return end

    def _keep(self, data: bytes, at: int, limit: int) -> int:
        """Keep the part of a line that has arrived."""
        if len(data) - at > limit:
            raise BadBody("a line between chunks is too long")
        self._line = data[at:]
        return len(data)


def chunk(content: bytes) -> bytes:
    """Return content as one chunk."""
    return b"%x\r\n%b\r\n" % (len(content), content)
