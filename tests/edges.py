"""A real edge in a thread, before a scripted keeper and scripted Labs.

Every error in its loop is recorded, as is every request that h11 refuses. `Edge.close` fails if
there is any, or if a connection or a task is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import socket
import ssl
import threading
import time

from edge_peers import Scripted, Visitor
from harness import PATIENCE, until
from labkeeper.edge.client import Client
from labkeeper.edge.hosts import Hosts
from labkeeper.edge.limits import Limits
from labkeeper.edge.proxy import Proxy
from labkeeper.edge.routes import Route
from labkeeper.edge.tls import TlsConnection


class Edge:
    """The edge, in the loop of a thread. Its clock can be advanced; nothing sweeps but `sweep`."""

    def __init__(self, directory, most=1000, buffers=None, context=None, **limits):
        """With a `context` it speaks TLS."""
        self.context = context
        self.errors = []
        self.keeper = Scripted(self.errors)
        self.labs = {}
        self._ahead = 0.0
        self.clients = []
        self.socket = directory / "keeper.sock"
        self.loop = asyncio.SelectorEventLoop()
        self.loop.time = lambda: time.monotonic() + self._ahead
        self.loop.set_exception_handler(lambda _loop, context: self.errors.append(context))
        self.limits = dataclasses.replace(Limits(), **limits)
        self._log = (directory / "access.log").open("ab+", buffering=0)
        self.proxy = Proxy(
            str(self.socket),
            limits=self.limits,
            most=most,
            loop=self.loop,
            log_file=self._log.fileno(),
        )
        self.proxy.access_log.on = True
        self.proxy.large_bodies.longest = 2**20
        self.proxy.hosts = Hosts(["labs.example.org", "*.labs.example.org"])
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        if buffers is not None:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
        self.server = self.wait(self._serve())
        self.address = self.server.sockets[0].getsockname()

    async def _serve(self):
        return await self.loop.create_server(self._connection, sock=self._listener, backlog=1024)

    def _connection(self):
        client = functools.partial(Client, self.proxy)
        return client() if self.context is None else TlsConnection(self.proxy, self.context, client)

    def wait(self, coroutine):
        """Run a coroutine in the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE)

    def call(self, act, *arguments):
        """Call a function in the loop."""

        async def do():
            return act(*arguments)

        return self.wait(do())

    def start_keeper(self):
        async def listen():
            return await self.loop.create_unix_server(self.keeper.visit, str(self.socket))

        self.keeper.listener = self.wait(listen())
        return self.keeper

    def add_lab(self, name="lab", generation=1, buffers=None):
        """Start a Lab, and route requests to it."""
        lab = Scripted(self.errors)
        listener = socket.socket()
        if buffers is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
        listener.bind(("127.0.0.1", 0))

        async def listen():
            return await self.loop.create_server(lab.visit, sock=listener)

        lab.listener = self.wait(listen())
        port = listener.getsockname()[1]
        route = Route(name, generation, "127.0.0.1", port, f"/servers/{name}/", "key")
        self.call(self.proxy.routes.set, route)
        self.labs[name, generation] = lab
        return lab

    def jump(self, seconds):
        """Advance the clock, and look at the connections' deadlines."""

        def advance():
            self._ahead += seconds
            self.proxy.sweep()

        self.call(advance)

    def connect(self, buffers=None, source="", name="x", plain=False):
        """Return a new client, whose address is `source`.

        It uses TLS if the edge does, and checks the edge's name.
        """
        client = Visitor(self.address, buffers, source)
        if self.context is not None and not plain:
            context = ssl.create_default_context()
            self.authority.configure_trust(context)
            client.socket = context.wrap_socket(
                client.socket, server_hostname=name, suppress_ragged_eofs=False
            )
        self.clients.append(client)
        return client

    def send(self, data):
        """Return a new client that has sent bytes."""
        client = self.connect()
        client.send(data)
        return client

    @property
    def upstreams(self):
        return [self.keeper, *self.labs.values()]

    @property
    def requests(self):
        """All requests that have reached the keeper or a Lab."""
        return [request for server in self.upstreams for request in server.requests]

    @property
    def received(self):
        return b"".join(server.received for server in self.upstreams)

    @property
    def inside(self):
        """The edge's clients, without those that have not finished their handshake."""
        return self.call(lambda: [one for one in self.proxy._clients if isinstance(one, Client)])

    @property
    def log(self):
        """The entries of the access log."""
        self.call(self.proxy.access_log.write)
        self._log.seek(0)
        return [json.loads(line) for line in self._log]

    def settle(self, count):
        """Wait until this many clients are connected."""
        until(lambda: self.call(lambda: self.proxy.open) == count, what=f"{count} clients")

    def _left(self):
        """Return the connections of the keeper and the Labs that are open."""
        open_ = [visit for server in self.upstreams for visit in server.visits if not visit.closed]
        for visit in open_:
            if not visit.transport.is_closing():
                visit.transport.set_write_buffer_limits()
                visit._flood = None
                visit.transport.resume_reading()
        return len(open_)

    def close(self):
        """End, and check that nothing is left."""
        for client in self.clients:
            client.close()
        try:
            self.call(self.server.close)
            self.call(self.proxy.close)
            for server in self.upstreams:
                if server.listener is not None:
                    self.call(server.listener.close)
            until(lambda: not self.call(self._left), what="the connections to be closed")
            # The loop's own pipe, and its own task.
            until(lambda: self.call(lambda: len(self.loop._selector.get_map())) == 1)
            until(lambda: self.call(lambda: len(asyncio.all_tasks())) == 1)
        finally:
            for visit in [visit for server in self.upstreams for visit in server.visits]:
                self.call(visit.transport.abort)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self._log.close()
            self.loop.close()
        assert self.errors == [], self.errors


@contextlib.contextmanager
def edge_in(directory, **options):
    """Run an edge."""
    edge = Edge(directory, **options)
    try:
        yield edge
    finally:
        edge.close()
