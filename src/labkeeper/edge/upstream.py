"""One connection to the keeper or to a Lab: it belongs to one client's connection.

Requests of different clients never share a connection, so a mistake in framing could only ever
confuse a client with itself.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

from labkeeper.edge.bodies import BadBody, Body, Chunked, Sized, UntilClosed
from labkeeper.edge.heads import (
    ANSWER_LIMIT,
    CONTINUE,
    END,
    FINAL,
    WITHOUT_BODY,
    Answer,
    BadHead,
    Request,
    check_length,
    check_start,
    read_answer,
)
from labkeeper.edge.pieces import PieceProtocol
from labkeeper.edge.routes import Route

Target = Route | None
"""Where a request goes: to a Lab, or to the keeper (None)."""
_TOO_SHORT: Final = "it closed the connection before the end of its answer"


class AnswerReader(Protocol):
    """What receives an answer, piece by piece."""

    def answer_begun(self, answer: Answer, rest: bytes) -> None:
        """Receive the head; `rest` follows it if the answer accepts a websocket."""

    def answer_continued(self, content: bytes) -> None:
        """Receive a part of the body."""

    def piece_read(self) -> None:
        """Send what was received: what follows has not arrived."""

    def answer_ended(self) -> None:
        """Receive the end."""

    def answer_failed(self, reason: str) -> None:
        """Receive the failure: the connection was lost, or what arrived is no answer."""

    def pause_request(self) -> None:
        """Stop sending the request's body: the connection takes no more at the moment."""

    def resume_request(self) -> None:
        """Send it again."""

    def answer_continue(self) -> None:
        """Receive `100 Continue`."""


class Upstream(PieceProtocol):
    """A connection to one target, for one request at a time."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.transport: asyncio.Transport
        self._reader: AnswerReader | None = None
        self._request: Request
        self._head = b""
        self._body: Body | None = None
        """The body that arrives; None before it."""
        self._reusable = True
        self.idle_since = 0.0
        """When it last answered a request, by the loop's clock; 0: it has not answered any."""

    @property
    def idle(self) -> bool:
        """Whether another request can be sent over it."""
        return self._reader is None and self._reusable and not self.transport.is_closing()

    def send(self, request: Request, head: bytes, reader: AnswerReader) -> None:
        """Send the head of a request; its answer goes to `reader`."""
        self._request, self._reader = request, reader
        self._head, self._body = b"", None
        self.transport.write(head)

    def abort(self) -> None:
        """Close the connection at once; nothing more is passed on."""
        self._reader = None
        self.transport.abort()

    # Called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self.transport = transport  # type: ignore[assignment]  # a stream's transport is asyncio.Transport

    def data_received(self, data: bytes) -> None:
        """Read the answer in a piece of data."""
        try:
            while data and self._reader is not None:
                data = self._read_head(data) if self._body is None else self._read_body(data)
        except (BadHead, BadBody) as error:
            self._fail(f"its answer is not HTTP: {error}")
        if self._reader is not None:
            self._reader.piece_read()
        if data:
            # Nothing was asked for: this connection cannot be trusted with another request.
            self.transport.abort()

    def eof_received(self) -> None:
        """The connection's end may be that of a body."""
        if isinstance(self._body, UntilClosed):
            self._end()
        else:
            # At once: the transport would first wait until the request is taken.
            self._fail(_TOO_SHORT)

    def connection_lost(self, _error: Exception | None) -> None:
        """Report a missing answer to the reader."""
        self._fail(_TOO_SHORT)

    def pause_writing(self) -> None:
        """See asyncio."""
        if self._reader is not None:
            self._reader.pause_request()

    def resume_writing(self) -> None:
        """See asyncio."""
        if self._reader is not None:
            self._reader.resume_request()

    # The answer

    def _read_head(self, data: bytes) -> bytes:
        since = len(self._head)
        self._head += data
        end = self._head.find(END, max(0, since - len(END))) + len(END)
        if end < len(END):
            check_start(self._head, ANSWER_LIMIT, since)
            return b""
        head, rest = self._head[:end], self._head[end:]
        check_length(head, ANSWER_LIMIT)
        self._head = b""
        answer = read_answer(head, self._request)
        if answer.websocket:
            return self._switch(answer, rest)
        if answer.status < FINAL:
            if answer.status == CONTINUE:
                self._there.answer_continue()
            return rest
        self._body = self._body_of(answer)
        self._reusable = answer.keep_alive and not isinstance(self._body, UntilClosed)
        self._there.answer_begun(answer, b"")
        if self._body is not None and self._body.ended:
            self._end()
        return rest

    def _switch(self, answer: Answer, rest: bytes) -> bytes:
        reader, self._reader = self._there, None
        self._reusable = False
        reader.answer_begun(answer, rest)
        return b""

    def _body_of(self, answer: Answer) -> Body:
        """Return the body of an answer (RFC 9112, 6.3)."""
        if self._request.method == b"HEAD" or answer.status in WITHOUT_BODY:
            return Sized(0)
        if answer.chunked:
            return Chunked()
        return UntilClosed() if answer.length is None else Sized(answer.length)

    def _read_body(self, data: bytes) -> bytes:
        body = self._body
        if body is None:
            return data
        content, rest = body.feed(data)
        if content:
            self._there.answer_continued(content)
        if body.ended and self._reader is not None:
            self._end()
        return rest

    @property
    def _there(self) -> AnswerReader:
        if self._reader is None:
            raise RuntimeError("there is no request")
        return self._reader

    def _end(self) -> None:
        reader, self._reader, self._body = self._reader, None, None
        self.idle_since = asyncio.get_running_loop().time()
        if not self._reusable:
            # Its answer is whole; it may never take what is left of the request.
            self.transport.abort()
        if reader is not None:
            reader.answer_ended()

    def _fail(self, reason: str) -> None:
        reader, self._reader = self._reader, None
        self._reusable = False
        self.transport.abort()
        if reader is not None:
            reader.answer_failed(reason)
