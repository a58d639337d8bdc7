"""A new kernel's first websocket waits for a status of the kernel, but not forever."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest
from traitlets import HasTraits, Unicode

from labkeeper.forkserver import websockets


class Kernel(HasTraits):
    execution_state = Unicode("starting")

    def __init__(self):
        super().__init__()
        self.channels = []

    def connect_shell(self):
        channel = SimpleNamespace(open=True)
        channel.close = lambda: setattr(channel, "open", False)
        self.channels.append(channel)
        return channel


class Connection:
    """A websocket connection whose kernel tells its state after so many requests."""

    def __init__(self, kernel, tells_at=None):
        self.kernel_manager = kernel
        self.session = self
        self.requests = 0
        self.prepared = False
        self.tells_at = tells_at

    async def prepare(self):
        self.prepared = True

    def connect(self):
        return "connected"

    def send(self, channel, kind):
        assert (channel.open, kind) == (True, "kernel_info_request")
        self.requests += 1
        if self.requests == self.tells_at:
            loop = asyncio.get_running_loop()
            loop.call_soon(setattr, self.kernel_manager, "execution_state", "idle")


def prepare(connection):
    asyncio.run(websockets.prompt(Connection).prepare(connection))
    assert connection.prepared


@pytest.mark.parametrize("tells_at", [1, 3])
def test_it_is_prepared_when_the_kernel_has_told_its_state(tells_at):
    kernel = Kernel()
    connection = Connection(kernel, tells_at)
    prepare(connection)
    assert connection.requests == tells_at
    assert [channel.open for channel in kernel.channels] == [False]


def test_a_kernel_whose_state_is_known_is_not_asked():
    kernel = Kernel()
    kernel.execution_state = "busy"
    connection = Connection(kernel)
    prepare(connection)
    assert (connection.requests, kernel.channels) == (0, [])


def test_a_kernel_that_never_tells_its_state_is_left_to_jupyter(monkeypatch):
    monkeypatch.setattr(websockets, "_FIRST_STATUS_SECONDS", 0.2)
    kernel = Kernel()
    begun = time.monotonic()
    prepare(Connection(kernel))
    assert time.monotonic() - begun >= 0.2
    assert [channel.open for channel in kernel.channels] == [False]


class Handler:
    def __init__(self, ws_connection):
        self.ws_connection = ws_connection
        self.without_delay = False

    def set_nodelay(self, value):
        assert self.ws_connection is not None
        self.without_delay = value


@pytest.mark.parametrize("ws_connection", [object(), None], ids=["is open", "has closed"])
def test_it_connects_also_if_the_browser_has_left(ws_connection):
    connection = Connection(Kernel())
    connection.websocket_handler = Handler(ws_connection)
    assert websockets.prompt(Connection).connect(connection) == "connected"
    assert connection.websocket_handler.without_delay == (ws_connection is not None)


def test_connections_without_a_method_to_prepare_get_none():
    class Plain:
        def connect(self):
            return "connected"

    assert not hasattr(websockets.prompt(Plain), "prepare")
