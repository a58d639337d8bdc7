"""What one address, and one browser session, may have of the edge."""

from __future__ import annotations

import time
from hashlib import sha256

from edge_peers import SWITCH, WEBSOCKET, answer, get
from harness import until
from labkeeper.edge.forwarded import networks
from labkeeper.edge.sessions import Session

WORDS = b"first", b"second"
"""The cookies of two sessions."""


PROBE = get(b"/edge/healthz")


def test_an_address_has_a_share_of_the_connections(make_edge):
    edge = make_edge(connections_of_address=2)
    edge.start_keeper().answers(None)
    lab = edge.add_lab()
    lab.answers(SWITCH)
    websocket, busy = edge.connect(), edge.connect()
    assert websocket.ask(get(b"/servers/lab/ws", *WEBSOCKET)).status == 101
    busy.send(get())
    until(lambda: edge.keeper.requests)
    assert edge.connect().drain()[0] == b""
    assert edge.connect(source="127.0.0.2").ask(PROBE).status == 200
    websocket.close()
    until(lambda: edge.call(lambda: not edge.proxy._tunnels))
    assert edge.connect().ask(PROBE).status == 200
    told = []
    edge.call(edge.proxy.report, told.append)
    assert told[0]["report"]["refused"] == 1


def test_an_address_that_has_its_share_loses_the_longest_idle_connection_of_its_own(make_edge):
    edge = make_edge(connections_of_address=2)
    others = edge.connect(source="127.0.0.2")
    first, second = edge.connect(), edge.connect()
    assert [one.ask(PROBE).status for one in (others, first, second, first)] == [200] * 4
    third = edge.connect()
    assert second.drain()[0] == b""
    assert [one.ask(PROBE).status for one in (others, first, third)] == [200] * 3


def test_a_session_has_a_limit_of_requests_and_websockets(make_edge):
    edge = make_edge(requests_of_session=2)
    lab = edge.add_lab()
    known = [Session(sha256(word).hexdigest(), "lab", "ada", time.time() + 60) for word in WORDS]
    edge.call(edge.proxy.sessions.add, known)
    first, second = (b"Cookie: labkeeper-session=" + word for word in WORDS)
    lab.answers(SWITCH, None, None)
    websocket = edge.connect()
    assert websocket.ask(get(b"/servers/lab/ws", first, *WEBSOCKET)).status == 101
    asking = edge.send(get(b"/servers/lab/a", first))
    until(lambda: len(lab.requests) == 2)
    refused = edge.connect().ask(get(b"/servers/lab/b", first))
    assert (refused.status, refused.headers[b"retry-after"]) == (429, b"2")
    edge.send(get(b"/servers/lab/c", second))
    until(lambda: len(lab.requests) == 3)
    asking.close()
    websocket.close()
    until(lambda: edge.call(lambda: len(edge.proxy._in_use)) == 1)
    lab.answers(answer(b"again"))
    assert edge.connect().ask(get(b"/servers/lab/d", first)).body == b"again"


def test_a_trusted_proxy_may_have_all_connections(make_edge):
    edge = make_edge(connections_of_address=1)
    edge.start_keeper()
    edge.proxy.trusted = networks(["127.0.0.2"])
    clients = [edge.connect(source="127.0.0.2") for _ in range(3)]
    assert [client.ask(get()).status for client in clients] == [200] * 3
    first, second = edge.connect(), edge.connect()
    assert (second.ask(get()).status, first.drain()[0]) == (200, b"")
