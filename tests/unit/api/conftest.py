from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from labkeeper.api.wsgi import channel, server
from labkeeper.api.wsgi.server import WsgiServer
from serving import HOLD, Served, StandingClock, application


@pytest.fixture
def clock(monkeypatch):
    """The clock of servers created after it."""
    made = StandingClock()
    for module in (channel, server):
        monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def serve(tmp_path):
    """Serve the test application on a TCP and a Unix socket."""
    made = []

    def make(certificate=None, max_body=2**20, **options):
        HOLD.clear()
        listener = socket.create_server(("127.0.0.1", 0))
        path = Path(os.path.relpath(tmp_path / "keeper.sock"))  # pytest's path may be too long.
        unix_listener = socket.socket(socket.AF_UNIX)
        unix_listener.bind(str(path))
        server = WsgiServer(
            application,
            [listener, unix_listener],
            threads=8,
            max_body=max_body,
            certificate=certificate,
            **options,
        )
        server.start()
        made.append(Served(server, listener, path))
        return made[-1]

    yield make
    HOLD.set()
    for served in made:
        served.close()
