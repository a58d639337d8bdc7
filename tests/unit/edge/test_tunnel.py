"""Websockets through a real edge: they become tunnels."""

from __future__ import annotations

import pytest

from edge_peers import BOTH, FULL, MUCH, PIECE, SMALL, SWITCH, WEBSOCKET, Cut, Flood, answer, get
from harness import until

pytestmark = BOTH
OPEN = get(b"/servers/lab/ws", *WEBSOCKET)


@pytest.fixture
def tunnel(edge, lab):
    """The two ends of a tunnel: a client, and a Lab's connection."""
    lab.answers(SWITCH)
    client = edge.connect()
    assert client.ask(OPEN).status == 101
    until(lambda: edge.call(lambda: edge.proxy._tunnels))
    return client, lab.visits[0]


def test_bytes_are_relayed_both_ways(edge, tunnel):
    client, visit = tunnel
    client.send(b"\x81\x00GET / HTTP/1.1\r\n\r\n")
    until(lambda: visit.tunnelled == b"\x81\x00GET / HTTP/1.1\r\n\r\n")
    edge.call(visit.say, b"\x00\xffHTTP/1.1 200 OK\r\n\r\n")
    assert client.read(21) == b"\x00\xffHTTP/1.1 200 OK\r\n\r\n"


def test_much_is_relayed_both_ways(edge, tunnel):
    client, visit = tunnel
    content = bytes(range(256)) * 2**14
    edge.call(visit.say, content)
    assert client.read(len(content)) == content
    client.send(content)
    until(lambda: len(visit.tunnelled) == len(content))
    assert visit.tunnelled == content


def test_bytes_that_come_early_are_relayed(edge, lab):
    lab.answers(SWITCH + b"early from the lab")
    client = edge.send(OPEN + b"early from the client")
    assert client.receive().status == 101
    assert client.read(18) == b"early from the lab"
    until(lambda: lab.visits[0].tunnelled == b"early from the client")


def test_head_of_the_answer_has_its_own_fields_only_once(edge, tunnel, lab):
    (head,) = lab.heads
    names = [name for name, _ in head.headers]
    assert names.count(b"upgrade") == names.count(b"connection") == 1
    assert (b"sec-websocket-version", b"13") in head.headers


def test_tunnel_ends_with_its_client(edge, tunnel):
    client, visit = tunnel
    client.close()
    until(lambda: visit.closed)
    edge.settle(0)


@pytest.mark.parametrize("reset", [False, True])
def test_tunnel_ends_with_its_lab_after_the_last_bytes(edge, tunnel, reset):
    client, visit = tunnel
    edge.call(visit.say, Cut(b"" if reset else b"last", reset=reset))
    assert client.drain()[0] == (b"" if reset else b"last")
    edge.settle(0)


def test_refused_websocket_is_an_answer_like_any_other(edge, lab):
    lab.answers(answer(b"no", status=b"403 Forbidden"), answer(b"next"))
    client = edge.connect()
    assert client.ask(OPEN).status == 403
    assert client.ask(get(b"/servers/lab/")).body == b"next"


def test_tunnels_stay_while_the_edge_drains_and_are_closed_at_its_end(edge, tunnel):
    client, visit = tunnel
    edge.call(edge.proxy.drain)
    edge.jump(100_000)
    client.send(b"still here")
    until(lambda: visit.tunnelled == b"still here")
    edge.call(edge.proxy.close)
    until(lambda: visit.closed)
    assert client.drain()[0] == b""


def test_tunnel_counts_as_a_connection(make_edge):
    edge = make_edge(most=1)
    edge.add_lab().answers(SWITCH)
    client = edge.connect()
    assert client.ask(OPEN).status == 101
    assert edge.connect(plain=True).drain()[0] == b""
    edge.settle(1)


def _ends(edge):
    """Return how many bytes the two ends of the only tunnel have not sent."""

    def count():
        (client,) = edge.proxy._tunnels
        lab = client.get_protocol()._other
        return client.get_write_buffer_size() + lab.get_write_buffer_size()

    return edge.call(count)


@pytest.mark.parametrize("early", [b"", bytes(2**18)])
def test_client_that_does_not_read_stops_its_lab(edge, lab, early):
    lab.answers(Flood(SWITCH + early))
    client = edge.connect(SMALL)
    client.send(OPEN)
    until(lambda: lab.visits and lab.visits[0].blocked and edge.call(lambda: edge.proxy._tunnels))
    assert _ends(edge) < 2**20
    assert lab.poured < MUCH


@pytest.mark.parametrize("early", [False, True])
def test_lab_that_does_not_read_stops_its_client(make_edge, early):
    """Early bytes alone can be more than it takes, if the edge reads that far ahead."""
    edge = make_edge(ahead=2**24)
    lab = edge.add_lab(buffers=SMALL)
    lab.answers(None)
    client = edge.send(OPEN)
    until(lambda: lab.requests)
    edge.call(lab.visits[0].transport.pause_reading)
    client.socket.setblocking(False)
    sent = 0

    def stuck():
        nonlocal sent
        before = sent
        try:
            while sent < MUCH:
                sent += client.socket.send(bytes(PIECE))
        except FULL:
            pass
        return sent == before

    (inside,) = edge.inside
    if early:
        until(lambda: stuck() and len(inside._input) > 2**24)
    edge.call(lab.visits[0].say, SWITCH)
    until(lambda: edge.call(lambda: edge.proxy._tunnels))
    until(stuck)
    assert sent < MUCH
    assert _ends(edge) < 2**25


def test_end_of_a_tunnel_that_takes_nothing_is_cut_after_a_time(edge):
    lab = edge.add_lab(buffers=4096)
    lab.answers(SWITCH)
    client = edge.connect()
    assert client.ask(OPEN).status == 101
    until(lambda: edge.call(lambda: edge.proxy._tunnels))
    end = edge.call(lambda: next(iter(edge.proxy._tunnels)).get_protocol()._other)
    edge.call(lab.visits[0].transport.pause_reading)

    def pending():
        client.send(bytes(SMALL))
        return edge.call(end.get_write_buffer_size)

    until(pending)
    client.close()
    edge.settle(0)
    edge.jump(1000)
    until(lambda: edge.call(lambda: end._sock is None), what="the Lab's end to be closed")
