"""Failures of servers, keepers and gateways are reported at once, with cause, and cleaned up."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from gateway_servers import KernelGateway
from harness import (
    PATIENCE,
    alive,
    forked,
    processes_marked,
    run_cell,
    servers_in,
    start_kernel,
    until,
)

BROKEN = {
    "config-error": "raise RuntimeError('my own mistake')",
    "import-error": "c.ServerApp.reraise_server_extension_failures = True\n"
    "c.ServerApp.jpserver_extensions = {'no_such_thing': True}",
    "other": "import sys; print('the last words'); sys.exit(3)",
}


@pytest.mark.promise
@pytest.mark.parametrize("cause", BROKEN)
def test_post_returns_502_with_the_cause_if_the_lab_exits_during_startup(make_keeper, cause):
    keeper = make_keeper(start_timeout=600).start()
    keeper.configure_jupyter(BROKEN[cause])
    # The start timeout is longer than the test waits: the response has to come from the exit.
    answer = keeper.post()
    assert answer.status_code == 502, answer.text
    problem = answer.json()
    assert problem["failure_class"] == cause
    assert problem["exit"]["code"] == (3 if cause == "other" else 1)
    assert problem["log_tail"]
    assert any(
        "no_such_thing" in line or "my own mistake" in line or "last words" in line
        for line in problem["log_tail"]
    )
    server = keeper.get()
    assert (server["state"], server["failure"]["failure_class"]) == ("failed", cause)
    assert not processes_marked(keeper.server_dirs)
    assert not (keeper.server_dirs / "default").exists()
    # The log is kept, and once the configuration is repaired, the same request succeeds.
    assert keeper.http.get("/api/servers/default/logs").text.strip()
    keeper.configure_jupyter("")
    assert keeper.post().status_code == 201


def test_silent_exit_during_startup_is_reported_with_the_exit_code_only(make_keeper):
    """Log lines of another extension that loaded successfully are not mistaken for the cause."""
    keeper = make_keeper(start_timeout=600)
    extension = keeper.base / "extensions" / "zz_quits.py"
    extension.parent.mkdir()
    extension.write_text("import os\n\ndef _load_jupyter_server_extension(app):\n    os._exit(7)\n")
    keeper.variables["PYTHONPATH"] = os.pathsep.join(
        [str(extension.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    keeper.configure_jupyter("c.ServerApp.jpserver_extensions = {'zz_quits': True}")
    problem = keeper.start().post().json()
    assert any("successfully loaded" in line for line in problem["log_tail"])
    assert (problem["failure_class"], problem["exit"]["code"]) == ("other", 7)
    assert (
        problem["detail"]
        == "cannot start server 'default': JupyterLab ended before it was ready (exit code 7)"
    )


def test_unwritable_runtime_directory_is_named_in_the_error(make_keeper):
    keeper = make_keeper(runtime_dir="/proc/labkeeper").start()
    answer = keeper.post()
    assert answer.status_code == 502
    assert answer.json()["failure_class"] == "config-error"
    assert "/proc/labkeeper" in answer.json()["detail"]
    assert keeper.get()["state"] == "failed"


def test_interpreter_without_jupyterlab_is_reported(make_keeper, tmp_path):
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.symlink_to("/usr/bin/python3")
    keeper = make_keeper(jupyter_python=python).start()
    answer = keeper.post()
    assert answer.status_code == 502
    assert answer.json()["failure_class"] == "import-error"
    assert "LABKEEPER_JUPYTER_PYTHON" in answer.json()["detail"]


def test_killed_server_is_restarted_until_its_restart_budget_is_used_up(
    make_keeper,
):
    # With probes practically off, only the exit of the process can be noticed.
    keeper = make_keeper(probe_period=3600).start()
    server = keeper.post().json()
    kernel = start_kernel(server)
    kernel_pid = int(run_cell(server, kernel, "import os; os.getpid()"))
    os.kill(server["pid"], signal.SIGKILL)
    after = until(
        lambda: (s := keeper.get())["pid"] != server["pid"] and s, what="the crash to be noticed"
    )
    # It may already be running again.
    assert after["state"] in {"backoff", "starting"} or after["generation"] > server["generation"]
    assert not alive(kernel_pid)
    again = keeper.wait_for("running")
    assert again["restarts"] == 1
    assert again["pid"] != server["pid"]
    assert "launch 1" in keeper.http.get("/api/servers/default/logs", params={"tail": 1000}).text

    for _ in range(3):
        pid = keeper.wait_for("running")["pid"]
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: keeper.get()["pid"] != pid, what="the crash to be noticed")
        # The third backoff takes 8 s. A start request resets the budget,
        # so the last crash is the fourth.
        if (
            until(
                lambda: (s := keeper.get()["state"]) in {"running", "failed"} and s,
                what="the server to run again or to fail",
            )
            == "failed"
        ):
            break
    failed = keeper.wait_for("failed")
    assert failed["failure"]["failure_class"] == "killed"
    assert failed["exit"]["signal"] == "SIGKILL"
    assert failed["restarts"] == 3
    assert keeper.http.get("/api/servers/default/logs").text.strip()


@pytest.mark.promise
def test_server_killed_by_an_unnamed_signal_is_restarted(keeper):
    server = keeper.post().json()
    os.kill(server["pid"], signal.SIGRTMIN + 6)
    until(lambda: keeper.get()["generation"] > server["generation"], what="the server's relaunch")
    assert keeper.wait_for("running")["generation"] == server["generation"] + 1


DRIPPING = """
import asyncio, os
from jupyter_server.base import handlers
async def get(self, real=handlers.APIVersionHandler.get):
    with open({looks!r}, "a") as looks:
        looks.write("x")
    while os.path.exists({flag!r}):
        self.write("x" * {size})
        await self.flush()
        await asyncio.sleep({pause})
    await real(self)
