"""One connection of a client: reads its requests one after the other, and limits its time."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import socket
import struct
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

from labkeeper.edge import answers
from labkeeper.edge.access_log import Record, new_id
from labkeeper.edge.admission import Admission, Elsewhere, Refused, ToKeeper, ToLab, admit
from labkeeper.edge.exchange import Exchange
from labkeeper.edge.forwarded import Sender, sender_of
from labkeeper.edge.heads import (
    END,
    REQUEST_LIMIT,
    BadHead,
    Headers,
    Request,
    check_length,
    check_start,
    header,
    read_request,
)
from labkeeper.edge.pieces import PieceProtocol, address_of
from labkeeper.edge.proxy import Proxy
from labkeeper.edge.routes import place_of
from labkeeper.edge.sessions import Session
from labkeeper.edge.upstream import Target, Upstream

PROBE: Final = b"/edge/healthz"
"""The path of the edge's own probe; it says nothing about the keeper."""
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")
"""As the keeper accepts it."""
_RESET: Final = struct.pack("ii", 1, 0)
"""Has a socket send a reset when it is closed; else the end of an answer without a length, and of
one that is cut, would look the same."""


class Client(PieceProtocol):
    """A client's connection."""

    def __init__(self, proxy: Proxy) -> None:
        self.address = ""
        self.deadline = math.inf
        self._proxy = proxy
        self._transport: asyncio.Transport
        self._input = b""
        """What has arrived and was not read yet."""
        self._scanned = 0
        """How much of it was searched for the end of a head."""
        self._exchange: Exchange | None = None
        self._record: Record | None = None
        """The request in progress, for the access log."""
        self._upstream: Upstream | None = None
        """Kept for the next request."""
        self._blocked = False
        """Whether its peer does not read the answer fast enough."""
        self._lingers = False
        """Whether it only waits until its peer has read the last answer."""
        self._peer: Sender
        """Who is at the other end of the connection."""
        self.sender: Sender
        """Who sends the current request, which the peer may have passed on."""
        self.policies: Headers = []
        """The headers of every answer."""

    # Called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._transport = transport  # type: ignore[assignment]  # a stream's transport is asyncio.Transport
        self._transport.set_write_buffer_limits(high=self._proxy.limits.untaken)
        secure = transport.get_extra_info("ssl_object") is not None
        self._peer = self.sender = Sender(address_of(transport), secure)
        self.address = self._peer.address
        if not self._proxy.enter(self):
            self._transport.abort()
            return
        self._wait()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._lingers:
            return
        self._input = self._input + data if self._input else data
        self.go_on()

    def connection_lost(self, _error: Exception | None) -> None:
        """See asyncio."""
        self._proxy.leave(self)
        if self._exchange is not None:
            self._exchange.abort()
        if self._record is not None:
            self._record.cut = True
        self._end_request()
        self._drop_upstream()

    def pause_writing(self) -> None:
        """See asyncio."""
        self._blocked = True
        self._set_deadline()
        if self._exchange is not None:
            self._exchange.pause_answer()

    def resume_writing(self) -> None:
        """See asyncio."""
        self._blocked = False
        self._set_deadline()
        if self._exchange is not None:
            self._exchange.resume_answer()
        self.go_on()

    # Requests

    def go_on(self) -> None:
        """Read as much of the input as possible."""
        while self._input and not self._lingers and not self._transport.is_closing():
            if self._exchange is None:
                if self._blocked or not self._read_head():
                    break
            elif self._exchange.wants_body:
                self._input = self._exchange.receive_body(self._input)
                if self._exchange is None or not self._exchange.is_collecting:
                    self._set_deadline()
            else:
                break
        self.pace()

    def pace(self) -> None:
        """Stop reading the connection while its input cannot be passed on."""
        if self._transport.is_closing():
            return
        waits = self._exchange is not None or self._blocked
        if waits and len(self._input) > self._proxy.limits.ahead:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _read_head(self) -> bool:
        """Begin the next request; return whether its head was complete."""
        since = self._scanned
        end = self._input.find(END, max(0, since - len(END))) + len(END)
        try:
            if end < len(END):
                check_start(self._input, REQUEST_LIMIT, since)
                if since == 0:
                    self._set_deadline()
                self._scanned = len(self._input)
                return False
            head, self._input, self._scanned = self._input[:end], self._input[end:], 0
            check_length(head, REQUEST_LIMIT)
            request = read_request(head)
            self._identify(request)
        except BadHead as error:
            self.refuse(error.status, f"cannot accept the request: {error.reason}")
            return False
        self._begin(request)
        return True

    def _identify(self, request: Request) -> None:
        """Find out who sends a request. Raises BadHead."""
        before = self.sender
        self.sender = sender_of(self._peer, request.headers, self._proxy.trusted)
        if self.sender is not before and self.sender != before:
            # Clients share no connection, not even those behind one proxy.
            self._drop_upstream()
        if self._peer.secure and self._proxy.hsts:
            self.policies = answers.transport_security(request.host)

    def _begin(self, request: Request) -> None:
        """Answer a request of our own, or begin an exchange."""
        self._proxy.waiting.remove(self)
        record = self._record = self._new_record(request)
        match self._admit(request):
            case ToLab(server, session) as lab:
                record.to, record.server = "lab", server
                if session is not None:
                    record.session = session
                    self._proxy.use(session)
                self._exchange = Exchange(self, self._proxy, request, lab, record)
            case ToKeeper():
                record.to = "keeper"
                self._exchange = Exchange(self, self._proxy, request, None, record)
            case Refused(status, detail):
                self.refuse(status, detail)
                return
            case answer:
                self._answer_here(request, answer)
                return
        self._set_deadline()
        self._exchange.begin()

    def _admit(self, request: Request) -> Admission | None:
        """Decide where a request goes; None: it is the probe of the edge."""
        path = request.path
        if path == PROBE:
            return None
        if not self._proxy.hosts.know(request.host.decode()):
            return Refused(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"cannot answer to the host name '{request.host.decode()}'; "
                "if it is the keeper's, add it to LABKEEPER_ALLOWED_HOSTS",
            )
        routes = self._proxy.routes
        place = place_of(request.host, path, routes.domain)
        if place is None:
            return ToKeeper()
        if place.is_bare:
            return Elsewhere(path + b"/" + request.target[len(path) :])
        admission = admit(request, place, routes, self._proxy.sessions, secure=self.sender.secure)
        if isinstance(admission, ToLab) and not self._proxy.has_room(admission.session):
            return Refused(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"cannot open server '{admission.server}' once more: this browser has too many "
                "requests and websockets open",
            )
        return admission

    def _answer_here(self, request: Request, where: Elsewhere | None) -> None:
        """Answer a request that goes nowhere."""
        close = not request.keep_alive or self._proxy.draining or request.length != 0
        if where is None:
            self._answer(HTTPStatus.OK, answers.healthy(close=close), close=close)
        else:
            answer = answers.redirect(where.location, close=close)
            self._answer(HTTPStatus.TEMPORARY_REDIRECT, answer, close=close)

    @property
    def session(self) -> Session | None:
        """The session of the request in progress, if it has one."""
        return None if self._exchange is None else self._exchange.session

    def forwarded(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that tell the other side about this client and its request."""
        id_ = "" if self._record is None else self._record.id
        return [
            (b"x-forwarded-for", self.sender.address.encode()),
            (b"x-forwarded-proto", b"https" if self.sender.secure else b"http"),
            (b"x-request-id", id_.encode()),
        ]

    def _new_record(self, request: Request | None = None) -> Record:
        """Return a new record, of what could not be read as a request if there is none."""
        now = self._proxy.loop.time()
        if request is None:
            return Record(self.sender.address, new_id(), now)
        sent = header(request.headers, b"x-request-id") or b""
        id_ = sent.decode() if _REQUEST_ID.fullmatch(sent) else new_id()
        return Record(self.sender.address, id_, now, request.method, request.host, request.target)

    def _end_request(self) -> None:
        """End the request in progress, if there is one."""
        self._exchange = None
        record, self._record = self._record, None
        if record is not None:
            self._proxy.ended(record)

    # Connections to the other side

    def kept_upstream(self, target: Target) -> Upstream | None:
        """Return the kept connection if it leads to this very target, and close it if not."""
        upstream, self._upstream = self._upstream, None
        if upstream is not None and (upstream.target is not target or not upstream.idle):
            upstream.abort()
            return None
        return upstream

    def rest(self, since: float) -> None:
        """Close the kept connection if it was not used since."""
        if self._upstream is not None and self._upstream.idle_since < since:
            self._drop_upstream()

    def _drop_upstream(self) -> None:
        if self._upstream is not None:
            self._upstream.abort()
            self._upstream = None

    # Answers

    def write(self, data: bytes) -> None:
        """Send a part of an answer."""
        if self._record is not None:
            self._record.sent += len(data)
        self._transport.write(data)

    def _answer(self, status: HTTPStatus, answer: bytes, *, close: bool) -> None:
        record = self._record = self._record or self._new_record()
        record.status = status
        if record.method == b"HEAD":
            answer = answer[: answer.index(END) + len(END)]
        self.write(answers.with_headers(answer, self.policies))
        self._end_request()
        if close:
            self._linger()
        else:
            self._wait()

    def refuse(self, status: HTTPStatus, detail: str) -> None:
        """Send an error after which the connection is closed."""
        record = self._record = self._record or self._new_record()
        answer = answers.problem(status, detail, request_id=record.id)
        self._answer(status, answer, close=True)

    def end_exchange(self, upstream: Upstream | None, *, close: bool) -> None:
        """Go on after an answer; keep the connection that it came over."""
        self._end_request()
        self._drop_upstream()
        if close:
            if upstream is not None:
                upstream.abort()
            self._linger()
            return
        if upstream is not None and upstream.idle:
            self._upstream = upstream
        self._wait()
        if self._input:
            # Not at once: a long row of pipelined requests must not recurse.
            self._proxy.loop.call_soon(self.go_on)
        else:
            self.pace()

    def leave_to_tunnel(self) -> tuple[asyncio.Transport, bytes, Callable[[], None]]:
        """Hand the connection over to a tunnel, which calls the last result at its end.

        Returns it with the unread input.
        """
        closed = self._proxy.tunnel_opened(self._transport, self.address, self.session)
        self._proxy.leave(self)
        self._end_request()
        self._drop_upstream()
        self._transport.set_write_buffer_limits()
        return self._transport, self._input, closed

    # The end

    def _wait(self) -> None:
        """Wait for the next request."""
        self._proxy.waiting.add(self)
        self._set_deadline()
        if self._proxy.draining:
            self.drain()

    def _linger(self) -> None:
        """Close it once its peer has read the last answer: input would reset the connection."""
        self._lingers, self._input = True, b""
        self._proxy.waiting.remove(self)
        self._set_deadline()
        if not self._transport.is_closing():
            # Its peer may have read the answer and be gone.
            with contextlib.suppress(OSError):
                self._transport.write_eof()
            self._transport.resume_reading()

    def _set_deadline(self) -> None:
        """Set the deadline that its state implies; a head's is not extended by its bytes."""
        limits = self._proxy.limits
        if self._lingers:
            seconds = limits.linger
        elif self._blocked:
            seconds = limits.stalled
        elif self._exchange is None:
            seconds = limits.head_within if self._input else limits.idle
        elif self._exchange.is_collecting:
            seconds = limits.body_within
        else:
            seconds = math.inf if self._exchange.has_body else limits.stalled
        self.deadline = self._proxy.loop.time() + seconds

    def cut_off(self) -> None:
        """Reset it, so that what was sent cannot be mistaken for a whole answer."""
        connection = self._transport.get_extra_info("socket")
        if connection is not None and not self._transport.is_closing():
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._transport.abort()

    def drain(self) -> None:
        """Close it, or have it closed after the current answer."""
        if self._exchange is None and not self._input and not self._lingers:
            self._transport.close()

    def time_out(self, now: float) -> None:
        """Act on the deadline."""
        self.deadline = now + self._proxy.limits.linger
        if self._lingers or self._transport.get_write_buffer_size():
            self.cut_off()
        elif self._exchange is None and not self._input:
            self._transport.close()
        elif self._exchange is None:
            self.refuse(HTTPStatus.REQUEST_TIMEOUT, "cannot accept the request: too slow")
        else:
            self.cut_off()
