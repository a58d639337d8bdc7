"""The usage log over real and failing stores, by a clock that the test moves."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest

from harness import until
from labkeeper import usage_log
from labkeeper.core.errors import StoreError
from labkeeper.core.lifecycle import Event, Goal, State
from labkeeper.core.messages import Change
from labkeeper.core.server import Sample, Snapshot, Usage
from labkeeper.core.spec import QualifiedName
from labkeeper.store.queries import SqliteStore
from labkeeper.testing.fakes import FakeClock, MemoryStore, a_spec
from labkeeper.threads import ThreadGroup
from labkeeper.usage_log import UsageLog

LAB = QualifiedName("lab")
START = 1_800_000_000.0
SNAPSHOT = Snapshot(a_spec("lab"), State.STOPPED, Goal.ABSENT, 0.0, 0.0)


class Site:
    """A usage log over a store, and its clock."""

    def __init__(self, store):
        self.store, self.clock = store, FakeClock(time=START)
        store.save(SNAPSHOT)
        self.log = self.next_keeper()

    def next_keeper(self):
        self.log = UsageLog(self.store, self.clock, period=5.0)
        return self.log

    def measure(self, *memories, name=LAB, generation=1, cpus=0.5, every=5):
        for memory in memories:
            usage = Usage(memory, 0.0, 1, 1)
            self.log.record({name: Sample(generation, self.clock.time(), usage, cpus)})
            self.clock.advance(every)

    def columns(self, since=None):
        found = self.log.history(LAB, since)
        return found.resolution, found.start - START, found.memory


@pytest.fixture(params=["memory", "sqlite"])
def site(request, tmp_path):
    with contextlib.ExitStack() as stack:
        if request.param == "memory":
            yield Site(MemoryStore())
        else:
            store = SqliteStore(tmp_path / "store.sqlite")
            stack.callback(store.close)
            yield Site(store)


def test_the_last_hour_is_returned_as_measured(site):
    site.measure(100, 200)
    site.clock.advance(5)
    site.measure(300, generation=2)
    assert site.columns() == (5, 0, [100, 200, None, 300])
    assert site.log.history(LAB).generation == [1, 1, None, 2]
    site.clock.advance(3600 - 20)
    assert site.columns()[1:] == (5, [200, None, 300])


def test_a_server_that_was_never_measured_has_an_empty_history(site):
    site.measure(1, cpus=None)
    for since in (None, START - 1e5, START - 1e7):
        assert list(site.log.history(LAB, since).memory) == []


def test_longer_times_are_returned_as_means_saved_or_not(site):
    site.measure(*[100] * 6, *[400] * 6)
    site.log.save()
    site.measure(*[700] * 6)
    assert site.columns(START - 80000) == (60, 0, [250, 700])
    assert site.columns(START - 9e5) == (3600, 0, [400])
    assert site.log.history(LAB, START - 9e5).memory_max == [700]


def test_the_next_keeper_goes_on_with_what_was_saved(site):
    """The hour and the minute that were in progress as well: the rest is merged with them."""
    site.measure(*[100] * 15)
    site.log.save()
    site.next_keeper()
    site.measure(*[300] * 15)
    site.log.save()
    assert site.columns(START - 9e5) == (3600, 0, [200])
    assert site.columns(START - 80000) == (60, 0, [100, 250, 300])


def test_the_last_hour_is_in_minutes_if_only_an_earlier_keeper_measured_all_of_it(site):
    site.measure(*[100] * 24)
    site.log.save()
    site.next_keeper()
    assert site.columns() == (60, 0, [100, 100])
    site.measure(*[300] * 12)
    assert site.columns() == (60, 0, [100, 100, 300])
    assert site.columns(START + 121) == (5, 120, [300] * 12)


def test_what_is_not_saved_is_lost_with_the_keeper(site):
    site.measure(*[100] * 24)
    site.next_keeper()
    assert list(site.log.history(LAB).memory) == []


def test_a_deleted_server_is_forgotten(site):
    """Also if a last sample of it comes late: the next server of this name has no part in it."""
    site.measure(*[100] * 24)
    site.log.save()
    site.store.forget(LAB)
    site.log.changed(Change(Event.DELETE, SNAPSHOT, SNAPSHOT, START))
    site.measure(100)
    site.log.save()
    site.store.save(SNAPSHOT)
    site.next_keeper()
    for since in (None, START - 80000, START - 9e5):
        assert list(site.log.history(LAB, since).memory) == []


def test_another_change_forgets_nothing(site):
    site.measure(100)
    down = replace(SNAPSHOT, goal=Goal.DOWN)
    site.log.changed(Change(Event.STOP, SNAPSHOT, down, START))
    assert site.columns() == (5, 0, [100])


def test_a_store_that_fails_delays_what_is_saved():
    site = Site(MemoryStore())
    site.measure(*[100] * 12)
    site.store.failing = True
    site.log.save()
    site.measure(*[300] * 6)
    with pytest.raises(StoreError):
        site.log.history(LAB, START - 80000)
    assert site.columns(START) == (5, 0, [100] * 12 + [300] * 6)
    site.log.save()
    site.store.failing = False
    site.log.save()
    site.next_keeper()
    assert site.columns(START - 80000) == (60, 0, [100, 300])
    assert site.columns(START - 9e5) == (3600, 0, [167])


def test_samples_that_come_while_the_store_fails_are_merged_with_what_it_has_refused():
    class SlowStore(MemoryStore):
        def add_usage(self, points):
            if self.failing:
                site.measure(*[300] * 6)
            super().add_usage(points)

    site = Site(SlowStore())
    site.measure(*[100] * 6)
    site.store.failing = True
    site.log.save()
    site.store.failing = False
    site.log.save()
    site.next_keeper()
    assert site.columns(START - 80000) == (60, 0, [200])


def test_while_the_store_fails_only_the_last_hour_is_kept_for_it():
    site = Site(MemoryStore())
    site.store.failing = True
    for minute in range(90):
        site.measure(minute, every=60)
        site.log.save()
    site.store.failing = False
    site.log.save()
    site.next_keeper()
    assert site.columns(START - 80000) == (60, 30 * 60, list(range(30, 90)))


def test_the_store_is_trimmed_to_the_newest_points(site, monkeypatch):
    monkeypatch.setattr("labkeeper.core.usage.Level.size", 3)
    for memory in range(5):
        site.measure(memory, every=3600)
        site.log.save()
    assert [point.memory for point in site.store.usage(LAB, 60, since=0)] == [2, 3, 4]
    assert [point.memory for point in site.store.usage(LAB, 3600, since=0)] == [2, 3, 4]


def test_a_clock_that_was_far_ahead_costs_no_history(site):
    site.measure(*[100] * 24)
    site.log.save()
    site.clock.advance(1e9)
    site.measure(1)
    site.log.save()
    site.clock.advance(-1e9 - 5)
    site.measure(*[300] * 12)
    site.log.save()
    assert site.columns(START - 80000) == (60, 0, [100, 100, 300])


def test_servers_that_have_not_run_for_an_hour_occupy_no_memory(site):
    site.measure(100)
    site.clock.advance(3590)
    site.log.save()
    assert site.log.recent([LAB])
    site.clock.advance(20)
    site.log.save()
    assert not site.log._series
    assert not site.log._pending


def test_recent_usage_of_many_servers_is_returned_without_the_store():
    site = Site(MemoryStore())
    site.measure(100, 200)
    site.measure(300, name=QualifiedName("other"))
    site.store.failing = True
    found = site.log.recent([LAB, QualifiedName("none")], 4)
    assert list(found) == [LAB]
    assert found[LAB].memory == [100, 200, None, None]
    assert found[LAB].cpus == [0.5, 0.5, None, None]
    assert len(site.log.recent([LAB])[LAB].memory) == 30


def test_a_thread_saves(monkeypatch):
    monkeypatch.setattr(usage_log, "_SAVE_EVERY", 0.01)
    site, threads = Site(MemoryStore()), ThreadGroup()
    site.measure(100)
    site.log.start(threads)
    until(lambda: site.store.kept_usage, what="points in the store")
    threads.close()
    assert not site.log._pending
