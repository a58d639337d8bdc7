from __future__ import annotations

import pytest

from labkeeper.events.log import EventLog
from labkeeper.testing.fakes import FakeClock, MemoryStore


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def store():
    return MemoryStore()


@pytest.fixture
def event_log(store, clock):
    return EventLog(store, clock, size=10_000)
