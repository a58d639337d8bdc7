"""The system clock and the threads around the core: mailbox, executor, and snapshot board."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from typing import Final

import structlog

from labkeeper import shortage
from labkeeper.core.errors import BackendUnavailable, LabkeeperError
from labkeeper.core.fleet import Fleet
from labkeeper.core.lifecycle import MAY_EXIST
from labkeeper.core.messages import Change, Message, Reply, Report, StopAll, Tick
from labkeeper.core.ports import Clock
from labkeeper.core.server import Snapshot
from labkeeper.core.spec import QualifiedName

EXECUTOR_THREADS: Final = 8
"""Maximum number of servers with concurrent backend calls; the calls are short."""
_BEAT: Final = 1.0
"""Maximum sleep in seconds of the fleet's thread while timers run, to detect suspension."""
_OVERSLEPT: Final = 0.5
"""Oversleep in seconds that means that the keeper was suspended; less means a busy machine."""
_AWAKE_WITHIN: Final = 3.0
"""Seconds after a suspension in which all threads have run and reported."""
_ANSWER_WITHIN: Final = 30.0
"""Seconds in which the fleet must answer a command, however busy; beyond is a bug."""

_log = structlog.get_logger("labkeeper.runtime")


class SystemClock:
    """The system's clocks."""

    def monotonic(self) -> float:
        """Return seconds of a clock that never goes back."""
        return time.monotonic()

    def time(self) -> float:
        """Return seconds since the epoch."""
        return time.time()


class SnapshotBoard:
    """Snapshots of all servers, and those who wait for a change of one.

    Subscribes to the fleet twice: first to store a change, and after all other subscribers to wake
    those who wait. So what they ask next, such as for events, includes that change.
    """

    def __init__(self) -> None:
        self._snapshots: dict[QualifiedName, Snapshot] = {}
        self._changed = threading.Condition()
        self._watches: set[Watch] = set()
        self.changes = 0
        """The number of changes so far."""

    def changed(self, change: Change) -> None:
        """Store one change. Called by one thread only."""
        after = change.after
        # Readers may hold the old mapping for any time: it is replaced, never altered.
        others = {
            name: snap for name, snap in self._snapshots.items() if name != after.qualified_name
        }
        self._snapshots = others if after.forgotten else {**others, after.qualified_name: after}

    def wake(self, change: Change) -> None:
        """Wake those who wait for a change."""
        with self._changed:
            for watch in self._watches:
                watch.take(change.after)
            self.changes += 1
            self._changed.notify_all()

    def all(self) -> list[Snapshot]:
        """Return all servers, by name."""
        return sorted(self._snapshots.values(), key=lambda s: (s.name, s.spec.owner))

    def get(self, name: QualifiedName) -> Snapshot | None:
        """Return one server, or None."""
        return self._snapshots.get(name)

    def until(self, holds: Callable[[list[Snapshot]], bool], *, timeout: float) -> bool:
        """Wait until `holds` is true of all servers; return whether it became so."""
        with self._changed:
            return self._changed.wait_for(lambda: holds(self.all()), timeout)

    def wait(self, seen: int, timeout: float) -> None:
        """Wait until there are more changes than `seen`, for `timeout` seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: self.changes != seen, timeout)

    @contextmanager
    def watch(self, name: QualifiedName) -> Iterator[Watch]:
        """Watch one server; begin before the awaited command, so that nothing is missed."""
        watch = Watch(name, self._changed)
        with self._changed:
            self._watches.add(watch)
        try:
            yield watch
        finally:
            with self._changed:
                self._watches.discard(watch)


class Watch:
    """The snapshots of one server since the watch began."""

    def __init__(self, name: QualifiedName, changed: threading.Condition) -> None:
        self._name = name
        self._changed = changed
        self._seen: deque[Snapshot] = deque()

    def take(self, snapshot: Snapshot) -> None:
        """Record a change; called with the board's lock held."""
        if snapshot.qualified_name == self._name:
            self._seen.append(snapshot)

    def until(
        self, holds: Callable[[Snapshot], bool], *, first: Snapshot, timeout: float
    ) -> tuple[Snapshot, bool]:
        """Wait for a snapshot, `first` or later, of which `holds` is true.

        Return the last one examined, and whether `holds` was true of it.
        `first` is the fleet's own answer: snapshots before it are skipped.
        """
        until = time.monotonic() + timeout
        last = first
        with self._changed:
            if first in self._seen:
                while self._seen.popleft() != first:
                    pass
            while not holds(last):
                if self._seen:
                    last = self._seen.popleft()
                elif not self._changed.wait(max(0.0, until - time.monotonic())) and not self._seen:
                    return last, False
        return last, True


class KeyedExecutor:
    """Runs jobs on a few threads: jobs of one server in order, of different servers in parallel."""

    def __init__(
        self, mailbox: Callable[[Report], object], *, threads: int = EXECUTOR_THREADS
    ) -> None:
        """Start all threads at once, so that no job waits for one that cannot be started.

        Raises BackendUnavailable.
        """
        self._mailbox = mailbox
        self._waiting: queue.SimpleQueue[QualifiedName | None] = queue.SimpleQueue()
        """Names with a queue that no thread processes yet; None ends a thread."""
        self._queues: dict[
            QualifiedName, deque[tuple[Callable[[], Report | None], Report | None]]
        ] = {}
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        try:
            for number in range(threads):
                thread = threading.Thread(target=self._work, name=f"worker-{number}", daemon=True)
                shortage.start(thread)
                self._threads.append(thread)
        except BackendUnavailable:
            self.close()
            raise

    def submit(
        self, name: QualifiedName, job: Callable[[], Report | None], failed: Report | None = None
    ) -> None:
        """Queue a job; if it raises, the exception is logged and `failed` reported."""
        with self._lock:
            queued = self._queues.get(name)
            if queued is not None:
                queued.append((job, failed))
                return
            self._queues[name] = deque([(job, failed)])
        self._waiting.put(name)

    def close(self) -> None:
        """Finish queued jobs, and end the threads."""
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (name := self._waiting.get()) is not None:
            self._run(name)

    def _run(self, name: QualifiedName) -> None:
        """Run the jobs of one server until none is queued."""
        while True:
            with self._lock:
                queued = self._queues[name]
                if not queued:
                    del self._queues[name]
                    return
                job, failed = queued.popleft()
            try:
                report = job()
            except Exception:  # noqa: BLE001 - a bug: it must not take the other servers' jobs with it
                _log.exception("a job failed", server=name)
                report = failed
            if report is not None:
                self._mailbox(report)


