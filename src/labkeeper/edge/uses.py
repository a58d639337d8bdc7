"""When each session was last used, for keepers: they end those that were not used for too long."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from collections.abc import Set as AbstractSet
from typing import Final

Use = tuple[str, float | None]
"""The digest of a session, and the seconds since its last use; None: it is in use."""
MOST: Final = 300
"""Uses in a report, whose frame has less than 32 KiB: Linux sends it as a whole or not at all."""


class UseTable:
    """The last use of each session since the edge was started, and which of them were not told."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` returns seconds that never go back."""
        self._clock = clock
        self._last: dict[str, float] = {}
        self._untold: dict[str, None] = {}
        """In the order in which they are told."""
        self.keeper = ""
        """The id of the keeper that is told."""

    def note(self, digest: str) -> None:
        """Note that a use of a session begins or ends now."""
        self._last[digest] = self._clock()
        self._untold[digest] = None

    def tell_all(self, keeper: str) -> None:
        """Tell another keeper, by its id: it knows of no use."""
        self.keeper, self._untold = keeper, dict.fromkeys(self._last)

    def news(self, in_use: Container[str]) -> list[Use]:
        """Return the next uses to tell."""
        now = self._clock()
        return [
            (digest, None if digest in in_use else round(now - self._last[digest], 1))
            for digest, _ in zip(self._untold, range(MOST), strict=False)
        ]

    def told(self, news: Iterable[Use]) -> None:
        """Note that keepers were told."""
        for digest, _ in news:
            self._untold.pop(digest, None)

    @property
    def untold(self) -> int:
        """How many are still to be told."""
        return len(self._untold)

    def keep(self, digests: AbstractSet[str]) -> None:
        """Forget all other sessions, which have ended."""
        if not self._last.keys() <= digests:
            self._last = {digest: at for digest, at in self._last.items() if digest in digests}
            self._untold = {digest: None for digest in self._untold if digest in digests}
