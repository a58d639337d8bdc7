"""The control socket of a real edge: who may command it, and what commands do."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import ssl
import sys
import threading
import time

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import PATIENCE, alive, until
from labkeeper import unix_sockets
from labkeeper.edge import wire
from labkeeper.serve.edge.instances import Instances
from labkeeper.serve.edge.link import CONTROL, Link
from labkeeper.serve.process import LOCK

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the edge needs Linux")
ROUTE = {
    "server": "lab",
    "generation": 1,
    "host": "127.0.0.1",
    "port": 1,
    "base_url": "/servers/lab/",
    "key": "key",
}
"""Nothing listens there, so requests that are routed get 502."""
SESSION = {
    "digest": hashlib.sha256(b"secret").hexdigest(),
    "server": "lab",
    "user": "ada",
    "expires_at": time.time() + 3600,
}


def everything(routes, sessions, *, hosts=(), access_log=False):
    """Return the command that replaces all that the edge knows."""
    return {
        "do": "all",
        "domain": "",
        "hosts": list(hosts),
        "access_log": access_log,
        "longest_body": 2**20,
        "routes": routes,
        "sessions": sessions,
    }


COOKIE = {"Cookie": "labkeeper-session=secret"}
TOKEN = {"Authorization": "token x"}


class Started:
    """An edge, and the link of the keeper that this process is for it."""

    def __init__(self, state_dir, lock, *, secure=False):
        fcntl.flock(lock, fcntl.LOCK_EX)
        self.state_dir = state_dir
        self.public = socket.create_server(("127.0.0.1", 0))
        self.instances = Instances(
            state_dir, state_dir / "run", self.public.getsockname(), secure=secure
        )
        assert self.instances.find() == []
        self.link = self.instances.start(self.public)

    def get(self, headers, server="lab"):
        """Return the status of a request for a server."""
        host, port = self.public.getsockname()
        url = f"http://{host}:{port}/servers/{server}/api"
        return httpx.get(url, headers=headers, trust_env=False, timeout=PATIENCE).status_code

    def open(self, key=None):
        return Link.open(self.link.directory, key or self.instances.key(), within=PATIENCE)


def closed(link):
    """Wait until an edge closes a connection; it may report before."""
    link.connection.settimeout(PATIENCE)
    while link.connection.recv(65536):
        pass
    return True


@pytest.fixture
def lock(tmp_path):
    descriptor = os.open(tmp_path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def edge(request, tmp_path, lock):
    started = Started(tmp_path, lock, secure=getattr(request, "param", "plain") == "TLS")
    yield started
    with contextlib.suppress(OSError):
        started.link.send({"do": "stop"})
    started.instances.bury(started.link)
    started.instances.tidy()
    started.public.close()
    assert not list((tmp_path / "edge").iterdir())


def test_each_side_proves_that_it_knows_the_key(edge):
    assert edge.link.address == edge.public.getsockname()
    assert edge.link.public.getsockname() == edge.public.getsockname()
    assert edge.link.build == edge.instances.build
    with contextlib.closing(edge.open()) as again:
        assert again.process == edge.link.process


def test_who_does_not_hold_the_keepers_lock_is_refused(edge, lock):
    fcntl.flock(lock, fcntl.LOCK_UN)
    with pytest.raises((EOFError, ConnectionError)):
        edge.open()
    fcntl.flock(lock, fcntl.LOCK_EX)
    edge.open().close()


def test_a_keeper_with_another_key_is_refused(edge):
    with pytest.raises((EOFError, ConnectionError)):
        edge.open("1" * 64)


def test_an_edge_with_another_key_is_refused(tmp_path):
    """Its proof cannot be a repetition of the keeper's, which is for another role."""
    listener = unix_sockets.listen(tmp_path, CONTROL)

    def pretend():
        connection, _ = listener.accept()
        with connection:
            connection.sendall(wire.encode({"version": 1, "nonce": wire.nonce()}))
            (told,) = wire.Frames().feed(connection.recv(65536))
            claims = {"pid": 1, "build": "b", "address": ["x", 1]}
            connection.sendall(wire.encode({"proof": told["proof"]} | claims))

    thread = threading.Thread(target=pretend)
    thread.start()
    with pytest.raises(wire.WireError, match="does not know the key"):
        Link.open(tmp_path, "0" * 64, within=PATIENCE)
    thread.join()
    listener.close()


def test_clients_wait_until_routes_and_sessions_are_known(edge):
    """So after the end of an edge, the next one does not refuse what the last one served."""
    got = []
    thread = threading.Thread(target=lambda: got.append(edge.get(TOKEN)))
    thread.start()
    # The edge has handled the connection, as far as it ever will before it serves.
    edge.open().close()
    assert got == []
    edge.link.send(everything([ROUTE], []))
    thread.join(PATIENCE)
    assert got == [502]


