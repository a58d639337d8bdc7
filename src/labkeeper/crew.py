"""Threads that all end when their owner is closed, whatever they wait for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import structlog

_log = structlog.get_logger("labkeeper.crew")


class Crew:
    """Threads that can be told to end, and waited for."""

    def __init__(self) -> None:
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        # Closing the writing end wakes everybody at once.
        self.wake, self._wake_writer = os.pipe()
        """A descriptor that becomes readable when all are to end; to be waited for beside whatever else is waited for."""

    @property
    def closed(self) -> bool:
        """Whether all are to end."""
        return self._closed.is_set()

    def sleep(self, seconds: float) -> bool:
        """Wait; say whether all are to end instead."""
        return self._closed.wait(seconds)

    def start(self, name: str, target: Callable[..., None], *args: object) -> threading.Thread:
        """Run `target` in a thread of its own."""

        def body() -> None:
            try:
                target(*args)
            except Exception:  # noqa: BLE001 - a bug: it must be seen, and nobody waits for this thread
                _log.exception("a thread failed", thread=name)
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=body, name=name, daemon=True)
        with self._lock:
            # Only one that runs can be waited for.
            thread.start()
            self._threads.add(thread)
        return thread

    def close(self) -> None:
        """Tell all to end, and wait until they have."""
        self._closed.set()
        os.close(self._wake_writer)
        while running := self._running():
            for thread in running:
                thread.join()
        os.close(self.wake)

    def _running(self) -> list[threading.Thread]:
        with self._lock:
            return list(self._threads)