handlers.APIVersionHandler.get = get
"""


@pytest.mark.parametrize(("size", "pause"), [(1, 0.3), (2**20, 0.0)], ids=["slow", "endless"])
def test_server_whose_response_never_ends_can_be_stopped(make_keeper, tmp_path, size, pause):
    """Neither a slow nor an endless response delays the stop or fills the keeper's memory."""
    keeper = make_keeper(probe_period=0.3, stop_grace=3, kill_wait=1).start()
    flag, looks = tmp_path / "flag", tmp_path / "looks"
    keeper.configure_jupyter(
        DRIPPING.format(flag=str(flag), looks=str(looks), size=size, pause=pause)
    )
    assert keeper.post().status_code == 201
    flag.touch()
    before = looks.stat().st_size
    memory = psutil.Process(keeper.process.pid).memory_info().rss
    until(lambda: looks.stat().st_size > before + 1, what="two more probes of the server")
    answer = keeper.delete(force="true")
    assert (answer.status_code, answer.json()["state"]) == (200, "stopped"), answer.text
    assert psutil.Process(keeper.process.pid).memory_info().rss - memory < 100_000_000


@pytest.mark.promise
def test_server_shut_down_through_its_own_api_stays_stopped(keeper):
    server = keeper.post().json()
    httpx.post(
        f"{server['url']}api/shutdown",
        headers={"Authorization": f"token {server['token']}"},
        trust_env=False,
    )
    stopped = keeper.wait_for("stopped")
    assert stopped["exit"] == {"code": 0, "signal": None}
    assert stopped["goal"] == "down"
    assert keeper.http.post("/api/servers?wait=0", json={}).status_code == 202


@pytest.mark.promise
def test_servers_survive_a_killed_keeper_and_are_adopted_by_the_next(make_keeper):
    keeper = make_keeper(launch_by="fork").start_to_fork()
    lives = keeper.post(name="lives").json()
    dies = keeper.post(name="dies").json()
    leaves = keeper.post(name="leaves").json()
    keeper.post(name="rests")
    keeper.post("/rests/stop")
    kernel = start_kernel(lives)
    run_cell(lives, kernel, "x = 42")

    keeper.kill()
    assert alive(lives["pid"])
    os.kill(dies["pid"], signal.SIGKILL)
    httpx.post(
        f"{leaves['url']}api/shutdown",
        headers={"Authorization": f"token {leaves['token']}"},
        trust_env=False,
    )
    until(lambda: not alive(dies["pid"]) and not alive(leaves["pid"]))
    keeper.start()

    names = [server["name"] for server in keeper.http.get("/api/servers").json()["servers"]]
    assert names == ["dies", "leaves", "lives", "rests"]
    after = keeper.wait_for("running", "lives")
    assert (after["pid"], after["token"], after["generation"]) == (
        lives["pid"],
        lives["token"],
        lives["generation"],
    )
    assert run_cell(after, kernel, "x") == "42"
    assert keeper.wait_for("stopped", "leaves")["exit"] == {"code": 0, "signal": None}
    assert keeper.get("rests")["state"] == "stopped"
    # It was running when the keeper was killed, so its crash counts against the budget.
    again = keeper.wait_for("running", "dies")
    assert again["pid"] != dies["pid"]
    assert again["restarts"] == 1
    # An adopted server's exit is noticed as fast as that of a launched one, and it can be stopped.
    os.kill(after["pid"], signal.SIGKILL)
    until(lambda: keeper.get("lives")["pid"] != after["pid"], what="the crash to be noticed")
    assert keeper.delete("lives").status_code == 200


