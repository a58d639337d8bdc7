"""Heads of requests and answers: what is accepted and refused, and what is written instead."""

from __future__ import annotations

import pytest

from edge_peers import SWITCH, WEBSOCKET, get
from labkeeper.edge.heads import (
    ANSWER_LIMIT,
    REQUEST_LIMIT,
    BadHead,
    answer_head,
    check_start,
    read_answer,
    read_request,
    request_head,
)

GET = read_request(get())
OPEN = read_request(get(b"/", *WEBSOCKET))


def status_of(head):
    """Return the status with which a request's head is refused."""
    with pytest.raises(BadHead) as caught:
        read_request(head)
    return int(caught.value.status)


def written(*headers, start=b"GET / HTTP/1.1"):
    """Return the lines that are sent in place of a request with headers."""
    request = read_request(b"\r\n".join([start, b"Host: x", *headers, b"", b""]))
    return request_head(request, ()).split(b"\r\n")[:-2]


@pytest.mark.parametrize(
    "method", [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS"]
)
def test_method_and_target_are_kept(method):
    request = read_request(get(b"/a/b%20c;d?e={f}|g&h=..", method=method))
    assert (request.method, request.target) == (method, b"/a/b%20c;d?e={f}|g&h=..")
    assert (request.path, request.host, request.length) == (b"/a/b%20c;d", b"x", 0)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (get(method=b"CONNECT"), 405),
        (get(method=b"TRACE"), 405),
        (get(b"/", b"Expect: 200-ok"), 417),
        (get(b"/", b"Expect: "), 417),
        (get(b"/", *[b"A: b"] * 127), None),
        (get(b"/", *[b"A: b"] * 129), 431),
        (get(b"/", b"Expect: 100-continue", b"Expect: 100-continue"), 400),
    ],
)
def test_refusals_have_their_own_statuses(head, status):
    if status is None:
        assert read_request(head)
    else:
        assert status_of(head) == status


@pytest.mark.parametrize(
    "host",
    [b"x", b"x:80", b"a-b.c_d:65535", b"127.0.0.1:1", b"[::1]", b"[fe80::1.2.3.4]:8", b"A" * 255],
)
def test_hosts_are_accepted(host):
    assert read_request(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host).host == host


@pytest.mark.parametrize(
    "host",
    [b"", b"x y", b"x/y", b"u@x", b"x:", b"x:123456", b"x:a", b"[::1", b"[x]", b"x,y", b"A" * 256,
     b"\xe4", b"x\ty"],
)  # fmt: skip
def test_other_hosts_are_refused(host):
    assert status_of(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host) == 400


@pytest.mark.parametrize(
    "name",
    [b"authorization", b"content-type", b"expect", b"host", b"origin", b"sec-websocket-key",
     b"transfer-encoding", b"upgrade", b"content-length"],
)  # fmt: skip
def test_header_of_which_programs_read_different_ones_may_be_there_once(name):
    values = {b"expect": b"100-continue", b"transfer-encoding": b"chunked", b"content-length": b"1"}
    line = name.title() + b": " + values.get(name, b"x")
    assert status_of(get(b"/", line, line)) == 400


def test_other_headers_may_be_there_twice_and_keep_their_order():
    lines = written(b"Cookie: a=1", b"X: \t y \t", b"Cookie: b=2", b"Empty:")
    assert lines[1:] == [b"host: x", b"cookie: a=1", b"x: y", b"cookie: b=2", b"empty: "]


@pytest.mark.parametrize(
    "line",
    [b"Connection: keep-alive", b"Keep-Alive: 5", b"Proxy-Authorization: x", b"TE: trailers",
     b"Proxy-Authenticate: x", b"Proxy-Connection: close", b"Trailer: x", b"Upgrade: h2c",
     b"HTTP2-Settings: x"],
)  # fmt: skip
def test_headers_about_one_connection_are_not_passed_on(line):
    assert written(line) == [b"GET / HTTP/1.1", b"host: x"]


