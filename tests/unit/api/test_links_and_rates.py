"""One-time links, and rate limits."""

from __future__ import annotations

import pytest

from labkeeper.api import links, rates
from labkeeper.api.links import LabLink, Maker, SignInLink
from labkeeper.core.access import Caller, Scope
from labkeeper.core.errors import TooManyRequests

ADA = Caller("token:ada", Scope.MANAGE)


class ManualClock:
    """A clock that the test moves."""

    now = 100.0

    def __call__(self):
        return self.now


def test_a_ticket_can_be_used_once_and_expires(monkeypatch):
    clock = ManualClock()
    known = links.Links(clock=clock)
    link = LabLink(Maker(ADA), "lab", 3, "/lab", confirm=False)
    first, second, third = (known.make(link, lifetime=seconds) for seconds in (10.0, 10.0, 20.0))
    assert known.look(first) == known.look(first) is not None
    assert (known.use(first).server, known.use(first)) == ("lab", None)
    clock.now += 10.0
    assert (known.look(second), known.use(second)) == (None, None)
    assert known.use(third).generation == 3
    assert known.use("no ticket") is None
    monkeypatch.setattr(links, "_MOST", 2)
    tickets = [known.make(link, lifetime=10.0) for _ in range(3)]
    assert [known.use(ticket) is not None for ticket in tickets] == [False, True, True]


def test_a_link_opens_nothing_once_its_makers_token_is_revoked():
    known, valid = links.Links(), True
    maker = Maker(ADA, lambda: valid)
    made = [LabLink(maker, "lab", 3, "/lab", confirm=False), SignInLink(maker)]
    tickets = [known.make(link, lifetime=10.0) for link in made]
    assert [known.look(ticket) for ticket in tickets] == made
    valid = False
    assert [known.look(ticket) for ticket in tickets] == [None, None]
    assert [known.use(ticket) for ticket in tickets] == [None, None]


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
