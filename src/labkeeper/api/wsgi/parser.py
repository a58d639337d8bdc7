"""Parsing of requests: limits, framing, and bodies that are kept or discarded."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, Final

from waitress.parser import HTTPRequestParser, ParsingError
from waitress.utilities import BadRequest, RequestEntityTooLarge, RequestHeaderFieldsTooLarge

_HEADERS: Final = 100
"""Maximum number of headers of a request."""
IN_MEMORY: Final = 64 * 1024
"""Bytes of a body that are kept in memory; a larger one is in a file."""
_DRAIN_LIMIT: Final = 256 * 1024 * 1024
"""Bytes of an oversized body that are read and discarded, so that its sender reads the answer."""
_CODINGS: Final = re.compile(
    rb"^transfer-encoding:[ \t]*(.*?)[ \t]*\r?$", re.IGNORECASE | re.MULTILINE
)


class _Nothing:
    """Receives a body and discards it."""

    def append(self, piece: bytes) -> None:
        pass

    def __len__(self) -> int:
        return 0

    def getfile(self) -> io.BytesIO:
        return io.BytesIO()

    def close(self) -> None:
        pass


class RequestParser(HTTPRequestParser):
    """Also reads a discarded body to its end: a caller cut off while sending sees no answer.

    A body is kept if its sender is known and there is room. So a request without a token costs no
    more than its connection.
    """

    expect_continue: bool
    body_rcv: Any
    is_head = False
    """Whether its answer has no body; known even for otherwise unreadable requests."""
    is_large = False
    """Whether its body is kept and may be too long for memory."""
    unread = False
    """Whether its body is discarded."""
    _left = 0

    def __init__(self, adj: Any, keeps: Callable[[str | None, bool], bool]) -> None:
        """`keeps` decides by the Authorization header and whether the body may be large."""
        super().__init__(adj)
        self._keeps = keeps

    def received(self, data: bytes) -> int:
        """Consume bytes; return how many."""
        if self._left:
            taken = min(len(data), self._left)
            self._left -= taken
            self.completed = self._left == 0
            return taken
        if self.body_rcv is None:
            self.is_head = (self.header_plus + data).lstrip().startswith(b"HEAD ")
        try:
            consumed: int = super().received(data)
        except ValueError:
            # A URL or length that Python cannot parse.
            self.error = BadRequest("the request line or a header cannot be read")
            self.completed = True
            return len(data)
        if isinstance(self.error, RequestEntityTooLarge):
            self._refuse_body()
        return consumed

    def parse_header(self, header_plus: bytes) -> None:
        """Parse the head of a request. Raises ParsingError."""
        if header_plus.count(b"\n") <= _HEADERS + 1:
            super().parse_header(header_plus)
        else:
            # As waitress does for a head that is too long.
            super().parse_header(b"GET / HTTP/1.0\r\n")
            self.error = RequestHeaderFieldsTooLarge(f"exceeds {_HEADERS} headers")
        self._check_length(_CODINGS.findall(header_plus))
        if "close" in {
            option.strip(" \t").lower() for option in self.headers.get("CONNECTION", "").split(",")
        }:
            # Waitress compares only the whole header.
            self.headers["CONNECTION"] = "close"
        if self.body_rcv is not None:
            may_be_large = self.chunked or self.content_length >= IN_MEMORY
            if self._keeps(self.headers.get("AUTHORIZATION"), may_be_large):
                self.is_large = may_be_large
            else:
                self._throw_body_away()

    def _check_length(self, codings: list[bytes]) -> None:
        """Reject framing that another program may read differently (RFC 9112, 6.1 and 6.3)."""
        plain = self.version == "1.1" and [coding.lower() for coding in codings] == [b"chunked"]
        if codings and ("CONTENT_LENGTH" in self.headers or not plain):
            raise ParsingError(
                "Transfer-Encoding must be 'chunked', once, in HTTP/1.1, and without Content-Length"
            )

    def _throw_body_away(self) -> None:
        self.unread = True
        self.body_rcv.buf = _Nothing()
        if self.expect_continue:
            # The sender awaits 100 Continue and gets its answer instead; more data is no request.
            self.expect_continue, self.body_rcv = False, None
            self.headers["CONNECTION"] = "close"

    def _refuse_body(self) -> None:
        if self.expect_continue or self.body_rcv is None:
            # The sender waits for 100 Continue and gets the error.
            self.expect_continue = False
        elif self.content_length < _DRAIN_LIMIT:
            self._left = self.content_length
            self.completed = self._left == 0
