from __future__ import annotations

import pytest

from labkeeper.events.log import Chronicle
from labkeeper.testing.fakes import FakeClock, MemoryStore


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def store():
    return MemoryStore()


@pytest.fixture
def chronicle(store, clock):
    return Chronicle(store, clock, size=10_000)
