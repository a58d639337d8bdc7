"""Compressed answers: which ones are, what their heads say, and that their content is the same."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import threading

import brotli
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_peers import SMALL, Cut, answer, get, post
from harness import PATIENCE, until
from labkeeper.edge import codings, compression
from labkeeper.edge.compression import Compressor
from labkeeper.edge.heads import read_answer, read_request

JSON = b"Content-Type: application/json"
IMMUTABLE = b"Cache-Control: public, max-age=31536000, immutable"
BOTH = b"Accept-Encoding: gzip, deflate, br, zstd"
TEXT = json.dumps(list(range(1000))).encode()
LONG = json.dumps(list(range(100_000))).encode()
PAGE = b"/servers/lab/api"


def decoded(reply):
    """Return what an answer contains."""
    coding = reply.headers.get(b"content-encoding")
    return {None: bytes, b"br": brotli.decompress, b"gzip": gzip.decompress}[coding](reply.body)


def request_with(*headers, method=b"GET"):
    return read_request(get(PAGE, *headers, method=method))


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        (b"", None),
        (b"br", b"br"),
        (b"gzip", b"gzip"),
        (b"deflate, zstd", None),
        (b"gzip, deflate, br, zstd", b"br"),
        (b"gzip;q=1, br;q=0.5", b"gzip"),
        (b"br ; q=0.5 , gzip;q=0.499", b"br"),
        (b"br;q=0, gzip", b"gzip"),
        (b"br;q=0, *", b"gzip"),
        (b"GZIP;Q=0.1", b"gzip"),
        (b"*", b"br"),
        (b"*;q=0", None),
        (b"identity", None),
        (b"gzip;q=0.5, identity", None),
        (b"gzip;q=0.5, identity;q=0.5", b"gzip"),
        (b"br;q=0.000, gzip;q=0", None),
        (b"br;q=2, gzip;q=-1", None),
        (b"br;q=, gzip;q=0.1234", None),
        (b"br;level=1, gzip", b"gzip"),
        (b",,;,", None),
    ],
)
def test_client_gets_the_coding_that_it_likes_best(accepted, coding):
    assert codings.coding_for(request_with(b"Accept-Encoding: " + accepted)) == coding


def test_codings_may_be_accepted_in_several_headers():
    request = request_with(b"Accept-Encoding: br;q=0.1", b"Accept-Encoding: gzip;q=0.2")
    assert codings.coding_for(request) == b"gzip"
    assert codings.coding_for(request_with()) is None


@pytest.mark.parametrize("body", [TEXT, LONG])
@pytest.mark.parametrize("coding", [b"br", b"gzip"])
@pytest.mark.parametrize("more", [(), (IMMUTABLE,)])
def test_compressed_answer_has_the_same_content(edge, lab, body, coding, more):
    lab.answers(answer(body, JSON, *more, b'ETag: "x"', b"Accept-Ranges: bytes"))
    client = edge.connect()
    for _ in range(2):
        reply = client.ask(get(PAGE, b"Accept-Encoding: " + coding))
        assert reply.headers[b"content-encoding"] == coding
        assert decoded(reply) == body
        assert len(reply.body) < len(body) / 2
        assert int(reply.headers[b"content-length"]) == len(reply.body)
        assert reply.headers[b"vary"] == b"accept-encoding"
        assert reply.headers[b"etag"] == b'W/"x"'
        assert b"accept-ranges" not in reply.headers
    # The same connection was used.
    assert len(lab.visits) == 1
    assert edge.call(lambda: edge.proxy.compressor.in_work) == 0


@pytest.mark.parametrize(
    "kind",
    [b"application/json; charset=UTF-8", b"Text/JavaScript", b"application/vnd.x+json", b"text/css",
     b"image/svg+xml", b"text/plain;charset=utf-8", b"application/wasm", b"font/ttf"],
)  # fmt: skip
def test_text_is_compressed(edge, lab, kind):
    lab.answers(answer(TEXT, b"Content-Type: " + kind))
    assert edge.connect().ask(get(PAGE, BOTH)).headers[b"content-encoding"] == b"br"


HTML, STREAM, PNG = (
    b"Content-Type: " + kind for kind in (b"text/html", b"text/event-stream", b"image/png")
)
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
    + JSON
    + b"\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(TEXT), TEXT)
)


@pytest.mark.parametrize(
    "said",
    [
        answer(b"x" * codings.LEAST, JSON),
        answer(TEXT),
        answer(TEXT, HTML),
        answer(TEXT, STREAM),
        answer(TEXT, PNG),
        answer(TEXT, b"Content-Type: application/jsonx"),
        answer(TEXT, JSON, b"Cache-Control: No-Transform"),
        answer(TEXT, JSON, b"Content-MD5: x"),
        answer(TEXT, JSON, b"Content-Range: bytes 0-1/2", status=b"206 Partial Content"),
        answer(TEXT, JSON, status=b"404 Not Found"),
        answer(b"[" * (codings.MOST + 1), JSON),
        CHUNKED,
    ],
)
def test_other_answers_are_passed_on_as_they_are(edge, lab, said):
    lab.answers(said)
    reply = edge.connect().ask(get(PAGE, BOTH))
    assert b"content-encoding" not in reply.headers
    assert b"vary" not in reply.headers
    assert reply.body == (TEXT if said is CHUNKED else said.partition(b"\r\n\r\n")[2])


def test_answer_that_is_compressed_already_is_not_compressed_again(edge, lab):
    packed = gzip.compress(LONG)
    lab.answers(answer(packed, JSON, b"Content-Encoding: gzip"))
    reply = edge.connect().ask(get(PAGE, BOTH))
    assert (reply.headers[b"content-encoding"], reply.body) == (b"gzip", packed)


@pytest.mark.parametrize(
    "asked",
    [
        post(PAGE, b"content", BOTH),
        get(PAGE, BOTH, method=b"OPTIONS"),
        get(PAGE, BOTH, b"Content-Length: 1", body=b"x"),
    ],
)
def test_answers_to_other_requests_are_not_compressed(edge, lab, asked):
    lab.answers(answer(TEXT, JSON))
    reply = edge.connect().ask(asked)
    assert (b"content-encoding" in reply.headers, reply.body) == (False, TEXT)


def test_answers_of_the_keeper_are_not_compressed(edge):
    """They have tokens in them."""
    edge.keeper.answers(answer(TEXT, JSON))
    reply = edge.connect().ask(get(b"/api/servers", BOTH))
    assert (b"content-encoding" in reply.headers, reply.body) == (False, TEXT)


def test_answer_says_that_it_varies_also_to_clients_that_accept_no_coding(edge, lab):
    lab.answers(answer(TEXT, JSON, b'ETag: "x"', b"Vary: Origin"))
    reply = edge.connect().ask(get(PAGE))
    assert reply.body == TEXT
    assert reply.headers[b"etag"] == b'"x"'
    assert reply.headers[b"vary"] == b"accept-encoding"


@pytest.mark.parametrize("known", [b"Accept-Encoding", b"Cookie,accept-encoding", b"*"])
def test_answer_that_varies_already_is_not_told_twice(known):
    said = read_answer(
        b"HTTP/1.1 200 OK\r\nVary: %b\r\n\r\n" % known, request_with()
    )  # fmt: skip
    assert codings.varying(said).headers == [(b"vary", known)]


def test_head_says_what_get_would_but_the_length(edge, lab):
    """It would be known only after compressing (RFC 9110, 8.6)."""
    lab.answers(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n" + JSON + b"\r\n\r\n")
    reply = edge.connect().ask(get(PAGE, BOTH, method=b"HEAD"), method=b"HEAD")
    assert (reply.headers[b"content-encoding"], reply.body) == (b"br", b"")
    assert b"content-length" not in reply.headers
    reply = edge.connect().ask(get(PAGE, method=b"HEAD"), method=b"HEAD")
    assert reply.headers[b"content-length"] == b"5000"


def test_known_answer_is_confirmed_with_the_weak_tag(edge, lab):
    lab.answers(b'HTTP/1.1 304 Not Modified\r\nETag: "x"\r\n\r\n')
    reply = edge.connect().ask(get(PAGE, BOTH, b'If-None-Match: W/"x"'))
    assert (reply.status, reply.headers[b"etag"]) == (304, b'W/"x"')
    assert b'W/"x"' in lab.received


def test_old_client_gets_a_compressed_answer_with_its_length(edge, lab):
    lab.answers(answer(LONG, JSON))
    data, _ = edge.send(get(PAGE, BOTH).replace(b"HTTP/1.1", b"HTTP/1.0")).drain()
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"content-length: %d" % len(body) in head
    assert brotli.decompress(body) == LONG


def test_content_that_cannot_be_compressed_is_sent_as_it_is(edge, lab):
    body = random.Random(1).randbytes(200_000)
    lab.answers(answer(body, JSON))
    reply = edge.connect().ask(get(PAGE, BOTH))
    assert reply.body == body
    assert b"content-encoding" not in reply.headers
    assert reply.headers[b"vary"] == b"accept-encoding"


def test_answer_is_sent_as_it_is_if_no_thread_can_be_started(edge, lab, monkeypatch):
    def refuse(*_arguments):
        raise RuntimeError("can't start new thread")

    lab.answers(answer(LONG, JSON))
    client = edge.connect()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        assert client.ask(get(PAGE, BOTH)).body == LONG
    # Nothing waits for a thread, and the next one is started.
    assert edge.proxy.compressor._thread._work_queue.empty()
    assert decoded(client.ask(get(PAGE, BOTH))) == LONG


def test_answer_is_sent_as_it_is_if_it_cannot_be_compressed(edge, lab, monkeypatch):
    def fail(*_arguments):
        raise MemoryError

    monkeypatch.setattr(compression, "_compress", fail)
    lab.answers(answer(LONG, JSON))
    assert edge.connect().ask(get(PAGE, BOTH)).body == LONG


def test_pipelined_requests_are_answered_in_order(edge, lab):
    lab.answers(answer(LONG, JSON), answer(TEXT, JSON), answer(b"ok"))
    client = edge.send(get(PAGE, BOTH) * 3)
    assert [decoded(client.receive()) for _ in range(3)] == [LONG, TEXT, b"ok"]


@given(
    pieces=st.lists(st.binary(max_size=3000), max_size=30),
    times=st.integers(1, 40),
    coding=st.sampled_from([b"br", b"gzip"]),
    cache=st.sampled_from([b"no-cache", b"immutable"]),
)
@settings(deadline=None, max_examples=60)
def test_any_content_in_any_pieces_arrives_whole(pieces, times, coding, cache):
    body = b"".join(pieces) * times

    async def pass_on():
        compressor = Compressor(asyncio.get_running_loop())
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nCache-Control: %b\r\n%b\r\n\r\n"
        request = request_with(b"Accept-Encoding: " + coding)
        said = read_answer(head % (len(body), cache, JSON), request)
        _, parcel = compressor.begin(request, said, pytest.fail)
        if parcel is None:
            assert not codings.LEAST < len(body) <= codings.MOST
            return
        for piece in pieces * times:
            parcel.add(piece)
        ready = asyncio.get_running_loop().create_future()
        parcel.compress(ready.set_result)
        sent = await ready
        content = b"".join(iter(parcel.take, b""))
        parcel.close()
        compressor.close()
        assert (len(content), compressor.in_work) == (sent.length, 0)
        if (b"content-encoding", coding) in sent.headers:
            content = {b"br": brotli.decompress, b"gzip": gzip.decompress}[coding](content)
        assert content == body

    asyncio.run(pass_on())


# Bundles


def test_labs_share_bundles_by_their_content_alone(edge):
    """The same address says nothing: a Lab cannot replace what another one serves there."""
    bodies = {"a": LONG, "b": LONG, "c": LONG.replace(b"99", b"88")}
    for name, body in bodies.items():
        edge.add_lab(name).answers(answer(body, JSON, IMMUTABLE))
    client = edge.connect()
    for name in "abcabc":
        target = b"/servers/%b/static/lab/main.js" % name.encode()
        assert decoded(client.ask(get(target, BOTH))) == bodies[name]
    assert len(edge.proxy.compressor._bundles._found) == 2


def test_only_what_is_immutable_is_kept(edge, lab):
    lab.answers(answer(LONG, JSON))
    edge.connect().ask(get(PAGE, BOTH))
    assert edge.proxy.compressor._bundles._found == {}


def test_longest_unused_bundles_are_forgotten(monkeypatch):
    bodies = [random.Random(seed).randbytes(1000) for seed in range(3)]
    monkeypatch.setattr(compression, "_KEPT", 2 * len(brotli.compress(bodies[0], quality=5)))
    bundles = compression._Bundles()
    for number in (0, 1, 0, 2, 2):
        bundles.get(bodies[number], b"br")
    kept = [brotli.decompress(content) for content in bundles._found.values()]
    assert kept == [bodies[0], bodies[2]]
    assert bundles._size == sum(map(len, bundles._found.values()))


# Hostile Labs and slow clients


def test_answer_that_ends_early_becomes_a_502_and_is_not_asked_for_again(edge, lab):
    whole = answer(LONG, JSON)
    lab.answers(answer(b"ok"), Cut(whole[:-1]))
    client = edge.connect()
    assert client.ask(get(PAGE)).status == 200
    assert client.ask(get(PAGE, BOTH)).status == 502
    assert len(lab.requests) == 2
    assert edge.call(lambda: edge.proxy.compressor.in_work) == 0


def test_what_follows_an_answer_is_dropped_with_its_connection(edge, lab):
    lab.answers(answer(TEXT, JSON) + b"HTTP/1.1 200 OK\r\n\r\n", answer(b"ok"))
    client = edge.connect()
    assert decoded(client.ask(get(PAGE, BOTH))) == TEXT
    assert client.ask(get(PAGE)).body == b"ok"
    assert len(lab.visits) == 2


def test_no_more_is_collected_than_the_limit(edge, lab, monkeypatch):
    """Labs that never finish an answer cost that much memory, and others their compression."""
    monkeypatch.setattr(compression, "_COLLECT_WITHIN", PATIENCE)
    start = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%b\r\n\r\n" % (codings.MOST, JSON)
    lab.answers(start + b"[")
    most = compression._IN_WORK // codings.MOST
    clients = [edge.send(get(PAGE, BOTH)) for _ in range(most)]
    until(lambda: edge.proxy.compressor.in_work == compression._IN_WORK)
    other = edge.send(get(PAGE, BOTH))
    head = other.read(15)
    assert head == b"HTTP/1.1 200 OK"
    edge.jump(compression._COLLECT_WITHIN)
    until(lambda: edge.proxy.compressor.in_work == 0)
    assert all(client.read(15) == head for client in clients)


def test_answer_that_takes_long_is_passed_on_as_it_comes(make_edge, monkeypatch):
    monkeypatch.setattr(compression, "_COLLECT_WITHIN", PATIENCE)
    edge = make_edge(buffers=SMALL, untaken=SMALL)
    body = random.Random(1).randbytes(500_000).hex().encode()
    whole = answer(body, JSON)
    half = len(whole) // 2
    sent = half - len(whole) + len(body)
    lab = edge.add_lab()
    lab.answers(whole[:half], answer(b"ok"))
    client = edge.connect(buffers=SMALL)
    client.send(get(PAGE, BOTH))
    until(lambda: edge.call(lambda: [collected(one) for one in edge.proxy._clients]) == [sent])
    edge.jump(compression._COLLECT_WITHIN)
    until(lambda: [inside for inside in edge.inside if inside._blocked])
    (visit,) = lab.visits
    edge.call(visit.transport.write, whole[half:])
    reply = client.receive()
    assert (b"content-encoding" in reply.headers, reply.body) == (False, body)
    assert reply.headers[b"vary"] == b"accept-encoding"
    assert edge.call(lambda: edge.proxy.compressor.in_work) == 0
    assert client.ask(get(PAGE)).body == b"ok"
    assert len(lab.visits) == 1


def test_client_that_does_not_read_is_sent_no_more_and_gets_all_later(make_edge):
    edge = make_edge(buffers=SMALL, untaken=SMALL)
    lab = edge.add_lab()
    body = random.Random(1).randbytes(1_000_000).hex().encode()
    lab.answers(answer(body, JSON))
    client = edge.connect(buffers=SMALL)
    client.send(get(PAGE, BOTH))
    until(lambda: [inside for inside in edge.inside if inside._blocked])
    assert edge.proxy.compressor.in_work > 900_000
    (inside,) = edge.inside
    assert edge.call(inside._transport.get_write_buffer_size) < 200_000
    assert decoded(client.receive()) == body
    assert decoded(client.ask(get(PAGE, BOTH))) == body
    assert edge.call(lambda: edge.proxy.compressor.in_work) == 0


@pytest.mark.parametrize("leaves", ["while it is compressed", "while it is sent"])
def test_nothing_remains_of_a_client_that_leaves(make_edge, leaves):
    edge = make_edge(buffers=SMALL, untaken=SMALL)
    body = random.Random(1).randbytes(1_000_000).hex().encode()
    edge.add_lab().answers(answer(body, JSON))
    begun, go_on = threading.Event(), threading.Event()
    if leaves == "while it is compressed":
        edge.proxy.compressor._thread.submit(lambda: (begun.set(), go_on.wait()))
        begun.wait()
    client = edge.connect(buffers=SMALL)
    client.send(get(PAGE, BOTH))
    if leaves == "while it is sent":
        until(lambda: [inside for inside in edge.inside if inside._blocked])
    else:
        until(lambda: edge.call(lambda: [one for one in edge.proxy._clients if work_of(one)]))
    client.close()
    edge.settle(0)
    assert edge.call(lambda: edge.proxy.compressor.in_work) == 0
    go_on.set()


def collected(client):
    """Return how much of an answer was collected for a client so far."""
    exchange = client._exchange
    return 0 if exchange is None or exchange._parcel is None else len(exchange._parcel._collected)


def work_of(client):
    """Return what the thread does for a client."""
    exchange = client._exchange
    return None if exchange is None or exchange._parcel is None else exchange._parcel._work
