"""One-time links, and rate limits."""

from __future__ import annotations

import pytest

from labkeeper.api import links, rates
from labkeeper.core.errors import TooManyRequests


class ManualClock:
    """A clock that the test moves."""

    now = 100.0

    def __call__(self):
        return self.now


def test_a_ticket_can_be_used_once_and_expires(monkeypatch):
    clock = ManualClock()
    known = links.Links(clock=clock)
    others = {"confirm": False, "actor": "token:ada", "until": None, "valid": lambda: True}
    first, second, third = (
        known.make("lab", 3, "/lab", lifetime=seconds, **others) for seconds in (10.0, 10.0, 20.0)
    )
    assert known.look(first) == known.look(first) is not None
    assert (known.use(first).server, known.use(first)) == ("lab", None)
    clock.now += 10.0
    assert (known.look(second), known.use(second)) == (None, None)
    assert known.use(third).generation == 3
    assert known.use("no ticket") is None
    monkeypatch.setattr(links, "_MOST", 2)
    tickets = [known.make("lab", 1, "/lab", lifetime=10.0, **others) for _ in range(3)]
    assert [known.use(ticket) is not None for ticket in tickets] == [False, True, True]


def test_a_caller_may_send_a_burst_and_then_a_limited_rate():
    clock = ManualClock()
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


def test_a_rate_of_zero_disables_the_limit():
    known = rates.Rates(0.0)
    for _ in range(1000):
        known.take("ada")
