"""The WSGI server: its sockets, the peers of its callers, and its threads."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading

import pytest

from harness import PATIENCE, no_descriptors, until
from labkeeper.api.concurrency import ConcurrencyLimit, reserve
from labkeeper.api.wsgi import WsgiServer
from labkeeper.core.errors import BackendUnavailable
from labkeeper.identity.peers import PEER, Listener, identify

THREADS = 4


class Served:
    """A real server around a test application, on a TCP socket and two Unix sockets."""

    def __init__(self, directory, stack):
        self.hold = threading.Event()
        stack.callback(self.hold.set)
        self._stack = stack
        self._tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.paths = [os.path.relpath(directory / name) for name in ("own.sock", "edge.sock")]
        own, edge = (
            stack.enter_context(kind(socket.AF_UNIX)) for kind in (Listener, socket.socket)
        )
        for listener, path in zip((own, edge), self.paths, strict=True):
            listener.bind(path)
        self.server = WsgiServer(
            self._answer, [self._tcp, own], threads=THREADS, max_body=1024, behind_edge=edge
        )
        self.server.start()
        stack.callback(self.server.close)

    def _answer(self, environ, start_response):
        if environ["PATH_INFO"] == "/hold":
            self.hold.wait(PATIENCE)
        peer = environ.get(PEER)
        told = {
            name: environ.get(name)
            for name in ("wsgi.url_scheme", "REMOTE_ADDR", "HTTP_LABKEEPER_PEER")
        }
        told["peer"] = peer and [peer.pid, peer.uid, peer.gid]
        told["size"] = len(environ["wsgi.input"].read())
        body = b"x" * 5_000_000 if environ["PATH_INFO"] == "/large" else json.dumps(told).encode()
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    def connect(self, path=None):
        if path is None:
            made = socket.create_connection(self._tcp.getsockname(), timeout=PATIENCE)
        else:
            made = socket.socket(socket.AF_UNIX)
            made.settimeout(PATIENCE)
            made.connect(path)
        return self._stack.enter_context(made)


@pytest.fixture
def served(tmp_path):
    with contextlib.ExitStack() as stack:
        yield Served(tmp_path, stack)


def ask(connection, path="/", headers=(), body=b""):
    head = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]
    connection.sendall("\r\n".join(head).encode() + body)
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    assert answer.status == 200
    return json.loads(answer.read())


FORGED = ["labkeeper.peer: 1", "Labkeeper-Peer: root", "labkeeper_peer: 1"]


def test_peers_are_identified_on_the_keepers_own_socket_only(served):
    for connection in (served.connect(), served.connect(served.paths[1])):
        told = ask(connection, headers=FORGED)
        assert (told["peer"], told["HTTP_LABKEEPER_PEER"]) == (None, "root")
    told = ask(served.connect(served.paths[0]), headers=FORGED)
    assert told["peer"] == [os.getpid(), os.getuid(), os.getgid()]


def test_only_the_edge_is_believed_about_clients(served):
    headers = ["X-Forwarded-For: 192.0.2.1", "X-Forwarded-Proto: https"]
    told = ask(served.connect(served.paths[1]), headers=headers)
    assert (told["REMOTE_ADDR"], told["wsgi.url_scheme"]) == ("192.0.2.1", "https")
    for path, address in ((served.paths[0], "localhost"), (None, "127.0.0.1")):
        told = ask(served.connect(path), headers=headers)
        assert (told["REMOTE_ADDR"], told["wsgi.url_scheme"]) == (address, "http")


def test_a_connection_that_outlives_its_process_has_no_peer(served):
    ours, its = socket.socketpair()
    code = (
        "import socket, sys\n"
        "connection = socket.socket(socket.AF_UNIX)\n"
        "connection.connect(sys.argv[1])\n"
        "socket.send_fds(socket.socket(fileno=int(sys.argv[2])), [b'x'], [connection.fileno()])\n"
        "sys.stdin.read()\n"
    )
    with ours, its:
        child = subprocess.Popen(
            [sys.executable, "-c", code, served.paths[0], str(its.fileno())],
            pass_fds=[its.fileno()],
            stdin=subprocess.PIPE,
        )
        ((descriptor,), uid) = socket.recv_fds(ours, 1, 1)[1], os.getuid()
    with socket.socket(fileno=descriptor) as connection:
        assert ask(connection)["peer"] == [child.pid, uid, os.getgid()]
        child.communicate()
        assert ask(connection)["peer"] is None


def test_a_process_that_ended_before_it_was_accepted_is_not_a_peer(tmp_path):
    path = os.path.relpath(tmp_path / "door")
    with Listener(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        code = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, path], check=True)
        connection, _ = listener.accept()
        with connection:
            assert connection.peer() is None


def test_a_connection_that_cannot_be_identified_is_closed(tmp_path):
    with Listener(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as caller:
        listener.bind(os.path.relpath(tmp_path / "door"))
        listener.listen()
        caller.connect(os.path.relpath(tmp_path / "door"))
        with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
            listener.accept()
    with socket.socket() as unconnected:
        assert identify(unconnected)() is None


def test_a_body_is_read_to_its_end_before_it_is_refused(served):
    """The application refuses it by its length; waitress would close the connection at once."""
    assert ask(served.connect(), body=bytes(1_000_000))["size"] == 1_000_000


def test_callers_that_do_not_read_hold_no_thread(served):
    crowd = [served.connect() for _ in range(3 * THREADS)]
    for connection in crowd:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1)
    until(lambda: not served.server._threads.active_count, what="all threads to be idle")
    assert ask(served.connect())["size"] == 0
    for connection in crowd:
        connection.close()
    # Waitress closes the files of answers only with their connections.
    until(lambda: len(served.server._servers[0].active_channels) == 1, what="the crowd to leave")


def test_a_closed_server_leaves_neither_threads_nor_connections(tmp_path):
    with contextlib.ExitStack() as stack:
        served = Served(tmp_path, stack)
        connection = served.connect()
        ask(connection)
        outlives = connection.dup()
        threads = [one for one in threading.enumerate() if one.name.startswith("waitress")]
        assert len(threads) == THREADS
    with outlives:
        assert outlives.recv(1) == b""
    until(lambda: not any(one.is_alive() for one in threads), what="the threads to end")


def test_without_a_thread_starting_fails(tmp_path, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(BackendUnavailable, match="--pids-limit"),
    ):
        Served(tmp_path, stack)


@pytest.mark.parametrize(("threads", "count"), [(4, 2), (16, 2), (64, 8), (128, 16)])
def test_some_threads_are_reserved_for_requests_that_do_not_wait(threads, count):
    assert reserve(threads) == count
    limit = ConcurrencyLimit(threads)
    assert sum(limit.acquire() for _ in range(2 * threads)) == threads - count
    limit.release()
    assert [limit.acquire(), limit.acquire()] == [True, False]