@pytest.mark.parametrize(
    "name",
    [b"Forwarded", b"X-Forwarded-For", b"X-Forwarded-Proto", b"X-Forwarded-Host",
     b"X-Real-IP", b"X-Forwarded-Prefix", b"X-Scheme", b"X-Labkeeper-User", b"X_Forwarded_For",
     b"X-Forwarded_For", b"Content_Length", b"A_b"],
)  # fmt: skip
def test_headers_that_only_a_proxy_sets_are_not_passed_on(name):
    assert written(name + b": forged") == [b"GET / HTTP/1.1", b"host: x"]


@pytest.mark.parametrize(
    "options", [b"Authorization", b"close, Cookie", b"x-forwarded-for", b"Content-Length", b"host"]
)
def test_connection_may_not_name_headers_that_would_be_dropped(options):
    assert status_of(get(b"/", b"Connection: " + options)) == 400
    assert status_of(get(b"/", b"Connection: close", b"Connection: " + options)) == 400


@pytest.mark.parametrize(
    ("head", "goes_on"),
    [
        (get(), True),
        (get(b"/", b"Connection: keep-alive"), True),
        (get(b"/", b"Connection: close"), False),
        (get(b"/", b"Connection: TE, , CLOSE "), False),
        (b"GET / HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n\r\n", False),
    ],
)
def test_connections_are_kept_in_http_1_1_only(head, goes_on):
    assert read_request(head).keep_alive is goes_on


def test_body_is_sized_chunked_or_empty():
    assert read_request(get(b"/", b"Content-Length: 007")).length == 7
    assert read_request(get(b"/", b"Transfer-Encoding: CHUNKED")).length is None
    assert read_request(get(method=b"POST")).length == 0
    chunked = written(b"Transfer-Encoding: chunked", start=b"POST / HTTP/1.1")
    assert chunked[-1] == b"transfer-encoding: chunked"
    assert written(b"Content-Length: 5")[-1] == b"content-length: 5"


def test_client_of_http_1_0_cannot_wait_to_continue():
    head = b"POST / HTTP/1.0\r\nHost: x\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n"
    assert not read_request(head).expects
    assert read_request(head.replace(b"1.0", b"1.1")).expects
    assert written(start=b"GET / HTTP/1.0")[0] == b"GET / HTTP/1.1"


def test_websocket_is_recognized_and_its_head_written_anew():
    assert OPEN.websocket
    lines = written(*WEBSOCKET)
    assert lines[-2:] == [b"connection: upgrade", b"upgrade: websocket"]
    assert lines.count(b"upgrade: websocket") == 1


@pytest.mark.parametrize(
    "head",
    [
        *(get(b"/", *(line for line in WEBSOCKET if line != missing)) for missing in WEBSOCKET),
        get(b"/", *WEBSOCKET, method=b"POST"),
        get(b"/", *WEBSOCKET, b"Content-Length: 1"),
        get(b"/", *WEBSOCKET, b"Transfer-Encoding: chunked"),
        get(b"/", *WEBSOCKET).replace(b"HTTP/1.1", b"HTTP/1.0"),
        get(b"/", *WEBSOCKET).replace(b"websocket", b"h2c"),
        get(b"/", *WEBSOCKET).replace(b"13", b"8"),
    ],
)
def test_other_upgrades_are_ignored(head):
    request = read_request(head)
    assert not request.websocket
    assert b"upgrade: websocket" not in request_head(request, ())


def test_start_of_a_head_is_refused_as_soon_as_it_is_wrong():
    for start, limit, since in ((b"GET /\n", 100, 0), (b"a\r\nb\n", 100, 5), (b"\n", 100, 0)):
        with pytest.raises(BadHead):
            check_start(start, limit, since)
    with pytest.raises(BadHead) as caught:
        check_start(bytes(REQUEST_LIMIT + 1), REQUEST_LIMIT)
    assert caught.value.status == 431
    check_start(bytes(REQUEST_LIMIT), REQUEST_LIMIT)
    check_start(b"a\r\nb\r", ANSWER_LIMIT, 4)
    check_start(b"\r\n", ANSWER_LIMIT, 1)


