"""Threads that end when their owner is closed, whatever they wait for."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import structlog

from labkeeper import shortage
from labkeeper.core.errors import LabkeeperError

_log = structlog.get_logger("labkeeper.threads")


class ThreadGroup:
    """Threads that can be asked to end, and joined."""

    def __init__(self) -> None:
        self._threads: set[threading.Thread] = set()
        self._failing: dict[str, str] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        # Closing the writing end wakes all threads at once.
        self.wake, self._wake_writer = os.pipe()
        """A descriptor that becomes readable when all threads must end; for use in polls."""

    @property
    def closed(self) -> bool:
        """Whether all threads must end."""
        return self._closed.is_set()

    @property
    def failing(self) -> Mapping[str, str]:
        """Error of each watcher's last round, by the watcher's name."""
        return dict(self._failing)

    def sleep(self, seconds: float) -> bool:
        """Wait; return True early if all threads must end."""
        return self._closed.wait(seconds)

    def start(self, name: str, target: Callable[..., None], *args: object) -> threading.Thread:
        """Run `target` in a new thread.

        Raises BackendUnavailable if none can be started; nothing has happened then.
        """

        def body() -> None:
            try:
                target(*args)
            except Exception:  # noqa: BLE001 - a bug: it must be logged, without a caller
                _log.exception("a thread failed", thread=name)
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=body, name=name, daemon=True)
        with self._lock:
            # Only a running thread can be joined.
            shortage.start(thread)
            self._threads.add(thread)
        return thread

    @contextmanager
    def standing_by(self, name: str) -> Iterator[Callable[[Callable[[], None]], None]]:
        """Yield a function that hands a job to a thread started beforehand.

        Nothing is thus begun without a thread to supervise it; without a job the thread ends.
        Raises BackendUnavailable if no thread can be started.
        """
        given: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.start(name, lambda: given.get()())  # noqa: PLW0108 - it waits, and is to do so in the thread
        try:
            yield given.put
        finally:
            # Behind the handed job, this is never taken.
            given.put(lambda: None)

    def watch(self, name: str, look: Callable[[], None], *, every: Callable[[], float]) -> None:
        """Call `look` every `every()` seconds; a failed round is recorded, others follow."""

        def rounds() -> None:
            while not self.sleep(every()):
                try:
                    look()
                    self._failing.pop(name, None)
                except Exception as error:  # noqa: BLE001 - the next round must follow in any case
                    if name not in self._failing:
                        _log.exception("a watcher's round failed", watcher=name)
                    self._failing[name] = (
                        error.message if isinstance(error, LabkeeperError) else repr(error)
                    )

        self.start(name, rounds)

    def close(self) -> None:
        """Ask all threads to end, and join them."""
        self._closed.set()
        os.close(self._wake_writer)
        while running := self._running():
            for thread in running:
                thread.join()
        os.close(self.wake)

    def _running(self) -> list[threading.Thread]:
        with self._lock:
            return list(self._threads)
