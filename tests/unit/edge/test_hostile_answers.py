"""Hostile answers of a Lab: the client gets 502, or a cut connection, and nobody else's bytes."""

from __future__ import annotations

import pytest

from edge_peers import SWITCH, WEBSOCKET, Cut, Flood, answer, get
from harness import until

LAB = get(b"/servers/lab/")
EVIL = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"


def headed(*lines, status=b"200 OK", version=b"1.1"):
    return b"\r\n".join([b"HTTP/" + version + b" " + status, *lines, b"", b""])


CL, CHUNKED = b"Content-Length: 0", b"Transfer-Encoding: chunked"
NO_ANSWER = {
    "nothing": Cut(),
    "noise": b"\x16\x03\x01\r\n\r\n",
    "noise without an end": Cut(b"\x16\x03\x01"),
    "request": LAB,
    "conflicting lengths": headed(CL, b"Content-Length: 5") + EVIL,
    "length and chunks": headed(CL, CHUNKED) + b"0\r\n\r\n" + EVIL,
    "chunks and length": headed(CHUNKED, CL) + b"0\r\n\r\n" + EVIL,
    "unknown coding": headed(b"Transfer-Encoding: gzip") + EVIL,
    "two codings": headed(CHUNKED, CHUNKED) + EVIL,
    "chunks in HTTP/1.0": headed(CHUNKED, version=b"1.0") + b"0\r\n\r\n" + EVIL,
    "negative length": headed(b"Content-Length: -1") + EVIL,
    "length of a list": headed(b"Content-Length: 0, 0") + EVIL,
    "huge length": headed(b"Content-Length: 9999999999999999999") + EVIL,
    "bare LF": headed(CL).replace(b"\r\n", b"\n") + EVIL,
    "bare CR": headed(b"X: a\rb", CL) + EVIL,
    "NUL": headed(b"X: a\0b", CL) + EVIL,
    "obs-fold": headed(b"X: a\r\n b", CL) + EVIL,
    "space before a colon": headed(b"Content-Length : 0") + EVIL,
    "empty line first": b"\r\n" + headed(CL) + EVIL,
    "HTTP/2": headed(CL, version=b"2") + EVIL,
    "status beyond 599": headed(CL, status=b"600 x") + EVIL,
    "short status": headed(CL, status=b"20") + EVIL,
    "header flood": headed(*[b"A: b"] * 200, CL) + EVIL,
    "long header": headed(b"A: " + b"b" * 70_000, CL) + EVIL,
    "endless head": Flood(b"HTTP/1.1 200 OK\r\nA: ", b"a" * 4096),
    "endless headers": Flood(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 1000),
    "switch that nobody asked for": SWITCH + EVIL,
    "switch to another protocol": SWITCH.replace(b"websocket", b"h2c") + EVIL,
    "switch without a protocol": headed(status=b"101 Switching Protocols") + EVIL,
    "only 1xx": Cut(headed(status=b"103 Early Hints") * 1000),
    "1xx and noise": headed(status=b"103 Early Hints") * 1000 + b"noise\r\n\r\n",
}


@pytest.mark.parametrize("said", [pytest.param(said, id=name) for name, said in NO_ANSWER.items()])
def test_what_is_no_answer_becomes_502(edge, lab, said):
    lab.answers(said)
    client = edge.send(LAB + get(b"/second"))
    reply = client.receive()
    assert (reply.status, b"evil" in reply.body) == (502, False)
    assert client.drain() == (b"", False)
    until(lambda: lab.visits[0].closed)
    assert edge.keeper.requests == []