class Mailbox:
    """Queue of messages to the fleet, from any thread."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[tuple[Message, Future[Reply | None]] | None] = (
            queue.SimpleQueue()
        )

    def post(self, message: Message) -> Future[Reply | None]:
        """Queue a message; the future receives the fleet's answer."""
        answer: Future[Reply | None] = Future()
        self._items.put((message, answer))
        return answer

    def close(self) -> None:
        """End the reader once it has processed all queued messages."""
        self._items.put(None)

    def size(self) -> int:
        """Return the number of queued messages."""
        return self._items.qsize()

    def get(self, timeout: float | None) -> tuple[Message, Future[Reply | None]] | None:
        """Return the next message, or None at the end.

        Raises queue.Empty after `timeout` seconds.
        """
        return self._items.get(timeout=timeout)


class Keeper:
    """The fleet with its thread: accepts commands from any thread, and answers them."""

    def __init__(
        self,
        fleet: Fleet,
        mailbox: Mailbox,
        executor: KeyedExecutor,
        board: SnapshotBoard,
        clock: Clock,
    ) -> None:
        """`clock` must be the fleet's."""
        self._fleet = fleet
        self._mailbox = mailbox
        self._queues = executor
        self._board = board
        self._clock = clock
        self._thread = threading.Thread(target=self._loop, name="fleet", daemon=True)

    def start(self) -> None:
        """Recover the servers of an earlier keeper, then start the thread. Raises StoreError."""
        self._fleet.recover()
        shortage.start(self._thread)

    def ask(self, message: Message) -> Reply | None:
        """Send a command; return the fleet's answer (not its outcome). Raises LabkeeperError."""
        try:
            return self._mailbox.post(message).result(_ANSWER_WITHIN)
        except TimeoutError as error:
            raise BackendUnavailable(
                "cannot take the command: the keeper is busy; try again"
            ) from error

    @property
    def alive(self) -> bool:
        """Whether the fleet's thread runs."""
        return self._thread.is_alive()

    def all(self) -> list[Snapshot]:
        """Return all servers, by name."""
        return self._board.all()

    def get(self, name: QualifiedName) -> Snapshot | None:
        """Return one server, or None."""
        return self._board.get(name)

    @property
    def changes(self) -> int:
        """The number of changes of servers so far."""
        return self._board.changes

    def wait(self, seen: int, timeout: float) -> None:
        """Wait until there are more changes than `seen`, for `timeout` seconds at most."""
        self._board.wait(seen, timeout)

    def watch(self, name: QualifiedName) -> AbstractContextManager[Watch]:
        """Watch one server."""
        return self._board.watch(name)

    def stop_all(self, *, within: float) -> bool:
        """Stop every server; return whether all ended within `within` seconds."""
        try:
            self.ask(StopAll())
        except Exception:  # noqa: BLE001 - see the log
            # One server's error; the others got the command, and are waited for.
            _log.exception("not every server could be told to stop")
        return self._board.until(
            lambda all_: not any(s.state in MAY_EXIST for s in all_), timeout=within
        )

    def close(self) -> None:
        """End the threads; servers live on."""
        self._mailbox.close()
        if self._thread.ident is not None:  # It was started.
            self._thread.join()
        self._queues.close()

    def _loop(self) -> None:
        looked, expected, held_until = -math.inf, math.inf, -math.inf
        while True:
            due, now = self._fleet.next_deadline(), self._clock.monotonic()
            if now > expected + _OVERSLEPT and (due is None or due > looked):
                # Supervisors were suspended, too: an event that a timer waits for may be reported
                # only now. A timer that is delayed already is not delayed again.
                held_until = now + _AWAKE_WITHIN
            wait = None if due is None else min(max(due, held_until) - now, _BEAT)
            looked, expected = now, math.inf if wait is None else now + wait
            if wait is None or wait > 0:
                if not self._take(wait):
                    return
            else:
                # Only messages that are here by now go first: a busy mailbox must not delay a
                # timer.
                if not all(self._take(0) for _ in range(self._mailbox.size())):
                    return
                self._step(Tick(), Future())

    def _take(self, timeout: float | None) -> bool:
        """Process the next message within `timeout` seconds, if any; return False at the end."""
        with contextlib.suppress(queue.Empty):
            item = self._mailbox.get(timeout)
            if item is None:
                return False
            self._step(*item)
        return True

    def _step(self, message: Message, answer: Future[Reply | None]) -> None:
        try:
            answer.set_result(self._fleet.step(message))
        except LabkeeperError as error:
            answer.set_exception(error)
        except Exception as error:  # noqa: BLE001 - a bug: the caller gets it, the fleet continues
            _log.exception("a step of the fleet failed", message=type(message).__name__)
            answer.set_exception(error)
