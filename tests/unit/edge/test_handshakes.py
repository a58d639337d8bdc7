"""Handshakes at a real edge take turns. By its clock, each costs a second, or as a test says."""

from __future__ import annotations

import socket
import ssl

import pytest

from edge_peers import get
from harness import until

COST = 1.0


class Costly:
    """A context whose handshakes take their time."""

    def __init__(self, context):
        self.cost = 0.0
        """Seconds."""
        self.edge = None
        self._context = context

    def wrap_bio(self, *arguments, **options):
        if self.cost:
            self.edge._ahead += self.cost
        return self._context.wrap_bio(*arguments, **options)


@pytest.fixture
def context(issue):
    return Costly(issue("x"))


@pytest.fixture
def hello(authority):
    """The first bytes of a handshake, which anyone can send again and again."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    sent = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="x").do_handshake()
    return sent.read()


def waiting(edge):
    return edge.call(lambda: len(edge.proxy.handshakes))


def ask_for(edge, hello, source, count):
    """Have an address ask for handshakes, all of which wait; return its clients."""
    crowd = [edge.connect(source=source, plain=True) for _ in range(count)]
    before = waiting(edge)
    for client in crowd:
        client.send(hello)
    until(lambda: waiting(edge) == before + count, what="the handshakes to wait")
    return crowd


def answered(clients):
    """Return how many of the clients have got the edge's part of the handshake."""
    return sum(map(has_answer, clients))


def has_answer(client):
    client.socket.setblocking(False)
    try:
        return bool(client.socket.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


@pytest.fixture
def established(edge):
    return edge.connect(source="127.0.0.9")


@pytest.fixture
def busy(request, edge, established, context, hello):
    """Have the edge rest after a handshake."""
    context.edge, context.cost = edge, getattr(request, "param", COST)
    first = edge.connect(source="127.0.0.9", plain=True)
    first.send(hello)
    until(lambda: has_answer(first), what="a handshake")


def test_other_requests_are_answered_between_two_handshakes(edge, established, busy, hello):
    crowd = ask_for(edge, hello, "127.0.0.2", 5)
    for number in range(1, 6):
        assert established.ask(get()).status == 200
        assert established.ask(get()).status == 200
        assert answered(crowd) == number - 1
        # As long as the handshake before has taken.
        edge.jump(COST)
        until(lambda number=number: answered(crowd) == number, what="one handshake")
    assert waiting(edge) == 0


def test_a_flood_from_one_address_delays_the_handshake_of_another_by_one(edge, busy, hello):
    ask_for(edge, hello, "127.0.0.2", 50)
    (other,) = ask_for(edge, hello, "127.0.0.3", 1)
    edge.jump(COST)
    until(lambda: waiting(edge) == 50, what="the handshake of the first in the flood")
    assert not has_answer(other)
    edge.jump(COST)
    until(lambda: has_answer(other), what="the handshake of the other one")
    assert waiting(edge) == 49


def test_handshakes_that_have_waited_can_be_completed(edge, busy, hello, context):
    ask_for(edge, hello, "127.0.0.2", 3)
    context.cost = 0
    edge.jump(COST)
    assert edge.connect(source="127.0.0.3").ask(get()).status == 200


@pytest.mark.parametrize("busy", [100 * COST], indirect=True)
def test_who_waits_too_long_is_forgotten(edge, busy, hello):
    crowd = ask_for(edge, hello, "127.0.0.2", 3)
    edge.jump(edge.limits.head_within + 1)
    assert [client.drain()[0] for client in crowd] == [b""] * 3
    until(lambda: waiting(edge) == 0, what="them to be forgotten")


def test_what_a_waiting_client_sends_is_not_read(edge, busy, hello):
    """Nothing would limit how much of it is kept."""
    ask_for(edge, hello + bytes(2**16), "127.0.0.2", 1)
    (kept,) = edge.call(
        lambda: [c._received.pending for c in edge.proxy._clients if c.address == "127.0.0.2"]
    )
    assert 0 < kept <= 2**14


def test_how_many_wait_is_reported(edge, busy, hello):
    ask_for(edge, hello, "127.0.0.2", 3)
    told = []
    edge.call(edge.proxy.report, told.append)
    assert told[0]["report"]["handshakes"] == 3
