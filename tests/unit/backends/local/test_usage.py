"""Usage of real processes, with a control group and without one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from harness import kill_all, processes_where, until
from labkeeper.backends.local import usage
from labkeeper.backends.local.limits import ControlGroups
from labkeeper.backends.local.processes import Process, carries
from labkeeper.core.spec import ServerName
from labkeeper.forkserver.marks import MARK

MIB = 2**20
NAME = ServerName("measured")
PARENT = """
import subprocess, sys, time
hold = "import time; data = bytearray(64 << 20); print(len(data), flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", hold])
# One that has left its parent, and is known by its mark alone.
subprocess.Popen(["sh", "-c", "(sleep 600) & exit"]).wait()
sys.stdin.read()
child.kill(); child.wait()
print("killed", flush=True)
time.sleep(600)
"""


@pytest.fixture
def server(tmp_path):
    """A process with a child that holds memory, and another one that has been orphaned."""
    server_dir = tmp_path / NAME
    running = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, MARK: str(server_dir)},
    )
    assert running.stdout.readline().strip() == str(64 * MIB)
    yield running
    kill_all(
        processes_where(
            lambda process: (
                process.environ().get(MARK) == str(server_dir) and process.pid != os.getpid()
            )
        )
    )
    running.wait()
    running.stdin.close()
    running.stdout.close()


class NoGroups(ControlGroups):
    """A machine on which we cannot create control groups."""

    def _of(self, name):
        return []


def settled(meter, server, count):
    return settled_as(meter, Process.find(server.pid), count)


def settled_as(meter, process, count):
    def measured():
        found = meter.measure({NAME: process}).get(NAME)
        return found if found is not None and found.processes == count else None

    return until(measured, what=f"a measurement of {count} processes")


def test_without_groups_processes_are_found_by_parent_and_by_mark(server, tmp_path):
    """All processes are added up, and CPU time stays monotonic when one ends."""
    meter = usage.Meter(NoGroups(tmp_path), tmp_path)
    before = settled(meter, server, 3)
    assert 64 * MIB < before.memory < 200 * MIB
    assert before.threads >= 3
    assert before.cpu_seconds > 0
    assert before.proportional is None or 64 * MIB < before.proportional < before.memory
    server.stdin.close()
    assert server.stdout.readline() == "killed\n"
    after = settled(meter, server, 2)
    assert after.memory < before.memory - 60 * MIB
    assert after.cpu_seconds >= before.cpu_seconds
    server.kill()
    server.wait()
    assert settled_as(meter, Process(server.pid, "0"), 1).memory < MIB * 20


FORKED_AHEAD = """
import sys
from labkeeper.forkserver.marks import mark
print("there", flush=True)
mark(sys.stdin.readline().strip())
print("marked", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows another mark later")
def test_process_that_gets_its_mark_late_is_counted_from_then_on(server, tmp_path):
    server_dir = str(tmp_path / NAME)
    ahead = subprocess.Popen(
        [sys.executable, "-c", FORKED_AHEAD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, MARK: " " * len(server_dir)},
    )
    try:
        assert ahead.stdout.readline() == "there\n"
        meter = usage.Meter(NoGroups(tmp_path), tmp_path)
        for _ in range(3):
            settled(meter, server, 3)
        print(server_dir, file=ahead.stdin, flush=True)
        assert ahead.stdout.readline() == "marked\n"
        assert settled(meter, server, 4)
    finally:
        ahead.kill()
        ahead.communicate()


@pytest.mark.root
def test_a_process_of_another_user_with_the_servers_mark_is_not_counted(server, tmp_path):
    (tmp_path / NAME / "jupyter").mkdir(parents=True)
    mark = {MARK: str(tmp_path / NAME)}
    forged = subprocess.Popen(
        ["sleep", "600"], env={**os.environ, **mark}, user=1234, group=1234, extra_groups=[]
    )
    try:
        until(lambda: carries(forged.pid, MARK))
        meter = usage.Meter(NoGroups(tmp_path), tmp_path)
        settled(meter, server, 3)
        # Young processes are inspected a second time.
        assert settled(meter, server, 3)
    finally:
        forged.kill()
        forged.wait()


def test_with_a_group_its_members_are_measured(server, tmp_path):
    groups = ControlGroups(tmp_path)
    groups.hold(NAME, server.pid)
    if server.pid not in groups.counted(NAME).members:
        pytest.skip("cannot create control groups on this machine")
    try:
        measured = settled(usage.Meter(groups, tmp_path), server, 2)
        assert measured.memory > 64 * MIB
        assert measured.threads >= 2
        assert measured.cpu_seconds >= 0
    finally:
        groups.kill(NAME)
        until(lambda: not groups.counted(NAME).members, what="all processes in the group to end")
        groups.remove(NAME)


def test_shared_memory_is_rarely_measured_and_cpu_time_is_monotonic(server, tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(usage, "_proportional", lambda pids: looks.append(1) or 5)
    meter = usage.Meter(NoGroups(tmp_path), tmp_path)
    process, last = Process.find(server.pid), 0.0
    for _ in range(5):
        measured = meter.measure({NAME: process})[NAME]
        assert measured.proportional == 5
        assert measured.cpu_seconds >= last
        last = measured.cpu_seconds
    assert len(looks) == 1
