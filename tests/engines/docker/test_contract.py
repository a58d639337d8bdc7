"""What users of the container rely on: ports, paths, responses and graceful shutdown."""

from __future__ import annotations

import httpx
import pytest

from engine import FORK, docker
from harness import run_cell, start_kernel, until

SERVER_INFO = (
    "base_url",
    "hostname",
    "notebook_dir",
    "password",
    "pid",
    "port",
    "secure",
    "token",
    "url",
)
GRACE = 10
"""Default timeout of `docker stop` in seconds."""


def test_lab_starts_on_request_runs_a_cell_and_stops(make_container, notebooks):
    owner = notebooks.stat().st_uid
    container = make_container(
        "--user", f"{owner}:{owner}", notebooks=notebooks, environment=FORK
    ).start()
    unauthenticated = httpx.get(f"http://127.0.0.1:{container.port}/api/servers", trust_env=False)
    assert unauthenticated.status_code == 401
    assert not reachable(container.lab_port)

    server = container.server()
    assert all(server[name] is not None for name in SERVER_INFO), server
    assert (server["hostname"], server["port"], server["notebook_dir"]) == (
        "0.0.0.0",
        container.lab_port,
        "/notebooks",
    )
    assert server["lab_url"] == f"http://127.0.0.1:{container.lab_port}/lab?token={server['token']}"
    page = httpx.get(server["lab_url"], trust_env=False, follow_redirects=True)
    assert page.status_code == 200
    assert "JupyterLab" in page.text

    kernel = start_kernel(server)
    assert run_cell(server, kernel, "open('of-a-cell.txt', 'w').write('kept')") == "4"
    made = notebooks / "of-a-cell.txt"
    assert made.read_text() == "kept"
    assert made.stat().st_uid == owner

    report = container.delete().json()["stop_report"]
    assert (report["method"], report["kernels_stopped"], report["kernels_left"]) == (
        "shutdown",
        [kernel],
        [],
    )
    assert not reachable(container.lab_port)
    assert [file.name for file in notebooks.iterdir()] == ["of-a-cell.txt"]
    assert container.stop() == 0


def test_docker_stop_shuts_every_server_and_kernel_down_gracefully(make_container, notebooks):
    owner = notebooks.stat().st_uid
    container = make_container("--user", f"{owner}:{owner}", notebooks=notebooks).start()
    idle, busy = container.server(), container.server(name="busy", port=9999)
    start_kernel(idle)
    start_kernel(busy | {"url": f"http://{container.address}:9999/"})
    terminal = httpx.post(
        f"{idle['url']}api/terminals",
        headers={"Authorization": f"token {idle['token']}"},
        json={},
        trust_env=False,
    )
    assert terminal.status_code == 200

    code = container.stop()

    logs = container.logs()
    assert code == 0, logs
    assert "no server is left" in logs
    assert logs.count("stopping -> stopped") == 2
    assert logs.count("method=shutdown") == 2, logs
    assert "killing" not in logs
    assert list(notebooks.iterdir()) == []


def test_killed_container_recovers_its_servers_when_it_starts_again(make_container):
    container = make_container().start()
    container.server(name="was-running")
    container.http.post("/api/servers/was-running/stop")
    container.server()
    docker("kill", container.name)
    docker("start", container.name)
    container.wait()

    assert container.get("was-running")["state"] == "stopped"
    server = container.http.get(
        "/api/servers/default", params={"wait_for": "running", "wait": 60}
    ).json()
    # It was meant to be up, but its process was gone, so it was restarted.
    assert server["state"] == "running"
    assert server["restarts"] == 1
    assert httpx.get(server["lab_url"], trust_env=False, follow_redirects=True).status_code == 200
    assert container.stop() == 0


def test_zombies_are_reaped(make_container):
    container = make_container(environment=FORK).start()
    server = container.forked()
    kernel = start_kernel(server)
    # An orphaned process is reparented to the init of the container.
    run_cell(
        server, kernel, "import subprocess; subprocess.run(['sh', '-c', 'setsid sleep 0.3 &'])"
    )
    container.delete()
    until(
        lambda: all(state != "Z" for state, _ in container.processes().values()),
        what="all zombies to be reaped",
    )
    commands = [command for _, command in container.processes().values()]
    assert not [command for command in commands if "sleep" in command or "ipykernel" in command], (
        commands
    )


@pytest.mark.parametrize("signal", ["TERM", "INT", "HUP"])
def test_each_termination_signal_shuts_down_gracefully(make_container, signal):
    container = make_container().start()
    container.server()
    docker("kill", "--signal", signal, container.name)
    assert container.ended() == 0
    assert "no server is left" in container.logs()


def reachable(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/api", trust_env=False, timeout=5).is_success
    except httpx.HTTPError:
        return False