@pytest.mark.parametrize(
    "body",
    [b"zz\r\n", b"-1\r\n", b"1\r\nab\r\n0\r\n\r\n", b"1\na\r\n0\r\n\r\n",
     b"1 \r\na\r\n", b"1;" + b"x" * 2000,
     b"0\r\nnonsense\r\n\r\n", b"0\r\nA: b\n\r\n\r\n", b"0\r\n" + b"A: b\r\n" * 3000, b"1" * 17],
)  # fmt: skip
def test_answer_with_bad_chunks_is_cut(edge, lab, body):
    lab.answers(headed(CHUNKED) + b"4\r\ngood\r\n" + body + EVIL)
    client = edge.send(LAB)
    data, reset = client.drain()
    assert reset
    assert b"evil" not in data
    assert not data.endswith(b"0\r\n\r\n")
    assert len(lab.requests) == 1


@pytest.mark.parametrize(
    ("method", "said", "body"),
    [
        (b"GET", answer(b"good") + EVIL, b"good"),
        (b"GET", headed(CHUNKED) + b"4\r\ngood\r\n0\r\n\r\n" + EVIL, b"good"),
        (b"GET", headed(CHUNKED) + b"4\r\ngood\r\n0\r\nA: b\r\n\r\n" + EVIL, b"good"),
        (b"GET", headed(status=b"204 No Content") + EVIL, b""),
        (b"GET", headed(b"Content-Length: 4", status=b"204 No Content") + EVIL, b""),
        (b"GET", headed(CHUNKED, status=b"304 Not Modified") + b"4\r\ngood\r\n0\r\n\r\n", b""),
        (b"HEAD", headed(b"Content-Length: 4") + b"good" + EVIL, b""),
        (b"HEAD", headed(CHUNKED) + b"0\r\n\r\n" + EVIL, b""),
        (b"GET", headed(status=b"103 Early Hints") * 1000 + answer(b"good") + EVIL, b"good"),
        (b"GET", headed(status=b"100 Continue") * 1000 + answer(b"good") + EVIL, b"good"),
    ],
)
def test_bytes_after_an_answer_reach_nobody(edge, lab, method, said, body):
    lab.answers(said)
    edge.keeper.answers(answer(b"keeper"))
    client = edge.connect()
    for _ in range(2):
        reply = client.ask(get(b"/servers/lab/", method=method), method)
        assert (reply.body, reply.before) == (body, [])
    assert client.ask(get()).body == b"keeper"
    assert edge.connect().ask(get()).body == b"keeper"
    assert [len(visit.requests) for visit in lab.visits] == [1, 1]


def test_bytes_on_an_idle_connection_end_it(edge, lab):
    client = edge.connect()
    client.ask(LAB)
    edge.call(lab.visits[0].say, EVIL)
    until(lambda: lab.visits[0].closed)
    assert client.ask(LAB).body == b"ok"
    assert len(lab.visits) == 2


def test_answer_before_its_request_stays_with_its_client(edge, lab):
    lab.greeting = EVIL
    first, second = edge.connect(), edge.connect()
    assert second.ask(get()).body == b"ok"
    assert first.ask(LAB).body in {b"evil", b"ok"}
    assert second.ask(get()).body == b"ok"
    assert first.ask(get()).body == b"ok"


def test_refused_websocket_leaves_no_tunnel(edge, lab):
    lab.answers(answer(b"no", b"Upgrade: websocket", b"Connection: upgrade") + EVIL)
    client = edge.send(get(b"/servers/lab/", *WEBSOCKET) + get())
    assert client.receive().body == b"no"
    assert client.receive().body == b"ok"
    assert len(edge.keeper.requests) == 1


@pytest.mark.parametrize(
    "line",
    [b"Connection: close, X-Frame-Options", b"Keep-Alive: 9", b"Proxy-Authenticate: x",
     b"Trailer: A", b"Upgrade: h2c"],
)  # fmt: skip
def test_headers_about_the_labs_connection_are_not_passed_on(edge, lab, line):
    lab.answers(answer(b"ok", line, b"X-Frame-Options: DENY"))
    headers = edge.connect().ask(LAB).headers
    assert headers.keys() == {b"x-frame-options", b"content-length", b"x-request-id"}
