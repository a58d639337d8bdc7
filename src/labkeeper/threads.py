"""Threads that all end when their owner is closed, whatever they wait for."""

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
    """Threads that can be told to end, and waited for."""

    def __init__(self) -> None:
        self._threads: set[threading.Thread] = set()
        self._failing: dict[str, str] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        # Closing the writing end wakes everybody at once.
        self.wake, self._wake_writer = os.pipe()
        """A descriptor that becomes readable when all are to end; to be waited for beside whatever else is waited for."""

    @property
    def closed(self) -> bool:
        """Whether all are to end."""
        return self._closed.is_set()

    @property
    def failing(self) -> Mapping[str, str]:
        """Why the last round of a watcher failed, by the watcher's name."""
        return dict(self._failing)

    def sleep(self, seconds: float) -> bool:
        """Wait; return whether all are to end instead."""
        return self._closed.wait(seconds)

    def start(self, name: str, target: Callable[..., None], *args: object) -> threading.Thread:
        """Run `target` in a thread of its own. Raises BackendUnavailable where none can be started: nothing has happened then."""

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
            shortage.start(thread)
            self._threads.add(thread)
        return thread

    @contextmanager
    def standing_by(self, name: str) -> Iterator[Callable[[Callable[[], None]], None]]:
        """Start a thread that does what it is given inside, if anything; so nothing is begun that no thread could attend.

        Raises BackendUnavailable where none can be started.
        """
        given: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.start(name, lambda: given.get()())  # noqa: PLW0108 - it waits, and is to do so in the thread
        try:
            yield given.put
        finally:
            # Behind what it was given, this is never taken.
            given.put(lambda: None)

    def watch(self, name: str, look: Callable[[], None], *, every: Callable[[], float]) -> None:
        """Call `look` again and again, with so many seconds in between. A round that fails is told, and is not the last."""

        def rounds() -> None:
            while not self.sleep(every()):
                try:
                    look()
                    self._failing.pop(name, None)
                except Exception as error:  # noqa: BLE001 - whatever it is: nobody else would do the next round
                    if name not in self._failing:
                        _log.exception("a watcher cannot do its round", watcher=name)
                    self._failing[name] = error.message if isinstance(error, LabkeeperError) else repr(error)

        self.start(name, rounds)

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
