"""The keeper with a low limit on processes and threads: it reports the shortage and carries on."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time

import httpx
import psutil
import pytest

from harness import PATIENCE, until
from shortages import Group, GroupedKeeper, needs_group

pytestmark = needs_group


@pytest.fixture
def group():
    made = Group()
    yield made
    made.remove()


class ConfinedKeeper(GroupedKeeper):
    """A keeper whose servers only sleep."""

    @property
    def environment(self):
        sleeper = self.base / "sleeper"
        sleeper.write_text("#!/bin/sh\nexec sleep 600\n")
        sleeper.chmod(0o755)
        return super().environment | {"LABKEEPER_JUPYTER_PYTHON": str(sleeper)}


@pytest.mark.parametrize("launch_by", ["exec", "fork"])
@pytest.mark.parametrize("allowed", [1, 2, 3, 5])
def test_startup_with_too_few_threads_fails_with_one_line_and_exit_code_2(
    tmp_path, group, allowed, launch_by
):
    keeper = ConfinedKeeper(tmp_path, group, launch_by=launch_by)
    group.allow(allowed)
    ended = subprocess.run(
        keeper.command("serve"),
        env=keeper.environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    messages = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert len(messages) == 1, ended.stderr
    assert "--pids-limit" in messages[0]


def test_keeper_runs_with_a_limit_of_100_processes(tmp_path, group):
    group.allow(100)
    keeper = ConfinedKeeper(tmp_path, group, launch_by="exec", threads=32).start()
    assert 32 < group.count < 60
    assert keeper.stop() == 0


def test_short_requests_succeed_while_waiting_callers_use_up_all_threads(tmp_path, group):
    keeper = ConfinedKeeper(tmp_path, group, launch_by="exec", threads=16).start()
    callers, answers = [], []
    try:
        assert keeper.http.post("/api/servers?wait=0", json={}).status_code == 202
        until(lambda: keeper.get()["state"] == "starting", what="the server to be starting")

        def wait():
            with contextlib.suppress(httpx.HTTPError):
                answers.append(
                    httpx.get(url, headers=keeper.http.headers, timeout=PATIENCE, trust_env=False)
                )

        url = f"{keeper.url}/api/servers/default?wait_for=running&wait={PATIENCE}"
        callers = [threading.Thread(target=wait) for _ in range(30)]
        for caller in callers:
            caller.start()
        # Callers who cannot get a thread are answered at once.
        until(lambda: len(answers) == 30 - 14, what="answers to callers who get no thread")
        group.allow(1)
        for _ in range(20):
            assert keeper.http.get("/healthz").status_code == 200
        assert sum(caller.is_alive() for caller in callers) == 14
        assert {answer.status_code for answer in answers} == {200}
        group.allow("max")
    finally:
        keeper.delete(force="true")
        for caller in callers:
            caller.join()
        code = keeper.stop()
    assert code == 0
    # On a busy machine, a caller whose request arrives late finds the server already deleted.
    assert {answer.status_code for answer in answers} <= {200, 404}


SHORTAGE_SECONDS = 2.0
"""Duration of a shortage: many probes, and ten times `hung_after`."""


@contextlib.contextmanager
def without_threads(keeper):
    """Forbid new processes and threads in the group, as if a notebook had used them up."""
    keeper.group.allow(1)
    try:
        yield
    finally:
        keeper.group.allow("max")


@contextlib.contextmanager
def without_descriptors(keeper):
    process = psutil.Process(keeper.process.pid)
    _, hard = before = process.rlimit(psutil.RLIMIT_NOFILE)
    # poll() fails if it is given more descriptors than the limit, so do not go below that.
    process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds() // 2, hard))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_NOFILE, before)


@pytest.fixture
def jupyter_keeper(tmp_path, group):
    """A keeper with JupyterLab that probes and polls its servers continuously."""
    keeper = GroupedKeeper(
        tmp_path, group, probe_period=0.1, hung_after=0.2, cull_period=0.1, idle_timeout="1h"
    ).start_to_fork()
    yield keeper
    group.allow("max")
    keeper.close()


@pytest.mark.parametrize("shortage", [without_threads, without_descriptors])
def test_keeper_short_of_resources_does_not_restart_a_healthy_server(jupyter_keeper, shortage):
    server = (
        jupyter_keeper.wait_for("running") if jupyter_keeper.post().status_code == 201 else None
    )
    with shortage(jupyter_keeper):
        time.sleep(SHORTAGE_SECONDS)
    until(
        lambda: jupyter_keeper.http.get("/readyz").status_code == 200,
        what="the keeper to be ready again",
    )
    after = jupyter_keeper.get()
    assert (after["state"], after["pid"], after["restarts"]) == ("running", server["pid"], 0)


def test_readyz_reports_checks_that_cannot_run_for_lack_of_threads(jupyter_keeper):
    jupyter_keeper.post().raise_for_status()
    with without_threads(jupyter_keeper):
        report = until(
            lambda: "culler: " in (text := jupyter_keeper.http.get("/readyz").text) and text,
            what="/readyz to report the culler's failure",
        )
        assert jupyter_keeper.http.get("/healthz").status_code == 200
    assert "no more processes are allowed" in report
    until(
        lambda: jupyter_keeper.http.get("/readyz").status_code == 200,
        what="the keeper to be ready again",
    )


def test_start_without_a_free_thread_is_retried_and_can_be_deleted(jupyter_keeper):
    with without_threads(jupyter_keeper):
        for name in ("kept", "deleted"):
            assert (
                jupyter_keeper.http.post("/api/servers?wait=0", json={"name": name}).status_code
                == 202
            )
        until(
            lambda: jupyter_keeper.get("deleted")["state"] != "starting",
            what="the start to fail once",
        )
        assert jupyter_keeper.delete("deleted").status_code == 200
    jupyter_keeper.wait_for("running", name="kept")
