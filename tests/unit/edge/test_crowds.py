"""Many clients at once: those that do nothing, or next to nothing, cost the others nothing."""

from __future__ import annotations

import contextlib
import resource
import socket
import sys

import psutil
import pytest

from edge_peers import PROBE, get
from harness import until
from labkeeper.edge.limits import Limits

SLOW = 500
IDLE = 10_000
PROBE_ON = b"GET /edge/healthz HTTP/1.1\r\nHost: x\r\n\r\n"


def test_500_clients_with_slow_heads_delay_nobody(edge):
    """Slowloris: each sends a byte now and then, so that its head never ends."""
    clients = [edge.send(b"GET / HT") for _ in range(SLOW)]
    edge.settle(SLOW)
    for byte in (b"T", b"P", b"/"):
        for client in clients:
            client.send(byte)
        edge.jump(4)
        assert edge.connect().ask(get()).status == 200
    until(lambda: edge.call(lambda: sum(len(c._input) for c in edge.proxy._clients)) == SLOW * 11)
    edge.jump(4)
    assert {client.receive().status for client in clients} == {408}
    assert edge.connect().ask(PROBE).status == 200


@pytest.fixture
def descriptors():
    """Allow as many descriptors as the test needs, or as many as can be."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * Limits().connections + 1000
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, before[1])))
    if resource.getrlimit(resource.RLIMIT_NOFILE) == before:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.skipif(sys.platform != "linux", reason="the edge needs Linux")
def test_10000_idle_clients_are_kept_and_delay_nobody(run, descriptors):
    count = min(IDLE, descriptors // 2 - 500)
    with run() as edge, contextlib.ExitStack() as stack:
        port = edge.public.getsockname()[1]
        process = psutil.Process(edge._link.process.pid)
        before = process.memory_info().rss

        def probe(number):
            # An address may have 2,000 connections.
            client = socket.create_connection(
                ("127.0.0.1", port), source_address=(f"127.0.0.{2 + number // 1000}", 0)
            )
            stack.enter_context(client)
            client.sendall(PROBE_ON)
            return client

        def answered(client):
            return client.recv(65536).startswith(b"HTTP/1.1 200")

        clients = []
        for first in range(0, count, 500):
            row = [probe(number) for number in range(first, min(count, first + 500))]
            assert all(map(answered, row))
            clients += row
        # The first ones are still there, and so is room.
        for client in (clients[0], clients[-1], probe(count)):
            client.sendall(PROBE_ON)
            assert answered(client)
        assert process.memory_info().rss - before < count * 16 * 1024
