"""Bodies of requests to the keeper, collected here, so that it never waits for a slow sender.

Those to Labs are passed on as they come: they may be of any size.
"""

from __future__ import annotations

from collections import Counter
from http import HTTPStatus
from typing import Final

from labkeeper.edge.bodies import BadBody

_LARGE: Final = 4096
"""Bytes above which a body is large; a head may be longer, too."""


class BodyTooLarge(BadBody):
    """A body is longer than the keeper accepts."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE

    def __init__(self, longest: int) -> None:
        super().__init__(f"body must be at most {longest} bytes")


class TooManyBodies(BadBody):
    """Too many large bodies arrive."""

    status = HTTPStatus.SERVICE_UNAVAILABLE


class LargeBodies:
    """Counts large bodies while they arrive: in all, and of each client's address."""

    def __init__(self, most: int, most_of_address: int) -> None:
        self.longest = 0
        """Bytes of a body that the keeper accepts."""
        self._most = most
        self._most_of_address = most_of_address
        self._addresses: Counter[str] = Counter()

    def begin(self, address: str, length: int | None) -> CollectedBody:
        """Return a new body; a length of None: it is in chunks.

        Raises BodyTooLarge, TooManyBodies.
        """
        if length is not None and length > self.longest:
            raise BodyTooLarge(self.longest)
        if length is not None and length <= _LARGE:
            return CollectedBody(self.longest)
        has_all = self._addresses[address] >= self._most_of_address
        if has_all or self._addresses.total() >= self._most:
            raise TooManyBodies("too many large bodies are being received; send it again later")
        self._addresses[address] += 1
        return CollectedBody(self.longest, self, address)

    def ended(self, address: str) -> None:
        """Count one less."""
        self._addresses[address] -= 1
        if not self._addresses[address]:
            del self._addresses[address]


class CollectedBody:
    """One body."""

    def __init__(self, longest: int, counted: LargeBodies | None = None, address: str = "") -> None:
        """`counted` is told its end."""
        self.content = bytearray()
        self._longest = longest
        self._counted = counted
        self._address = address

    def add(self, content: bytes) -> None:
        """Add what has arrived. Raises BodyTooLarge."""
        if len(self.content) + len(content) > self._longest:
            raise BodyTooLarge(self._longest)
        self.content += content

    def close(self) -> None:
        """Count it no longer."""
        counted, self._counted = self._counted, None
        if counted is not None:
            counted.ended(self._address)
