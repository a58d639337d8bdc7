"""Tickets that are good once, and buckets that fill again."""

from __future__ import annotations

import pytest

from labkeeper.api import links, rates
from labkeeper.core.errors import TooManyRequests


class Hand:
    """A clock that is moved by hand."""

    now = 100.0

    def __call__(self):
        return self.now


def test_a_ticket_is_good_once_and_for_its_time(monkeypatch):
    clock = Hand()
    known = links.Links(clock=clock)
    first, second, third = (
        known.make("lab", 3, "/lab", lifetime=seconds) for seconds in (10.0, 10.0, 20.0)
    )
    assert (known.use(first).server, known.use(first)) == ("lab", None)
    clock.now += 10.0
    assert known.use(second) is None
    assert known.use(third).generation == 3
    assert known.use("no ticket") is None
    monkeypatch.setattr(links, "_MOST", 2)
    tickets = [known.make("lab", 1, "/lab", lifetime=10.0) for _ in range(3)]
    assert [known.use(ticket) is not None for ticket in tickets] == [False, True, True]


def test_a_caller_has_so_many_requests_at_once_and_then_so_many_a_second():
    clock = Hand()
    known = rates.Rates(2.0, clock=clock)
    for _ in range(20):
        known.take("ada")
    with pytest.raises(TooManyRequests) as caught:
        known.take("ada")
    assert caught.value.details == {"retry_after": 1}
    known.take("bob")
    clock.now += 1.0
    known.take("ada")
    known.take("ada")
    with pytest.raises(TooManyRequests):
        known.take("ada")
    clock.now += 1000.0
    for _ in range(20):
        known.take("ada")
    with pytest.raises(TooManyRequests):
        known.take("ada")


def test_without_a_rate_nothing_is_counted():
    known = rates.Rates(0.0)
    for _ in range(1000):
        known.take("ada")
