"""Tunnels: after `101 Switching Protocols`, bytes are relayed both ways, and never read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from labkeeper.edge.pieces import PieceProtocol

_TAKEN_WITHIN: Final = 60.0
"""Seconds in which one end has to take what is on its way after the other one has ended."""


class TunnelEnd(PieceProtocol):
    """One of the two connections of a tunnel."""

    def __init__(self, other: asyncio.Transport, closed: Callable[[], None] | None = None) -> None:
        """`closed` is called at the end of this connection."""
        self._other = other
        self._closed = closed

    def data_received(self, data: bytes) -> None:
        """Relay a piece."""
        self._other.write(data)

    def pause_writing(self) -> None:
        """Stop reading the other end: this one takes no more at the moment."""
        if not self._other.is_closing():
            self._other.pause_reading()

    def resume_writing(self) -> None:
        """Read the other end again."""
        if not self._other.is_closing():
            self._other.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        """Close the other end, once it has taken what is on its way: no half of it is of use."""
        if error is None:
            self._other.close()
            if self._other.get_write_buffer_size():
                asyncio.get_running_loop().call_later(_TAKEN_WITHIN, self._other.abort)
        else:
            self._other.abort()
        if self._closed is not None:
            self._closed()


def join(client: asyncio.Transport, lab: asyncio.Transport, closed: Callable[[], None]) -> None:
    """Make a tunnel of two connections; `closed` is called at the end of the client's."""
    client.set_protocol(TunnelEnd(lab, closed))
    lab.set_protocol(TunnelEnd(client))
    for transport in (client, lab):
        if not transport.is_closing():
            transport.resume_reading()
