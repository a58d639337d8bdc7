"""What clients and Labs may take of the edge: memory, time, and connections; and how it drains."""

from __future__ import annotations

import pytest

from edge_peers import BOTH, FULL, MUCH, PROBE, SMALL, Flood, answer, get, post
from harness import until

pytestmark = BOTH
ENDLESS = 2**40
"""Bytes; nobody sends them all."""
SLACK = 2**20
"""Bytes that the edge may hold beside its limits: a piece of a connection's data or two."""


def own(edge):
    """Return how many bytes the edge holds for its clients."""

    def count():
        total = 0
        for client in edge.proxy._clients:
            total += len(client._input) + client._transport.get_write_buffer_size()
            exchange = client._exchange
            if exchange is not None and exchange._upstream is not None:
                total += exchange._upstream.transport.get_write_buffer_size()
        return total

    return edge.call(count)


def fill(client, row=b"\0"):
    """Send something again and again until nothing more is taken."""
    client.socket.setblocking(False)
    sent = 0
    row *= SMALL

    def stuck():
        nonlocal sent
        before = sent
        try:
            while sent < MUCH:
                sent += client.socket.send(row[sent % len(row) :])
        except FULL:
            pass
        return sent == before

    until(stuck)
    assert sent < MUCH


# Memory


@pytest.mark.parametrize("chunked", [False, True])
def test_request_to_a_lab_that_does_not_read_stops(edge, chunked):
    lab = edge.add_lab(buffers=SMALL)
    lab.reads = False
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % ENDLESS
    client = edge.connect(SMALL)
    client.send(get(b"/servers/lab/", framing, method=b"POST"))
    if chunked:
        client.send(b"%x\r\n" % ENDLESS)
    until(lambda: lab.visits)
    fill(client)
    assert own(edge) < SLACK


def test_answer_to_a_client_that_does_not_read_stops(edge, lab):
    lab.answers(Flood(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % ENDLESS))
    client = edge.connect(SMALL)
    client.send(get(b"/servers/lab/"))
    until(lambda: lab.visits and lab.visits[0].blocked and edge.inside[0]._blocked)
    assert own(edge) < SLACK
    assert lab.poured < MUCH


def test_answer_goes_on_when_the_client_reads_again(edge, lab):
    body = bytes(range(256)) * 2**16
    lab.answers(answer(body))
    client = edge.connect(2**18)
    client.send(get(b"/servers/lab/"))
    until(lambda: edge.inside and edge.inside[0]._blocked)
    assert client.receive().body == body
    assert client.ask(get()).status == 200


def test_connection_of_an_answer_that_was_read_slowly_serves_the_next_one(make_edge):
    edge = make_edge(buffers=SMALL, untaken=SMALL)
    lab = edge.add_lab()
    lab.answers(answer(b"x" * 400_000), answer(b"ok"))
    client = edge.connect(buffers=SMALL)
    client.send(get(b"/servers/lab/"))
    until(lambda: [inside for inside in edge.inside if inside._blocked])
    assert len(client.receive().body) == 400_000
    assert client.ask(get(b"/servers/lab/")).body == b"ok"
    assert len(lab.visits) == 1


def test_pipelined_input_stops_while_a_request_is_answered(edge):
    edge.keeper.answers(None)
    client = edge.connect(SMALL)
    client.send(get())
    until(lambda: edge.requests)
    fill(client)
    assert own(edge) < SLACK


def test_input_stops_while_an_answered_client_does_not_read(make_edge):
    """The answer has arrived as a whole, but the client has taken only a part of it."""
    edge = make_edge(buffers=SMALL, untaken=SMALL)
    edge.start_keeper().answers(answer(bytes(150_000)))
    client = edge.connect(SMALL)
    client.send(get())
    until(lambda: edge.requests and edge.inside[0]._exchange is None and edge.inside[0]._blocked)
    fill(client)
    assert own(edge) < SLACK


def test_pipelined_probes_of_a_client_that_does_not_read_stop(make_edge):
    edge = make_edge(buffers=SMALL, untaken=SMALL)
    client = edge.connect(SMALL)
    fill(client, get(b"/edge/healthz"))
    assert edge.inside[0]._blocked
    assert own(edge) < SLACK


# Time


def test_head_that_is_never_finished_is_refused_with_408(edge):
    client = edge.send(b"GET / HT")
    until(lambda: edge.inside and edge.inside[0]._input)
    edge.jump(edge.limits.head_within / 2)
    client.send(b"TP/1.1\r\n")
    until(lambda: edge.inside[0]._input.endswith(b"\r\n"))
    edge.jump(edge.limits.head_within / 2 + 1)
    assert client.receive().status == 408
    assert client.drain() == (b"", False)


def test_start_of_the_next_head_has_its_own_time(edge):
    client = edge.send(get() + b"GET")
    client.receive()
    until(lambda: edge.inside[0]._exchange is None and edge.inside[0]._scanned)
    edge.jump(edge.limits.head_within + 1)
    assert client.receive().status == 408


@pytest.mark.parametrize("used", [False, True])
def test_idle_connection_is_closed(edge, used):
    client = edge.connect()
    if used:
        client.ask(get())
    # An unfinished handshake has less time; the client's part of it ends before the edge's.
    until(lambda: edge.inside)
    edge.jump(edge.limits.idle - 1)
    edge.settle(1)
    edge.jump(2)
    assert client.drain() == (b"", False)


def test_stalled_body_cuts_the_connection(edge, lab):
    client = edge.send(get(b"/servers/lab/", b"Content-Length: 9", method=b"POST"))
    until(lambda: lab.heads)
    for byte in (b"a", b"b"):
        edge.jump(edge.limits.stalled - 1)
        client.send(byte)
        until(lambda byte=byte: edge.received.endswith(byte))
    edge.jump(edge.limits.stalled + 1)
    assert client.drain()[0] == b""
    until(lambda: lab.visits[0].closed)


