"""Fuzz requests: a real keeper answers all of them as documented, and keeps running."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fuzzing import DEPTHS, FUZZ, JSON, fields_of, nested
from harness import KeeperProcess
from labkeeper.api.handlers.servers import _decode_cursor, _encode_cursor
from labkeeper.core.errors import InvalidSpec
from labkeeper.schema.requests.servers import RestartRequest

CLIENT_ERRORS = range(400, 500)
HEADER_VALUES = st.text(
    st.characters(min_codepoint=32, max_codepoint=255, blacklist_characters="\x7f"), max_size=100
).map(str.strip)
"""Header values that a client can send. The raw requests below also have others."""
METHODS = st.sampled_from([b"GET", b"POST", b"TRACE", b"OPTIONS", b"GE T", b""])
TARGETS = st.sampled_from(
    [
        b"/api/servers",
        b"//",
        b"http://[",
        b"*",
        b"/%",
        b"/\xff",
        b"/api/servers/%2e%2e/..",
        b"/?" + b"a" * 9000,
    ]
)
LINES = st.lists(
    st.sampled_from(
        [b"Host: ", b"Host: a\r\nHost: b", b"Content-Length: -1", b"Content-Length: 1e3",
         b"Content-Length: 5", b"Expect: 100-continue", b"Transfer-Encoding: chunked",
         b"Transfer-Encoding: x", b"Content-Type: application/json; charset=hex", b" folded", b":",
         b"Authorization: Bearer \xff", b"Authorization: Bearer", b"X-Request-Id: \x00",
         b"Connection: upgrade", b"<long>"]
    ),
    max_size=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def keeper(tmp_path_factory):
    """A keeper without servers: no test of this module starts one."""
    keeper = KeeperProcess(tmp_path_factory.mktemp("keeper"), launch_by="exec")
    yield keeper.start()
    text = keeper.log.read_text()
    keeper.close()
    assert "unexpected error" not in text


@FUZZ
@given(
    data=st.binary(max_size=200)
    | st.builds(
        lambda method, target, lines, body: b"\r\n".join(
            [method + b" " + target + b" HTTP/1.1", *lines, b"", body]
        ),
        METHODS,
        TARGETS,
        LINES,
        st.binary(max_size=20),
    )
)
def test_noise_instead_of_a_request_is_rejected(keeper, data):
    """Without a token, every complete request is refused, and the keeper keeps responding."""
    with (
        socket.create_connection(("127.0.0.1", keeper.port), timeout=10) as caller,
        contextlib.suppress(ConnectionError),
    ):
        caller.sendall(data.replace(b"<long>", b"a" * 70_000))
        with contextlib.suppress(OSError):  # The keeper may already have closed the connection.
            caller.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := caller.recv(65536):
            answer += piece
        statuses = [int(status) for status in re.findall(rb"^HTTP/1\.[01] (\d{3})", answer)]
        assert all(status in CLIENT_ERRORS or status in {100, 501, 505} for status in statuses), (
            answer
        )
    assert keeper.http.get("/readyz").status_code == 200


@FUZZ
@given(
    query=st.dictionaries(
        st.sampled_from(["cursor", "label", "state", "limit", "x"]),
        st.text(max_size=40),
        max_size=3,
    )
)
def test_server_list_handles_any_query(keeper, query):
    assert keeper.http.get("/api/servers", params=query).status_code in {200, 422}


@FUZZ
@given(text=st.text() | st.binary().map(lambda data: base64.urlsafe_b64encode(data).decode()))
@example(text="=")
@example(text="YQ")
def test_cursor_is_valid_or_rejected(text):
    with contextlib.suppress(InvalidSpec):
        name = _decode_cursor(text)
        assert _decode_cursor(_encode_cursor(name)) == name


@FUZZ
@given(last=HEADER_VALUES | st.integers().map(str))
@example(last="²")
@example(last="9" * 18)
def test_last_event_id_is_a_number_or_rejected(keeper, last):
    answer = keeper.http.get("/api/events", headers={"Last-Event-ID": last.encode("latin-1")})
    assert answer.status_code == (200 if re.fullmatch("[0-9]{0,18}", last) else 422)


@FUZZ
@given(
    headers=st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ("X-Request-Id", "Host", "Accept", "Origin", "Cookie"), HEADER_VALUES
        ),
    )
)
def test_header_values_may_be_anything(keeper, headers):
    sent = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = keeper.http.get("/api/version", headers=sent)
    assert answer.status_code == 200 or answer.status_code in CLIENT_ERRORS
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", answer.headers["X-Request-Id"])


BODIES = (
    fields_of(
        **{
            name: st.text() | st.dictionaries(st.text(), st.text(), max_size=2)
            for name in RestartRequest.model_fields
        }
    )
    | st.dictionaries(st.text(), JSON, max_size=2)
    | JSON
)


@FUZZ
@given(
    body=BODIES.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=100)
    | DEPTHS.map(nested)
)
@example(body=b'{"env": {"A": "\\ud800"}}')
@example(body=b'{"idle_timeout": ' + b"9" * 5000 + b"}")
def test_body_may_be_anything(keeper, body):
    """For a server that does not exist, so that a valid body has no effect."""
    answer = keeper.http.post(
        "/api/servers/nobody/restart", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code in {400, 404, 422}, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
