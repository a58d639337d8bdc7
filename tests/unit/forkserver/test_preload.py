"""A fork server sees what it must not share with the servers that it forks."""

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
def test_what_a_fork_would_share_is_seen(made):
    before = preload._shared_things()
    end = made()
    assert preload._shared_things() - before
    end()
    # A thread leaves the kernel's list a moment after it was joined.
    until(lambda: not preload._shared_things() - before)


def test_a_file_that_is_only_open_is_no_harm():
    before = preload._shared_things()
    with Path(__file__).open():
        assert not preload._shared_things() - before


@pytest.mark.parametrize(
    ("parent", "code"), [(os.getpid, 7), (os.getppid, 1)], ids=["lives", "has ended"]
)
def test_a_rehearsal_goes_on_only_as_long_as_its_fork_server_lives(monkeypatch, parent, code):
    """Also where that ended before it could ask to be told."""
    monkeypatch.setattr(preload, "enter", lambda _: os._exit(7))
    expected = parent()
    pid = os.fork()
    if pid == 0:
        preload._perform(NO_LAUNCH, -1, expected)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
