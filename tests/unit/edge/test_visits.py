"""Who has a Lab open in a browser, as a real edge sees it."""

from __future__ import annotations

import hashlib
import time

import pytest

from edge_peers import SWITCH, WEBSOCKET, answer, get
from harness import until
from labkeeper.edge.sessions import Session

COOKIE = b"Cookie: labkeeper-session=secret"
TARGET = b"/servers/lab/x"


@pytest.fixture
def session(edge):
    """The session of a browser for the Lab."""
    digest = hashlib.sha256(b"secret").hexdigest()
    made = Session(digest, "lab", "ada", time.time() + 3600)
    edge.call(edge.proxy.sessions.add, [made])
    return made


def visits(edge, server="lab"):
    return edge.call(lambda: (edge.proxy.visitors(server), edge.proxy.visits.ago(server)))


def test_a_request_is_a_visit_while_it_lasts_and_remembered_afterwards(edge, lab, session):
    lab.answers(None)
    client = edge.send(get(TARGET, COOKIE))
    until(lambda: lab.requests)
    assert visits(edge)[0] == 1
    edge.jump(100.0)
    edge.call(lab.visits[0].say, answer())
    assert client.receive().status == 200
    until(lambda: visits(edge)[0] == 0)
    edge.jump(100.0)
    count, ago = visits(edge)
    assert count == 0
    assert 100.0 <= ago < 200.0
    assert visits(edge, "other") == (0, None)


def test_a_tunnel_is_a_visit_until_it_ends(edge, lab, session):
    lab.answers(SWITCH)
    client = edge.connect()
    assert client.ask(get(TARGET, COOKIE, *WEBSOCKET)).status == 101
    edge.jump(100.0)
    assert visits(edge)[0] == 1
    client.close()
    edge.settle(0)
    count, ago = visits(edge)
    assert count == 0
    assert ago < 100.0


def test_programs_are_no_visitors(edge, lab, session):
    assert edge.connect().ask(get(TARGET)).status == 200
    lab.answers(SWITCH)
    assert edge.connect().ask(get(TARGET, *WEBSOCKET)).status == 101
    assert visits(edge) == (0, None)


def test_visits_to_a_lab_that_has_ended_are_forgotten(edge, lab, session):
    edge.add_lab("other")
    assert edge.connect().ask(get(TARGET, COOKIE)).status == 200
    edge.call(edge.proxy.routes.remove, "other")
    edge.jump(1.0)
    assert visits(edge)[1] is not None
    edge.call(edge.proxy.routes.remove, "lab")
    edge.jump(1.0)
    assert visits(edge)[1] is None
