"""Resource usage samples, taken by one thread; requests get the last one.

Processes are measured in each period. The servers are asked for their kernels and connections only
while samples are requested, and by another thread, so that one that hangs, or waits for its
gateway, delays no measurement.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import structlog

from labkeeper.core.errors import BackendError
from labkeeper.core.lifecycle import State
from labkeeper.core.ports import Backend, Clock, Probe
from labkeeper.core.server import Load, Sample, Snapshot, Usage
from labkeeper.core.spec import QualifiedName
from labkeeper.threads import ThreadGroup

_ASKED_FOR: Final = 60.0
"""Seconds after a request during which servers are asked for their kernels and connections."""
_AT_FIRST: Final = 0.2
"""Interval in seconds before the first two samples, as CPU usage takes two."""
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
        record: Callable[[Mapping[QualifiedName, Sample]], None],
    ) -> None:
        """`servers` returns all servers; `period` is in seconds, 0 disables sampling.

        `record` receives the samples of each measurement.
        """
        self._backend = backend
        self._probe = probe
        self._servers = servers
        self._threads = threads
        self._clock = clock
        self._period = period
        self._record = record
        self._asked = float("-inf")
        self._samples: dict[QualifiedName, Sample] = {}
        self._loads: dict[QualifiedName, tuple[int, Load]] = {}
        self._asking = threading.Thread()
        """The thread that asks servers or last did; before the first, one that is not started."""
        self._rounds = 0
        """Number of measurements."""
        self._measured_at = float("-inf")
        """When samples were last taken, by the clock that never goes back."""

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
        if self._rounds <= 1:
            return min(_AT_FIRST, self._period)
        # In the middle of the intervals of the usage log, so that each interval has its sample.
        return self._period - (self._clock.time() - self._period / 2) % self._period

    def _round(self) -> None:
        self._sample()
        if self._clock.monotonic() - self._asked >= _ASKED_FOR:
            self._loads = {}
        elif not self._asking.is_alive() and (not self._loads or self._rounds % _LOADS_EVERY == 0):
            self._asking = self._threads.start("ask-usage", self._ask)
        self._rounds += 1

    def _sample(self) -> None:
        running = {s.qualified_name: s for s in self._servers() if s.state is State.RUNNING}
        try:
            usages = self._backend.usage(running)
        except BackendError as error:
            _log.warning("cannot measure what servers use", error=error.message)
            return
        now = self._clock.monotonic()
        elapsed, self._measured_at = now - self._measured_at, now
        self._samples = {
            name: self._sample_of(name, running[name].generation, elapsed, usage)
            for name, usage in usages.items()
        }
        self._record(self._samples)

    def _sample_of(
        self, name: QualifiedName, generation: int, elapsed: float, usage: Usage
    ) -> Sample:
        now, before, cpus = self._clock.time(), self._samples.get(name), None
        if before is not None and before.generation == generation and elapsed > 0:
            spent = max(0.0, usage.cpu_seconds - before.usage.cpu_seconds)
            cpus = round(spent / elapsed, 3)
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
