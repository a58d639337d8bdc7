"""What is on both sides of a real edge: scripted keepers and Labs, and clients.

Keepers and Labs record the raw bytes of each connection, and read requests with h11, which is
stricter than most servers: what it refuses is recorded as an error.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import socket
import ssl
import struct

import h11
import pytest

from harness import PATIENCE

PIECE = 64 * 1024
"""Bytes that a `Flood` writes at once."""
MUCH = 2**28
"""Bytes; more of a `Flood` are not written, as nothing seems to stop it."""
SMALL = 16 * 1024
"""Bytes of a socket's buffers, where a test needs them to be small."""
BOTH = pytest.mark.parametrize("context", ["plain", "TLS"], indirect=True)
"""Runs a test of an edge with plain HTTP, and with TLS."""
FULL = (BlockingIOError, ssl.SSLWantWriteError)
"""What a socket raises that does not wait and takes nothing more."""
PROBE = b"GET /edge/healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


TOKEN = b"Authorization: token x"
"""A program's token for a Lab, which the edge passes on."""


def get(target=b"/", *headers, method=b"GET", body=b""):
    """Return a request as bytes, with a token if it is for a Lab."""
    known = [TOKEN] if target.startswith(b"/servers/") else []
    head = [method + b" " + target + b" HTTP/1.1", b"Host: x", *known, *headers]
    return b"\r\n".join([*head, b"", body])


def post(target=b"/", body=b"content", *headers):
    """Return a request with a body, as bytes."""
    return get(target, b"Content-Length: %d" % len(body), *headers, method=b"POST", body=body)


def answer(body=b"ok", *headers, status=b"200 OK"):
    """Return an answer of known length, as bytes."""
    lines = [b"HTTP/1.1 " + status, b"Content-Length: %d" % len(body), *headers, b"", body]
    return b"\r\n".join(lines)


SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Accept: x\r\n\r\n"
)
WEBSOCKET = (
    b"Connection: Upgrade",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    b"Sec-WebSocket-Version: 13",
)


@dataclasses.dataclass
class Cut:
    """An answer after which the connection ends; `reset`: not in good order."""

    content: bytes = b""
    reset: bool = False


@dataclasses.dataclass
class Flood:
    """An answer of a head and many bytes, which are written as fast as the edge takes them."""

    head: bytes
    piece: bytes = bytes(PIECE)


class Visit(asyncio.Protocol):
    """One connection that the edge has opened."""

    def __init__(self, server):
        self.server = server
        self.received = b""
        """All bytes."""
        self.requests = []
        """The raw bytes of each whole request."""
        self.tunnelled = b""
        """What came after the answer that opened a tunnel."""
        self.closed = False
        self.blocked = False
        """Whether the edge takes no more of the answer."""
        self._pending = b""
        self._reader = self._reader_of()
        """What reads requests; None in a tunnel."""
        self._flood = None

    def connection_made(self, transport):
        self.transport = transport
        self.server.visits.append(self)
        if not self.server.reads:
            transport.pause_reading()
        if self.server.greeting:
            transport.write(self.server.greeting)

    def connection_lost(self, _error):
        self.closed = True

    def pause_writing(self):
        self.blocked = True

    def resume_writing(self):
        self.blocked = False
        self._pour()

    def data_received(self, data):
        self.received += data
        if self.server.mute:
            return
        if self._reader is None:
            self.tunnelled += data
        else:
            self._read(data)

    _reader_of = staticmethod(functools.partial(h11.Connection, h11.SERVER, 2**17))

    def _read(self, data):
        while data and self._reader is not None:
            self._pending += data
            self._reader.receive_data(data)
            data = self._advance()

    def _advance(self):
        """Read as much as possible; return what follows a whole request."""
        while True:
            try:
                event = self._reader.next_event()
            except h11.RemoteProtocolError as error:
                self.server.errors.append(error)
                self.transport.abort()
                return b""
            if event is h11.NEED_DATA or event is h11.PAUSED:
                return b""
            if isinstance(event, h11.Request):
                self.server.heads.append(event)
                if self.server.early:
                    self.say(self.server.answer(self._pending))
            if isinstance(event, h11.EndOfMessage):
                return self._whole()

    def _whole(self):
        rest = self._reader.trailing_data[0]
        raw = self._pending[: len(self._pending) - len(rest)]
        self._pending, self._reader = b"", self._reader_of()
        self.requests.append(raw)
        if not self.server.early:
            said = self.server.answer(raw)
            self.say(said)
        if self._reader is None:
            self.tunnelled, rest = rest, b""
        return rest

    def say(self, said):
        """Answer with bytes, a `Cut` or a `Flood`; with None, not yet."""
        start = getattr(said, "head", said)
        if isinstance(start, bytes) and start.startswith(b"HTTP/1.1 101"):
            self._reader = None
        if isinstance(said, bytes):
            self.transport.write(said)
        elif isinstance(said, Cut):
            self.transport.write(said.content)
            if said.reset:
                reset_at_end(self.transport.get_extra_info("socket"))
                self.transport.abort()
            else:
                self.transport.close()
        elif isinstance(said, Flood):
            self.transport.set_write_buffer_limits(high=0)
            self.transport.write(said.head)
            self._flood = said.piece
            self._pour()

    def _pour(self):
        while self._flood is not None and not self.blocked and not self.transport.is_closing():
            if self.server.poured > MUCH:
                self.server.errors.append("nothing stops the flood")
                self.transport.abort()
            self.server.poured += len(self._flood)
            self.transport.write(self._flood)


