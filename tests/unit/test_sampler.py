"""The sampler over the fake backend: it measures while samples are in demand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness import until
from labkeeper import sampler
from labkeeper.core.errors import BackendUnavailable
from labkeeper.core.lifecycle import Goal, State
from labkeeper.core.server import Load, Snapshot
from labkeeper.runtime import SystemClock
from labkeeper.testing.fakes import a_spec
from labkeeper.testing.world import FakeBackend, World
from labkeeper.threads import ThreadGroup


class Probe:
    silent = False

    def load(self, endpoint):
        if self.silent:
            raise BackendUnavailable("cannot ask the server: this probe is silent")
        return Load(2, 1)


class CountingClock(SystemClock):
    """A clock that can be moved forward, and that counts how often it was read."""

    ahead = 0.0
    readings = 0

    def monotonic(self):
        self.readings += 1
        return super().monotonic() + self.ahead


class Site:
    """A running server in a fake world, and a sampler of it."""

    def __init__(self, period=0.02):
        self.world, self.probe, self.clock = World(), Probe(), CountingClock()
        process = self.world.begin(a_spec("lab"), 1)
        self.snapshot = Snapshot(
            process.spec, State.RUNNING, Goal.UP, 0.0, 0.0, generation=1, endpoint=process.endpoint
        )
        self.backend, self.threads = FakeBackend(lambda report: None, self.world), ThreadGroup()
        self.sampler = sampler.Sampler(
            self.backend,
            self.probe,
            lambda: [self.snapshot],
            threads=self.threads,
            clock=self.clock,
            period=period,
        )
        self.sampler.start()


@pytest.fixture
def site():
    site = Site()
    yield site
    site.threads.close()


def test_the_last_sample_of_the_current_generation_is_returned(site):
    """None at first; then memory, CPU share and load; None again for another generation."""
    assert site.sampler.of(site.snapshot) is None
    sample = until(
        lambda: (s := site.sampler.of(site.snapshot)) and s.load and s.cpus is not None and s,
        what="a complete sample",
    )
    assert sample.usage.memory == 2**27
    assert sample.load == Load(2, 1)
    assert sample.cpus > 0
    assert site.sampler.of(replace(site.snapshot, generation=2)) is None
    assert site.sampler.of(replace(site.snapshot, state=State.STOPPING)) is None


def test_a_server_that_does_not_respond_is_measured_without_its_load(site):
    site.probe.silent = True
    site.sampler.of(site.snapshot)
    assert until(lambda: site.sampler.of(site.snapshot), what="a sample").load is None


def test_nothing_is_measured_without_demand(site):
    site.sampler.of(site.snapshot)
    until(lambda: site.sampler._samples, what="a sample")
    site.clock.ahead = sampler._WANTED_FOR
    until(lambda: not site.sampler._samples, what="old samples to be dropped")
    before, readings = site.backend._measured, site.clock.readings
    # Each round reads the clock, to learn whether samples are in demand.
    until(lambda: site.clock.readings >= readings + 3, what="three more rounds")
    assert site.backend._measured == before


def test_a_period_of_zero_disables_sampling():
    site = Site(period=0)
    assert site.sampler.of(site.snapshot) is None
    assert not site.threads._threads
    site.threads.close()
