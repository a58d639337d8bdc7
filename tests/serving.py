"""A real WSGI server around a test application, and clients that talk to it over raw sockets."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import socket
import threading
import time

from harness import PATIENCE, until
from labkeeper.api.wsgi.channel import Channel
from labkeeper.identity.peers import UNREAD


class StandingClock:
    """The clock behind a server's timeouts. It stands still until a test advances it."""

    def __init__(self):
        self._now = time.monotonic()

    def monotonic(self):
        return self._now

    def jump(self, seconds):
        self._now += seconds


class Served:
    """A test application behind a real server, with the connections that tests open to it."""

    def __init__(self, server, listener, door):
        self.server, self.door = server, door
        self.address = listener.getsockname()
        self.opened = []

    def connect(self):
        connection = socket.create_connection(self.address, timeout=PATIENCE)
        self.opened.append(connection)
        return connection

    def connect_locally(self):
        connection = socket.socket(socket.AF_UNIX)
        self.opened.append(connection)
        connection.settimeout(PATIENCE)
        connection.connect(str(self.door))
        return connection

    @property
    def inside(self):
        """How many connections the server has."""
        return sum(isinstance(one, Channel) for one in list(self.server._map.values()))

    def settle(self, count):
        until(lambda: self.inside == count, what=f"the server to have {count} connections")

    def close(self):
        for connection in self.opened:
            connection.close()
        self.server.close()


HOLD = threading.Event()
FILE = 3 * 2**20
"""Bytes."""


def application(environ, start_response):
    """Block, send a large response or events, or report the caller and its upload, by path."""
    path = environ["PATH_INFO"]
    if path == "/hold":
        HOLD.wait(PATIENCE)
    if path == "/large":
        body = [bytes(2**20)] * 40
    elif path == "/file":
        body = environ["wsgi.file_wrapper"](io.BytesIO(bytes(FILE)))
    elif path == "/events":
        body = (b"data: %d\n\n" % number for number in range(5))
    else:
        known = {
            name: environ.get(name)
            for name in ("wsgi.url_scheme", "REMOTE_ADDR", "HTTP_LABKEEPER_PEER")
        }
        peer = environ.get("labkeeper.peer")
        sent = environ["wsgi.input"].read()
        known["unread"] = environ.get(UNREAD, False)
        known |= {
            "peer": peer and [peer.pid, peer.uid, peer.gid],
            "size": len(sent),
            "digest": hashlib.sha256(sent).hexdigest(),
        }
        body = [json.dumps(known).encode()]
    start_response("200 OK", [("Content-Type", "application/octet-stream")])
    return body


def ask(connection, path="/", headers=(), method="GET", body=b""):
    head = [
        f"{method} {path} HTTP/1.1",
        "Host: x",
        *headers,
        *([f"Content-Length: {len(body)}"] if body else []),
    ]
    connection.sendall("\r\n".join([*head, "", ""]).encode() + body)
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.status, answer.read()


def ask_json(connection, **options):
    status, body = ask(connection, **options)
    assert status == 200
    return json.loads(body)


def is_closed(connection):
    connection.settimeout(PATIENCE)
    try:
        return connection.recv(65536) == b""
    except ConnectionResetError:
        return True