def test_keeper_that_shares_the_listening_socket_does_not_have_the_edge_wait(edge):
    """A duplicate of the socket that waits would have it wait for a connection, in its loop."""
    edge.link.send(everything([], []))
    assert edge.get(TOKEN) == 404
    with contextlib.closing(edge.open()) as link, link.public.dup():
        assert [edge.get(TOKEN) for _ in range(3)] == [404] * 3


def test_routes_are_replaced_changed_and_removed(edge):
    edge.link.send(everything([ROUTE], []))
    assert (edge.get(TOKEN), edge.get(TOKEN, "other")) == (502, 404)
    edge.link.send({"do": "route", "route": ROUTE | {"server": "other"}})
    edge.link.send({"do": "unroute", "server": "lab"})
    edge.link.send({"do": "unroute", "server": "lab"})
    until(lambda: (edge.get(TOKEN), edge.get(TOKEN, "other")) == (404, 502), what="changed routes")
    edge.link.send(everything([], []))
    until(lambda: edge.get(TOKEN, "other") == 404, what="the end of all routes")


def test_routes_to_servers_that_may_run_stay_if_the_generation_is_the_same(edge):
    """As after a restart of the keeper, until it has found them."""
    others = [ROUTE | {"server": name, "generation": 2} for name in ("older", "gone")]
    told = everything([ROUTE, *others], [])
    edge.link.send(told)
    assert [edge.get(TOKEN, name) for name in ("lab", "older", "gone")] == [502] * 3
    edge.link.send(told | {"routes": [], "kept": {"lab": 1, "older": 3, "never": 1}})
    until(lambda: edge.get(TOKEN, "gone") == 404, what="other routes")
    assert [edge.get(TOKEN, name) for name in ("lab", "older", "never")] == [502, 404, 404]


def test_sessions_are_replaced_added_and_ended(edge):
    edge.link.send(everything([ROUTE], []))
    assert edge.get(COOKIE) == 401
    edge.link.send({"do": "sessions", "begun": [SESSION], "ended": []})
    until(lambda: edge.get(COOKIE) == 502, what="the session")
    edge.link.send({"do": "sessions", "begun": [], "ended": [SESSION["digest"], "none"]})
    until(lambda: edge.get(COOKIE) == 401, what="the end of the session")
    edge.link.send(everything([ROUTE], [SESSION]))
    until(lambda: edge.get(COOKIE) == 502, what="the session again")
    edge.link.send(everything([ROUTE], []))
    until(lambda: edge.get(COOKIE) == 401, what="no sessions")


def reported(edge):
    """Return the last report of an edge."""
    with contextlib.suppress(TimeoutError):
        edge.link.receive()
    return edge.link.heard.report


def test_it_reports_what_it_does(edge):
    edge.link.send(everything([ROUTE], []))
    assert (edge.get(TOKEN), edge.get({}), edge.get(TOKEN)) == (502, 401, 502)
    counted = {("lab", "5xx"): 2, ("edge", "4xx"): 1}
    until(lambda: reported(edge).answers == counted, what="the report of three answers")


def test_it_answers_at_known_host_names_only(edge):
    edge.link.send(everything([ROUTE], [], hosts=["*.example.org"]))
    known = [edge.get(TOKEN | {"Host": host}) for host in ("x", "a.example.org:1", "[::1]:80")]
    others = [edge.get(TOKEN | {"Host": host}) for host in ("example.org", "a.example.com")]
    assert (known, others) == ([502] * 3, [421] * 2)


def test_it_logs_answers_if_the_keeper_wants_it(edge):
    log = edge.instances.access_log
    edge.link.send(everything([ROUTE], [], access_log=True))
    edge.get(TOKEN | {"X-Request-Id": "first"})
    until(lambda: log.size, what="the access log")
    (line,) = log.tail(None)
    entry = json.loads(line)
    assert (entry["request_id"], entry["server"], entry["status"]) == ("first", "lab", 502)
    edge.link.send(everything([], []))
    unlogged = TOKEN | {"X-Request-Id": "unlogged"}
    until(lambda: edge.get(TOKEN) == 404, what="the next command")
    assert edge.get(unlogged) == 404
    edge.link.send({"do": "stop"})
    until(lambda: not alive(edge.link.process.pid), what="the edge to end")
    assert "unlogged" not in "".join(log.tail(None))
    assert (log.path.stat().st_mode & 0o777) == 0o600


