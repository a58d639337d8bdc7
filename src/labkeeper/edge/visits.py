"""Visits: when a browser with a session last used each Lab.

Programs that send a token are no visitors: a monitor that polls a Lab must not keep it awake.
"""

from __future__ import annotations

from collections.abc import Callable, Container


class VisitTable:
    """The last visit to each Lab, since the edge was started."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` returns seconds that never go back."""
        self._clock = clock
        self._last: dict[str, float] = {}

    def note(self, server: str) -> None:
        """Note that a browser uses a Lab now."""
        self._last[server] = self._clock()

    def ago(self, server: str) -> float | None:
        """Return the seconds since the last visit to a Lab; None if there was none."""
        last = self._last.get(server)
        return None if last is None else self._clock() - last

    def keep(self, servers: Container[str]) -> None:
        """Forget the visits to all other Labs, which have ended."""
        if not all(server in servers for server in self._last):
            self._last = {server: at for server, at in self._last.items() if server in servers}
