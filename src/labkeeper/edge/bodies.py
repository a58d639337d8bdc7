"""Bodies of HTTP/1 messages, as they arrive in pieces (RFC 9112, 6 and 7).

llhttp does not report where in a piece a body ends, and what follows may be the next request. So
chunks are decoded here; the form is narrower than the grammar: no space around a size.
"""

from __future__ import annotations

import re
from typing import Final, Protocol

from labkeeper.edge.heads import TRAILERS

_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[^\x00-\x08\x0a-\x1f\x7f]*+)?\r\n")
_LONGEST_LINE: Final = 1024
"""Maximum bytes of a line with a chunk's size and extensions, which are dropped."""
_LONGEST_TRAILERS: Final = 8192
"""Maximum bytes of the headers after the last chunk, which are dropped."""

LAST_CHUNK: Final = b"0\r\n\r\n"


class BadBody(Exception):  # noqa: N818 - as BadHead
    """A body is not framed as it must be; the message is the reason."""


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
        rest, pieces = self._line + data, []
        self._line = b""
        while rest and not self.ended:
            if self._trailers:
                rest = self._end(rest)
            elif self._left is None:
                rest = self._begin_chunk(rest)
            else:
                piece, rest = self._within_chunk(rest, self._left)
                pieces.append(piece)
            if self._line:
                break
        return b"".join(pieces), rest if self.ended else b""

    def _begin_chunk(self, rest: bytes) -> bytes:
        end = rest.find(b"\n") + 1
        if not end:
            self._keep(rest, _LONGEST_LINE)
            return b""
        found = _SIZE.fullmatch(rest, 0, end)
        if found is None or end > _LONGEST_LINE:
            raise BadBody("the size of a chunk is malformed")
        size = int(found[1], 16)
        self._left, self._trailers = (None, True) if size == 0 else (size + 2, False)
        return rest[end:]

    def _within_chunk(self, rest: bytes, left: int) -> tuple[bytes, bytes]:
        """Return content, and what follows; the last two bytes of a chunk are its line end."""
        content = rest[: max(0, left - 2)]
        closing = rest[len(content) : left]
        if not b"\r\n"[-min(left, 2) :].startswith(closing):
            raise BadBody("a chunk is longer than its size")
        self._left = (left - len(content) - len(closing)) or None
        return content, rest[len(content) + len(closing) :]

    def _end(self, rest: bytes) -> bytes:
        end = 2 if rest.startswith(b"\r\n") else rest.find(b"\r\n\r\n") + 4
        if end == 3:  # noqa: PLR2004 - none was found
            self._keep(rest, _LONGEST_TRAILERS)
            return b""
        if not TRAILERS.fullmatch(rest, 0, end) or end > _LONGEST_TRAILERS:
            raise BadBody("the headers after the last chunk are malformed")
        self.ended = True
        return rest[end:]

    def _keep(self, part: bytes, limit: int) -> None:
        if len(part) > limit:
            raise BadBody("a line between chunks is too long")
        self._line = part


def chunk(content: bytes) -> bytes:
    """Return content as one chunk."""
    return b"%x\r\n%b\r\n" % (len(content), content)
