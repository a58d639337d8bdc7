"""Bodies of requests to the keeper: it gets them as a whole, and no slow sender can block it."""

from __future__ import annotations

import pytest

from edge_peers import get, post
from harness import until

CHUNKED = b"Transfer-Encoding: chunked"
LONGEST = 2**20
"""Bytes of a body that the keeper accepts; see `edges`."""
LARGE = b"Content-Length: 5000"


def begin(edge, *headers, source=""):
    """Send the head of a request with a body."""
    client = edge.connect(source=source)
    client.send(get(b"/", *headers, method=b"POST"))
    return client


def collected(edge):
    """Return what has arrived of each body that is not complete."""
    exchanges = [client._exchange for client in edge.inside]
    return [
        bytes(one._collected.content) for one in exchanges if one is not None and one.is_collecting
    ]


def test_the_keeper_is_asked_once_the_whole_body_is_there(edge):
    client = begin(edge, b"Content-Length: 4")
    client.send(b"bo")
    until(lambda: collected(edge) == [b"bo"])
    assert edge.keeper.visits == []
    client.send(b"dy")
    assert client.receive(b"POST").status == 200
    assert edge.keeper.received.endswith(b"\r\n\r\nbody")


def test_the_keeper_gets_a_length_in_place_of_chunks(edge):
    client = begin(edge, CHUNKED)
    client.send(b"2\r\nbo\r\n")
    until(lambda: collected(edge) == [b"bo"])
    client.send(b"2;x=y\r\ndy\r\n0\r\nTrailer: x\r\n\r\n" + get())
    assert client.receive(b"POST").status == client.receive().status == 200
    head, _, body = edge.keeper.received.partition(b"\r\n\r\n")
    assert body.startswith(b"body")
    assert b"content-length: 4" in head
    assert b"chunked" not in head


def test_the_edge_asks_for_the_body_itself(edge):
    client = begin(edge, b"Content-Length: 4", b"Expect: 100-continue")
    assert client.read(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert edge.keeper.visits == []
    client.send(b"body")
    reply = client.receive(b"POST")
    assert (reply.status, reply.before) == (200, [])
    assert b"expect" not in edge.keeper.received.lower()


@pytest.mark.parametrize("expects", [[], [b"Expect: 100-continue"]])
def test_a_body_that_says_it_is_too_long_is_not_received(edge, expects):
    client = begin(edge, b"Content-Length: %d" % (LONGEST + 1), *expects)
    reply = client.receive(b"POST")
    assert (reply.status, reply.before) == (413, [])
    assert b"at most 1048576 bytes" in reply.body
    assert b"request_entity_too_large" in reply.body
    assert edge.keeper.visits == []


def test_chunks_that_become_too_long_are_not_received(edge):
    client = begin(edge, CHUNKED)
    client.send(b"%x\r\n%b\r\n1\r\nx" % (LONGEST, bytes(LONGEST)))
    assert client.receive(b"POST").status == 413
    assert edge.keeper.visits == []


def test_the_longest_body_is_passed_on(edge):
    body = b"x" * LONGEST
    assert edge.connect().ask(post(b"/", body), b"POST").status == 200
    assert edge.keeper.received.endswith(body)


@pytest.mark.parametrize("framing", [LARGE, CHUNKED])
def test_one_address_has_its_share_of_large_bodies(make_edge, framing):
    edge = make_edge(large_bodies_of_address=2)
    edge.start_keeper()
    first, second = begin(edge, framing), begin(edge, framing)
    until(lambda: len(collected(edge)) == 2)
    reply = begin(edge, framing).receive(b"POST")
    assert (reply.status, reply.headers[b"retry-after"]) == (503, b"2")
    # Others have theirs, and small ones are always received.
    assert edge.connect().ask(post(), b"POST").status == 200
    other = begin(edge, framing, source="127.0.0.2")
    until(lambda: len(collected(edge)) == 3)
    # One that has been received counts no longer, nor does one whose sender is gone.
    first.send(b"0\r\n\r\n" if framing == CHUNKED else bytes(5000))
    assert first.receive(b"POST").status == 200
    third = begin(edge, framing)
    second.close()
    until(lambda: len(collected(edge)) == 2)
    for client in (third, other, begin(edge, framing)):
        client.send(b"0\r\n\r\n" if framing == CHUNKED else bytes(5000))
        assert client.receive(b"POST").status == 200


def test_large_bodies_are_limited_in_all(make_edge):
    edge = make_edge(large_bodies=2)
    edge.start_keeper()
    for source in ("127.0.0.2", "127.0.0.3"):
        begin(edge, LARGE, source=source)
    until(lambda: len(collected(edge)) == 2)
    assert begin(edge, LARGE).receive(b"POST").status == 503
    assert edge.call(edge.proxy.large_bodies._addresses.total) == 2


def test_a_body_that_is_no_chunk_is_refused_and_counted_no_longer(edge):
    client = begin(edge, CHUNKED)
    client.send(b"nonsense\r\n")
    assert client.receive(b"POST").status == 400
    assert edge.call(edge.proxy.large_bodies._addresses.total) == 0