# Answers


def read(*lines, status=b"200 OK", version=b"1.1", request=GET):
    head = b"\r\n".join([b"HTTP/" + version + b" " + status, *lines, b"", b""])
    return read_answer(head, request)


@pytest.mark.parametrize(
    ("lines", "length", "chunked"),
    [
        ([], None, False),
        ([b"Content-Length: 5"], 5, False),
        ([b"Transfer-Encoding: Chunked"], None, True),
    ],
)
def test_framing_of_an_answer(lines, length, chunked):
    answer = read(*lines)
    assert (answer.length, answer.chunked, answer.keep_alive) == (length, chunked, True)


@pytest.mark.parametrize(
    "lines",
    [
        [b"Content-Length: 5", b"Content-Length: 6"],
        [b"Content-Length: 5", b"Content-Length: 5"],
        [b"Content-Length: 5, 5"],
        [b"Content-Length: +5"],
        [b"Content-Length: -5"],
        [b"Content-Length: 0x5"],
        [b"Content-Length: "],
        [b"Content-Length: " + b"9" * 16],
        [b"Content-Length: 5", b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: gzip, chunked"],
        [b"Transfer-Encoding: gzip"],
        [b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"],
        [b"Transfer-Encoding : chunked"],
        [b" folded"],
        [b"X: a\rb"],
        [b"X: a\0b"],
        [b"no colon"],
        [b": no name"],
        [b"X: y"] * 129,
    ],
)
def test_answer_whose_head_is_ambiguous_or_malformed_is_refused(lines):
    with pytest.raises(BadHead):
        read(*lines)


@pytest.mark.parametrize(
    "status", [b"099 x", b"600 x", b"20 x", b"2000 x", b"200\x0bx", b"", b"abc"]
)
def test_malformed_status_is_refused(status):
    with pytest.raises(BadHead):
        read(status=status)


def test_old_answer_is_kept_alive_only_if_it_says_so():
    assert not read(version=b"1.0").keep_alive
    assert read(b"Connection: Keep-Alive", version=b"1.0").keep_alive
    assert not read(b"Connection: close").keep_alive
    with pytest.raises(BadHead):
        read(b"Transfer-Encoding: chunked", version=b"1.0")
    with pytest.raises(BadHead):
        read(version=b"2.0")


def test_only_a_requested_websocket_is_switched_to():
    assert read_answer(SWITCH, OPEN).websocket
    with pytest.raises(BadHead):
        read_answer(SWITCH, GET)
    for change in ((b"websocket", b"h2c"), (b"Connection: Upgrade\r\n", b"")):
        with pytest.raises(BadHead):
            read_answer(SWITCH.replace(*change), OPEN)


def test_head_of_an_answer_is_written_anew():
    answer = read(
        b"Set-Cookie: a", b"Set-Cookie: b", b"Connection: keep-alive, X", b"Keep-Alive: 5",
        b"Content-Length: 5", b"Upgrade: h2c", status=b"299 \xe4 odd  reason",
    )  # fmt: skip
    assert answer_head(answer, [(b"content-length", b"5")], close=True) == (
        b"HTTP/1.1 299 \xe4 odd  reason\r\nset-cookie: a\r\nset-cookie: b\r\n"
        b"content-length: 5\r\nconnection: close\r\n\r\n"
    )
    assert answer_head(read(status=b"200"), (), close=False) == b"HTTP/1.1 200 \r\n\r\n"
    head = answer_head(read_answer(SWITCH, OPEN), (), close=True)
    assert head.endswith(b"connection: upgrade\r\nupgrade: websocket\r\n\r\n")
    assert head.count(b"upgrade: ") == 1
