"""Hostile requests, and exactly what reaches the keeper and the Labs of them."""

from __future__ import annotations

import pytest

from edge_peers import PROBE, TOKEN, WEBSOCKET, get

EVIL = b"GET /evil HTTP/1.1\r\nHost: x\r\n\r\n"
"""A request that is smuggled: it never may reach anyone."""


def smuggled(*framing, body=b"", method=b"POST", version=b"1.1"):
    """Return a request with these framing headers, before another one."""
    head = [method + b" / HTTP/" + version, b"Host: x", *framing, b"", b""]
    return b"\r\n".join(head) + body + EVIL


CL, TE = b"Content-Length: ", b"Transfer-Encoding: "
CHUNKED = TE + b"chunked"
END = b"0\r\n\r\n"
REFUSED = {
    # Which length applies
    "CL.TE": smuggled(CL + b"6", CHUNKED, body=END),
    "TE.CL": smuggled(CHUNKED, CL + b"4", body=END),
    "CL.TE with a length of zero": smuggled(CL + b"0", CHUNKED, body=END),
    "TE.TE": smuggled(CHUNKED, CHUNKED, body=END),
    "TE.TE, the second one unknown": smuggled(CHUNKED, TE + b"x", body=END),
    "TE.TE, the first one unknown": smuggled(TE + b"identity", CHUNKED, body=END),
    "list of codings": smuggled(TE + b"chunked, chunked", body=END),
    "chunked not last": smuggled(TE + b"chunked, identity", body=END),
    "gzip before chunked": smuggled(TE + b"gzip, chunked", body=END),
    "identity": smuggled(TE + b"identity", CL + b"0"),
    "unknown coding": smuggled(TE + b"xchunked", body=END),
    "quoted coding": smuggled(TE + b'"chunked"', body=END),
    "coding with a parameter": smuggled(TE + b"chunked;q=1", body=END),
    "coding with a comma": smuggled(TE + b",chunked", body=END),
    "empty coding": smuggled(TE, CL + b"0"),
    "coding after a vertical tab": smuggled(TE + b"\x0bchunked", body=END),
    "coding before a form feed": smuggled(TE + b"chunked\x0c", body=END),
    "coding before NUL": smuggled(TE + b"chunked\0", body=END),
    "coding before 0xA0": smuggled(TE + b"chunked\xa0", body=END),
    "space before the colon of TE": smuggled(b"Transfer-Encoding : chunked", body=END),
    "tab before the colon of TE": smuggled(b"Transfer-Encoding\t: chunked", body=END),
    "space before the colon of CL": smuggled(b"Content-Length : 0"),
    "NUL in a name": smuggled(b"Transfer-Encoding\0: chunked", body=END),
    "obs-fold of a coding": smuggled(b"Transfer-Encoding:\r\n chunked", body=END),
    "obs-fold of another header": smuggled(b"X: y\r\n " + CHUNKED, body=END),
    "obs-fold before all headers": b"GET / HTTP/1.1\r\n Host: x\r\n\r\n" + EVIL,
    "chunks in HTTP/1.0": smuggled(CHUNKED, body=END, version=b"1.0"),
    "two lengths": smuggled(CL + b"0", CL + b"33"),
    "two lengths that agree": smuggled(CL + b"0", CL + b"0"),
    "two lengths in a list": smuggled(CL + b"0, 33"),
    "two equal lengths in a list": smuggled(CL + b"0, 0"),
    "empty length": smuggled(CL),
    "negative length": smuggled(CL + b"-1"),
    "signed length": smuggled(CL + b"+0"),
    "hexadecimal length": smuggled(CL + b"0x0"),
    "length with an underscore": smuggled(CL + b"0_0"),
    "length with a space": smuggled(CL + b"0 0"),
    "length with a point": smuggled(CL + b"0.0"),
    "length beyond 64 bits": smuggled(CL + b"18446744073709551616"),
    "length beyond 15 digits": smuggled(CL + b"0000000000000000"),
    "length of other digits": smuggled(CL + b"\xd9\xa0"),
    "length before NUL": smuggled(CL + b"0\0"),
    # Line ends
    "bare LF in the request line": b"GET / HTTP/1.1\nHost: x\r\n\r\n" + EVIL,
    "bare LF between headers": b"GET / HTTP/1.1\r\nHost: x\nX: y\r\n\r\n" + EVIL,
    "bare LF at the end of a head": b"GET / HTTP/1.1\r\nHost: x\r\n\n" + EVIL,
    "only bare LF": b"GET / HTTP/1.1\nHost: x\n\n" + EVIL,
    "bare CR between headers": b"GET / HTTP/1.1\r\nHost: x\rX: y\r\n\r\n" + EVIL,
    "bare CR at the end of a header": b"GET / HTTP/1.1\r\nHost: x\r\r\n\r\n" + EVIL,
    "bare CR in the target": b"GET /\rX HTTP/1.1\r\nHost: x\r\n\r\n" + EVIL,
    "line end in the target": b"GET /\r\nX HTTP/1.1\r\nHost: x\r\n\r\n" + EVIL,
    "empty line first": b"\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n" + EVIL,
    "spaces first": b"  GET / HTTP/1.1\r\nHost: x\r\n\r\n" + EVIL,
    "header without a colon": get(b"/", b"nonsense") + EVIL,
    "header without a name": get(b"/", b": x") + EVIL,
    "NUL in a value": get(b"/", b"X: a\0b") + EVIL,
    "DEL in a value": get(b"/", b"X: a\x7fb") + EVIL,
    "escape in a value": get(b"/", b"X: a\x1bb") + EVIL,
    "space in a name": get(b"/", b"X y: z") + EVIL,
    "byte above ASCII in a name": get(b"/", b"X\xe4: z") + EVIL,
    # Request lines
    "absolute form": get(b"http://x/servers/lab/") + EVIL,
    "absolute form of another host": get(b"http://169.254.169.254/latest") + EVIL,
    "authority form": get(b"x:443") + EVIL,
    "CONNECT": get(b"x:443", method=b"CONNECT") + EVIL,
    "asterisk form": get(b"*", method=b"OPTIONS") + EVIL,
    "asterisk form of GET": get(b"*") + EVIL,
    "no slash": get(b"servers/lab/") + EVIL,
    "no target": b"GET  HTTP/1.1\r\nHost: x\r\n\r\n" + EVIL,
    "two spaces": b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n" + EVIL,
    "tab for a space": b"GET\t/ HTTP/1.1\r\nHost: x\r\n\r\n" + EVIL,
    "space in the target": get(b"/a b") + EVIL,
    "fragment": get(b"/#/servers/lab/") + EVIL,
    "byte above ASCII in the target": get(b"/\xc0\xae\xc0\xae/") + EVIL,
    "NUL in the target": get(b"/\0") + EVIL,
    "unknown method": get(method=b"FOO") + EVIL,
    "method in lower case": get(method=b"get") + EVIL,
    "method with a line end": get(method=b"GET\r\n") + EVIL,
    "HTTP/0.9": b"GET /\r\n\r\n" + EVIL,
    "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: x\r\n\r\n" + EVIL,
    "HTTP/2.0": b"GET / HTTP/2.0\r\nHost: x\r\n\r\n" + EVIL,
    "HTTP/1.10": b"GET / HTTP/1.10\r\nHost: x\r\n\r\n" + EVIL,
    "http in lower case": b"GET / http/1.1\r\nHost: x\r\n\r\n" + EVIL,
    "preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + EVIL,
    "ICY": b"SOURCE /x ICE/1.0\r\nHost: x\r\n\r\n" + EVIL,
    "answer": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" + EVIL,
    # Paths
    **{
        f"path {target.decode()}": get(target) + EVIL
        for target in (
            b"//x/", b"/./", b"/..", b"/../", b"/servers/lab/../x/", b"/servers/lab/..",
            b"/servers/lab/..;/x/", b"/servers/lab/.;a=b/", b"/%2e%2e/", b"/servers/lab/%2E./x",
            b"/servers/lab/.%2e", b"/servers/lab/%2e", b"/servers\\lab", b"/servers/lab/..\\x",
            b"/servers/lab/..?x", b"/\\x",
        )
    },
    # Hosts
    "no Host": b"GET / HTTP/1.1\r\n\r\n" + EVIL,
    "empty Host": b"GET / HTTP/1.1\r\nHost:\r\n\r\n" + EVIL,
    "two Hosts": get(b"/", b"Host: y") + EVIL,
    "two equal Hosts": get(b"/", b"Host: x") + EVIL,
    "Host with a path": b"GET / HTTP/1.1\r\nHost: x/y\r\n\r\n" + EVIL,
    "Host with a user": b"GET / HTTP/1.1\r\nHost: a@x\r\n\r\n" + EVIL,
    "Host with a space": b"GET / HTTP/1.1\r\nHost: x y\r\n\r\n" + EVIL,
    "Host with a quote": b'GET / HTTP/1.1\r\nHost: x"\r\n\r\n' + EVIL,
    # What Connection drops
    **{
        f"Connection names {name.decode()}": get(b"/", b"Connection: close, " + name) + EVIL
        for name in (
            b"Authorization", b"Cookie", b"Host", b"Content-Length", b"X-Forwarded-For",
            b"Transfer-Encoding", b"X-Request-Id", b"Sec-WebSocket-Key", b"Origin",
        )
    },
    "two credentials": get(b"/", b"Authorization: a", b"Authorization: b") + EVIL,
    "two origins": get(b"/", b"Origin: a", b"Origin: b") + EVIL,
}  # fmt: skip
TOO_LARGE = {
    "many headers": get(b"/", *[b"A: b"] * 129) + EVIL,
    "very many headers": get(b"/", *[b"A:"] * 10_000) + EVIL,
    "long header": get(b"/", b"A: " + b"b" * 33_000) + EVIL,
    "long name": get(b"/", b"a" * 33_000 + b": b") + EVIL,
    "long target": get(b"/" + b"a" * 33_000) + EVIL,
    "long method": b"A" * 33_000,
    "endless head": b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 6_000,
}
OTHER = {
    "TRACE": (get(method=b"TRACE") + EVIL, 405),
    "CONNECT to a path": (get(method=b"CONNECT") + EVIL, 405),
    "unknown expectation": (get(b"/", b"Expect: 100-continue, x") + EVIL, 417),
}
CASES = [
    *((name, raw, 400) for name, raw in REFUSED.items()),
    *((name, raw, 431) for name, raw in TOO_LARGE.items()),
    *((name, *case) for name, case in OTHER.items()),
]


