"""What a process must not have when it is forked."""

from __future__ import annotations

import asyncio
import mmap
import os
import selectors
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from harness import until
from labkeeper.forkserver.spoilers import spoilers


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


def devices():
    device = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
    return lambda: os.close(device)


def shared_memory():
    shared = mmap.mmap(-1, mmap.PAGESIZE)
    return shared.close


@pytest.mark.parametrize(
    "made", [loops, polls, sockets, pipes, threads, programs, devices, shared_memory]
)
def test_resources_that_a_fork_would_share_are_detected(made):
    before = spoilers()
    end = made()
    assert spoilers() - before
    end()
    # A joined thread stays in the kernel's list for a moment.
    until(lambda: not spoilers() - before)


def test_an_open_file_is_harmless():
    before = spoilers()
    with Path(__file__).open():
        assert not spoilers() - before


THREADS = """
import os, sys
sys.path.insert(0, sys.argv[1])
from labkeeper.forkserver.spoilers import spoilers
before = spoilers()
import numpy
started = len(os.listdir("/proc/self/task"))
assert not spoilers() - before, spoilers()
square = numpy.ones((600, 600))
assert (square @ square == 600).all()
print(started, len(os.listdir("/proc/self/task")))
"""


def test_threads_of_a_library_that_end_at_a_fork_are_no_obstacle():
    """They are started again when they are needed."""
    source = Path(__file__).parents[3] / "src"
    told = subprocess.run(
        [sys.executable, "-c", THREADS, source], capture_output=True, text=True, check=True
    )
    started, again = map(int, told.stdout.split())
    assert again == started


def test_thread_that_is_prepared_for_forks_is_no_obstacle():
    before = spoilers()

    def run(name):
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
        named.set()
        end.wait()

    for name, expected in (("jemalloc_bg_thd", 0), ("other", 1)):
        named, end = threading.Event(), threading.Event()
        thread = threading.Thread(target=run, args=(name,))
        thread.start()
        named.wait()
        assert len(spoilers() - before) == expected
        end.set()
        thread.join()
