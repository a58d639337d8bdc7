"""Who asks the fork server for servers is looked at, and nothing of what is seen stays."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys

import pytest

from harness import PATIENCE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

LISTEN = """
import ctypes, os, re, socket, sys
from labkeeper.backends.standalone import peers

class Piece(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]

def own_memory():
    libc = ctypes.CDLL(None, use_errno=True)
    for line in open("/proc/self/maps").read().splitlines():
        first, end = (int(number, 16) for number in line.split()[0].split("-"))
        content = ctypes.create_string_buffer(end - first)
        here, there = Piece(ctypes.addressof(content), end - first), Piece(first, end - first)
        if libc.process_vm_readv(os.getpid(), ctypes.byref(here), 1, ctypes.byref(there), 1, 0) > 0:
            yield content

listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("listening", flush=True)
connection, _ = listener.accept()
peers.check(connection)
# They do not hold what they find: they are in this memory themselves.
wanted = [re.compile(pattern.encode()) for pattern in sys.argv[2:]]
print([any(pattern.search(content) for content in own_memory()) for pattern in wanted])
"""
ASK = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.recv(1)"


def hidden(text):
    return "".join(f"[{letter}]" for letter in text)


def test_of_the_environments_of_who_asks_nothing_stays_in_memory(tmp_path):
    """A keeper of root has secrets there, and whatever stays is in each server that is forked."""
    path = os.path.relpath(tmp_path / "door")
    secret, control = secrets.token_hex(16), secrets.token_hex(16)
    listening = [sys.executable, "-c", LISTEN, path, hidden(secret), hidden(control)]
    known = os.environ | {"CONTROL": control}
    with subprocess.Popen(listening, env=known, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "listening\n"
        many = {f"SECRET{number}": f"{number}-{secret}" for number in range(100)}
        with subprocess.Popen([sys.executable, "-c", ASK, path], env=os.environ | many):
            # What it has in its own environment shows that the search finds what is there.
            assert server.communicate(timeout=PATIENCE)[0] == "[False, True]\n"
