"""Requests through a real edge: where they go, and how they and their answers are framed."""

from __future__ import annotations

import dataclasses

import h11
import pytest

from edge_peers import BOTH, PROBE, Cut, answer, get, post
from harness import until

pytestmark = BOTH


@pytest.mark.parametrize(
    "target",
    [b"/servers/lab/", b"/servers/lab/api?q=1", b"/servers/lab//x", b"/servers/lab/a%2fb/%20.x"],
)
def test_request_below_a_server_reaches_its_lab_with_the_same_target(edge, lab, target):
    assert edge.connect().ask(get(target)).status == 200
    assert [head.target for head in lab.heads] == [target]
    assert edge.keeper.requests == []


@pytest.mark.parametrize(
    "target",
    [b"/", b"/api/servers/lab", b"/servers", b"/servers/", b"/servers//lab/", b"/serverslab/",
     b"/servers/LAB/", b"/servers/%6cab/", b"/servers/-lab/", b"/servers/lab%2fx",
     b"/x?/servers/lab/", b"/servers?/lab/"],
)  # fmt: skip
def test_every_other_request_reaches_the_keeper(edge, lab, target):
    assert edge.connect().ask(get(target)).status == 200
    assert [head.target for head in edge.keeper.heads] == [target]
    assert lab.requests == []


def test_request_to_a_server_without_a_route_is_answered_with_404(edge):
    reply = edge.connect().ask(get(b"/servers/ghost/"))
    assert (reply.status, edge.requests) == (404, [])


def test_request_without_a_route_never_uses_the_kept_connection_to_the_keeper(edge):
    client = edge.connect()
    assert client.ask(get(b"/api")).status == 200
    assert client.ask(get(b"/servers/ghost/")).status == 404
    assert [head.target for head in edge.keeper.heads] == [b"/api"]


@pytest.mark.parametrize(
    ("target", "location"),
    [(b"/servers/lab", b"/servers/lab/"), (b"/servers/lab?a=b?c", b"/servers/lab/?a=b?c")],
)
def test_name_of_a_server_alone_is_redirected_with_its_query(edge, lab, target, location):
    client = edge.connect()
    reply = client.ask(get(target))
    assert (reply.status, reply.headers[b"location"]) == (307, location)
    assert client.ask(get()).status == 200
    assert lab.requests == []


def test_probe_is_answered_without_keeper(make_edge):
    client = make_edge().connect()
    assert client.ask(get(b"/edge/healthz")).body == b'{"status":"ok"}'
    assert client.ask(PROBE).status == 200
    assert client.drain() == (b"", False)


def test_lab_that_does_not_listen_is_answered_with_502(edge, lab):
    edge.call(lab.listener.close)
    assert edge.connect().ask(get(b"/servers/lab/")).status == 502


def test_request_is_told_who_sent_it(edge):
    edge.connect().ask(get(b"/", b"X-Request-Id: given-1", b"X-Forwarded-For: 6.6.6.6"))
    headers = edge.keeper.heads[0].headers
    assert (b"x-forwarded-for", b"127.0.0.1") in headers
    assert (b"x-forwarded-proto", b"https" if edge.context else b"http") in headers
    assert (b"x-request-id", b"given-1") in headers


# Connections


def test_pipelined_requests_are_answered_in_their_order(edge, lab):
    lab.answer = edge.keeper.answer = lambda raw: answer(raw.split()[1])
    targets = [b"/%d" % i if i % 3 else b"/servers/lab/%d" % i for i in range(50)]
    client = edge.send(b"".join(map(get, targets)))
    assert [client.receive().body for _ in targets] == targets


def test_pipelined_posts_keep_their_bodies(edge):
    edge.keeper.answer = lambda raw: answer(raw.partition(b"\r\n\r\n")[2])
    client = edge.send(b"".join(post(b"/", b"%d" % i * 100) for i in range(20)))
    assert [client.receive().body for _ in range(20)] == [b"%d" % i * 100 for i in range(20)]


def test_kept_connection_is_used_again(edge):
    client = edge.connect()
    assert [client.ask(get()).status for _ in range(3)] == [200] * 3
    assert len(edge.keeper.visits) == 1


def test_connection_of_one_client_is_never_used_by_another(edge):
    clients = [edge.connect() for _ in range(5)]
    for _ in range(2):
        for client in clients:
            assert client.ask(get()).status == 200
    assert [len(visit.requests) for visit in edge.keeper.visits] == [2] * 5


