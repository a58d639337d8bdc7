"""How connections are read, and who is at their other end."""

from __future__ import annotations

import asyncio
from typing import Final

_BUFFER: Final = memoryview(bytearray(256 * 1024))
"""Shared by all connections, since each piece is taken out at once. Else asyncio would allocate as
much for every piece, most of which are small: a fifth of the edge's time."""


def address_of(transport: asyncio.BaseTransport) -> str:
    """Return the address of a connection's peer."""
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) else "localhost"


class PieceProtocol(asyncio.BufferedProtocol):
    """The protocol of a connection that is read in pieces; all belong to one thread."""

    def get_buffer(self, _sizehint: int) -> memoryview:
        """See asyncio."""
        return _BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        """See asyncio."""
        self.data_received(bytes(_BUFFER[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """Receive a piece."""
        raise NotImplementedError
