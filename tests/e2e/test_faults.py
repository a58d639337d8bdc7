"""What goes wrong, goes wrong in the open: at once, with its cause, and with nothing left."""

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
from harness import alive, forked, processes_marked, run_cell, servers_in, start_kernel, until

BROKEN = {
    "config-error": "raise RuntimeError('my own mistake')",
    "import-error": "c.ServerApp.reraise_server_extension_failures = True\n"
    "c.ServerApp.jpserver_extensions = {'no_such_thing': True}",
    "other": "import sys; print('the last words'); sys.exit(3)",
}


@pytest.mark.promise
@pytest.mark.parametrize("cause", BROKEN)
def test_a_lab_that_dies_at_start_fails_the_post_with_its_cause(make_keeper, cause):
    keeper = make_keeper(start_timeout=600).start()
    keeper.configure_jupyter(BROKEN[cause])
    # Its timeout is longer than anybody waits here: it is its end that is answered with.
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
    # The log is still there, and a repaired configuration needs no more than the same request.
    assert keeper.http.get("/api/servers/default/logs").text.strip()
    keeper.configure_jupyter("")
    assert keeper.post().status_code == 201


def test_a_lab_that_ends_without_a_word_is_explained_by_its_exit_code_alone(make_keeper):
    """And not by what another extension has logged before, which is in order."""
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


def test_a_runtime_directory_that_cannot_be_written_is_named(make_keeper):
    keeper = make_keeper(runtime_dir="/proc/labkeeper").start()
    answer = keeper.post()
    assert answer.status_code == 502
    assert answer.json()["failure_class"] == "config-error"
    assert "/proc/labkeeper" in answer.json()["detail"]
    assert keeper.get()["state"] == "failed"


def test_an_interpreter_without_jupyterlab_is_named(make_keeper, tmp_path):
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.symlink_to("/usr/bin/python3")
    keeper = make_keeper(jupyter_python=python).start()
    answer = keeper.post()
    assert answer.status_code == 502
    assert answer.json()["failure_class"] == "import-error"
    assert "LABKEEPER_JUPYTER_PYTHON" in answer.json()["detail"]