def test_connection_to_the_other_side_ends_with_its_client(edge):
    client = edge.connect()
    client.ask(get())
    client.close()
    until(lambda: edge.keeper.visits[0].closed)


def test_request_in_progress_ends_with_its_client(edge):
    edge.keeper.answers(None)
    client = edge.send(get())
    until(lambda: edge.requests)
    client.close()
    until(lambda: edge.keeper.visits[0].closed)


def test_post_does_not_use_the_kept_connection_which_is_closed(edge):
    client = edge.connect()
    client.ask(get())
    edge.keeper.answers(None)
    client.send(post())
    until(lambda: edge.keeper.visits[0].closed)
    until(lambda: len(edge.requests) == 2)
    assert [len(visit.requests) for visit in edge.keeper.visits] == [1, 1]


def test_kept_connection_to_an_earlier_launch_is_not_used(edge):
    old = edge.add_lab(generation=1)
    client = edge.connect()
    client.ask(get(b"/servers/lab/"))
    new = edge.add_lab(generation=2)
    client.ask(get(b"/servers/lab/"))
    assert (len(old.requests), len(new.requests)) == (1, 1)
    until(lambda: old.visits[0].closed)


def test_kept_connection_is_not_used_after_its_route_is_removed(edge, lab):
    client = edge.connect()
    client.ask(get(b"/servers/lab/"))
    edge.call(edge.proxy.routes.remove, "lab")
    assert client.ask(get(b"/servers/lab/")).status == 404
    assert len(lab.requests) == 1


def test_connection_to_an_earlier_launch_that_was_being_opened_is_not_used(edge):
    """Whatever listens there by now."""
    old = edge.add_lab(generation=1)
    new_port = edge.add_lab(generation=2).listener.sockets[0].getsockname()[1]
    route = dataclasses.replace(edge.proxy.routes.find("lab"), generation=3, port=new_port)
    first = old.listener.sockets[0].getsockname()[1]
    edge.call(edge.proxy.routes.set, dataclasses.replace(route, generation=1, port=first))
    connect, begun = edge.loop.create_connection, []

    async def slowly(*arguments):
        begun.append(arguments)
        if len(begun) == 1:
            edge.proxy.routes.set(route)
        return await connect(*arguments)

    edge.loop.create_connection = slowly
    assert edge.connect().ask(get(b"/servers/lab/")).status == 200
    assert (len(old.requests), len(edge.labs["lab", 2].requests)) == (0, 1)
    until(lambda: old.visits[0].closed)


def test_a_server_at_the_address_of_another_one_has_replaced_it(edge, lab):
    """The keeper may not have noticed the other one's end."""

    def statuses():
        return [
            edge.connect().ask(get(b"/servers/%b/" % name)).status for name in (b"lab", b"other")
        ]

    assert statuses() == [200, 404]
    route = edge.proxy.routes.find("lab")
    other = dataclasses.replace(route, server="other")
    edge.call(edge.proxy.routes.set, other)
    assert statuses() == [404, 200]
    edge.call(edge.proxy.routes.set, route)
    assert statuses() == [200, 404]
    edge.call(edge.proxy.routes.replace, [other], {"lab": route.generation})
    assert statuses() == [404, 200]


def test_unused_connection_to_the_other_side_is_closed_after_a_time(edge):
    client = edge.connect()
    client.ask(get())
    edge.jump(edge.limits.upstream_idle + 1)
    until(lambda: edge.keeper.visits[0].closed)
    assert client.ask(get()).status == 200


def test_connection_that_the_other_side_closes_is_replaced(edge, lab):
    lab.answers(answer(b"1", b"Connection: close"))
    client = edge.connect()
    assert [client.ask(get(b"/servers/lab/")).body for _ in range(3)] == [b"1"] * 3
    assert len(lab.visits) == 3


# Framing


def test_http_1_0_client_gets_no_chunks_and_its_connection_is_closed(edge):
    edge.keeper.answers(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    )
    client = edge.send(b"GET / HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n\r\n")
    data, reset = client.drain()
    head, _, body = data.partition(b"\r\n\r\n")
    assert (body, reset) == (b"ok", False)
    assert b"\r\nconnection: close" in head
    assert b"transfer-encoding" not in head


def test_answer_of_http_1_0_that_ends_with_its_connection_becomes_chunks(edge, lab):
    lab.answers(Cut(b"HTTP/1.0 200 OK\r\n\r\nuntil the end"))
    client = edge.connect()
    for _ in range(2):
        reply = client.ask(get(b"/servers/lab/"))
        assert reply.body == b"until the end"
        assert reply.headers[b"transfer-encoding"] == b"chunked"


