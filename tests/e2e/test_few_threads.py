"""A machine, or a container, that lets a keeper have few processes and threads: it says so, and does what it can."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time

import httpx
import pytest

from harness import PATIENCE, KeeperProcess, until
from labkeeper.backends import limits

PIDS = {**limits._version_1(), **limits._version_2()}.get("pids") if sys.platform == "linux" else None

pytestmark = pytest.mark.skipif(PIDS is None, reason="needs a control group for processes that can be written")


class Group:
    """A control group of a test."""

    def __init__(self):
        self.path = PIDS.base / f"labkeeper-test-{os.getpid()}"
        self.path.mkdir()

    def allow(self, count):
        (self.path / "pids.max").write_text(str(count))

    @property
    def count(self):
        """How many processes and threads are in it."""
        return int((self.path / "pids.current").read_text())


@pytest.fixture
def group():
    made = Group()
    yield made
    until(lambda: made.count == 0, what="nothing left in the group")
    made.path.rmdir()


class ConfinedKeeper(KeeperProcess):
    """A keeper in a control group of its own, with its servers: here these only sleep."""

    def __init__(self, base, group, **settings):
        super().__init__(base, **settings)
        self.group = group

    def command(self, *arguments):
        join = 'echo $$ > "$1/cgroup.procs"; shift; exec "$@"'
        return ["sh", "-c", join, "sh", self.group.path, *super().command(*arguments)]

    @property
    def environment(self):
        sleeper = self.base / "sleeper"
        sleeper.write_text("#!/bin/sh\nexec sleep 600\n")
        sleeper.chmod(0o755)
        return super().environment | {"LABKEEPER_JUPYTER_PYTHON": str(sleeper)}


@pytest.mark.parametrize("launch_by", ["exec", "fork"])
@pytest.mark.parametrize("allowed", [1, 2, 3, 5])
def test_too_few_threads_to_begin_with_are_one_line_and_an_exit_code_of_2(tmp_path, group, allowed, launch_by):
    keeper = ConfinedKeeper(tmp_path, group, launch_by=launch_by)
    group.allow(allowed)
    ended = subprocess.run(
        keeper.command("serve"), env=keeper.environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert ended.returncode == 2, ended.stderr
    said = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert len(said) == 1, ended.stderr
    assert "--pids-limit" in said[0]


def test_a_container_with_a_hundred_processes_is_enough(tmp_path, group):
    group.allow(100)
    keeper = ConfinedKeeper(tmp_path, group).start()
    assert group.count < 20
    assert keeper.stop() == 0


def test_where_threads_run_out_fewer_callers_wait_and_quick_requests_stay_quick(tmp_path, group):
    keeper = ConfinedKeeper(tmp_path, group).start()
    callers, answers = [], []
    try:
        assert keeper.http.post("/api/servers?wait=0", json={}).status_code == 202
        until(lambda: keeper.get()["state"] == "starting", what="a server that starts")
        group.allow(group.count + 4)

        def wait():
            with contextlib.suppress(httpx.HTTPError):
                answers.append(httpx.get(url, headers=keeper.http.headers, timeout=PATIENCE, trust_env=False))

        url = f"{keeper.url}/api/servers/default?wait_for=running&wait={PATIENCE}"
        callers = [threading.Thread(target=wait) for _ in range(30)]
        for caller in callers:
            caller.start()
        # Those for whom there is no place have their answer at once.
        until(lambda: len(answers) > 15, what="answers to those who have no place")
        for _ in range(20):
            began = time.monotonic()
            assert keeper.http.get("/healthz").status_code == 200
            assert time.monotonic() - began < PATIENCE / 4
        assert any(caller.is_alive() for caller in callers)
        group.allow("max")
    finally:
        keeper.delete(force="true")
        for caller in callers:
            caller.join()
        code = keeper.stop()
    assert code == 0
    assert {answer.status_code for answer in answers} == {200}
    said = [line for line in keeper.log.read_text().splitlines() if "no more threads" in line]
    assert len(said) == 1
    assert "LABKEEPER_THREADS" in said[0]
