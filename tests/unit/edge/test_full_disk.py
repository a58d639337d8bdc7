"""Edges on a disk that is full: they are started again, and found by the next keeper."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

import pytest
import structlog

from edge_peers import PROBE, Visitor
from harness import alive, until
from shortages import Disk

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(sys.platform != "linux", reason="the edge needs Linux"),
]


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path / "disk")
    yield made
    made.remove()


@pytest.fixture
def state_dir(disk):
    (disk.path / "logs").mkdir()
    return disk.path


def pid_of(edge):
    return edge._link.process.pid


def answers(edge):
    with contextlib.closing(Visitor(edge.public.getsockname())) as client:
        return client.ask(PROBE).status == 200


def fill(disk, what):
    """Leave no room for a byte or a file; with `no logs`, there are none either."""
    disk.fill()
    for log in (disk.path / "logs").glob("*.log"):
        with contextlib.suppress(OSError), log.open("ab", buffering=0) as stream:
            while True:
                stream.write(b"x")
        if what == "no logs":
            # If it were removed, the end of the edge would free an inode.
            log.rename(log.with_suffix(".moved"))
    disk.exhaust_inodes()


@pytest.mark.parametrize("what", ["logs", "no logs"])
def test_a_killed_edge_is_started_again(run, disk, what):
    with run() as edge, structlog.testing.capture_logs() as log:
        assert answers(edge)
        for _ in range(2):
            before = pid_of(edge)
            fill(disk, what)
            os.kill(before, signal.SIGKILL)
            until(lambda old=before: pid_of(edge) != old, what="another edge")
            assert answers(edge)
        warned = [entry for entry in log if entry["event"] == "an edge cannot write its log"]
        assert "No space left on device" in {entry["error"] for entry in warned}
        assert not [entry for entry in log if entry["log_level"] == "error"]
    assert list((disk.path / "edge").iterdir()) == []


def test_an_edge_that_was_started_again_is_found_by_the_next_keeper(run, disk):
    with run(ends=False) as edge, edge.upstream():
        first = pid_of(edge)
        fill(disk, "logs")
        os.kill(first, signal.SIGKILL)
        until(lambda: pid_of(edge) != first, what="another edge")
        second = pid_of(edge)
    with run() as edge, edge.upstream():
        assert pid_of(edge) == second
        assert answers(edge)
    until(lambda: not alive(second), what="its end")
    os.waitpid(second, 0)


def test_a_keeper_whose_edge_has_died_with_the_keeper_before_starts_another_one(run, disk):
    with run(ends=False) as edge, edge.upstream():
        before = pid_of(edge)
    fill(disk, "logs")
    os.kill(before, signal.SIGKILL)
    os.waitpid(before, 0)
    with run() as edge, edge.upstream():
        assert pid_of(edge) != before
        assert answers(edge)