@pytest.mark.parametrize(
    ("method", "given"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n"),
        (b"HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        (b"HEAD", b"HTTP/1.1 200 OK\r\n\r\n"),
        (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
        (b"GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n"),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 50\r\n\r\n"),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\n\r\n"),
    ],
)
def test_answer_without_a_body_is_followed_by_the_next_one(edge, method, given):
    edge.keeper.answers(given, answer(b"next"))
    client = edge.connect()
    assert client.ask(get(method=method), method).body == b""
    assert client.ask(get()).body == b"next"


@pytest.mark.parametrize("size", [0, 1, 100, 300_000])
def test_chunks_are_relayed_both_ways(edge, lab, size):
    content = bytes(i % 251 for i in range(size))
    received = []

    def reply(raw):
        reader = h11.Connection(h11.SERVER)
        reader.receive_data(raw)
        event = reader.next_event()
        while not isinstance(event := reader.next_event(), h11.EndOfMessage):
            received.append(bytes(event.data))
        body = b"%x;x=y\r\n%b\r\n" % (size, content) if size else b""
        return (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\na: b\r\n\r\n"
        )

    lab.answer = reply
    pieces = [content[i : i + 70_000] for i in range(0, size, 70_000)]
    body = b"".join(b"%X;ext\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    request = get(b"/servers/lab/", b"Transfer-Encoding: chunked", method=b"PUT")
    client = edge.send(request + body + b"0\r\nTrailer: x\r\n\r\n")
    assert client.receive().body == content
    assert b"".join(received) == content
    assert b"Trailer" not in lab.received
    assert client.ask(get()).status == 200


def test_client_that_waits_for_100_continue_gets_it_once(edge, lab):
    lab.early = True
    lab.answers(b"HTTP/1.1 100 Continue\r\n\r\n" * 3)
    client = edge.send(
        get(b"/servers/lab/", b"Content-Length: 4", b"Expect: 100-continue", method=b"POST")
    )
    assert client.read(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(b"body")
    until(lambda: edge.requests)
    edge.call(lab.visits[0].say, answer(b"done"))
    reply = client.receive(b"POST")
    assert (reply.before, reply.body) == ([], b"done")


def test_client_that_does_not_wait_gets_no_100_continue(edge, lab):
    lab.answers(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n" + answer())
    assert edge.connect().ask(post(b"/servers/lab/"), b"POST").before == []


def test_answer_before_the_end_of_the_body_closes_both_connections(edge, lab):
    lab.early = True
    lab.answers(answer(b"no", status=b"413 Content Too Large"))
    client = edge.send(get(b"/servers/lab/", b"Content-Length: 9", method=b"POST"))
    reply = client.receive(b"POST")
    assert (reply.status, reply.headers[b"connection"]) == (413, b"close")
    assert client.drain() == (b"", False)
    until(lambda: lab.visits[0].closed)


def test_connection_is_closed_if_the_answer_has_said_so_though_the_body_ends_in_time(edge, lab):
    lab.early = True
    lab.answers(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nha")
    client = edge.send(get(b"/servers/lab/", b"Content-Length: 4", method=b"POST"))
    client.rest = client.socket.recv(4096)
    assert b"connection: close" in client.rest
    client.send(b"body")
    until(lambda: edge.requests)
    edge.call(lab.visits[0].say, b"lf")
    assert client.receive(b"POST").body == b"half"
    assert client.drain() == (b"", False)


def test_malformed_chunk_is_refused_and_what_follows_it_is_dropped(edge):
    bad = get(b"/", b"Transfer-Encoding: chunked", method=b"POST") + b"5\r\nab\r\n\r\nGET /x"
    client = edge.send(bad + b" HTTP/1.1\r\n\r\n")
    assert client.receive(b"POST").status == 400
    assert client.drain() == (b"", False)
    assert edge.requests == []


@pytest.mark.parametrize("target", [b"/edge/healthz", b"/servers/lab", b"/servers/ghost/", b"/"])
def test_own_answer_to_head_has_no_body(make_edge, target):
    edge = make_edge(most_held=0)
    client = edge.send(get(target, b"Connection: close", method=b"HEAD"))
    data, reset = client.drain()
    assert (data.count(b"\r\n\r\n"), data[-4:], reset) == (1, b"\r\n\r\n", False)
