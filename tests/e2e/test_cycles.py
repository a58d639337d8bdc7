"""Start and delete many servers, one after another: leaks add up and show."""

from __future__ import annotations

import os

import psutil
import pytest

from harness import alive, forked, parent_of, until
from kernel_processes import SPARE, titled

CYCLES = int(os.environ.get("CYCLES", "20"))
WARM_UP = 20
"""Cycles before the first count, to fill pools and load whatever is loaded lazily."""
ALLOWED_GROWTH = 4 * 2**20
"""Bytes that a process may grow without a leak, as allocators do."""
GROWTH_PER_CYCLE = 4096
"""Additional bytes for each server: the event history grows with it."""


def run_cycles(keeper, count):
    for number in range(count):
        assert keeper.post(name=f"cycle{number}").status_code == 201
        assert keeper.delete(f"cycle{number}").status_code == 200


def count_resources(keeper, forkserver):
    """Count the resources of a keeper and its fork server."""
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
def test_starting_and_deleting_many_servers_leaks_no_resources(make_keeper):
    # Start with all threads: request threads are created on demand,
    # which on a busy machine may happen only after the first count.
    keeper = make_keeper(launch_by="fork", threads=4).start_to_fork()
    forkserver = parent_of(forked(keeper))
    assert keeper.delete().status_code == 200
    run_cycles(keeper, WARM_UP)
    until(
        lambda: any(titled(child, SPARE) for child in psutil.Process(forkserver).children()),
        what="the fork server to prepare the next child",
    )
    before, size = count_resources(keeper, forkserver), memory(keeper.process.pid, forkserver)
    run_cycles(keeper, CYCLES)
    assert alive(forkserver)

    def grown():
        return {
            name: count
            for name, count in count_resources(keeper, forkserver).items()
            if count > before[name]
        }

    until(lambda: not grown(), what=lambda: f"no more than {before}; found {grown()}")
    assert (
        memory(keeper.process.pid, forkserver) - size < ALLOWED_GROWTH + GROWTH_PER_CYCLE * CYCLES
    )