@pytest.mark.parametrize(("raw", "status"), [pytest.param(*c[1:], id=c[0]) for c in CASES])
def test_refused_request_reaches_nobody_nor_does_what_follows_it(edge, lab, raw, status):
    client = edge.send(raw)
    assert client.receive().status == status
    assert client.drain() == (b"", False)
    assert edge.received == b""


BAD_CHUNKS = {
    "size with a space": b"1 \r\na\r\n" + END,
    "size with a sign": b"+1\r\na\r\n" + END,
    "size with 0x": b"0x1\r\na\r\n" + END,
    "size with an underscore": b"0_1\r\na\r\n" + END,
    "size beyond 64 bits": b"10000000000000001\r\na\r\n" + END,
    "size that ends with LF": b"1\na\r\n" + END,
    "size with a bare CR": b"1\r\ra\r\n" + END,
    "extension with a bare LF": b"1;a\nb\r\na\r\n" + END,
    "extension with a bare CR": b"1;a\rb\r\na\r\n" + END,
    "endless extension": b"1;" + b"a" * 5000 + b"\r\na\r\n" + END,
    "no size": b"\r\na\r\n" + END,
    "negative size": b"-1\r\na\r\n" + END,
    "longer than its size": b"1\r\nab\r\n" + END,
    "ends with LF": b"1\r\na\n" + END,
    "ends with two other bytes": b"1\r\naXX" + END,
    "trailer with a fold": b"0\r\nA: b\r\n c\r\n\r\n",
    "trailer without a colon": b"0\r\n" + EVIL,
    "trailer that frames": b"0\r\nContent-Length : 9\r\n\r\n",
    "endless trailers": b"0\r\n" + b"A: b\r\n" * 3000 + b"\r\n",
}


