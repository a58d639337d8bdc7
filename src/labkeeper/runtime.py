"""The real clock and the threads around the core: mailbox, executor, and the board of snapshots."""

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
from labkeeper.core.spec import ServerName

EXECUTOR_THREADS: Final = 8
"""How many servers' backend calls run beside each other; the calls are short."""
_BEAT: Final = 1.0
"""Seconds that the fleet's thread sleeps at most while there is any timer, so that it sees whether it was suspended."""
_OVERSLEPT: Final = 0.5
"""Seconds that it wakes up too late by when the machine was not merely busy: the keeper was suspended."""
_AWAKE_WITHIN: Final = 3.0
"""Seconds in which all threads of a keeper that was suspended have had their turn, and told what they see."""
_ANSWER_WITHIN: Final = 30.0
"""Seconds in which the fleet answers a command, however busy; beyond is a bug."""

_log = structlog.get_logger("labkeeper.runtime")


class SystemClock:
    """Time as the system has it."""

    def monotonic(self) -> float:
        """Seconds that never go back."""
        return time.monotonic()

    def time(self) -> float:
        """Seconds since the epoch."""
        return time.time()


class SnapshotBoard:
    """What is known of every server, for readers. A listener of the fleet: each change replaces one snapshot."""

    def __init__(self) -> None:
        self._snapshots: dict[ServerName, Snapshot] = {}
        self._changed = threading.Condition()
        self._watches: set[Watch] = set()

    def changed(self, change: Change) -> None:
        """Take in one change."""
        after = change.after
        with self._changed:
            # Readers hold the old mapping as long as they like: it is replaced, never altered.
            others = {name: snap for name, snap in self._snapshots.items() if name != after.name}
            self._snapshots = others if after.forgotten else {**others, after.name: after}
            for watch in self._watches:
                watch.take(after)
            self._changed.notify_all()

    def all(self) -> list[Snapshot]:
        """Return all servers, by name."""
        snapshots = self._snapshots
        return [snapshots[name] for name in sorted(snapshots)]

    def get(self, name: ServerName) -> Snapshot | None:
        """Return one server."""
        return self._snapshots.get(name)

    def until(self, holds: Callable[[list[Snapshot]], bool], *, timeout: float) -> bool:
        """Wait until `holds` is true of all servers; return whether it became so."""
        with self._changed:
            return self._changed.wait_for(lambda: holds(self.all()), timeout)

    @contextmanager
    def watch(self, name: ServerName) -> Iterator[Watch]:
        """Watch one server; begin before the command whose outcome is awaited, and nothing is missed."""
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

    def __init__(self, name: ServerName, changed: threading.Condition) -> None:
        self._name = name
        self._changed = changed
        self._seen: deque[Snapshot] = deque()

    def take(self, snapshot: Snapshot) -> None:
        """Note a change; called with the board's lock held."""
        if snapshot.name == self._name:
            self._seen.append(snapshot)

    def until(self, holds: Callable[[Snapshot], bool], *, first: Snapshot, timeout: float) -> tuple[Snapshot, bool]:
        """Wait for a snapshot, `first` or later, of which `holds` is true; return the last one looked at, and whether it was.

        `first` is the fleet's own answer: what the watch saw before it is passed over.
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
    """Runs jobs on a few threads: those of one server in order, those of different servers in parallel."""

    def __init__(self, mailbox: Callable[[Report], None], *, threads: int = EXECUTOR_THREADS) -> None:
        """All threads are there from the beginning: no job may wait for one that cannot be started. Raises BackendUnavailable."""
        self._mailbox = mailbox
        self._waiting: queue.SimpleQueue[ServerName | None] = queue.SimpleQueue()
        """Names with a queue that no thread works on yet; None ends a thread."""
        self._queues: dict[ServerName, deque[tuple[Callable[[], Report | None], Report | None]]] = {}
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

    def submit(self, name: ServerName, job: Callable[[], Report | None], failed: Report | None = None) -> None:
        """Queue a job; if it raises, that is logged, and `failed` reported."""
        with self._lock:
            queued = self._queues.get(name)
            if queued is not None:
                queued.append((job, failed))
                return
            self._queues[name] = deque([(job, failed)])
        self._waiting.put(name)

    def close(self) -> None:
        """Finish what is queued, and end the threads."""
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (name := self._waiting.get()) is not None:
            self._run(name)

    def _run(self, name: ServerName) -> None:
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
    """Where messages to the fleet wait, from any thread."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[tuple[Message, Future[Reply | None]] | None] = queue.SimpleQueue()

    def receive(self, report: Report) -> None:
        """Take in a fact."""
        self._items.put((report, Future()))

    def post(self, message: Message) -> Future[Reply | None]:
        """Take in a command; the fleet's answer comes in the future."""
        answer: Future[Reply | None] = Future()
        self._items.put((message, answer))
        return answer

    def close(self) -> None:
        """Let the reader end after what is already here."""
        self._items.put(None)

    def size(self) -> int:
        """Count what waits."""
        return self._items.qsize()

    def get(self, timeout: float | None) -> tuple[Message, Future[Reply | None]] | None:
        """Return the next message, or None at the end; raise queue.Empty after `timeout` seconds."""
        return self._items.get(timeout=timeout)


