"""The access log of a real edge: what it says of each request, and what it keeps to itself."""

from __future__ import annotations

import errno
import hashlib
import time
from datetime import UTC, datetime

import pytest

from edge_peers import PROBE, SWITCH, WEBSOCKET, Cut, answer, get, post
from harness import until
from labkeeper.edge.sessions import Session

LAB = b"/servers/lab/api"


def logged(edge, count=1):
    """Return the only entries of the log, once there are this many."""
    until(lambda: len(edge.log) >= count, what="the access log")
    assert len(edge.log) == count
    return edge.log


def test_an_answer_of_a_lab_is_logged_with_all_that_is_known(edge, lab):
    digest = hashlib.sha256(b"secret").hexdigest()
    edge.call(edge.proxy.sessions.add, [Session(digest, "lab", "ada", time.time() + 60)])
    lab.answers(answer(b"x" * 100, status=b"201 Created"))
    client = edge.connect()
    cookie = b"Cookie: labkeeper-session=secret"
    client.ask(post(LAB + b"?token=hidden", b"content", cookie, b"X-Request-Id: mine-1"))
    (entry,) = logged(edge)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(entry.pop("time"))).seconds < 600
    assert entry.pop("bytes") > 100
    assert entry.pop("seconds") >= 0
    assert entry == {
        "request_id": "mine-1",
        "client": "127.0.0.1",
        "method": "POST",
        "host": "x",
        "path": "/servers/lab/api",
        "to": "lab",
        "server": "lab",
        "user": "ada",
        "status": 201,
        "cut": False,
    }
    assert (b"x-request-id", b"mine-1") in lab.heads[0].headers


def test_the_id_of_an_answer_is_that_of_the_log(edge, lab):
    lab.answers(answer(b"ok", b"X-Request-Id: of-the-lab"))
    headers = edge.connect().ask(get(LAB)).headers
    assert logged(edge)[0]["request_id"] == headers[b"x-request-id"].decode() != "of-the-lab"


@pytest.mark.parametrize("path", [b"/open/SECRET", b"/open/SECRET/x?a", b"/%6fpen/SECRET"])
def test_secrets_in_links_are_not_logged(edge, path):
    edge.connect().ask(get(path))
    (entry,) = logged(edge)
    assert (entry["path"], entry["to"]) == ("/open/...", "keeper")


@pytest.mark.parametrize(
    ("request_", "status", "to"),
    [
        (PROBE, 200, "edge"),
        (get(b"/servers/lab"), 307, "edge"),
        (get(b"/servers/ghost/"), 404, "lab"),
        (b"GET /servers/lab/ HTTP/1.1\r\nHost: x\r\n\r\n", 401, "edge"),
        (b"GET / HTTP/1.1\r\nHost: attacker.example\r\n\r\n", 421, "edge"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400, "edge"),
        (get(method=b"HEAD"), 200, "keeper"),
    ],
)
def test_every_answer_is_logged_once(edge, lab, request_, status, to):
    edge.send(request_).receive(request_.partition(b" ")[0])
    (entry,) = logged(edge)
    assert (entry["status"], entry["to"], entry["cut"]) == (status, to, False)


def test_a_client_that_leaves_before_the_answer_is_logged_without_a_status(edge):
    edge.keeper.answers(None)
    client = edge.send(get())
    until(lambda: edge.requests)
    client.close()
    (entry,) = logged(edge)
    assert (entry["status"], entry["cut"]) == (None, True)


def test_an_answer_that_is_cut_is_logged_as_such(edge):
    edge.keeper.answers(Cut(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"))
    edge.send(get()).drain()
    (entry,) = logged(edge)
    assert (entry["status"], entry["cut"]) == (200, True)


def test_a_websocket_is_logged_when_it_opens(edge, lab):
    lab.answers(SWITCH)
    edge.connect().ask(get(LAB, *WEBSOCKET))
    (entry,) = logged(edge)
    assert (entry["status"], entry["server"], entry["cut"]) == (101, "lab", False)


def test_a_connection_without_a_request_is_not_logged(edge):
    edge.connect().close()
    edge.connect().ask(PROBE)
    assert logged(edge)[0]["path"] == "/edge/healthz"


def test_a_full_disk_stops_no_answers(edge, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("labkeeper.edge.access_log.os.write", full)
    assert edge.connect().ask(PROBE).status == 200
    edge.call(edge.proxy.access_log.write)
    monkeypatch.undo()
    edge.connect().ask(PROBE)
    assert len(logged(edge)) == 1