def test_a_killed_server_is_not_called_running_and_comes_back_as_long_as_its_budget_lasts(
    make_keeper,
):
    # It is not asked whether it answers: its end is seen by itself.
    keeper = make_keeper(probe_period=3600).start()
    server = keeper.post().json()
    kernel = start_kernel(server)
    kernel_pid = int(run_cell(server, kernel, "import os; os.getpid()"))
    os.kill(server["pid"], signal.SIGKILL)
    after = until(
        lambda: (s := keeper.get())["pid"] != server["pid"] and s, what="no longer called running"
    )
    # It may be running again by the time we look.
    assert after["state"] in {"backoff", "starting"} or after["generation"] > server["generation"]
    assert not alive(kernel_pid)
    again = keeper.wait_for("running")
    assert again["restarts"] == 1
    assert again["pid"] != server["pid"]
    assert "launch 1" in keeper.http.get("/api/servers/default/logs", params={"tail": 1000}).text

    for _ in range(3):
        pid = keeper.wait_for("running")["pid"]
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: keeper.get()["pid"] != pid, what="no longer called running")
        # The third wait is 8 s; a start command gives a fresh budget, so the last crash is the fourth.
        if (
            until(
                lambda: (s := keeper.get()["state"]) in {"running", "failed"} and s,
                what="it is up, or given up",
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
def test_a_server_killed_by_a_signal_without_a_name_is_known_dead(keeper):
    server = keeper.post().json()
    os.kill(server["pid"], signal.SIGRTMIN + 6)
    until(lambda: keeper.get()["generation"] > server["generation"], what="it is launched again")
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
def test_a_server_whose_answer_never_ends_is_ended_all_the_same(make_keeper, tmp_path, size, pause):
    """However slowly or much it answers, it holds up neither its own stop nor the keeper's memory."""
    keeper = make_keeper(probe_period=0.3, stop_grace=3, kill_wait=1).start()
    flag, looks = tmp_path / "flag", tmp_path / "looks"
    keeper.configure_jupyter(
        DRIPPING.format(flag=str(flag), looks=str(looks), size=size, pause=pause)
    )
    assert keeper.post().status_code == 201
    flag.touch()
    before = looks.stat().st_size
    memory = psutil.Process(keeper.process.pid).memory_info().rss
    until(lambda: looks.stat().st_size > before + 1, what="two looks at the server")
    answer = keeper.delete(force="true")
    assert (answer.status_code, answer.json()["state"]) == (200, "stopped"), answer.text
    assert psutil.Process(keeper.process.pid).memory_info().rss - memory < 100_000_000


@pytest.mark.promise
def test_a_server_shut_down_from_inside_stays_stopped(keeper):
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
def test_servers_outlive_a_killed_keeper_and_are_taken_over_by_the_next(make_keeper):
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
    # It was running when we looked away: its crash is paid from its budget.
    again = keeper.wait_for("running", "dies")
    assert again["pid"] != dies["pid"]
    assert again["restarts"] == 1
    # What was taken over is ended as well as what was launched, and its end is seen as soon.
    os.kill(after["pid"], signal.SIGKILL)
    until(lambda: keeper.get("lives")["pid"] != after["pid"], what="no longer called running")
    assert keeper.delete("lives").status_code == 200


@pytest.mark.parametrize("launch_by", ["exec", "fork"])
def test_servers_that_are_left_by_one_keeper_are_taken_over_by_the_next(make_keeper, launch_by):
    keeper = make_keeper(on_exit="leave", launch_by=launch_by).start()
    server = forked(keeper) if launch_by == "fork" else keeper.post().json()
    kernel = start_kernel(server)
    run_cell(server, kernel, "x = 42")
    begun = keeper.http.post("/api/servers?wait=0", json={"name": "begun"}).json()

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
    assert keeper.wait_for("running", "begun")["generation"] == begun["generation"]
    assert keeper.stop() == 0
    assert not alive(server["pid"])


@pytest.mark.parametrize("moment", ["its process is there", "its process is on record"])
def test_a_keeper_killed_during_a_start_loses_nothing_and_launches_nothing_twice(
    make_keeper, moment
):
    keeper = make_keeper().start()
    assert keeper.http.post("/api/servers?wait=0", json={}).status_code == 202
    record = keeper.server_dirs / "default" / "launch.json"
    come = record.exists if "record" in moment else lambda: processes_marked(keeper.server_dirs)
    until(come, what=moment)
    keeper.kill()
    keeper.start()
    until(lambda: keeper.get()["state"] == "running", what="it runs")
    server = keeper.get()
    # What was not on record yet is begun anew.
    assert server["generation"] == 1 + server["restarts"] <= (1 if "record" in moment else 2)
    assert servers_in(keeper.server_dirs) == [server["pid"]]


def test_a_pid_that_another_program_has_by_now_is_not_taken_for_ours(make_keeper):
    keeper = make_keeper().start()
    server = keeper.post().json()
    keeper.kill()
    os.kill(server["pid"], signal.SIGKILL)
    until(lambda: not alive(server["pid"]))
    stranger = subprocess.Popen(["sleep", "1000"])
    try:
        record = keeper.server_dirs / "default" / "launch.json"
        jupyter = record.parent / "jupyter"
        (jupyter / f"jpserver-{server['pid']}.json").rename(
            jupyter / f"jpserver-{stranger.pid}.json"
        )
        record.write_text(json.dumps(json.loads(record.read_text()) | {"pid": stranger.pid}))
        keeper.start()
        again = keeper.wait_for("running")
        assert again["pid"] not in {stranger.pid, server["pid"]}
        assert keeper.delete().status_code == 200
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_lab_that_never_becomes_ready_is_ended_at_its_timeout_and_holds_nothing_up(make_keeper):
    keeper = make_keeper(
        launch_by="fork", start_timeout=6, stop_grace=2, kill_wait=1, max_request_rate=0
    )
    hangs = keeper.base / "hangs"
    keeper.configure_jupyter(
        f"import os, time\nif os.path.exists({str(hangs)!r}):\n    print('I wait', flush=True); time.sleep(1000)"
    )
    keeper.start_to_fork()
    hangs.touch()
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(keeper.post)
        answered = 0
        while not waiting.done():
            keeper.http.get("/api/servers").raise_for_status()
            answered += 1
        answer = waiting.result()
    # None of them waited for the start.
    assert answered > 10
    assert answer.status_code == 504, answer.text
    assert answer.json()["code"] == "start_timeout"
    assert "I wait" in answer.json()["log_tail"]
    assert keeper.get()["failure"]["failure_class"] == "start-timeout"
    assert not processes_marked(keeper.server_dirs / "default")


def test_a_lab_that_ignores_sigterm_is_killed_after_its_grace(make_keeper):
    keeper = make_keeper(stop_grace=2, kill_wait=1).start()
    keeper.configure_jupyter(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(1000)"
    )
    keeper.http.post("/api/servers?wait=0", json={})
    until(lambda: "deaf" in keeper.http.get("/api/servers/default/logs").text)
    answer = keeper.delete()
    assert answer.status_code == 200
    assert answer.json()["stop_report"]["method"] == "sigkill"
    assert answer.json()["stop_report"]["seconds"] >= 2
    assert not processes_marked(keeper.server_dirs)


def test_a_stop_with_a_dead_gateway_ends_within_its_grace_and_names_the_kernels_that_may_be_left(
    make_keeper, tmp_path
):
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


def test_a_lab_that_logs_without_end_fills_no_disk_and_holds_nothing_up(make_keeper):
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
    until(lambda: log.with_name("default.log.1").exists(), what="a rotation")
    tail = keeper.http.get("/api/servers/default/logs", params={"tail": 10}).text
    assert len(tail.splitlines()) == 10
    # 10 MB a second at most, looked at every 2 s, and one older part.
    assert sum(path.stat().st_size for path in log.parent.iterdir()) < 60_000_000
    assert log.with_name("default.log.1").stat().st_mode & 0o077 == 0
    assert keeper.delete(force="true").status_code == 200
    until(
        lambda: not list(log.parent.glob("default*")), what="the log is forgotten with its server"
    )


def test_a_suspended_server_is_stopped_all_the_same(make_keeper):
    keeper = make_keeper(stop_grace=2, kill_wait=1).start()
    server = keeper.post().json()
    os.kill(server["pid"], signal.SIGSTOP)
    answer = keeper.delete()
    assert answer.status_code == 200
    assert answer.json()["stop_report"]["method"] == "sigkill"


def test_a_server_that_hangs_is_replaced(make_keeper):
    keeper = make_keeper(hung_after=0.5, probe_period=0.5, stop_grace=2).start()
    server = keeper.post().json()
    os.kill(server["pid"], signal.SIGSTOP)
    until(lambda: keeper.get()["generation"] == 2, what="a second launch")
    again = keeper.wait_for("running")
    assert again["restarts"] == 1
    assert not alive(server["pid"])


def test_followers_get_each_line_until_the_end_and_leave_no_thread(make_keeper):
    keeper = make_keeper().start()
    server = keeper.post().json()
    # What Jupyter says of itself after its start comes late: the follower begins when all is quiet.
    until(lambda: "Skipped non-installed" in keeper.http.get("/api/servers/default/logs").text)
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
    process = psutil.Process(keeper.process.pid)

    def threads_for_a_crowd():
        """How many threads have to be added for 20 followers who then go."""
        before = process.num_threads()
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                client = stack.enter_context(
                    httpx.Client(base_url=keeper.url, headers=keeper.http.headers, trust_env=False)
                )
                stack.enter_context(
                    client.stream("GET", "/api/servers/other/logs", params={"follow": "true"})
                )
            assert keeper.http.get("/healthz").status_code == 200
            return process.num_threads() - before

    assert threads_for_a_crowd() > 0
    # Threads stay; those of followers who have gone are there for the next ones.
    until(lambda: threads_for_a_crowd() == 0, what="followers' threads are free")
    assert process.num_threads() < 100
    keeper.delete("other")
