"""Handshakes take turns, so that no crowd of clients can keep the edge from everything else.

A handshake costs a signature, about as much time as ten requests, and its client next to nothing.
Therefore all handshakes together get at most half of the edge's time, in small pieces: a turn ends
after a millisecond, and is followed by a rest of the same length. Addresses alternate: one that
asks for thousands delays the next handshake of another one by one. None is refused.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

_TURN: Final = 0.001
"""Seconds after which a turn starts no new step."""


class Shaking(Protocol):
    """A connection whose handshake is not complete."""

    address: str
    """The client's."""

    def shake_hands(self) -> None:
        """Go on with the handshake, as far as what has arrived allows."""


class Handshakes:
    """Connections that wait to go on with their handshakes."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: dict[str, dict[Shaking, None]] = {}
        """By address. Whichever comes first is the next one, of the addresses and of each row."""
        self._next: asyncio.TimerHandle | None = None
        """The next turn; None while nothing waits."""
        self._rested_at = 0.0
        """When the next turn may begin, by the loop's clock."""

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, connection: Shaking) -> None:
        """Have a connection go on when it is its turn."""
        self._waiting.setdefault(connection.address, {})[connection] = None
        self._plan()

    def discard(self, connection: Shaking) -> None:
        """Forget a connection."""
        row = self._waiting.get(connection.address, {})
        row.pop(connection, None)
        if not row:
            self._waiting.pop(connection.address, None)

    def _plan(self) -> None:
        if self._waiting and self._next is None:
            self._next = self._loop.call_at(self._rested_at, self._take_turn)

    def _take_turn(self) -> None:
        begun = now = self._loop.time()
        try:
            while self._waiting and now - begun < _TURN:
                self._go_round()
                now = self._loop.time()
        finally:
            self._next, self._rested_at = None, now + (now - begun)
            self._plan()

    def _go_round(self) -> None:
        """Have the first connection of the first address go on; that address is the last now."""
        address = next(iter(self._waiting))
        row = self._waiting.pop(address)
        connection = next(iter(row))
        del row[connection]
        if row:
            self._waiting[address] = row
        connection.shake_hands()