@pytest.mark.parametrize("launch_by", ["exec", "fork"])
def test_servers_left_running_at_shutdown_are_adopted_by_the_next_keeper(make_keeper, launch_by):
    keeper = make_keeper(on_exit="leave", launch_by=launch_by).start()
    server = forked(keeper) if launch_by == "fork" else keeper.post().json()
    kernel = start_kernel(server)
    run_cell(server, kernel, "x = 42")
    starting = keeper.http.post("/api/servers?wait=0", json={"name": "begun"}).json()

    assert keeper.stop() == 0
    assert run_cell(server, kernel, "x") == "42"
    keeper.settings["on_exit"] = "stop"
    keeper.start()

    after = keeper.wait_for("running")
    assert (after["pid"], after["token"], after["generation"]) == (
        server["pid"],
        server["token"],
        server["generation"],
    )
    assert run_cell(after, kernel, "x") == "42"
    assert keeper.wait_for("running", "begun")["generation"] == starting["generation"]
    assert keeper.stop() == 0
    assert not alive(server["pid"])


@pytest.mark.parametrize("moment", ["its process is there", "its process is on record"])
def test_keeper_killed_during_a_start_neither_loses_nor_duplicates_the_server(make_keeper, moment):
    keeper = make_keeper().start()
    assert keeper.http.post("/api/servers?wait=0", json={}).status_code == 202
    record = keeper.server_dirs / "default" / "launch.json"
    come = record.exists if "record" in moment else lambda: processes_marked(keeper.server_dirs)
    until(come, what=f"the moment when {moment}")
    keeper.kill()
    keeper.start()
    until(lambda: keeper.get()["state"] == "running", what="the server to run")
    server = keeper.get()
    # A start that was not recorded yet is begun again.
    assert server["generation"] == 1 + server["restarts"] <= (1 if "record" in moment else 2)
    assert servers_in(keeper.server_dirs) == [server["pid"]]


def test_reused_pid_is_not_mistaken_for_the_server(make_keeper):
    keeper = make_keeper().start()
    server = keeper.post().json()
    keeper.kill()
    os.kill(server["pid"], signal.SIGKILL)
    until(lambda: not alive(server["pid"]))
    unrelated = subprocess.Popen(["sleep", "1000"])
    try:
        record = keeper.server_dirs / "default" / "launch.json"
        jupyter = record.parent / "jupyter"
        (jupyter / f"jpserver-{server['pid']}.json").rename(
            jupyter / f"jpserver-{unrelated.pid}.json"
        )
        record.write_text(json.dumps(json.loads(record.read_text()) | {"pid": unrelated.pid}))
        keeper.start()
        again = keeper.wait_for("running")
        assert again["pid"] not in {unrelated.pid, server["pid"]}
        assert keeper.delete().status_code == 200
        assert unrelated.poll() is None
    finally:
        unrelated.kill()
        unrelated.wait()


def start_to_hang(keeper):
    """Start a keeper whose forked servers hang before they are ready."""
    hangs = keeper.base / "hangs"
    keeper.configure_jupyter(
        f"import os, time\nif os.path.exists({str(hangs)!r}):\n"
        "    print('I wait', flush=True); time.sleep(1000)"
    )
    keeper.start_to_fork()
    hangs.touch()


def test_start_timeout_ends_a_hanging_lab(make_keeper):
    keeper = make_keeper(launch_by="fork", start_timeout=6, stop_grace=2, kill_wait=1)
    start_to_hang(keeper)
    answer = keeper.post()
    assert answer.status_code == 504, answer.text
    assert answer.json()["code"] == "start_timeout"
    assert answer.json()["log_tail"]
    assert keeper.get()["failure"]["failure_class"] == "start-timeout"
    assert not processes_marked(keeper.server_dirs / "default")


def test_hanging_lab_blocks_no_other_requests(make_keeper):
    keeper = make_keeper(launch_by="fork", start_timeout=600)
    start_to_hang(keeper)
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(keeper.post)
        try:
            until(
                lambda: "I wait" in keeper.http.get("/api/servers/default/logs").text,
                what="JupyterLab to hang during its start",
            )
            for _ in range(20):
                (server,) = keeper.http.get("/api/servers").raise_for_status().json()["servers"]
                assert server["state"] == "starting"
            assert not waiting.done()
        finally:
            keeper.delete(force="true")
        assert waiting.result().is_error


def test_lab_that_ignores_sigterm_is_killed_after_the_grace_period(make_keeper):
    keeper = make_keeper(stop_grace=2, kill_wait=1).start()
    keeper.configure_jupyter(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('deaf', flush=True); time.sleep(1000)"
    )
    keeper.http.post("/api/servers?wait=0", json={})
    until(lambda: "deaf" in keeper.http.get("/api/servers/default/logs").text)
    answer = keeper.delete()
    assert answer.status_code == 200
    assert answer.json()["stop_report"]["method"] == "sigkill"
    assert not processes_marked(keeper.server_dirs)


