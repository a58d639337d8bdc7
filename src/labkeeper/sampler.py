"""Resource usage samples, taken by one thread while they are requested; requests get the last one.

Processes are measured in each period. The servers are asked for their kernels and connections by
another thread, so that one that hangs, or waits for its gateway, delays no measurement.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from labkeeper.core.errors import BackendError
from labkeeper.core.lifecycle import State
from labkeeper.core.ports import Backend, Clock, Probe
from labkeeper.core.server import Load, Sample, Snapshot, Usage
from labkeeper.core.spec import QualifiedName
from labkeeper.threads import ThreadGroup

_WANTED_FOR: Final = 60.0
"""Seconds of sampling after a request."""
_LOOK_EVERY: Final = 0.2
"""Interval in seconds between checks for a request, while there is none."""
_LOADS_EVERY: Final = 3
"""Periods between two rounds of requests to the servers."""

_log = structlog.get_logger("labkeeper.sampler")


class Sampler:
    """Takes samples, and returns the last ones to any thread."""

    def __init__(
        self,
        backend: Backend,
        probe: Probe,
        servers: Callable[[], Sequence[Snapshot]],
        *,
        threads: ThreadGroup,
        clock: Clock,
        period: float,
    ) -> None:
        """`servers` returns all servers; `period` is in seconds, 0 disables sampling."""
        self._backend = backend
        self._probe = probe
        self._servers = servers
        self._threads = threads
        self._clock = clock
        self._period = period
        self._asked = float("-inf")
        self._samples: dict[QualifiedName, Sample] = {}
        self._loads: dict[QualifiedName, tuple[int, Load]] = {}
        self._asking = threading.Thread()
        """The thread that asks servers or last did; before the first, one that is not started."""
        self._rounds = 0
        """Number of measurements since the first request."""

    def start(self) -> None:
        """Start the thread."""
        if self._period:
            self._threads.watch("usage", self._round, every=self._pause)

    def of(self, snapshot: Snapshot) -> Sample | None:
        """Return a running server's last sample without waiting; None if this launch has none."""
        self._asked = self._clock.monotonic()
        sample = self._samples.get(snapshot.qualified_name)
        if (
            snapshot.state is not State.RUNNING
            or sample is None
            or sample.generation != snapshot.generation
        ):
            return None
        return sample

    def _pause(self) -> float:
        # Sample soon after the first request, and again soon: CPU usage takes two samples.
        return self._period if self._rounds > 1 else _LOOK_EVERY

    def _round(self) -> None:
        if self._clock.monotonic() - self._asked >= _WANTED_FOR:
            # An outdated sample could be mistaken for a new one.
            self._samples, self._rounds = {}, 0
            return
        self._sample()
        if self._rounds % _LOADS_EVERY == 0 and not self._asking.is_alive():
            self._asking = self._threads.start("ask-usage", self._ask)
        self._rounds += 1

    def _sample(self) -> None:
        running = {s.qualified_name: s for s in self._servers() if s.state is State.RUNNING}
        try:
            usages = self._backend.usage(running)
        except BackendError as error:
            _log.warning("cannot measure what servers use", error=error.message)
            return
        now = self._clock.time()
        self._samples = {
            name: self._sample_of(name, running[name].generation, now, usage)
            for name, usage in usages.items()
        }

    def _sample_of(self, name: QualifiedName, generation: int, now: float, usage: Usage) -> Sample:
        before = self._samples.get(name)
        cpus = None
        if before is not None and before.generation == generation and now > before.at:
            spent = max(0.0, usage.cpu_seconds - before.usage.cpu_seconds)
            cpus = round(spent / (now - before.at), 3)
        asked, load = self._loads.get(name, (None, None))
        return Sample(generation, now, usage, cpus, load if asked == generation else None)

    def _ask(self) -> None:
        loads: dict[QualifiedName, tuple[int, Load]] = {}
        for snapshot in self._servers():
            if self._threads.closed:
                return
            if snapshot.endpoint is not None:
                try:
                    loads[snapshot.qualified_name] = (
                        snapshot.generation,
                        self._probe.load(snapshot.endpoint),
                    )
                except BackendError:
                    # Unresponsive servers are detected and reported elsewhere.
                    continue
        self._loads = loads
