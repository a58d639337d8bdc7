"""Culling with real JupyterLab, kernels and terminals: only what is idle is stopped."""

from __future__ import annotations

import json
import os
import signal

import httpx
import websocket

from harness import PATIENCE, forked, kernel_websocket, run_cell, send_cell, start_kernel, until

QUICK = {"cull_period": 0.5, "cull_grace": 0, "cull_warning": 1}
LATER = QUICK | {"cull_period": "366d"}
"""For a keeper that culls nothing until `begin_culling`: before, even a slow test has time."""


def begin_culling(keeper):
    """Start the keeper again, as one that culls soon; its running servers stay."""
    keeper.kill()
    keeper.settings |= QUICK
    keeper.start()


def log_entries(keeper, event):
    """Return what the keeper logged for one kind of event."""
    lines = [
        json.loads(line) for line in keeper.log.read_text().splitlines() if line.startswith("{")
    ]
    return [line for line in lines if line["event"] == event]


def idle(keeper, name):
    return keeper.http.get(f"/api/servers/{name}/idle").json()


def wait_for_next_poll(keeper, name):
    """Wait until the culler has polled a server again; `idle` would poll it itself."""

    def last_poll():
        servers = keeper.http.get("/api/idle").json()["servers"]
        return next(server["looked_at"] for server in servers if server["name"] == name)

    before = last_poll()
    until(lambda: last_poll() != before, what="the culler to poll the server again")


def jupyter_request(server, method, path, **body):
    headers = {"Authorization": f"token {server['token']}"}
    answer = httpx.request(
        method,
        server["url"] + path,
        headers=headers,
        json=body or None,
        timeout=PATIENCE,
        trust_env=False,
    )
    assert answer.is_success, answer.text
    return answer.json() if answer.content else None


def open_terminal(server, *commands):
    """Open a terminal, type commands, and return its websocket."""
    name = jupyter_request(server, "POST", "api/terminals")["name"]
    url = f"{server['url']}terminals/websocket/{name}".replace("http", "ws", 1)
    socket = websocket.create_connection(
        url, header=[f"Authorization: token {server['token']}"], timeout=PATIENCE
    )
    for command in commands:
        socket.send(json.dumps(["stdin", f"{command}\n"]))
    return socket


def make_busy(server, kernel, code):
    """Run code in a kernel without waiting for the result."""
    with kernel_websocket(server, kernel) as socket:
        send_cell(socket, code)
        until(
            lambda: (
                jupyter_request(server, "GET", f"api/kernels/{kernel}")["execution_state"] == "busy"
            ),
            what="the kernel to be busy",
        )


def test_idle_servers_are_stopped_after_a_warning_and_busy_ones_are_kept(
    make_keeper,
):
    keeper = make_keeper(**LATER, launch_by="fork").start_to_fork()

    def start(name):
        return keeper.post(name=name, idle_timeout="2s").json()

    deaf = start("deaf")
    # Otherwise it might be culled before it is suspended.
    keeper.http.post("/api/servers/deaf/snooze", json={"for": "1h"}).raise_for_status()
    busy = start("busy")
    make_busy(busy, start_kernel(busy), "import time; time.sleep(600)")
    open_terminal(start("program"), "sleep 600").close()
    open_terminal(start("shell")).close()
    start_kernel(start("silent"))
    until(lambda: idle(keeper, "program")["held_by"], what="the program in the terminal to start")
    begin_culling(keeper)
    for name in ("busy", "program", "deaf"):
        keeper.wait_for("running", name)
    os.kill(deaf["pid"], signal.SIGSTOP)
    try:
        keeper.http.post("/api/servers/deaf/snooze", json={"for": 0}).raise_for_status()
        for name in ("silent", "shell"):
            stopped = keeper.wait_for("stopped", name)
            assert stopped["goal"] == "down"
            assert [
                line["rule"]
                for line in log_entries(keeper, "a server is about to be culled")
                if line["server"] == name
            ]
            assert [
                line["reason"].startswith("idle_timeout: unused for")
                for line in log_entries(keeper, "a server is culled")
                if line["server"] == name
            ] == [True]
        # These were started before the stopped ones, and have been polled once more since.
        for name in ("busy", "program"):
            wait_for_next_poll(keeper, name)
        assert {keeper.get(name)["state"] for name in ("busy", "program", "deaf")} == {"running"}
        held = idle(keeper, "busy")
        assert (held["state"], held["held_by"][0]["kind"], held["held_by"][0]["reason"]) == (
            "in-use",
            "kernel",
            "is busy",
        )
        assert idle(keeper, "program")["held_by"] == [
            {"kind": "terminal", "id": "1", "reason": "runs sleep"}
        ]
        assert idle(keeper, "deaf")["state"] == "unknown"
        assert "did not answer in time" in idle(keeper, "deaf")["reason"]
        assert idle(keeper, "shell")["state"] == "not-running"
    finally:
        os.kill(deaf["pid"], signal.SIGCONT)
    result = keeper.cli("idle")
    assert "runs sleep" in result.stdout, (result.stdout, result.stderr)
    assert "in-use" in keeper.cli("idle", "busy").stdout
    # The spec is unchanged: a start brings the server back.
    assert keeper.http.post("/api/servers/silent/start").json()["idle_timeout"] == 2


