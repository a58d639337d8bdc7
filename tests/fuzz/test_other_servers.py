"""Fuzz the responses of gateways, JupyterLab servers and keepers, over a real connection."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fuzzing import FUZZ, JSON, Speaker, answers, fields_of
from labkeeper.client import Client
from labkeeper.core.errors import BackendError, BackendUnavailable, LabkeeperError
from labkeeper.core.server import Endpoint, GatewayHealth
from labkeeper.core.spec import Gateway
from labkeeper.gateways.client import GatewayClient
from labkeeper.jupyter.client import JupyterClient
from labkeeper.testing.fakes import FakeClock

SLOW_RESPONSE = b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000
"""Start of a response that, sent a byte at a time, takes longer than a test may."""
TIMES = (
    st.sampled_from(
        [
            "2026-01-01T00:00:00Z",
            "9999-12-31T23:59:59.999999-23:59",
            "0001-01-01T00:00:00+23:59",
            "-1",
        ]
    )
    | st.text()
)
KERNELS = st.lists(
    fields_of(
        id=st.text(),
        name=st.text(),
        execution_state=st.text(),
        last_activity=TIMES,
        connections=st.integers(),
    ),
    max_size=3,
)
STATUS = fields_of(last_activity=TIMES, kernels=st.integers(), connections=st.integers())
EVENTS = fields_of(
    id=st.integers(), at=st.text(), kind=st.text(), server=st.text(), generation=st.integers(),
    message=st.text(), actor=st.text(), reason=st.text(), request_id=st.text(),
    details=st.dictionaries(st.text(), JSON, max_size=2),
)  # fmt: skip
RESPONSE_HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: "
PROBLEMS = fields_of(
    code=st.sampled_from(["server_not_found", "start_failed", "unreachable", "nonsense"]),
    detail=st.text(),
    status=st.integers(),
)


def responses_with(about):
    return answers(about.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=100))


def gateway(port):
    return Gateway(f"http://127.0.0.1:{port}", f"ws://127.0.0.1:{port}")


def endpoint(port):
    url = f"http://127.0.0.1:{port}/"
    return Endpoint(
        url,
        "t",
        base_url="/",
        hostname="127.0.0.1",
        port=port,
        secure=False,
        password=False,
        root_dir="/",
    )


@FUZZ
@given(
    answer=answers()
    | responses_with(fields_of(kernelspecs=st.dictionaries(st.text(), JSON, max_size=3)))
)
def test_gateway_client_handles_any_response(speaker, answer):
    speaker.answer = answer
    client, target = GatewayClient(FakeClock(), timeout=2), gateway(speaker.port)
    health = client.check(target)
    assert isinstance(health, GatewayHealth)
    assert health.error is None or health.error.message
    for operation in (client.has_kernel, client.end_kernel):
        with contextlib.suppress(BackendUnavailable):
            assert isinstance(operation(target, "1"), bool)


@FUZZ
@given(answer=responses_with(KERNELS) | responses_with(STATUS) | answers())
def test_jupyter_client_handles_any_response(speaker, answer):
    speaker.answer = answer
    client, target = JupyterClient(timeout=2), endpoint(speaker.port)
    assert isinstance(client.answers(target), bool)
    assert isinstance(client.proves(target), bool)
    assert isinstance(client.shutdown(target, timeout=2), bool)
    for operation in (
        client.kernels,
        client.load,
        client.activity,
        lambda to: client.end_kernel(to, "1"),
    ):
        with contextlib.suppress(BackendError):
            operation(target)


@pytest.mark.parametrize(
    "operation",
    [
        JupyterClient.answers,
        JupyterClient.proves,
        JupyterClient.kernels,
        lambda client, to: client.shutdown(to, timeout=1),
    ],
)
def test_jupyter_client_times_out_on_a_byte_by_byte_response(operation):
    with Speaker() as slow:
        slow.answer, slow.pause = SLOW_RESPONSE, 0.05
        with contextlib.suppress(BackendError):
            assert operation(JupyterClient(timeout=1), endpoint(slow.port)) is False


@FUZZ
@given(
    answer=responses_with(PROBLEMS)
    | responses_with(fields_of(events=st.lists(EVENTS, max_size=2)))
    | answers()
)
@example(answer=RESPONSE_HEAD + b"text/plain; charset=hex\r\n\r\nab")
@example(answer=RESPONSE_HEAD + b"text/plain; charset=rot13\r\n\r\nab")
@example(answer=RESPONSE_HEAD + b"text/plain\r\nContent-Encoding: gzip\r\n\r\nab")
@example(
    answer=RESPONSE_HEAD
    + b'application/json\r\n\r\n{"results": [{"name": "a", "status": 502, "problem": {"code": 1}}]}'
)
def test_keeper_client_handles_any_response(speaker, answer):
    speaker.answer = answer
    with Client(f"http://127.0.0.1:{speaker.port}", token="t" * 16) as client:
        for operation in (
            client.version,
            lambda: [*client.list()],
            client.events,
            client.metrics,
            lambda: [*client.follow("a")],
            client.ready,
            lambda: client.idle("a"),
            lambda: [result.error for result in client.start_many(["a"])],
        ):
            with contextlib.suppress(LabkeeperError):
                operation()


LINES = st.one_of(
    EVENTS.map(lambda event: f"data: {json.dumps(event)}"),
    st.text(),
    st.sampled_from(
        ['data: {"id":', 'data: {"id":1}', ": keep-alive", "event: gap", "retry: 1", ""]
    ),
)


@FUZZ
@given(lines=st.lists(LINES, max_size=5))
def test_event_stream_with_any_lines_yields_events_or_an_error(speaker, lines):
    body = "\n".join(lines).encode(errors="replace")
    speaker.answer = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + body
    )
    with (
        Client(f"http://127.0.0.1:{speaker.port}", token="t" * 16) as client,
        contextlib.suppress(LabkeeperError),
    ):
        assert all(isinstance(event.id, int) for event in client.follow_events())