def reset_at_end(connection):
    """Have a socket send a reset when it is closed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Scripted:
    """A keeper or a Lab. It answers each whole request with what `answer` returns for it."""

    def __init__(self, errors):
        self.errors = errors
        self.answer = lambda _request: answer()
        self.reads = True
        """Whether it reads what it receives."""
        self.mute = False
        """Whether it never looks at what it receives."""
        self.early = False
        """Whether it answers as soon as it has received a head."""
        self.greeting = b""
        """What it sends on every new connection."""
        self.visits, self.heads = [], []
        self.poured = 0
        """Bytes of floods."""
        self.listener = None

    def answers(self, *given):
        """Answer the requests with these, one after the other; the last one is repeated."""
        row = collections.deque(given)
        self.answer = lambda _request: row.popleft() if len(row) > 1 else row[0]

    @property
    def requests(self):
        return [request for visit in self.visits for request in visit.requests]

    @property
    def received(self):
        return b"".join(visit.received for visit in self.visits)

    def visit(self):
        """Return the protocol of a new connection."""
        return Visit(self)


@dataclasses.dataclass
class Reply:
    """An answer as a client reads it."""

    status: int
    headers: dict
    body: bytes
    before: list
    """The statuses of the answers before it, such as 100."""


class Visitor:
    """A client of the edge: a socket, and what was received and not read."""

    def __init__(self, address, buffers=None, source=""):
        self.socket = socket.socket()
        self.socket.settimeout(PATIENCE)
        if buffers is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
        if source:
            self.socket.bind((source, 0))
        try:
            self.socket.connect(address)
        except BaseException:
            self.socket.close()
            raise
        self.rest = b""

    def send(self, data):
        self.socket.sendall(data)

    def ask(self, data, method=b"GET"):
        self.send(data)
        return self.receive(method)

    def receive(self, method=b"GET"):
        """Read one answer. Fails if it is not whole."""
        reader = h11.Connection(h11.CLIENT, 2**17)
        asked = [("Host", "x"), ("Connection", "upgrade"), ("Upgrade", "websocket")]
        reader.send(h11.Request(method=method, target="/", headers=asked))
        reader.send(h11.EndOfMessage())
        before, body, head = [], b"", None
        if self.rest:
            reader.receive_data(self.rest)
        while True:
            event = reader.next_event()
            if event is h11.NEED_DATA:
                reader.receive_data(self.socket.recv(PIECE))
            elif isinstance(event, h11.InformationalResponse):
                before.append(event.status_code)
                if event.status_code == 101:
                    self.rest = reader.trailing_data[0]
                    return Reply(101, dict(event.headers), b"", before[:-1])
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self.rest = reader.trailing_data[0]
                return Reply(head.status_code, dict(head.headers), body, before)
            else:
                raise AssertionError(event)

    def read(self, count):
        """Read this many bytes."""
        while len(self.rest) < count:
            piece = self.socket.recv(PIECE)
            assert piece, self.rest
            self.rest += piece
        data, self.rest = self.rest[:count], self.rest[count:]
        return data

    def drain(self):
        """Read until the end; return the bytes, and whether the connection was reset."""
        data, self.rest = self.rest, b""
        try:
            while piece := self.socket.recv(PIECE):
                data += piece
        except (ConnectionResetError, ssl.SSLEOFError):
            return data, True
        return data, False

    def close(self):
        self.socket.close()