def test_polls_by_the_keeper_and_by_open_tabs_are_not_activity(make_keeper):
    keeper = make_keeper(**QUICK, probe_period=0.2, launch_by="fork").start()
    server = forked(keeper, "lab", idle_timeout="1h")
    kernel = start_kernel(server)
    assert run_cell(server, kernel, "1+1") == "2"
    until(
        lambda: jupyter_request(server, "GET", f"api/kernels/{kernel}")["execution_state"] == "idle"
    )
    with kernel_websocket(server, kernel):
        first = jupyter_request(server, "GET", "api/status")["last_activity"]
        for _ in range(3):
            assert idle(keeper, "lab")["last_used"] == f"kernel {kernel}"
            assert keeper.http.get("/api/servers/lab/kernels").status_code == 200
            for path in ("kernels", "sessions", "terminals", "contents", "kernelspecs"):
                jupyter_request(server, "GET", f"api/{path}")
            wait_for_next_poll(keeper, "lab")
        assert jupyter_request(server, "GET", "api/status")["last_activity"] == first
    jupyter_request(server, "PUT", "api/contents/a.txt", type="file", format="text", content="x")
    assert jupyter_request(server, "GET", "api/status")["last_activity"] > first


def test_open_connection_is_activity_if_cull_connected_is_off(make_keeper):
    keeper = make_keeper(**LATER, cull_connected="false").start()
    server = keeper.post(name="lab", idle_timeout="2s").json()
    with kernel_websocket(server, start_kernel(server)):
        begin_culling(keeper)
        keeper.wait_for("running", "lab")
        until(lambda: idle(keeper, "lab")["held_by"], what="the API to report what keeps it in use")
        assert idle(keeper, "lab")["held_by"][0]["kind"] == "connection"
    keeper.wait_for("stopped", "lab")


def test_snooze_and_max_age_survive_a_restart_of_the_keeper(make_keeper):
    keeper = make_keeper(**LATER, max_snooze="1h").start()
    for name, rule in (("aged", {"max_age": 2}), ("snoozed", {"idle_timeout": 2})):
        assert keeper.post(name=name, **rule).status_code == 201
    before = idle(keeper, "aged")["stops_at"]
    refused = keeper.http.post("/api/servers/snoozed/snooze", json={"for": "2h"})
    assert (refused.status_code, "LABKEEPER_MAX_SNOOZE" in refused.json()["detail"]) == (422, True)
    result = keeper.cli("snooze", "snoozed", "--for", "30m", "--json")
    until_ = json.loads(result.stdout)["snoozed_until"]
    assert keeper.get("snoozed")["snoozed_until"] == until_
    keeper.kill()
    keeper.start()
    keeper.wait_for("running", "aged")
    keeper.wait_for("running", "snoozed")
    assert idle(keeper, "aged")["rules"][0]["since"][:19] <= before[:19]
    begin_culling(keeper)
    keeper.wait_for("stopped", "aged")
    assert log_entries(keeper, "a server is culled")[-1]["reason"].startswith(
        "max_age: it has run for"
    )
    listed = keeper.http.get("/api/idle").json()["servers"]
    assert [(one["name"], one["state"]) for one in listed] == [
        ("snoozed", "snoozed"),
        ("aged", "not-running"),
    ]
    assert keeper.get("snoozed")["state"] == "running"
    assert (
        keeper.http.post("/api/servers/snoozed/snooze", json={"for": 0}).json()["snoozed_until"]
        is None
    )
    keeper.wait_for("stopped", "snoozed")


def test_idle_kernels_are_culled_both_locally_and_on_a_gateway(make_keeper, gateway):
    keeper = make_keeper(**LATER, kernel_idle_timeout=2).start()
    beside = keeper.post(name="beside", idle_timeout="1h").json()
    remote = keeper.post(
        name="remote", gateway_url=gateway.url, gateway_auth_token=gateway.token
    ).json()
    of_beside, of_remote = kernels = [start_kernel(server) for server in (beside, remote)]
    assert run_cell(beside, of_beside, "1+1") == "2"
    until(
        lambda: (
            jupyter_request(beside, "GET", f"api/kernels/{of_beside}")["execution_state"] == "idle"
        )
    )
    before = jupyter_request(beside, "GET", "api/status")["last_activity"]
    begin_culling(keeper)
    until(
        lambda: (
            {line["kernel"] for line in log_entries(keeper, "a kernel is culled")} == set(kernels)
        ),
        what="both kernels to be culled",
    )
    assert jupyter_request(beside, "GET", "api/kernels") == []
    assert of_remote not in gateway.kernels()
    # Culling a kernel does not count as activity of its server.
    assert jupyter_request(beside, "GET", "api/status")["last_activity"] == before