def test_bytes_do_not_extend_the_time_of_a_body_for_the_keeper(edge):
    client = edge.send(get(b"/", b"Content-Length: 9", method=b"POST"))
    until(lambda: edge.inside and edge.inside[0]._exchange)
    edge.jump(edge.limits.body_within / 2)
    client.send(b"a")
    until(lambda: edge.inside[0]._exchange._collected.content)
    edge.jump(edge.limits.body_within / 2 + 1)
    assert client.drain()[0] == b""
    assert edge.keeper.visits == []


def test_client_that_does_not_read_is_cut(edge, lab):
    lab.answers(Flood(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % ENDLESS))
    client = edge.connect(SMALL)
    client.send(get(b"/servers/lab/"))
    until(lambda: lab.visits and lab.visits[0].blocked and edge.inside[0]._blocked)
    edge.jump(edge.limits.stalled + 1)
    edge.settle(0)
    until(lambda: lab.visits[0].closed)


def test_refused_sender_that_does_not_end_is_cut_after_a_time(edge):
    client = edge.send(b"nonsense\r\n\r\n")
    assert client.receive().status == 400
    client.send(bytes(100))
    edge.jump(edge.limits.linger + 1)
    edge.settle(0)


def test_answer_may_take_any_time(edge):
    edge.keeper.answers(None)
    client = edge.send(post())
    until(lambda: edge.requests)
    edge.jump(100_000)
    edge.call(edge.keeper.visits[0].say, answer(b"late"))
    assert client.receive(b"POST").body == b"late"


# Connections


def test_longest_idle_connection_makes_room(make_edge):
    edge = make_edge(most=3)
    edge.start_keeper().answers(None)
    busy = edge.send(get())
    until(lambda: edge.requests)
    first, second = edge.connect(), edge.connect()
    until(lambda: len(edge.inside) == 3)
    edge.connect()
    assert first.drain()[0] == b""
    edge.settle(3)
    assert second.ask(get(b"/edge/healthz")).status == 200
    edge.call(edge.keeper.visits[0].say, answer(b"whole"))
    assert busy.receive().body == b"whole"


def test_many_connections_at_once_do_not_exceed_the_limit(make_edge):
    edge = make_edge(most=3)

    def crowd():
        """Connect within one round of the loop, so that all are accepted in the next one."""
        return [edge.connect(plain=True) for _ in range(20)]

    clients = edge.call(crowd)
    until(lambda: edge.call(lambda: edge.proxy.open) == 3)
    clients.append(edge.connect())
    assert clients[-1].ask(PROBE).status == 200
    assert edge.call(lambda: edge.proxy.open) <= 3


def test_connection_is_closed_if_all_others_are_busy(make_edge):
    edge = make_edge(most=1)
    edge.start_keeper().answers(None)
    busy = edge.send(get())
    until(lambda: edge.requests)
    assert edge.connect(plain=True).drain()[0] == b""
    edge.call(edge.keeper.visits[0].say, answer(b"whole"))
    assert busy.receive().body == b"whole"


def test_closed_connection_reads_no_more_requests(edge):
    """Pipelined requests are read later, when their connection may have ended."""
    edge.send(get()).receive()
    (inside,) = edge.inside
    edge.clients[0].close()
    edge.settle(0)

    def read_late():
        inside._input = get()
        inside.go_on()
        return inside._exchange, list(edge.proxy.waiting)

    assert edge.call(read_late) == (None, [])


# Drain


def test_idle_connections_are_closed_to_drain(edge):
    clients = [edge.connect(), edge.connect()]
    clients[0].ask(get())
    until(lambda: len(edge.inside) == 2)
    edge.call(edge.proxy.drain)
    assert [client.drain() for client in clients] == [(b"", False)] * 2


def test_request_in_progress_is_answered_before_the_end(edge):
    edge.keeper.answers(None)
    client = edge.send(get() + get(b"/second"))
    until(lambda: edge.requests)
    edge.call(edge.proxy.drain)
    edge.call(edge.keeper.visits[0].say, answer(b"whole"))
    reply = client.receive()
    assert (reply.body, reply.headers[b"connection"]) == (b"whole", b"close")
    assert client.drain() == (b"", False)
    assert len(edge.requests) == 1


def test_answer_that_has_begun_is_finished_before_the_end(edge):
    edge.keeper.answers(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nha")
    client = edge.send(get())
    assert client.socket.recv(10)
    edge.call(edge.proxy.drain)
    edge.call(edge.keeper.visits[0].say, b"lf")
    assert client.drain()[0].endswith(b"half")


def test_head_that_has_begun_is_answered_before_the_end(edge):
    client = edge.send(b"GET / HTTP/1.1\r\n")
    until(lambda: edge.inside and edge.inside[0]._input)
    edge.call(edge.proxy.drain)
    reply = client.ask(b"Host: x\r\n\r\n")
    assert (reply.status, reply.headers[b"connection"]) == (200, b"close")


def test_new_connection_is_closed_while_draining(edge):
    edge.call(edge.proxy.drain)
    assert edge.connect().drain() == (b"", False)


def test_refused_client_can_still_read_its_answer_while_the_edge_drains(edge):
    """A connection that is closed with unread input is reset, and its last answer may be lost."""
    client = edge.send(b"nonsense\r\n\r\n")
    until(lambda: edge.inside and edge.inside[0]._lingers)
    edge.call(edge.proxy.drain)
    edge.settle(1)
    client.send(bytes(100))
    assert client.receive().status == 400
    client.close()
    edge.settle(0)
