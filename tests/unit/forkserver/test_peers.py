"""The fork server checks its peers, and keeps nothing of their environments in memory."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys

import pytest

from harness import PATIENCE
from memory import OWN_MEMORY, hidden

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

LISTEN = (
    OWN_MEMORY
    + """
import os, socket, sys
from labkeeper.forkserver import peers

listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("listening", flush=True)
connection, _ = listener.accept()
peers.check(connection, os.geteuid(), os.getcwd())
wanted = [re.compile(pattern.encode()) for pattern in sys.argv[2:]]
print([any(pattern.search(content) for _, content in own_memory()) for pattern in wanted])
"""
)
ASK = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.recv(1)"


def test_nothing_of_a_peers_environment_stays_in_memory(tmp_path):
    """The environment of a root keeper has secrets, and forked servers inherit this memory."""
    path = os.path.relpath(tmp_path / "door")
    secret, control = secrets.token_hex(16), secrets.token_hex(16)
    listening = [sys.executable, "-c", LISTEN, path, hidden(secret), hidden(control)]
    known = os.environ | {"CONTROL": control}
    with subprocess.Popen(listening, env=known, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "listening\n"
        many = {f"SECRET{number}": f"{number}-{secret}" for number in range(100)}
        with subprocess.Popen([sys.executable, "-c", ASK, path], env=os.environ | many):
            # The process's own environment shows that the search works.
            assert server.communicate(timeout=PATIENCE)[0] == "[False, True]\n"
