"""Rate limit of each caller: a token bucket."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Final

from labkeeper.core.errors import TooManyRequests

_BURST: Final = 10.0
"""Size of a burst, in seconds of the rate."""


class Rates:
    """Counts requests by caller. Thread-safe; it grows with the bounded number of callers."""

    def __init__(self, per_second: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """A rate of 0 disables the limit."""
        self._rate = per_second
        self._most = max(1.0, per_second * _BURST)
        self._clock = clock
        self._lock = threading.Lock()
        self._left: dict[str, tuple[float, float]] = {}
        """The remaining requests of each caller, and when they were computed."""

    def take(self, caller: str) -> None:
        """Count one request. Raises TooManyRequests."""
        if not self._rate:
            return
        with self._lock:
            now = self._clock()
            left, at = self._left.get(caller, (self._most, now))
            left = min(self._most, left + (now - at) * self._rate)
            enough = left >= 1.0
            self._left[caller] = (left - enough, now)
        if not enough:
            raise TooManyRequests(
                f"cannot answer: '{caller}' may ask {self._rate:g} times a second "
                f"(LABKEEPER_MAX_REQUEST_RATE), and {self._most:g} times at once; ask again later",
                retry_after=max(1, math.ceil((1.0 - left) / self._rate)),
            )
