"""TLS: between a client's socket and what serves the client.

asyncio's own TLS has no half-closed connections, and tells of a connection only after its
handshake, so those who never finish one would not count. Here a connection counts from its first
moment, and has a deadline. Whatever is encrypted goes to the socket's transport at once; so that
transport's buffer, its limits and its back-pressure are those of the whole connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, Final

from labkeeper.edge import answers
from labkeeper.edge.access_log import Record, new_id
from labkeeper.edge.pieces import PieceProtocol, address_of
from labkeeper.edge.proxy import Proxy

_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2: forward secret, and authenticated. Those of TLS 1.3 all are."""
_HANDSHAKE: Final = b"\x16"
"""The first byte that a client sends (RFC 8446, 5.1)."""
_PIECE: Final = 256 * 1024
_HELLO: Final = 16 * 1024
"""Bytes that are received at once of a client that waits for its turn; a handshake needs less."""


class EncryptedKeyError(Exception):
    """A key needs a password."""


def context_of(chain: bytes, key: bytes) -> ssl.SSLContext:
    """Return the context of a server with a certificate, its chain, and its key, all PEM.

    Raises EncryptedKeyError, ssl.SSLError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    # Without tickets, no key decrypts what was sent earlier. Resumption would save a signature.
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.num_tickets = 0
    with _as_file(chain) as chain_file, _as_file(key) as key_file:
        context.load_cert_chain(chain_file, key_file, password=_no_password)
    return context


def _no_password() -> str:
    # Otherwise OpenSSL would prompt for it on the terminal.
    raise EncryptedKeyError


@contextlib.contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """Yield the path of a file in memory, which only this process can reach."""
    descriptor = os.memfd_create("labkeeper")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


class TlsConnection(asyncio.Transport, PieceProtocol):
    """A client's connection: the protocol of its socket, and the transport of what serves it."""

    session = None

    def __init__(
        self,
        proxy: Proxy,
        context: ssl.SSLContext,
        serve: Callable[[], PieceProtocol],
    ) -> None:
        """`serve` returns what serves the client, once there is a handshake."""
        super().__init__()
        self.address = ""
        self.deadline = proxy.loop.time() + proxy.limits.head_within
        """Until the end of the handshake."""
        self._proxy = proxy
        self._serve = serve
        self._socket: asyncio.Transport
        self._protocol: PieceProtocol | None = None
        """What serves the client; None before the end of the handshake."""
        self._received, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._context = context
        self._tls: ssl.SSLObject | None = None
        """None before its first turn: a client that sends nothing costs little."""
        self._ended = False
        """Whether the client was told that nothing more follows."""

    # A client's connection without a request, for the proxy

    def time_out(self, _now: float) -> None:
        """See `proxy.Connection`."""
        self._socket.abort()

    def rest(self, since: float) -> None:
        """See `proxy.Connection`."""

    def cut_off(self) -> None:
        """See `proxy.Connection`."""
        self._socket.abort()

    def drain(self) -> None:
        """See `proxy.Connection`."""
        self._socket.close()

    # The protocol of the socket, called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._socket = transport  # type: ignore[assignment]  # a stream's transport is asyncio.Transport
        self.address = address_of(transport)
        if self._proxy.enter(self):
            self._proxy.waiting.add(self)
        else:
            self._socket.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        """See asyncio."""
        buffer = super().get_buffer(sizehint)
        return buffer[:_HELLO] if self._protocol is None else buffer

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._ended:
            return
        if self._tls is None and not data.startswith(_HANDSHAKE):
            self._refuse_plain()
            return
        self._received.write(data)
        if self._protocol is None:
            self._socket.pause_reading()
            self._proxy.handshakes.add(self)
        else:
            self._go_on()

    def shake_hands(self) -> None:
        """See `handshakes.Shaking`."""
        self._socket.resume_reading()
        self._go_on()

    def _go_on(self) -> None:
        """Go on with the handshake, and read what follows it."""
        tls = self._tls = self._tls or self._context.wrap_bio(
            self._received, self._to_send, server_side=True
        )
        try:
            if self._protocol is None:
                self._shake_hands(tls)
            self._read(tls)
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLError:
            # The client reads why, in an alert.
            self._flush()
            self._socket.close()

    def pause_writing(self) -> None:
        """See asyncio."""
        if self._protocol is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """See asyncio."""
        if self._protocol is not None:
            self._protocol.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio."""
        if self._protocol is None:
            self._proxy.handshakes.discard(self)
            self._proxy.leave(self)
        else:
            self._protocol.connection_lost(error)

    def _refuse_plain(self) -> None:
        self._ended = True
        detail = "cannot answer plain HTTP: this port speaks HTTPS; use https://"
        status, id_ = HTTPStatus.BAD_REQUEST, new_id()
        answer = answers.problem(status, detail, request_id=id_)
        now = self._proxy.loop.time()
        self._proxy.ended(Record(self.address, id_, now, status=status, sent=len(answer)))
        self._socket.write(answer)
        self._socket.close()

    def _shake_hands(self, tls: ssl.SSLObject) -> None:
        """Go on with the handshake. Raises ssl.SSLError, such as SSLWantReadError."""
        tls.do_handshake()
        self._flush()
        # The client counts once: what serves it registers itself.
        self._proxy.leave(self)
        self._protocol = self._serve()
        self._protocol.connection_made(self)

    def _read(self, tls: ssl.SSLObject) -> None:
        """Pass on what has arrived. Raises ssl.SSLError."""
        pieces, ended = [], False
        while not ended:
            try:
                piece = tls.read(_PIECE)
            except ssl.SSLWantReadError:
                break
            pieces.append(piece)
            ended = not piece
        if self._to_send.pending and self._socket.get_write_buffer_size():
            # It makes OpenSSL answer, and does not read that: nothing would limit the buffer.
            self._socket.abort()
            return
        self._flush()
        if data := b"".join(pieces):
            self.get_protocol().data_received(data)
        if ended:
            self.close()

    def _flush(self) -> None:
        """Send what was encrypted."""
        if self._to_send.pending and not self._socket.is_closing():
            self._socket.write(self._to_send.read())

    # The transport of what serves the client

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """See asyncio."""
        if self._tls is None or self._ended or self._socket.is_closing():
            return
        rest = memoryview(data)
        while rest:
            rest = rest[self._tls.write(rest) :]
        self._flush()

    def write_eof(self) -> None:
        """End what is sent; what still arrives is dropped."""
        self._end()
        self._socket.write_eof()

    def close(self) -> None:
        """See asyncio."""
        self._end()
        self._socket.close()

    def _end(self) -> None:
        """Announce to the client that nothing more follows (close_notify)."""
        if self._tls is None or self._ended:
            return
        self._ended = True
        with contextlib.suppress(ssl.SSLError):
            # It would wait for the client to say the same.
            self._tls.unwrap()
        self._flush()

    def abort(self) -> None:
        """See asyncio."""
        self._socket.abort()

    def is_closing(self) -> bool:
        """See asyncio."""
        return self._socket.is_closing()

    def pause_reading(self) -> None:
        """See asyncio."""
        self._socket.pause_reading()

    def resume_reading(self) -> None:
        """See asyncio."""
        self._socket.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """See asyncio."""
        self._socket.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        """See asyncio."""
        return self._socket.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """See asyncio."""
        return self._tls if name == "ssl_object" else self._socket.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """See asyncio."""
        self._protocol = protocol  # type: ignore[assignment]  # all of the edge's are

    def get_protocol(self) -> PieceProtocol:
        """See asyncio."""
        if self._protocol is None:
            raise RuntimeError("there was no handshake")
        return self._protocol
