"""The threads that answer requests: started on demand, up to a limit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

import structlog
from waitress.task import ThreadedTaskDispatcher

from labkeeper.api.concurrency import reserve

_FAREWELL: Final = 5
"""Seconds for answers in progress to finish when the server closes."""
_FIRST_THREADS: Final = 4
"""Threads started before the first request."""

_log = structlog.get_logger("labkeeper.api")


class Threads(ThreadedTaskDispatcher):
    """Starts threads on demand, a few more than busy, up to a limit; none ends early."""

    def __init__(self, most: int, fit: Callable[[int], None]) -> None:
        super().__init__()
        self._most = most
        self._fit = fit
        self._short = False
        """Whether the last thread could not be started."""
        self._growing = threading.Lock()

    def begin(self) -> None:
        """Start the first threads. Raises RuntimeError."""
        self.set_thread_count(min(_FIRST_THREADS, self._most))

    def add_task(self, task: Any) -> None:
        """Queue a request."""
        with self._growing:
            self._grow()
        super().add_task(task)

    def shutdown(self, cancel_pending: bool = True, timeout: float = _FAREWELL) -> bool:  # noqa: FBT002 - waitress' signature
        """End all threads; abandon those that exceed the timeout."""
        with self._growing:
            self._most = 0
        stopped: bool = super().shutdown(cancel_pending, timeout)
        return stopped

    def start_new_thread(self, target: Any, thread_no: int) -> None:
        """Start a thread. Raises RuntimeError."""
        try:
            super().start_new_thread(target, thread_no)
        except RuntimeError:
            self.threads.discard(thread_no)
            raise

    def _grow(self) -> None:
        with self.lock:
            there = len(self.threads)
            # Ahead of need: if no more can be started, waiting callers must not hold all of them.
            wanted = self.active_count + len(self.queue) + 1 + reserve(there)
        if wanted <= there or there >= self._most:
            return
        try:
            self.set_thread_count(there + 1)
        except RuntimeError:
            if not self._short:
                _log.warning(
                    "no more threads can be started, so fewer callers can wait at a time; "
                    "raise the limit of processes (ulimit -u, or the container's --pids-limit), "
                    "or lower LABKEEPER_THREADS",
                    threads=there,
                    wanted=self._most,
                )
            self._short = True
            self._fit(there)
        else:
            if self._short:
                self._fit(self._most)
            self._short = False
