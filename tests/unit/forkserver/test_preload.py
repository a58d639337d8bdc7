"""A fork server detects what its servers must not share."""

from __future__ import annotations

import asyncio
import os
import selectors
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from harness import until
from labkeeper.forkserver import preload
from labkeeper.forkserver.wire import Launch

NO_LAUNCH = Launch(
    server_dir="",
    title="",
    cwd="",
    env={},
    kernel_env={},
    umask=0o077,
    config={},
    user=None,
    cgroups=[],
    rlimits={},
    encrypt_kernels=False,
    zygote_cgroups=[],
    kernels_by="exec",
)


def loops():
    loop = asyncio.new_event_loop()
    return loop.close


def polls():
    return selectors.EpollSelector().close


def sockets():
    return socket.socket().close


def pipes():
    ends = os.pipe()
    return lambda: [os.close(end) for end in ends]


def threads():
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    return lambda: (end.set(), thread.join())


def programs():
    program = subprocess.Popen(["sleep", "300"])
    return lambda: (program.kill(), program.wait())


@pytest.mark.parametrize("made", [loops, polls, sockets, pipes, threads, programs])
def test_resources_that_a_fork_would_share_are_detected(made):
    before = preload._shared_things()
    end = made()
    assert preload._shared_things() - before
    end()
    # A joined thread stays in the kernel's list for a moment.
    until(lambda: not preload._shared_things() - before)


def test_an_open_file_is_harmless():
    before = preload._shared_things()
    with Path(__file__).open():
        assert not preload._shared_things() - before


@pytest.mark.parametrize(
    ("parent", "code"), [(os.getpid, 7), (os.getppid, 1)], ids=["lives", "has ended"]
)
def test_a_rehearsal_ends_with_its_fork_server(monkeypatch, parent, code):
    """Also if that ended before the rehearsal could subscribe to its end."""
    monkeypatch.setattr(preload, "enter", lambda _: os._exit(7))
    expected = parent()
    pid = os.fork()
    if pid == 0:
        preload._perform(NO_LAUNCH, (), -1, expected)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
