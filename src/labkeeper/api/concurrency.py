"""The limit of callers that wait or stream; each holds a thread, and some threads are reserved."""

from __future__ import annotations

import threading


def reserve(threads: int) -> int:
    """Return how many of `threads` are reserved for requests that do not wait."""
    return max(2, threads // 8)


class ConcurrencyLimit:
    """Counts callers that wait or stream. Thread-safe."""

    def __init__(self, threads: int) -> None:
        self._lock = threading.Lock()
        self._held = 0
        self._limit = threads - reserve(threads)

    def acquire(self) -> bool:
        """Take a slot unless the limit is reached. Never blocks."""
        with self._lock:
            free = self._held < self._limit
            self._held += free
            return free

    def release(self) -> None:
        """Free a slot."""
        with self._lock:
            self._held -= 1
