"""Fuzz the edge: near-HTTP in random pieces, and its readers against h11's."""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl

import h11
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from edge_peers import SWITCH, WEBSOCKET, Cut, answer, get
from edges import edge_in
from fuzzing import FUZZ
from harness import until
from labkeeper.edge.bodies import BadBody, Chunked
from labkeeper.edge.heads import (
    BadHead,
    answer_head,
    read_answer,
    read_request,
    request_head,
)
from labkeeper.edge.tls import context_of

GET = read_request(get())
OPEN = read_request(get(b"/", *WEBSOCKET))
LARGE = 2**18

METHODS = st.sampled_from(
    [b"GET", b"POST", b"HEAD", b"OPTIONS", b"PUT", b"CONNECT", b"PRI", b"get"]
)
TARGETS = st.sampled_from(
    [b"/", b"/", b"/servers/lab/?token=x", b"/servers/lab/", b"/servers/lab", b"/servers/ghost/x",
     b"/edge/healthz", b"*", b"//x", b"http://x/", b"x:1",
     b"/servers/lab/../x", b"/a?b=/../", b"/%2e%2e/"]
) | st.text("a/.%2eE;?&=|{}[]^'~!$()*+,:@_-#\\\"<>\x00\x7f\xe4", max_size=8).map(
    lambda text: b"/" + text.encode("latin-1")
)  # fmt: skip
NAMES = st.sampled_from(
    [b"Host", b"Content-Length", b"Transfer-Encoding", b"Connection", b"Upgrade", b"Expect", b"X",
     b"X-Forwarded-For", b"Cookie", b"Content_Length", b"Te", b"X-Request-Id", b"Keep-Alive",
     b"Sec-WebSocket-Key", b"Sec-WebSocket-Version", b"Content-Length ", b" X", b"", b"\xe4"]
)  # fmt: skip
VALUES = st.sampled_from(
    [b"x", b"0", b"3", b"00", b"+3", b"3, 3", b"99999999999999999999", b"chunked", b"identity",
     b"chunked, chunked", b"close", b"keep-alive", b"upgrade", b"websocket", b"h2c", b"13",
     b"100-continue", b"", b"a b", b"a\tb", b"a\rb", b"a\nb", b"a\0b", b"\xff", b"x:80", b"[::1]"]
) | st.binary(max_size=6)  # fmt: skip
SPACES = st.sampled_from([b"", b" ", b"\t", b" \t "])
ENDS = st.sampled_from([b"\r\n"] * 60 + [b"\n", b"\r", b"\r\n "])
GOOD_FIELDS = st.lists(
    st.sampled_from(
        [b"Content-Length: 3", b"Content-Length: \t03", b"Transfer-Encoding: Chunked", b"x-y:\tz ",
         b"Connection: close, upgrade", b"Cookie: a=b; c", b"X-Forwarded-For: 1", b"X_Y: z",
         b"X-Request-Id: 7", b"Expect: 100-Continue", b"TE: trailers", b"Empty:", b"Latin: \xe4",
         *WEBSOCKET]
    ),
    max_size=7,
    unique_by=lambda line: line.partition(b":")[0],
).map(lambda lines: b"".join(line + b"\r\n" for line in lines))  # fmt: skip
BAD_FIELDS = st.lists(
    st.tuples(NAMES, st.just(b":"), SPACES, VALUES, SPACES, ENDS).map(b"".join)
    | st.sampled_from(
        [b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n",
         *(line + b"\r\n" for line in WEBSOCKET)]
    ),
    max_size=6,
).map(b"".join)  # fmt: skip
FIELDS = GOOD_FIELDS | BAD_FIELDS
BODIES = st.sampled_from(
    [b"", b"abc", b"0\r\n\r\n", b"3\r\nabc\r\n0\r\n\r\n", b"3\r\nabcd",
     b"3;a=b\r\nabc\r\n0\r\n\r\n",
     b"3 \r\nabc\r\n0\r\n\r\n", b"3\nabc\n0\n\n"]
) | st.binary(max_size=8)  # fmt: skip
CUTS = st.lists(st.integers(0, 300), max_size=6)


