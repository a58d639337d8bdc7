"""Resource usage of a real server with a real kernel."""

from __future__ import annotations

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
