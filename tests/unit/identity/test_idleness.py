"""The age of a session's last use, whatever is killed, suspended or set in between."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkeeper.core.errors import StoreError
from labkeeper.identity.idleness import _STORE_EVERY, Idleness
from labkeeper.testing.fakes import FakeClock, MemoryStore


class Suspendable(FakeClock):
    """The clock of a machine that can be suspended, or set."""

    def set_forward(self, seconds):
        self._time += seconds


@pytest.fixture
def clock():
    return Suspendable()


@pytest.fixture
def store():
    return MemoryStore()


@pytest.fixture
def idleness(store, clock):
    return Idleness(store, clock, seen=False)


def test_the_age_is_that_of_the_last_use(idleness, clock):
    idleness.use(["a", "b"], 0.0)
    clock.advance(10)
    idleness.use(["b"], 4.0)
    idleness.use(["b"], 6.0)
    assert (idleness.age("a"), idleness.age("b")) == (10, 4)
    assert idleness.age("unknown") == 0
    clock.advance(1)
    assert idleness.age("unknown") == 1


def test_a_suspended_machine_and_a_clock_that_is_set_count_for_nothing(idleness, clock):
    idleness.use(["a"], 0.0)
    clock.set_forward(1e6)
    assert idleness.age("a") == 0
    clock.set_forward(-2e6)
    clock.advance(5)
    assert idleness.age("a") == 5


def test_time_without_a_keeper_counts_only_if_an_edge_has_seen_it(idleness, store, clock):
    idleness.use(["a"], 0.0)
    idleness.store()
    clock.advance(1000)
    assert Idleness(store, clock, seen=True).age("a") == 1000
    assert Idleness(store, clock, seen=False).age("a") == 0
    # Whoever sets the clock back makes no session younger than it is.
    clock.set_forward(-1e6)
    assert Idleness(store, clock, seen=True).age("a") == 0


def test_it_is_stored_every_few_minutes_and_when_a_use_is_news(idleness, store, clock):
    stored = []
    store.save_session_use = stored.append
    idleness.store()
    assert stored == []
    idleness.use(["a"], 0.0)
    idleness.store()
    clock.advance(_STORE_EVERY - 1)
    idleness.use(["a"], 0.0)
    idleness.store()
    assert len(stored) == 1
    clock.advance(1)
    idleness.store()
    assert [dict(use.used) for use in stored[1:]] == [{"a": _STORE_EVERY - 1}]
    clock.advance(_STORE_EVERY - 1)
    idleness.use(["a"], 0.0)
    idleness.store()
    assert len(stored) == 3
    idleness.keep([])
    clock.advance(_STORE_EVERY)
    idleness.store()
    assert len(stored) == 3


def test_on_a_full_disk_it_is_stored_later(idleness, store):
    idleness.use(["a"], 0.0)
    store.failing = True
    with pytest.raises(StoreError):
        idleness.store()
    store.failing = False
    idleness.store()
    assert list(store.kept_session_use.used) == ["a"]


KINDS = st.sampled_from(["use", "wait", "keeper is killed", "both are killed"])


@given(st.lists(st.tuples(KINDS, st.integers(0, 5000)), max_size=30))
def test_no_restart_ends_a_session_in_use_nor_keeps_an_idle_one(steps):
    """The age is right but for the few minutes that are not stored, with every order of kills."""
    store, clock = MemoryStore(), FakeClock()
    idleness = Idleness(store, clock, seen=False)
    idleness.use(["a"], 0.0)
    idleness.store()
    used = now = blind = 0
    for kind, seconds in steps:
        clock.advance(seconds)
        if kind == "both are killed":
            idleness, blind = Idleness(store, clock, seen=False), blind + 1
        else:
            now += seconds
            if kind == "keeper is killed":
                # The edge tells the next one how long ago the last use was.
                idleness = Idleness(store, clock, seen=True)
                idleness.use(["a"], now - used)
        if kind == "use":
            used = now
            idleness.use(["a"], 0.0)
        idleness.store()
        assert -_STORE_EVERY * blind <= idleness.age("a") - (now - used) <= _STORE_EVERY
