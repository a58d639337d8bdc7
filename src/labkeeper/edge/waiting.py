"""Clients without a request, in the order in which they began to wait."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class HasAddress(Protocol):
    """A client's connection."""

    address: str


_Client = TypeVar("_Client", bound=HasAddress)


class Waiting(Generic[_Client]):
    """The clients that wait: in all, and of each address."""

    def __init__(self) -> None:
        self._all: dict[_Client, None] = {}
        self._addresses: dict[str, dict[_Client, None]] = {}

    def __iter__(self) -> Iterator[_Client]:
        return iter(self._all)

    def add(self, client: _Client) -> None:
        """Add a client that begins to wait."""
        self._all[client] = None
        self._addresses.setdefault(client.address, {})[client] = None

    def remove(self, client: _Client) -> None:
        """Remove a client that waits no longer, if it did."""
        if client in self._all:
            del self._all[client]
            own = self._addresses[client.address]
            del own[client]
            if not own:
                del self._addresses[client.address]

    def longest(self, address: str | None = None) -> _Client | None:
        """Return the one that has waited longest, of an address or of all; None: there is none."""
        found = self._all if address is None else self._addresses.get(address, {})
        return next(iter(found), None)
