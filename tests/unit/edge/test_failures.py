"""Keepers that restart, Labs that fail, and connections that are cut: what the client is told."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import socket
import termios

import pytest

from edge_peers import BOTH, SMALL, Cut, answer, get, post
from edges import edge_in
from harness import until
from labkeeper.edge.bodies import LAST_CHUNK, chunk
from labkeeper.edge.exchange import Exchange

pytestmark = BOTH


def test_request_waits_for_a_keeper_that_comes_up_late(make_edge):
    edge = make_edge()
    clients = [edge.send(get()), edge.send(post())]
    until(lambda: edge.call(lambda: edge.proxy._report.held) == 2)
    edge.start_keeper()
    assert [client.receive().status for client in clients] == [200, 200]


def test_request_is_refused_with_503_if_no_keeper_comes(make_edge):
    edge = make_edge()
    client = edge.send(get())
    until(lambda: edge.call(lambda: edge.proxy._report.held))
    edge.jump(edge.limits.hold)
    reply = client.receive()
    assert (reply.status, reply.headers[b"retry-after"]) == (503, b"2")
    assert client.drain() == (b"", False)


def test_only_some_requests_wait_for_a_keeper(make_edge):
    edge = make_edge(most_held=2)
    held = [edge.send(get()) for _ in range(2)]
    until(lambda: edge.call(lambda: edge.proxy._report.held) == 2)
    assert edge.send(get()).receive().status == 503
    held[0].close()
    until(lambda: edge.call(lambda: edge.proxy._report.held) == 1)
    held.append(edge.send(get()))
    until(lambda: edge.call(lambda: edge.proxy._report.held) == 2)
    edge.start_keeper()
    assert [client.receive().status for client in held[1:]] == [200, 200]


def test_keeper_whose_backlog_is_full_is_waited_for(make_edge):
    """A Unix socket refuses such connections at once; they must not count as made."""
    edge = make_edge()
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(edge.socket))
        listener.listen(0)
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
        waiting.connect(str(edge.socket))
        client = edge.send(post())
        until(lambda: edge.call(lambda: edge.proxy._report.held))
        edge.socket.unlink()
        edge.start_keeper()
        assert client.receive().status == 200
    assert len(edge.requests) == 1


def test_nothing_remains_of_refused_requests(make_edge):
    """An error that is raised again and again would keep everything that it has passed through."""
    edge = make_edge(most_held=0)
    for _ in range(3):
        assert edge.send(get()).receive().status == 503
    for client in edge.clients:
        client.close()
    edge.settle(0)

    def left():
        gc.collect()
        return [
            one for one in gc.get_objects() if type(one) is Exchange and one._proxy is edge.proxy
        ]

    until(lambda: not edge.call(left))


@pytest.mark.parametrize("said", [Cut(), Cut(reset=True), Cut(b"HTTP/1.1 200 OK\r\nConte")])
@pytest.mark.parametrize("target", [b"/", b"/servers/lab/"])
def test_post_is_never_sent_again(edge, lab, target, said):
    for server in (edge.keeper, lab):
        server.answers(said)
    assert edge.connect().ask(post(target)).status == 502
    assert len(edge.requests) == 1


def test_get_is_repeated_once_if_the_keeper_is_lost(edge):
    edge.keeper.answers(Cut(), answer(b"second"))
    assert edge.connect().ask(get()).body == b"second"
    edge.keeper.answers(Cut())
    assert edge.connect().ask(get()).status == 502
    assert len(edge.requests) == 4


def test_get_over_a_kept_connection_to_a_lab_is_repeated_once(edge, lab):
    lab.answers(answer(), Cut(), answer(b"again"))
    client = edge.connect()
    client.ask(get(b"/servers/lab/"))
    assert client.ask(get(b"/servers/lab/")).body == b"again"
    assert [len(visit.requests) for visit in lab.visits] == [2, 1]


def test_get_over_a_new_connection_to_a_lab_is_not_repeated(edge, lab):
    lab.answers(Cut())
    assert edge.connect().ask(get(b"/servers/lab/")).status == 502
    assert len(lab.requests) == 1


def test_get_with_a_body_is_not_repeated(edge):
    edge.keeper.answers(Cut())
    assert edge.connect().ask(get(b"/", b"Content-Length: 1", body=b"x")).status == 502
    assert len(edge.requests) == 1


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 51\r\n\r\npart",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\nnonsense\r\n",
    ],
)
def test_answer_that_is_cut_ends_with_a_reset(edge, lab, said, version, reset):
    lab.answers(Cut(said, reset=reset))
    client = edge.send(b"GET /servers/lab/?token=x HTTP/%b\r\nHost: x\r\n\r\n" % version)
    data, was_reset = client.drain()
    assert was_reset
    assert not data.endswith(b"0\r\n\r\n")
    assert len(lab.requests) == 1


def send_more_than_is_taken(edge, client):
    """Send a whole request of which the edge keeps a part, as the Lab does not read it."""
    client.send(get(b"/servers/lab/", b"Transfer-Encoding: chunked", method=b"POST"))
    (inside,) = until(lambda: edge.inside)

    def taken():
        """Whether the edge has read all that was sent."""
        connection = inside._transport.get_extra_info("socket")
        outside = fcntl.ioctl(client.socket, termios.TIOCOUTQ, bytes(4))
        return outside == edge.call(fcntl.ioctl, connection, termios.FIONREAD, bytes(4)) == bytes(4)

    def kept():
        upstream = inside._exchange and inside._exchange._upstream
        return upstream is not None and upstream.transport.get_write_buffer_size()

    while not edge.call(kept):
        client.send(chunk(bytes(SMALL)))
        until(taken)
    client.send(LAST_CHUNK)
    until(lambda: inside._exchange.has_body)


def test_lab_that_ends_its_half_and_reads_nothing_is_answered_with_502(edge):
    """What it has not taken of the request must not delay the answer."""
    lab = edge.add_lab(buffers=SMALL)
    lab.mute, lab.reads = True, False
    client = edge.connect()
    send_more_than_is_taken(edge, client)
    edge.call(lab.visits[0].transport.write_eof)
    assert client.receive(b"POST").status == 502


@pytest.mark.parametrize("close", [b"Connection: close", b"X: y"])
def test_lab_that_answers_without_reading_the_body_keeps_no_connection(edge, close):
    lab = edge.add_lab(buffers=SMALL)
    lab.mute, lab.reads = True, False
    client = edge.connect()
    send_more_than_is_taken(edge, client)
    edge.call(lab.visits[0].say, answer(b"ok", close))
    assert client.receive(b"POST").status == 200
    client.close()
    edge.settle(0)
    until(lambda: edge.call(_upstream_sockets, edge) == [])


def _upstream_sockets(edge):
    """Return the edge's connections to Labs."""
    ports = {lab.listener.sockets[0].getsockname()[1] for lab in edge.labs.values()}
    found = []
    for key in edge.loop._selector.get_map().values():
        one = socket.socket(fileno=key.fd)
        try:
            if one.family == socket.AF_INET and one.getpeername()[1] in ports:
                found.append(key.fd)
        except OSError:
            pass
        finally:
            one.detach()
    return found


def test_client_that_is_gone_before_the_end_of_its_answer_is_no_error(edge):
    """It reads the last answer, and resets the connection before the edge has ended its half."""

    def gone():
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    client = edge.connect()
    assert client.ask(get()).status == 200
    edge.call(setattr, edge.inside[0]._transport, "write_eof", gone)
    assert client.ask(get(b"/..")).status == 400
    client.close()
    edge.settle(0)


def test_edge_that_closes_ends_everything(tmp_path, context, authority):
    with edge_in(tmp_path, context=context) as edge:
        edge.authority = authority
        edge.start_keeper().answers(None)
        clients = [edge.connect(), edge.send(get()), edge.send(b"GET /")]
        until(lambda: edge.requests)
        edge.settle(3)
        edge.call(edge.proxy.close)
        for client in clients:
            assert client.drain()[0] == b""
        edge.settle(0)
