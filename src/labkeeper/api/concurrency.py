"""Places to wait in: each caller that waits or follows a log holds a thread, and some threads are kept for those who do not."""

from __future__ import annotations

import threading


def reserve(threads: int) -> int:
    """Say how many of so many threads are kept for requests that nothing holds up."""
    return max(2, threads // 8)


class Places:
    """Counts who waits. Thread-safe."""

    def __init__(self, threads: int) -> None:
        self._lock = threading.Lock()
        self._taken = 0
        self.fit(threads)

    def take(self) -> bool:
        """Take a place; say whether there was one."""
        with self._lock:
            free = self._taken < self._count
            self._taken += free
            return free

    def give_back(self) -> None:
        """Give a place back that was taken."""
        with self._lock:
            self._taken -= 1

    def fit(self, threads: int) -> None:
        """Be as many as this number of threads allows; whoever has a place keeps it."""
        with self._lock:
            self._count = threads - reserve(threads)