def test_visits_of_browsers_with_a_session_are_told(edge):
    def visits(server="lab"):
        return edge.link.ask(edge.instances.key(), "visits", server, within=PATIENCE)

    edge.link.send(everything([ROUTE], [SESSION]))
    assert (edge.get(TOKEN), visits()) == (502, {"open": 0, "ago": None})
    assert edge.get(COOKIE) == 502
    found = visits()
    assert (found["open"], 0 <= found["ago"] <= PATIENCE) == (0, True)
    assert visits("other") == {"open": 0, "ago": None}


@pytest.mark.parametrize("command", ["stop", "drain"])
def test_it_ends_when_told_to(edge, command):
    edge.link.send(everything([], []))
    assert edge.get(TOKEN) == 404
    edge.link.send({"do": command})
    until(lambda: not alive(edge.link.process.pid), what="the edge to end")
    # Drained or not, it has given up the address; this process still has it.
    assert closed(edge.link)


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"do": "dance"},
        {"do": "all", "domain": "", "routes": [ROUTE]},
        everything([ROUTE], [SESSION | {"expires_at": "never"}]),
        {"do": "route", "route": ROUTE | {"port": 0}},
        {"do": "route", "route": ROUTE | {"server": "../x"}},
        {"do": "route", "route": ROUTE | {"host": 1}},
        {"do": "route", "route": [ROUTE]},
        {"do": "sessions", "begun": [SESSION | {"digest": "x"}], "ended": []},
        {"do": "sessions", "begun": [SESSION | {"user": ""}], "ended": []},
        {"do": "unroute", "server": 1},
        {"do": "certificate", "chain": "", "key": "", "hsts": True},
        {"do": "trust", "proxies": ["10.0.0.1/8"]},
        {"do": "trust", "proxies": "10.0.0.1"},
    ],
)
def test_a_bad_command_ends_the_connection_and_changes_nothing(edge, bad):
    edge.link.send(everything([ROUTE], [SESSION]))
    with contextlib.closing(edge.open()) as other:
        other.send(bad)
        assert closed(other)
    assert (edge.get(COOKIE), edge.get(TOKEN, "other")) == (502, 404)


WITH_TLS = pytest.mark.parametrize("edge", ["TLS"], indirect=True)


@pytest.fixture
def certificate(authority):
    leaf = authority.issue_cert("127.0.0.1")
    chain, key = leaf.cert_chain_pems[0].bytes(), leaf.private_key_pem.bytes()
    return {"do": "certificate", "chain": chain.decode(), "key": key.decode(), "hsts": True}


@pytest.fixture
def healthz(edge, authority):
    """Return a function that probes the edge with TLS."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    host, port = edge.public.getsockname()
    url = f"https://{host}:{port}/edge/healthz"
    return lambda: httpx.get(url, verify=context, trust_env=False, timeout=PATIENCE).status_code


@WITH_TLS
def test_edge_with_tls_serves_nothing_before_it_has_a_certificate(edge, certificate, healthz):
    with contextlib.closing(edge.open()) as other:
        assert other.secure
        other.send(everything([], []))
        assert closed(other)
    edge.link.send(certificate)
    edge.link.send(everything([], []))
    assert healthz() == 200


@WITH_TLS
def test_unusable_certificate_is_refused_and_the_one_before_stays(edge, certificate, healthz):
    edge.link.send(certificate)
    edge.link.send(everything([], []))
    assert healthz() == 200
    for bad in ({"key": ""}, {"chain": "nonsense"}):
        with contextlib.closing(edge.open()) as other:
            other.send(certificate | bad)
            assert closed(other)
    assert healthz() == 200


def test_a_command_before_the_proof_is_none(edge):
    with unix_sockets.connect(edge.link.directory, CONTROL, timeout=PATIENCE) as connection:
        connection.sendall(wire.encode({"do": "stop"}))
        with contextlib.suppress(ConnectionError):
            while connection.recv(65536):
                pass
    edge.open().close()


@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3)),
    st.lists(st.integers(1, 9), min_size=1),
)
@settings(deadline=None)
def test_frames_arrive_whole_however_they_are_split(messages, sizes):
    data = b"".join(map(wire.encode, messages))
    frames, received, at, turn = wire.Frames(), [], 0, 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        received += frames.feed(data[at : at + size])
        at, turn = at + size, turn + 1
    assert received == messages


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff\xff", b"\0\0\0\2[]", b"\0\0\0\1{", b"\0\0\0\2\xff\xff"]
)
def test_what_is_no_frame_is_refused(data):
    with pytest.raises(wire.WireError):
        wire.Frames().feed(data)
