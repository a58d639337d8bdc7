"""Resource usage of a real server with a real kernel, now and over time."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from harness import KeeperProcess, run_cell, start_kernel, until

MIB = 2**20


@pytest.fixture
def keeper(tmp_path):
    running = KeeperProcess(tmp_path, launch_by="exec", usage_period=0.5).start()
    yield running
    running.close()


def test_usage_of_a_kernel_is_reported_with_the_limits(keeper):
    """All figures grow with the kernel's work; a stopped server has none."""
    server = keeper.post(memory_limit=2048 * MIB, process_limit=500, cpu_limit=2.0).json()
    assert server["usage"] is None
    before = until(lambda: keeper.get()["usage"], what="a usage sample")
    assert before["memory"] > 30 * MIB
    kernel = start_kernel(server)
    run_cell(
        server,
        kernel,
        "data = bytearray(300 << 20); import time; end = time.time() + 1\n"
        "while time.time() < end: pass",
    )

    def grown():
        usage = keeper.get()["usage"]
        return (
            usage
            if usage["memory"] > before["memory"] + 280 * MIB and usage["kernels"] == 1
            else None
        )

    after = until(grown, what="a usage sample with the kernel")
    assert after["processes"] >= 2
    assert after["cpu_seconds"] > before["cpu_seconds"] + 0.5
    assert after["at"] > before["at"]
    found = keeper.get()
    limits = found["limits"]
    assert limits["memory"]["used"] == found["usage"]["memory"]
    assert limits["processes"]["used"] == found["usage"]["threads"] >= found["usage"]["processes"]
    assert limits["cpus"]["used"] == found["usage"]["cpus"]

    listed = keeper.http.get("/api/servers").json()["servers"]
    assert listed[0]["usage"]["kernels"] == 1
    shown = keeper.cli("show")
    assert "usage" in shown.stdout
    assert "% used" in shown.stdout
    assert keeper.http.post("/api/servers/default/stop").json()["usage"] is None


def history(keeper, since):
    found = keeper.http.get("/api/servers/default/usage", params={"since": since}).json()
    return {**found, "memory_max": [value for value in found["memory_max"] if value is not None]}


def test_usage_over_time_rises_with_a_kernel_and_survives_a_kill_of_the_keeper(keeper):
    """The minutes that were saved; a new launch is visible, and a deletion removes all."""
    server = keeper.post().json()
    before = until(lambda: history(keeper, "1h")["memory_max"], what="usage over time")[0]
    kernel = start_kernel(server)
    run_cell(
        server,
        kernel,
        "data = bytearray(200 << 20); import time; end = time.time() + 3\n"
        "while time.time() < end: pass",
    )

    def rises(since):
        found = history(keeper, since)
        risen = any(value > before + 200 * MIB for value in found["memory_max"])
        return found if risen and max(filter(None, found["cpus_max"]), default=0) > 0.5 else None

    assert until(lambda: rises("1h"), what="the kernel's memory")["resolution"] == 5
    assert until(lambda: rises("1d"), what="the same in minutes")["resolution"] == 60
    store = keeper.state_dir / "labkeeper.sqlite"

    def saved():
        with closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as db:
            (most,) = db.execute("SELECT max(memory_max) FROM usage").fetchone()
        return most is not None and most > before + 200 * MIB

    until(saved, what="the end of the minute")
    keeper.kill()
    keeper.start()
    keeper.wait_for("running")
    assert rises("1d")["resolution"] == 60
    assert rises("30d")["resolution"] == 3600
    assert rises("1h")["resolution"] == 60, "only the earlier keeper has measured it"
    keeper.http.post("/api/servers/default/restart", json={})
    until(lambda: history(keeper, "1d")["generation"][-1] == 2, what="usage of the next launch")
    assert keeper.stop() == 0
    keeper.start()
    assert history(keeper, "1d")["generation"][-1] == 2, "a keeper that ends saves all"
    keeper.http.post("/api/servers/default/stop")
    assert rises("1d")
    keeper.delete()
    keeper.post()
    assert not rises("1d")
