"""The sampler over the fake backend: it measures always, and asks servers on demand."""

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

NAME = a_spec("lab").qualified_name


class Probe:
    silent = False
    asked = 0

    def load(self, endpoint):
        self.asked += 1
        if self.silent:
            raise BackendUnavailable("cannot ask the server: this probe is silent")
        return Load(2, 1)


class MovedClock(SystemClock):
    """A clock that can be moved forward, and whose time of day can be set."""

    ahead = set_by = 0.0

    def monotonic(self):
        return super().monotonic() + self.ahead

    def time(self):
        return super().time() + self.set_by


class Site:
    """A running server in a fake world, and a sampler of it."""

    def __init__(self, period=0.02):
        self.world, self.probe, self.clock = World(), Probe(), MovedClock()
        process = self.world.begin(a_spec("lab"), 1)
        self.snapshot = Snapshot(
            process.spec, State.RUNNING, Goal.UP, 0.0, 0.0, generation=1, endpoint=process.endpoint
        )
        self.backend, self.threads = FakeBackend(lambda report: None, self.world), ThreadGroup()
        self.recorded, self.refused = [], 0
        self.sampler = sampler.Sampler(
            self.backend,
            self.probe,
            lambda: [self.snapshot],
            threads=self.threads,
            clock=self.clock,
            period=period,
            record=self.recorded.append,
        )
        self.sampler.start()

    def refuse(self, _names):
        self.refused += 1
        raise BackendUnavailable("cannot measure: this backend was told to fail")


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
    until(lambda: site.probe.asked > 1, what="requests")
    assert site.sampler.of(site.snapshot).load is None


def test_servers_are_measured_without_demand_but_asked_only_on_demand(site):
    until(lambda: len(site.recorded) > 3, what="measurements")
    assert not site.probe.asked
    site.sampler.of(site.snapshot)
    until(lambda: site.recorded[-1][NAME].load, what="a sample with its load")
    site.clock.ahead = sampler._ASKED_FOR
    until(lambda: site.recorded[-1][NAME].load is None, what="a sample without a load")
    until(lambda: not site.sampler._asking.is_alive(), what="the last answer")
    asked, recorded = site.probe.asked, len(site.recorded)
    until(lambda: len(site.recorded) > recorded + 6, what="more measurements")
    assert site.probe.asked == asked


def test_every_measurement_is_recorded_with_the_processors_in_use(site):
    until(lambda: len(site.recorded) > 3, what="measurements")
    first, *others = (samples[NAME] for samples in site.recorded)
    assert first.cpus is None
    assert all(sample.cpus > 0 for sample in others)
    assert all(sample.generation == 1 for sample in others)


def test_processors_are_right_when_the_clock_is_set(site):
    """The interval is taken from the clock that is never set."""
    until(lambda: len(site.recorded) > 3, what="measurements")
    site.clock.set_by = -3600.0
    recorded = len(site.recorded)
    until(lambda: len(site.recorded) > recorded + 2, what="more measurements")
    later = [samples[NAME] for samples in site.recorded[recorded + 1 :]]
    assert all(sample.cpus > 0 for sample in later)
    assert later[0].at < site.recorded[0][NAME].at


def test_what_cannot_be_measured_is_not_recorded(site):
    until(lambda: site.recorded, what="a measurement")
    site.backend.usage = site.refuse
    until(lambda: site.refused, what="an error")
    recorded, refused = len(site.recorded), site.refused
    until(lambda: site.refused > refused + 2, what="more errors")
    assert len(site.recorded) <= recorded + 1


@pytest.mark.parametrize(
    ("now", "pause"), [(1000.0, 2.5), (1002.4, 0.1), (1002.5, 5.0), (1004.0, 3.5)]
)
def test_measurements_are_in_the_middle_of_an_interval(now, pause):
    site = Site(period=0)
    site.sampler._period, site.sampler._rounds = 5.0, 2
    site.clock.time = lambda: now
    assert site.sampler._pause() == pytest.approx(pause)
    site.threads.close()


def test_a_period_of_zero_disables_sampling():
    site = Site(period=0)
    assert site.sampler.of(site.snapshot) is None
    assert not site.threads._threads
    site.threads.close()