def test_stop_with_an_unresponsive_gateway_lists_the_kernels_left_behind(make_keeper, tmp_path):
    keeper = make_keeper(stop_grace=4, kill_wait=1).start()
    gateway = KernelGateway(tmp_path / "gateway").start()
    try:
        server = keeper.post(gateway_url=gateway.url, gateway_auth_token=gateway.token).json()
        kernel = start_kernel(server)
        gateway.process.send_signal(signal.SIGSTOP)
        answer = keeper.delete()
    finally:
        gateway.stop()
    assert answer.status_code == 200, answer.text
    report = answer.json()["stop_report"]
    assert report["method"] == "shutdown"
    assert report["kernels_left"] == [kernel]
    assert report["kernels_stopped"] == []
    assert not processes_marked(keeper.server_dirs)


def test_endless_log_output_is_rotated(make_keeper):
    keeper = make_keeper(log_max_bytes=1_000_000).start()
    keeper.configure_jupyter(
        "import sys, threading, time\n"
        "def shout():\n"
        "    while True:\n"
        "        sys.stderr.write(('x' * 999 + '\\n') * 100); time.sleep(0.01)\n"
        "threading.Thread(target=shout, daemon=True).start()\n"
    )
    assert keeper.post().status_code == 201
    log = keeper.state_dir / "logs" / "default.log"
    until(lambda: log.with_name("default.log.1").exists(), what="the log to be rotated")
    tail = keeper.http.get("/api/servers/default/logs", params={"tail": 10}).text
    assert len(tail.splitlines()) == 10
    # At most 10 MB/s, checked every 2 s, plus one rotated file.
    assert sum(path.stat().st_size for path in log.parent.iterdir()) < 60_000_000
    assert log.with_name("default.log.1").stat().st_mode & 0o077 == 0
    assert keeper.delete(force="true").status_code == 200
    until(lambda: not list(log.parent.glob("default*")), what="the removal of the server's log")


def test_suspended_server_is_killed_on_stop(make_keeper):
    keeper = make_keeper(stop_grace=2, kill_wait=1).start()
    server = keeper.post().json()
    os.kill(server["pid"], signal.SIGSTOP)
    answer = keeper.delete()
    assert answer.status_code == 200
    assert answer.json()["stop_report"]["method"] == "sigkill"


def test_hung_server_is_restarted(make_keeper):
    keeper = make_keeper(hung_after=3, probe_period=0.5, stop_grace=2).start()
    server = keeper.post().json()
    os.kill(server["pid"], signal.SIGSTOP)
    until(lambda: keeper.get()["generation"] > 1, what="a second launch")
    # On a busy machine that one may not answer for as long.
    assert keeper.wait_for("running")["restarts"] >= 1
    assert not alive(server["pid"])


FOLLOWERS = 20
ENOUGH_THREADS = 32
"""Threads with which so many callers can follow, but not twice as many."""


def test_log_followers_get_every_line_and_release_their_threads(make_keeper):
    keeper = make_keeper(threads=ENOUGH_THREADS).start()
    server = keeper.post().json()
    lines = []
    with (
        httpx.Client(
            base_url=keeper.url, headers=keeper.http.headers, trust_env=False, timeout=30
        ) as other,
        other.stream(
            "GET", "/api/servers/default/logs", params={"follow": "true", "tail": 0}
        ) as stream,
    ):
        kernel = start_kernel(server)
        reader = stream.iter_lines()
        for line in reader:
            lines.append(line)
            if kernel in line:
                break
        threading.Thread(target=keeper.delete).start()
        lines.extend(reader)
    assert any("Shutting down" in line for line in lines)
    keeper.http.post("/api/servers?wait=0", json={"name": "other"})

    def followers(count):
        """Return the statuses that so many followers get at the same time."""
        with contextlib.ExitStack() as stack:
            answers = []
            for _ in range(count):
                client = stack.enter_context(
                    httpx.Client(
                        base_url=keeper.url,
                        headers=keeper.http.headers,
                        trust_env=False,
                        timeout=PATIENCE,
                    )
                )
                answers.append(
                    stack.enter_context(
                        client.stream("GET", "/api/servers/other/logs", params={"follow": "true"})
                    )
                )
            assert keeper.http.get("/healthz").status_code == 200
            return [answer.status_code for answer in answers]

    assert set(followers(2 * FOLLOWERS)) == {200, 429}
    # The keeper notices that they have disconnected.
    until(
        lambda: followers(FOLLOWERS) == [200] * FOLLOWERS,
        what="the threads of disconnected followers to be free",
    )
    keeper.delete("other")
