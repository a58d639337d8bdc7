"""Foreground programs of terminals, from the process table."""

from __future__ import annotations

import os
import pty
import signal
import sys
import time

import pytest

from harness import until
from labkeeper.backends.local import terminals
from labkeeper.backends.local.processes import Process
from labkeeper.backends.local.terminals import foregrounds
from labkeeper.forkserver import marks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def ticks():
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


@pytest.fixture
def shells():
    """Open terminals with an interactive shell, as children of this process."""
    opened = []

    def open_one():
        pid, master = pty.fork()
        if pid == 0:
            os.execv("/bin/sh", ["sh", "-i"])
        opened.append((pid, master))
        # Linux counts ages in ticks, and the next shell must be younger.
        born = ticks()
        until(lambda: ticks() > born, what="the next tick")
        return master

    yield open_one
    for pid, master in opened:
        os.kill(pid, signal.SIGKILL)
        os.close(master)
        os.waitpid(pid, 0)


def ours():
    return foregrounds(Process.find(os.getpid()))


def test_each_terminal_has_its_foreground_program_oldest_first(shells):
    before = ours()
    first, second = shells(), shells()
    until(lambda: ours() == [*before, "", ""], what="both shells to be idle")
    os.write(second, b"sleep 60\n")
    until(lambda: ours() == [*before, "", "sleep"], what="one shell to run a program")
    os.write(first, b"sleep 60 &\n")
    os.write(second, b"\x03")
    until(
        lambda: ours() == [*before, "", ""],
        what="the foreground program to end; the one in the background does not count",
    )


def test_the_programs_of_an_ended_process_or_on_another_system_are_unknown(monkeypatch):
    assert foregrounds(Process(2**22 + 1, "never")) is None
    monkeypatch.setattr(terminals.sys, "platform", "darwin")
    assert ours() is None


def test_a_program_whose_first_process_has_ended_still_counts():
    gone = marks.stat(os.getpid())._replace(
        group=1, session=1, terminal=5, foreground=2**22 + 1, started="0"
    )
    assert terminals._program(gone) == "a program"