@st.composite
def requests(draw):
    """Return a head of a request, or nearly one."""
    version = draw(st.sampled_from([b"1.1"] * 8 + [b"1.0", b"2.0", b"0.9"]))
    start = b"%b %b HTTP/%b" % (draw(METHODS), draw(TARGETS), version)
    host = draw(st.sampled_from([b"Host: x\r\n"] * 8 + [b""]))
    return start + draw(ENDS) + host + draw(FIELDS) + b"\r\n"


@st.composite
def answer_heads(draw):
    """Return a head of an answer, or nearly one."""
    version = draw(st.sampled_from([b"1.1"] * 8 + [b"1.0", b"2.0"]))
    status = draw(
        st.sampled_from([b"200", b"204", b"304", b"404", b"100", b"103", b"101", b"600", b"20"])
    )
    reason = draw(st.sampled_from([b" OK", b" ", b"", b" a  b", b" \xff", b" a\0"]))
    return b"HTTP/" + version + b" " + status + reason + draw(ENDS) + draw(FIELDS) + b"\r\n"


@st.composite
def chunked_bodies(draw):
    """Return a body in chunks, or nearly one."""
    ext = st.sampled_from([b""] * 5 + [b";", b";a=b", b" ", b";\xff", b";a\tb", b"\t;a"])
    lines = draw(
        st.lists(
            st.tuples(st.binary(min_size=1, max_size=20), ext, ENDS, ENDS).map(
                lambda part: b"%x%b%b%b%b" % (len(part[0]), part[1], part[2], part[0], part[3])
            )
            | st.binary(max_size=4),
            max_size=4,
        )
    )
    trailers = draw(st.sampled_from([b""] * 4 + [b"A: b\r\n", b"A:\xff\r\nB:\r\n", b"A : b\r\n"]))
    return b"".join(lines) + b"0" + draw(ext) + draw(ENDS) + trailers + b"\r\n"


def pieces_of(data, cuts):
    at = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[begin:end] for begin, end in itertools.pairwise(at)]


# The readers against h11's


def framing(headers):
    """Return the length of a body as its headers tell; None: it is chunked."""
    values = dict(headers)
    if b"transfer-encoding" in values:
        return None
    return int(values.get(b"content-length", 0))


@FUZZ
@given(requests())
def test_request_that_is_accepted_is_read_alike_by_h11(head):
    try:
        request = read_request(head)
    except BadHead:
        return
    reader = h11.Connection(h11.SERVER, LARGE)
    reader.receive_data(head)
    event = reader.next_event()
    assert isinstance(event, h11.Request)
    assert (event.method, event.target) == (request.method, request.target)
    assert event.http_version == (b"1.0" if request.is_old else b"1.1")
    assert sorted(event.headers) == sorted(
        # h11 normalizes these two.
        (name, value.lower() if name == b"transfer-encoding" else value)
        for name, value in request.headers
    )
    assert framing(event.headers) == request.length


@FUZZ
@given(requests())
def test_head_that_is_sent_in_place_of_a_request_is_read_alike_by_h11_and_by_the_edge(head):
    try:
        request = read_request(head)
    except BadHead:
        return
    sent = request_head(request, [(b"x-forwarded-for", b"127.0.0.1")])
    reader = h11.Connection(h11.SERVER, LARGE)
    reader.receive_data(sent)
    event = reader.next_event()
    assert (event.method, event.target, event.http_version) == (
        request.method,
        request.target,
        b"1.1",
    )
    assert framing(event.headers) == request.length
    again = read_request(sent)
    assert (again.method, again.target, again.length, again.websocket) == (
        request.method,
        request.target,
        request.length,
        request.websocket,
    )


