"""Many servers, one after another: whatever is not given back shows."""

from __future__ import annotations

import os

import psutil
import pytest

from harness import alive, forked, parent_of, until

CYCLES = int(os.environ.get("CYCLES", "20"))
WARM_UP = 20
"""Cycles before the first count: pools have filled, and what is loaded late is loaded."""
BREATH = 4 * 2**20
"""Bytes by which a process may grow that leaks nothing, as allocators do."""
PER_CYCLE = 4096
"""Bytes for each server besides: the history of what happened grows with it."""


def turn(keeper, count):
    for number in range(count):
        assert keeper.post(name=f"cycle{number}").status_code == 201
        assert keeper.delete(f"cycle{number}").status_code == 200


def held(keeper, forkserver):
    """Count what a keeper and its fork server hold."""
    places = (keeper.server_dirs, keeper.state_dir / "logs")
    counts = {
        "files": sum(
            len(names) + len(files) for place in places for _, names, files in os.walk(place)
        )
    }
    for name, process in (
        ("keeper", psutil.Process(keeper.process.pid)),
        ("fork server", psutil.Process(forkserver)),
    ):
        counts[f"{name}: children"] = len(process.children())
        counts[f"{name}: descriptors"] = process.num_fds()
        counts[f"{name}: threads"] = process.num_threads()
    return counts


def memory(*pids):
    return sum(psutil.Process(pid).memory_info().rss for pid in pids)


@pytest.mark.soak
@pytest.mark.timeout(120 + CYCLES * 5)
def test_after_many_servers_a_keeper_holds_as_much_as_before(make_keeper):
    # With all threads there from the beginning: those for callers come as they are needed, which on a busy machine may be late.
    keeper = make_keeper(launch_by="fork", threads=4).start_to_fork()
    forkserver = parent_of(forked(keeper))
    assert keeper.delete().status_code == 200
    turn(keeper, WARM_UP)
    until(psutil.Process(forkserver).children, what="the fork that waits for the next server")
    before, size = held(keeper, forkserver), memory(keeper.process.pid, forkserver)
    turn(keeper, CYCLES)
    assert alive(forkserver)

    def grown():
        return {
            name: count for name, count in held(keeper, forkserver).items() if count > before[name]
        }

    until(lambda: not grown(), what=lambda: f"no more than {before}, but {grown()}")
    assert memory(keeper.process.pid, forkserver) - size < BREATH + PER_CYCLE * CYCLES
