"""One request, from its head to the end of its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Protocol

from labkeeper.edge import answers, tunnel
from labkeeper.edge.access_log import Record
from labkeeper.edge.admission import ToLab
from labkeeper.edge.bodies import LAST_CHUNK, BadBody, Body, Chunked, Sized, chunk
from labkeeper.edge.collected import CollectedBody
from labkeeper.edge.compression import Parcel
from labkeeper.edge.heads import (
    NO_CONTENT,
    WITHOUT_BODY,
    Answer,
    Headers,
    Request,
    answer_head,
    request_head,
)
from labkeeper.edge.proxy import NoRoute, Proxy, Unreachable
from labkeeper.edge.upstream import Target, Upstream
from labkeeper.forkserver import identity


class Client(Protocol):
    """The client's connection, as an exchange uses it."""

    def kept_upstream(self, target: Target) -> Upstream | None:
        """Return the connection to a target that an earlier request has left, or None."""

    def forwarded(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that describe the client and its request."""

    @property
    def policies(self) -> Headers:
        """The headers of every answer to the client."""

    def go_on(self) -> None:
        """Read on: more of the request's body can be passed on."""

    def pace(self) -> None:
        """Stop or go on reading, as the state of the exchange demands."""

    def write(self, data: bytes) -> None:
        """Send a part of the answer."""

    def end_exchange(self, upstream: Upstream | None, *, close: bool) -> None:
        """End the exchange after a whole answer."""

    def refuse(self, status: HTTPStatus, detail: str) -> None:
        """End the exchange with an error, and close the connection."""

    def cut_off(self) -> None:
        """Close the connection at once: the answer is not whole."""

    def leave_to_tunnel(self) -> tuple[asyncio.Transport, bytes, Callable[[], None]]:
        """Hand the connection over to a tunnel, with the unread input; see `Proxy`."""


class Exchange:
    """Passes a request on, and its answer back. It reads an answer: see `AnswerReader`."""

    def __init__(
        self, client: Client, proxy: Proxy, request: Request, lab: ToLab | None, record: Record
    ) -> None:
        """Without a `lab`, the request goes to the keeper."""
        self._client = client
        self._proxy = proxy
        self._request = request
        self._server = None if lab is None else lab.server
        self.session = None if lab is None else lab.session
        """The session of the client, if it has one."""
        self._record = record
        self._body: Body = Chunked() if request.length is None else Sized(request.length)
        self._collected: CollectedBody | None = None
        """The body, while it is collected for the keeper, or until it is sent."""
        self._upstream: Upstream | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._full = False
        """Whether the upstream takes no more of the body at the moment."""
        self._repeated = False
        self._answered = False
        """Whether the head of the answer was sent."""
        self._closes = False
        """Whether it said that the connection will be closed."""
        self._in_chunks = False
        """Whether the answer is sent in chunks."""
        self._unsent = b""
        """What is sent with what follows: each call of send(2) takes longer than all else."""
        self._parcel: Parcel | None = None
        """The answer, while it is collected to be compressed, or sent so."""

    @property
    def wants_body(self) -> bool:
        """Whether more of the request's body can be taken now."""
        can_pass_on = self._upstream is not None and not self._full
        return (self.is_collecting or can_pass_on) and not self._body.ended

    @property
    def is_collecting(self) -> bool:
        """Whether the request's body is collected before anything is passed on."""
        return self._collected is not None and not self._body.ended

    @property
    def has_body(self) -> bool:
        """Whether the body of the request has arrived as a whole."""
        return self._body.ended

    def begin(self) -> None:
        """Send the request, or begin to collect its body for the keeper."""
        if self._server is None and not self._body.ended:
            self._begin_to_collect()
        else:
            self._pass_on()

    def _begin_to_collect(self) -> None:
        bodies = self._proxy.large_bodies
        try:
            self._collected = bodies.begin(self._record.client, self._request.length)
        except BadBody as error:
            self._refuse_body(error)
        else:
            self.answer_continue()

    def _pass_on(self) -> None:
        """Send the request, over the connection that the client has already, or a new one."""
        target = self._proxy.target(self._server)
        kept = self._client.kept_upstream(target)
        # Without a route there is no target, which must not be taken for the keeper.
        routed = self._server is None or target is not None
        if kept is not None and routed and self._request.repeatable:
            self._send(kept)
            return
        if kept is not None:
            kept.abort()
        self._connect()

    def abort(self) -> None:
        """End it without an answer: the client is gone."""
        if self._connecting is not None:
            self._connecting.cancel()
        if self._upstream is not None:
            self._upstream.abort()
        self._drop_parcel()
        self._drop_collected()

    def receive_body(self, data: bytes) -> bytes:
        """Take the body in a piece of the client's input; return what follows it."""
        try:
            content, rest = self._body.feed(data)
            if self._collected is not None:
                self._collect(self._collected, content)
            elif self._upstream is not None:
                self._pass_on_body(self._upstream, content)
        except BadBody as error:
            self._refuse_body(error)
            return b""
        return rest

    def _collect(self, collected: CollectedBody, content: bytes) -> None:
        """Collect a part of the body, and send the request with the last one."""
        collected.add(content)
        if self._body.ended:
            self._request.has_length(len(collected.content))
            self._pass_on()

    def _pass_on_body(self, upstream: Upstream, content: bytes) -> None:
        if self._request.length is not None:
            upstream.transport.write(content)
        else:
            framed = chunk(content) if content else b""
            # Not `writelines`: in some versions of Python it never says that too much is written.
            upstream.transport.write(framed + LAST_CHUNK if self._body.ended else framed)

    def pause_answer(self) -> None:
        """Stop reading the answer: the client takes no more at the moment."""
        if self._parcel is not None:
            self._parcel.is_held = True
        else:
            self._pause_upstream()

    def _pause_upstream(self) -> None:
        if self._upstream is not None and not self._upstream.transport.is_closing():
            self._upstream.transport.pause_reading()

    def resume_answer(self) -> None:
        """Read the answer again."""
        if self._parcel is not None:
            self._parcel.is_held = False
            self._send_parcel(self._parcel)
        elif self._upstream is not None and not self._upstream.transport.is_closing():
            self._upstream.transport.resume_reading()

    # The connection

    def _connect(self) -> None:
        self._connecting = self._proxy.loop.create_task(self._reach())

    async def _reach(self) -> None:
        try:
            upstream = await self._proxy.connect(self._server)
        except NoRoute as error:
            self._refuse(HTTPStatus.NOT_FOUND, str(error))
        except Unreachable as error:
            self._refuse(error.status, str(error))
        else:
            self._connecting = None
            self._send(upstream)
            self._client.go_on()

    def _send(self, upstream: Upstream) -> None:
        self._upstream = upstream
        added = self._client.forwarded()
        if self.session is not None and upstream.target is not None:
            signed = identity.sign(upstream.target.key, self.session.user, time.time())
            added.append((identity.HEADER.lower().encode(), signed.encode()))
        head = request_head(self._request, added)
        collected = self._collected
        upstream.send(self._request, head if collected is None else head + collected.content, self)
        self._drop_collected()

    def pause_request(self) -> None:
        """See `AnswerReader`."""
        self._full = True
        self._client.pace()

    def resume_request(self) -> None:
        """See `AnswerReader`."""
        self._full = False
        self._client.go_on()

    # The answer

    def answer_continue(self) -> None:
        """See `AnswerReader`."""
        if self._request.expects and not self._answered:
            self._request.expects = False  # Once is enough.
            self._client.write(answers.CONTINUE)

    def answer_begun(self, answer: Answer, rest: bytes) -> None:
        """See `AnswerReader`."""
        if answer.websocket:
            self._answered = True
            self._record.status = answer.status
            self._tunnel(answer, rest)
            return
        if self._server is not None:
            compressor = self._proxy.compressor
            answer, self._parcel = compressor.begin(self._request, answer, self._leave_parcel)
        if self._parcel is None:
            self._begin(answer)
        else:
            # The Lab has answered; if the rest does not come, it is not asked again.
            self._repeated = True

    def _begin(self, answer: Answer) -> None:
        """Send the head of the answer."""
        self._answered = True
        self._record.status = answer.status
        added = [*self._client.policies, (b"x-request-id", self._record.id.encode())]
        if answer.length is not None and answer.status != NO_CONTENT:
            added.append((b"content-length", b"%d" % answer.length))
        elif self._request.method != b"HEAD" and answer.status not in WITHOUT_BODY:
            self._in_chunks = not self._request.is_old
            if self._in_chunks:
                added.append((b"transfer-encoding", b"chunked"))
        self._closes = not self._goes_on
        self._unsent = answer_head(answer, added, close=self._closes)

    @property
    def _goes_on(self) -> bool:
        """Whether another request may follow."""
        return self._request.keep_alive and self._body.ended and not self._proxy.draining

    def answer_continued(self, content: bytes) -> None:
        """See `AnswerReader`."""
        if self._parcel is not None:
            self._parcel.add(content)
        else:
            self._put(chunk(content) if self._in_chunks else content)

    def _put(self, data: bytes) -> None:
        self._unsent = self._unsent + data if self._unsent else data

    def piece_read(self) -> None:
        """See `AnswerReader`."""
        unsent, self._unsent = self._unsent, b""
        if unsent:
            self._client.write(unsent)

    def answer_ended(self) -> None:
        """See `AnswerReader`."""
        if self._parcel is None:
            self._end()
            return
        parcel = self._parcel

        def send(answer: Answer) -> None:
            self._begin(answer)
            self._send_parcel(parcel)

        parcel.compress(send)

    def _leave_parcel(self) -> None:
        """Pass the answer on as it comes: the Lab takes too long."""
        parcel = self._parcel
        if parcel is not None:
            self._pause_upstream()
            self._begin(parcel.leave())
            self._send_parcel(parcel)

    def _send_parcel(self, parcel: Parcel) -> None:
        """Send as much of what was collected as the client takes."""
        while not parcel.is_held:
            piece = parcel.take()
            if not piece:
                self._drop_parcel()
                if parcel.is_whole:
                    self._end()
                else:
                    self.resume_answer()
                return
            self._put(piece)
            self.piece_read()

    def _drop_collected(self) -> None:
        collected, self._collected = self._collected, None
        if collected is not None:
            collected.close()

    def _drop_parcel(self) -> None:
        parcel, self._parcel = self._parcel, None
        if parcel is not None:
            parcel.close()

    def _end(self) -> None:
        """End after the whole answer was sent."""
        if self._in_chunks:
            self._put(LAST_CHUNK)
        self.piece_read()
        upstream, self._upstream = self._upstream, None
        if upstream is not None and not self._body.ended:
            upstream.abort()
        elif upstream is not None and not upstream.transport.is_closing():
            # It was paused if the client has not read all of this answer; the next one is another.
            upstream.transport.resume_reading()
        self._client.end_exchange(upstream, close=self._closes or not self._goes_on)

    def answer_failed(self, reason: str) -> None:
        """See `AnswerReader`."""
        upstream, self._upstream = self._upstream, None
        self._drop_parcel()
        if self._answered:
            # A part must not be mistaken for the whole.
            self._client.cut_off()
        elif (
            self._request.repeatable
            and not self._repeated
            and (self._server is None or (upstream is not None and upstream.idle_since > 0))
        ):
            # The keeper was restarted, or an idle connection was closed as we sent.
            self._repeated = True
            self._connect()
        else:
            self._refuse(HTTPStatus.BAD_GATEWAY, f"cannot answer: {self._who} failed: {reason}")

    @property
    def _who(self) -> str:
        return "the keeper" if self._server is None else f"server '{self._server}'"

    def _refuse_body(self, error: BadBody) -> None:
        self._refuse(error.status, f"cannot accept the request: {error}")

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        self._drop_collected()
        if self._upstream is not None:
            self._upstream.abort()
            self._upstream = None
        if self._answered:
            self._client.cut_off()
            return
        self._client.refuse(status, detail)

    def _tunnel(self, answer: Answer, rest: bytes) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream is None:
            return
        client, early, closed = self._client.leave_to_tunnel()
        # Joined first: each end has to hear that the other one takes no more.
        tunnel.join(client, upstream.transport, closed)
        client.write(answer_head(answer, (), close=False) + rest)
        if early:
            upstream.transport.write(early)