def client_for(request):
    """Return h11's view of a client that has sent a request."""
    reader = h11.Connection(h11.CLIENT, LARGE)
    asked = [("Host", "x"), ("Connection", "upgrade"), ("Upgrade", "websocket")]
    asked = asked if request.websocket else asked[:1]
    reader.send(h11.Request(method=request.method, target="/", headers=asked))
    reader.send(h11.EndOfMessage())
    return reader


@FUZZ
@given(answer_heads() | st.just(SWITCH), st.sampled_from([GET, OPEN]))
def test_answer_that_is_accepted_is_read_alike_by_h11(head, request):
    try:
        found = read_answer(head, request)
    except BadHead:
        return
    for raw, headers in (
        (head, found.headers),
        (answer_head(found, (), close=False), None),
    ):
        reader = client_for(request)
        reader.receive_data(raw)
        event = reader.next_event()
        assert isinstance(event, h11.Response | h11.InformationalResponse)
        assert (event.status_code, event.reason) == (found.status, found.reason.strip(b" \t"))
        if headers is None:
            assert not {b"content-length", b"transfer-encoding"} & dict(event.headers).keys()
            continue
        values = dict(event.headers)
        assert (b"transfer-encoding" in values) == found.chunked
        assert (
            values.get(b"content-length") in {None, b"%d" % (found.length or 0)}
            or int(values[b"content-length"]) == found.length
        )
        assert [name for name, _ in event.headers] == [name for name, _ in headers]


@FUZZ
@given(chunked_bodies(), CUTS)
def test_chunks_that_are_accepted_are_decoded_alike_by_h11(raw, cuts):
    body, content, rest = Chunked(), b"", b""
    try:
        for piece in pieces_of(raw, cuts):
            if body.ended:
                rest += piece
            else:
                more, rest = body.feed(piece)
                content += more
    except BadBody:
        return
    if not body.ended:
        return
    reader = h11.Connection(h11.SERVER, LARGE)
    reader.receive_data(get(b"/", b"Transfer-Encoding: chunked", method=b"POST") + raw)
    assert isinstance(reader.next_event(), h11.Request)
    decoded = b""
    while isinstance(event := reader.next_event(), h11.Data):
        decoded += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    assert (decoded, reader.trailing_data[0]) == (content, rest)


# The whole edge


@pytest.fixture(scope="module")
def edge(tmp_path_factory):
    """An edge before a keeper and a Lab, whose end fails on any error in its loop or of h11."""
    # Being module-scoped, it starts before the per-test check for leaked threads.
    with edge_in(tmp_path_factory.mktemp("edge")) as edge:
        edge.start_keeper()
        edge.add_lab()
        yield edge


def talk(edge, pieces):
    """Send pieces to the edge, each as a packet, and return all that it answers until its end.

    The client does not end the connection: if nothing else does, one of the edge's limits must.
    """
    client = edge.connect(plain=True)
    client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data = b""
    try:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                client.send(piece)
            client.socket.setblocking(False)
            for rounds in range(100_000):
                if rounds % 20 == 19:
                    edge.jump(100)
                edge.call(lambda: None)
                with contextlib.suppress(BlockingIOError):
                    piece = client.socket.recv(65536)
                    data += piece
                    if not piece:
                        break
            else:
                pytest.fail("the connection does not end")
        return data
    finally:
        client.close()
        edge.clients.remove(client)


def check(edge):
    """Fail on errors, and on requests that no edge should pass on."""
    edge.call(lambda: None)
    assert edge.errors == []
    for server in edge.upstreams:
        for visit in server.visits:
            assert b"forwarded-for: 127.0.0.1\r\n" in visit.received or visit.received == b""
        for head in server.heads:
            assert head.target.startswith(b"/")
        server.heads.clear()
        server.visits = [visit for visit in server.visits if not visit.closed]


