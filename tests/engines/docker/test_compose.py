"""`compose.yaml` as it is: a notebook runs with its kernel in a gateway."""

from __future__ import annotations

import os
import shutil
import subprocess

import httpx
import pytest

from engine import ROOT, TAG
from harness import PATIENCE, free_port, run_cell, start_kernel, until


class ComposeProject:
    """`docker compose` with compose.yaml, under its own project name."""

    def __init__(self, name):
        self.port, self.lab_port = free_port(), free_port()
        self._program = (
            ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
        )
        self._options = ["-f", str(ROOT / "compose.yaml"), "-p", name]
        self._env = os.environ | {
            "TAG": TAG,
            "API_PORT": str(self.port),
            "LAB_PORT": str(self.lab_port),
        }
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE, trust_env=False
        )

    def __call__(self, *arguments, check=True):
        done = subprocess.run(
            [*self._program, *self._options, *arguments],
            env=self._env,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
            check=False,
        )
        assert not check or done.returncode == 0, (done.stdout, done.stderr)
        return done.stdout

    def up(self):
        self("up", "-d", "--no-build")
        until(self._ready, what="the API to respond")
        token = self("exec", "-T", "jupyter-server", "labkeeper", "token").strip()
        self.http.headers["Authorization"] = f"Bearer {token}"

    def _ready(self):
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    def server(self, **body):
        answer = self.http.post("/api/servers", json={"gateway-url": "http://gateway:8888", **body})
        assert answer.status_code == 201, (answer.text, self("logs"))
        return answer.json() | {"url": f"http://127.0.0.1:{self.lab_port}/"}

    def gateway_kernels(self):
        code = (
            "import urllib.request as r;"
            " print(r.urlopen('http://gateway:8888/api/kernels').read().decode())"
        )
        return self("exec", "-T", "jupyter-server", "python", "-c", code).strip()


@pytest.fixture
def compose():
    made = ComposeProject(f"labkeeper-test-{os.getpid()}")
    yield made
    made.http.close()
    made("down", "-v", "-t", "1", check=False)


def test_kernels_run_in_the_gateway_with_their_environment_and_notebooks(compose):
    compose.up()
    server = compose.server(kernel_env={"KERNEL_TEAM": "blue"})
    channel = {"Authorization": f"token {server['token']}"}
    made = httpx.put(
        f"{server['url']}api/contents/team",
        headers=channel,
        json={"type": "directory"},
        trust_env=False,
    )
    assert made.status_code == 201
    kernel = start_kernel(server, path="team/notebook.ipynb")
    code = (
        "import os, socket; open('made', 'w').close();"
        " print(socket.gethostname(), os.getcwd(), os.environ['KERNEL_TEAM'])"
    )
    host, directory, team = run_cell(server, kernel, code).split()
    assert host == compose("exec", "-T", "gateway", "hostname").strip()
    assert host != compose("exec", "-T", "jupyter-server", "hostname").strip()
    assert (directory, team) == ("/notebooks/team", "blue")
    # Files that the kernel writes are visible in the Lab.
    listed = httpx.get(
        f"{server['url']}api/contents/team", headers=channel, trust_env=False
    ).json()["content"]
    assert [entry["name"] for entry in listed] == ["made"]
    assert kernel in compose.gateway_kernels()

    report = compose.http.delete("/api/servers/default").json()["stop_report"]
    assert (report["method"], report["kernels_stopped"], report["kernels_left"]) == (
        "shutdown",
        [kernel],
        [],
    )
    assert compose.gateway_kernels() == "[]"


def test_stopping_the_service_ends_its_kernels_in_the_gateway(compose):
    compose.up()
    start_kernel(compose.server())
    compose("stop", "jupyter-server")
    assert "no server is left" in compose("logs", "jupyter-server")
    ended = compose("logs", "gateway")
    assert "Kernel shutdown" in ended or "DELETE /api/kernels" in ended, ended