@pytest.mark.parametrize("raw", [pytest.param(raw, id=name) for name, raw in BAD_CHUNKS.items()])
def test_request_with_bad_chunks_is_never_whole_and_nothing_follows_it(edge, raw):
    client = edge.send(get(b"/", CHUNKED, method=b"POST") + raw + EVIL)
    assert client.receive(b"POST").status == 400
    assert client.drain() == (b"", False)
    assert edge.requests == []
    assert b"evil" not in edge.received


OURS = [
    (b"host", b"x"),
    (b"x-forwarded-for", b"127.0.0.1"),
    (b"x-forwarded-proto", b"http"),
    (b"x-request-id", b"id"),
]
CLEANED = {
    **{
        f"forged {name.decode()}": ([name + b": forged"], [])
        for name in (
            b"Forwarded", b"X-Forwarded-For", b"X-Forwarded-Host", b"X-Forwarded-Proto",
            b"X-Forwarded-Port", b"X-Forwarded-Prefix", b"X-Real-IP", b"X-Scheme",
            b"X-Labkeeper-User", b"X-Labkeeper-Peer", b"X_Forwarded_For", b"X-Forwarded_For",
            b"X-Labkeeper-Identity", b"X_LABKEEPER_IDENTITY", b"X-Labkeeper_Identity",
            b"X_Labkeeper_User", b"Transfer_Encoding", b"Content_Length", b"Host_", b"Te",
            b"Proxy-Authorization", b"Proxy-Connection", b"Keep-Alive", b"Trailer",
        )
    },
    "all at once": ([b"x-forwarded-FOR: 1", b"X-Forwarded-For:2", b"FORWARDED: for=1"], []),
    "h2c": ([b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: A"], []),
    "upgrade to TLS": ([b"Connection: Upgrade", b"Upgrade: TLS/1.0"], []),
    "websocket of another version": (
        [*WEBSOCKET[:3], b"Sec-WebSocket-Version: 8"],
        [(b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ=="), (b"sec-websocket-version", b"8")],
    ),
    "encoded line ends in a value": ([b"X: a%0d%0aEvil: b"], [(b"x", b"a%0d%0aEvil: b")]),
    "line end of Unicode in a value": ([b"X: a\xe2\x80\xa8b"], [(b"x", b"a\xe2\x80\xa8b")]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "left"), [pytest.param(*case, id=name) for name, case in CLEANED.items()]
)
@pytest.mark.parametrize("target", [b"/", b"/servers/lab/"])
def test_request_arrives_once_without_forged_headers(edge, lab, target, lines, left):
    client = edge.send(get(target, *lines, b"X-Request-Id: id") + PROBE)
    assert client.receive().status == 200
    assert client.receive().body == b'{"status":"ok"}'
    assert client.drain() == (b"", False)
    (head,) = edge.keeper.heads + lab.heads
    known = [(b"authorization", b"token x")] if lab.heads else []
    assert sorted(head.headers) == sorted(OURS + known + left)
    assert len(edge.requests) == 1
    assert edge.received == edge.requests[0]


@pytest.mark.parametrize(
    "target",
    [b"/%0d%0aEvil:%20x", b"/%0a", b"/%00", b"/a%2f..%2fb", b"/a%5c..%5cb", b"/...", b"/a..b/",
     b"/.x/", b"/x?/../..//", b"/x?\\", b"/%252e%252e/", b"/;/", b"/a;/b"],
)  # fmt: skip
@pytest.mark.parametrize("base", [b"", b"/servers/lab"])
def test_odd_target_arrives_as_it_is(edge, lab, base, target):
    client = edge.send(get(base + target) + PROBE)
    assert client.receive().status == 200
    assert client.receive().status == 200
    (head,) = (lab if base else edge.keeper).heads
    assert head.target == base + target
    assert len(edge.requests) == 1


@pytest.mark.parametrize(
    "target",
    [b"/servers%2flab/", b"/servers/lab%2f", b"/servers/lab%2f..%2fother/", b"/%73ervers/lab/",
     b"/servers/l%61b/", b"/servers%5clab/", b"/SERVERS/lab/", b"/servers/LAB/", b"/servers;/lab/",
     b"/servers/lab;/", b"/servers//lab/", b"/servers/lab%00/", b"/servers/lab%20/"],
)  # fmt: skip
def test_what_only_resembles_a_labs_path_is_the_keepers(edge, lab, target):
    """It decodes nothing: what it checked is what the other side gets."""
    client = edge.send(get(target, TOKEN) if target[:9] != b"/servers/" else get(target))
    assert client.receive().status == 200
    assert [head.target for head in edge.keeper.heads] == [target]
    assert lab.requests == []


@pytest.mark.parametrize(
    ("framing", "body"),
    [
        ([CL + b"%d" % len(EVIL)], EVIL),
        ([CHUNKED], b"%x\r\n%b\r\n" % (len(EVIL), EVIL) + END),
        ([CHUNKED], b"%x;a=b\r\n%b\r\n0\r\nA: b\r\n\r\n" % (len(EVIL), EVIL)),
        ([b"transfer-encoding:\tChunKed"], b"%x\r\n%b\r\n" % (len(EVIL), EVIL) + END),
    ],
)
@pytest.mark.parametrize("lines", [[], WEBSOCKET, [b"Expect: 100-continue"]])
@pytest.mark.parametrize("method", [b"GET", b"POST", b"OPTIONS"])
def test_request_in_a_body_stays_a_body(edge, method, framing, body, lines):
    client = edge.send(get(b"/", *framing, *lines, method=method) + body + PROBE)
    assert client.receive(method).status == 200
    assert client.receive().body == b'{"status":"ok"}'
    assert client.drain() == (b"", False)
    assert [head.target for head in edge.keeper.heads] == [b"/"]
    assert edge.requests[0].count(EVIL) == 1
    assert b"upgrade" not in edge.received.partition(b"\r\n\r\n")[0]