@FUZZ
@given(st.lists(st.tuples(requests(), BODIES).map(b"".join), min_size=1, max_size=3), CUTS)
def test_requests_in_any_pieces_end_and_only_whole_heads_are_passed_on(edge, sent, cuts):
    for server in edge.upstreams:
        server.answers(answer())
    data = talk(edge, pieces_of(b"".join(sent), cuts))
    assert data == b"" or data.startswith(b"HTTP/1.1 ")
    check(edge)


@FUZZ
@given(st.binary(max_size=300), CUTS)
def test_noise_is_passed_on_to_nobody(edge, sent, cuts):
    talk(edge, pieces_of(sent, cuts))
    check(edge)


@FUZZ
@given(
    st.tuples(answer_heads(), BODIES).map(b"".join) | st.binary(max_size=60),
    st.booleans(),
    st.sampled_from([b"GET", b"HEAD"]),
)
def test_any_answer_becomes_one_that_h11_accepts_or_a_reset(edge, said, websocket, method):
    lab = edge.labs["lab", 1]
    lab.answers(Cut(said))
    client = edge.connect()
    try:
        client.send(get(b"/servers/lab/", *(WEBSOCKET if websocket else ()), method=method))
        with contextlib.suppress(ConnectionResetError):
            reply = client.receive(method)
            assert reply.status == 502 or b"%d" % reply.status in said
    finally:
        client.close()
        edge.clients.remove(client)
    check(edge)


LAST = b"the last bytes"
PIECES = st.lists(st.binary(min_size=1, max_size=300), max_size=5)


@FUZZ
@given(st.binary(max_size=300), st.binary(max_size=300), st.tuples(PIECES, PIECES), CUTS)
def test_tunnel_relays_all_bytes_however_they_are_split(edge, early, first, later, cuts):
    """Also those that arrive together with the head, or before the Lab has answered."""
    sent, said = ([*pieces, LAST] for pieces in later)
    lab = edge.labs["lab", 1]
    lab.answers(SWITCH + first)
    client = edge.connect()
    try:
        for piece in pieces_of(get(b"/servers/lab/", *WEBSOCKET) + early, cuts):
            client.send(piece)
        assert client.receive().status == 101
        visit = lab.visits[-1]
        for piece in sent:
            client.send(piece)
        for piece in said:
            edge.call(visit.say, piece)
        while not client.rest.endswith(LAST):
            client.rest += client.socket.recv(65536)
        assert client.rest == first + b"".join(said)
        until(lambda: edge.call(lambda: visit.tunnelled).endswith(LAST), what="the last bytes")
        assert visit.tunnelled == early + b"".join(sent)
    finally:
        client.close()
        edge.clients.remove(client)
    check(edge)


# TLS


@pytest.fixture(scope="module")
def secure_edge(tmp_path_factory):
    """An edge that speaks TLS, before a keeper."""
    leaf = trustme.CA().issue_cert("x")
    context = context_of(leaf.cert_chain_pems[0].bytes(), leaf.private_key_pem.bytes())
    with edge_in(tmp_path_factory.mktemp("secure"), context=context) as edge:
        edge.start_keeper()
        yield edge


def greeting():
    """Return the first bytes of a handshake."""
    sent = ssl.MemoryBIO()
    context = ssl.create_default_context()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="x").do_handshake()
    return sent.read()


GREETING = greeting()
DAMAGES = st.lists(st.tuples(st.integers(0, len(GREETING) - 1), st.integers(0, 255)), max_size=4)


@FUZZ
@given(DAMAGES, st.binary(max_size=100), CUTS)
def test_damaged_handshakes_end_without_an_error(secure_edge, damages, noise, cuts):
    sent = bytearray(GREETING)
    for at, byte in damages:
        sent[at] = byte
    data = talk(secure_edge, pieces_of(bytes(sent) + noise, cuts))
    # A record of the handshake or an alert, or the answer to what is not TLS at all.
    assert data[:1] in {b"", b"\x16", b"\x15"} or data.startswith(b"HTTP/1.1 400 ")
    check(secure_edge)
    assert secure_edge.requests == []