class Keeper:
    """The fleet with its thread: commands come in from any thread, and are answered."""

    def __init__(self, fleet: Fleet, mailbox: Mailbox, executor: KeyedExecutor, board: SnapshotBoard, clock: Clock) -> None:
        """Take the clock that the fleet goes by."""
        self._fleet = fleet
        self._mailbox = mailbox
        self._queues = executor
        self._board = board
        self._clock = clock
        self._thread = threading.Thread(target=self._loop, name="fleet", daemon=True)

    def start(self) -> None:
        """Take up the servers of an earlier keeper, then listen. Raises StoreError."""
        self._fleet.recover()
        shortage.start(self._thread)

    def ask(self, message: Message) -> Reply | None:
        """Send a command, and wait for the fleet's answer (not for its outcome). Raises LabkeeperError."""
        try:
            return self._mailbox.post(message).result(_ANSWER_WITHIN)
        except TimeoutError as error:
            raise BackendUnavailable("cannot take the command: the keeper is busy; try again") from error

    @property
    def alive(self) -> bool:
        """Whether the fleet's thread listens."""
        return self._thread.is_alive()

    def all(self) -> list[Snapshot]:
        """Return all servers, by name."""
        return self._board.all()

    def get(self, name: ServerName) -> Snapshot | None:
        """Return one server."""
        return self._board.get(name)

    def watch(self, name: ServerName) -> AbstractContextManager[Watch]:
        """Watch one server."""
        return self._board.watch(name)

    def stop_all(self, *, within: float) -> bool:
        """Stop every server and wait; return whether all were gone `within` seconds."""
        try:
            self.ask(StopAll())
        except Exception:  # noqa: BLE001 - see the log
            # Of one server; the others were told, and are waited for.
            _log.exception("not every server could be told to stop")
        return self._board.until(lambda all_: not any(s.state in MAY_EXIST for s in all_), timeout=within)

    def close(self) -> None:
        """End the threads; servers live on."""
        self._mailbox.close()
        if self._thread.ident is not None:  # It has begun.
            self._thread.join()
        self._queues.close()

    def _loop(self) -> None:
        looked, expected, held_until = -math.inf, math.inf, -math.inf
        while True:
            due, now = self._fleet.next_deadline(), self._clock.monotonic()
            if now > expected + _OVERSLEPT and (due is None or due > looked):
                # Those who watch servers were suspended, too: what a timer waits for they may tell only now. A timer that is
                # held up already is not held up once more.
                held_until = now + _AWAKE_WITHIN
            wait = None if due is None else min(max(due, held_until) - now, _BEAT)
            looked, expected = now, math.inf if wait is None else now + wait
            if wait is None or wait > 0:
                if not self._take(wait):
                    return
            else:
                # Only what is here by now goes first: a busy mailbox must not hold up a timer.
                if not all(self._take(0) for _ in range(self._mailbox.size())):
                    return
                self._step(Tick(), Future())

    def _take(self, timeout: float | None) -> bool:
        """Take the next message, if one comes within some seconds; return whether we go on."""
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
        except Exception as error:  # noqa: BLE001 - a bug: whoever asked gets it, and the fleet goes on
            _log.exception("a step of the fleet failed", message=type(message).__name__)
            answer.set_exception(error)
