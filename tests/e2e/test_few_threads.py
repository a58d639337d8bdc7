"""A machine, or a container, that lets a keeper have few processes and threads: it says so, and does what it can."""

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
    """One whose servers only sleep."""

    @property
    def environment(self):
        sleeper = self.base / "sleeper"
        sleeper.write_text("#!/bin/sh\nexec sleep 600\n")
        sleeper.chmod(0o755)
        return super().environment | {"LABKEEPER_JUPYTER_PYTHON": str(sleeper)}


@pytest.mark.parametrize("launch_by", ["exec", "fork"])
@pytest.mark.parametrize("allowed", [1, 2, 3, 5])
def test_too_few_threads_to_begin_with_are_one_line_and_an_exit_code_of_2(
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
    said = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert len(said) == 1, ended.stderr
    assert "--pids-limit" in said[0]


def test_a_container_with_a_hundred_processes_is_enough(tmp_path, group):
    group.allow(100)
    keeper = ConfinedKeeper(tmp_path, group, launch_by="exec").start()
    assert group.count < 25
    assert keeper.stop() == 0


def test_where_threads_run_out_fewer_callers_wait_and_quick_requests_stay_quick(tmp_path, group):
    keeper = ConfinedKeeper(tmp_path, group, launch_by="exec").start()
    callers, answers = [], []
    try:
        assert keeper.http.post("/api/servers?wait=0", json={}).status_code == 202
        until(lambda: keeper.get()["state"] == "starting", what="a server that starts")
        group.allow(group.count + 4)

        def wait():
            with contextlib.suppress(httpx.HTTPError):
                answers.append(
                    httpx.get(url, headers=keeper.http.headers, timeout=PATIENCE, trust_env=False)
                )

        url = f"{keeper.url}/api/servers/default?wait_for=running&wait={PATIENCE}"
        callers = [threading.Thread(target=wait) for _ in range(30)]
        for caller in callers:
            caller.start()
        # Those for whom there is no place have their answer at once.
        until(lambda: len(answers) > 15, what="answers to those who have no place")
        for _ in range(20):
            assert keeper.http.get("/healthz").status_code == 200
        assert any(caller.is_alive() for caller in callers)
        assert {answer.status_code for answer in answers} == {200}
        group.allow("max")
    finally:
        keeper.delete(force="true")
        for caller in callers:
            caller.join()
        code = keeper.stop()
    assert code == 0
    # A caller whose request came late, on a busy machine, finds the server deleted.
    assert {answer.status_code for answer in answers} <= {200, 404}
    said = [line for line in keeper.log.read_text().splitlines() if "no more threads" in line]
    assert len(said) == 1
    assert "LABKEEPER_THREADS" in said[0]


SPELL = 2.0
"""Seconds for which something is short: many looks, and ten times what a server may be silent."""


@contextlib.contextmanager
def without_threads(keeper):
    """Nobody in the group can start a process or a thread, as when one notebook has used them up."""
    keeper.group.allow(1)
    try:
        yield
    finally:
        keeper.group.allow("max")


@contextlib.contextmanager
def without_descriptors(keeper):
    process = psutil.Process(keeper.process.pid)
    _, hard = before = process.rlimit(psutil.RLIMIT_NOFILE)
    # Not below the number of those that it waits for together, or Linux would not let it wait.
    process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds() // 2, hard))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_NOFILE, before)


@pytest.fixture
def real(tmp_path, group):
    """A keeper with JupyterLab, which looks at its servers all the time."""
    keeper = GroupedKeeper(
        tmp_path, group, probe_period=0.1, hung_after=0.2, cull_period=0.1, idle_timeout="1h"
    ).start_to_fork()
    yield keeper
    group.allow("max")
    keeper.close()


@pytest.mark.parametrize("shortage", [without_threads, without_descriptors])
def test_what_the_keeper_itself_lacks_is_not_taken_for_the_silence_of_a_server(real, shortage):
    server = real.wait_for("running") if real.post().status_code == 201 else None
    with shortage(real):
        time.sleep(SPELL)
    until(
        lambda: real.http.get("/readyz").status_code == 200, what="a keeper that watches everything"
    )
    after = real.get()
    assert (after["state"], after["pid"], after["restarts"]) == ("running", server["pid"], 0)


def test_while_threads_cannot_be_started_it_is_told_what_is_not_watched_and_made_up_for_later(real):
    real.post().raise_for_status()
    with without_threads(real):
        told = until(
            lambda: "culler: " in (said := real.http.get("/readyz").text) and said,
            what="a culler that cannot look",
        )
        assert real.http.get("/healthz").status_code == 200
    assert "no more processes are allowed" in told
    until(
        lambda: real.http.get("/readyz").status_code == 200, what="a keeper that watches everything"
    )


def test_a_start_for_which_there_is_no_thread_wedges_nothing(real):
    """It comes about as soon as there is one again; or is deleted, then and there."""
    with without_threads(real):
        for name in ("kept", "deleted"):
            assert real.http.post("/api/servers?wait=0", json={"name": name}).status_code == 202
        until(lambda: real.get("deleted")["state"] != "starting", what="the start has failed once")
        assert real.delete("deleted").status_code == 200
    real.wait_for("running", name="kept")
