"""Containers of the image under test, on a real Docker Engine.

`make test-docker` builds the image and says where the engine is.
"""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from contextlib import suppress
from pathlib import Path

import httpx

from harness import PATIENCE, free_port, until

ROOT = Path(__file__).resolve().parents[1]
TAG = os.environ.get("TAG", "test")
IMAGE = f"jupyter-server:{TAG}"
FORK = {"LABKEEPER_LAUNCH_BY": "fork"}


def docker(*arguments, check=True, timeout=PATIENCE, **options):
    """Run the Docker command line as a user would, and return the completed process."""
    done = subprocess.run(
        ["docker", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **options,
    )
    assert not check or done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done


class Container:
    """A container of the image, with its API and the default server's port published."""

    def __init__(self, *options, command=(), notebooks=None, image=IMAGE, environment=None):
        self.name = f"labkeeper-test-{uuid.uuid4().hex[:8]}"
        self.port, self.lab_port = free_port(), free_port()
        volume = () if notebooks is None else ("-v", f"{notebooks}:/notebooks")
        # A fork server takes seconds to load, so only tests about forking have one.
        variables = {"LABKEEPER_LAB_PORT": self.lab_port, "LABKEEPER_LAUNCH_BY": "exec"} | (
            environment or {}
        )
        self.arguments = (
            *("run", "-d", "--name", self.name),
            *(
                "-p",
                f"127.0.0.1:{self.port}:80",
                "-p",
                f"127.0.0.1:{self.lab_port}:{self.lab_port}",
            ),
            *(part for name, value in variables.items() for part in ("-e", f"{name}={value}")),
            *volume,
            *options,
            image,
            *command,
        )
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE, trust_env=False
        )

    def run(self):
        """Start it without waiting for its API."""
        docker(*self.arguments)
        return self

    def start(self):
        """Start it, and wait until its API is ready."""
        self.run()
        self.wait()
        self.http.headers["Authorization"] = f"Bearer {self.token}"
        return self

    def wait(self):
        until(self._ready, what="the API to respond")

    def _ready(self):
        assert self.state()["Running"], self.logs()
        with suppress(httpx.HTTPError):
            return self.http.get("/readyz").status_code == 200
        return False

    @property
    def token(self):
        return self.exec("labkeeper", "token").stdout.strip()

    def exec(self, *command, options=(), **more):
        return docker("exec", *options, self.name, *command, **more)

    def python(self, code, **more):
        return self.exec("python", "-c", code, **more).stdout

    def post(self, path="", **body):
        return self.http.post(f"/api/servers{path}", json=body)

    def delete(self, name="default"):
        return self.http.delete(f"/api/servers/{name}")

    def get(self, name="default"):
        return self.http.get(f"/api/servers/{name}").json()

    def server(self, **body):
        """Start a server, and return it with the URL that the host reaches it by."""
        answer = self.post(**body)
        assert answer.status_code == 201, (answer.text, self.logs())
        return self.seen_from_here(answer.json())

    def seen_from_here(self, server):
        return server | {"url": f"http://127.0.0.1:{server['port']}{server['base_url']}"}

    def forked(self, **body):
        """Start servers until one is forked: without a ready fork server, they are executed."""

        def start():
            server = self.server(**body)
            if server["launched_by"] == "fork":
                return server
            assert self.delete(server["name"]).status_code == 200
            return None

        return until(start, what="a forked server")

    def processes(self):
        """Return the command lines of the processes inside, by pid.

        The container's own Python reads them, since the image has no ps.
        """
        code = (
            "import json, pathlib\n"
            "found = {}\n"
            "for p in pathlib.Path('/proc').glob('[0-9]*'):\n"
            "    try: found[p.name] = [(p / 'stat').read_text().rpartition(')')[2].split()[0],"
            " (p / 'cmdline').read_text().replace('\\0', ' ').strip()]\n"
            "    except OSError: pass\n"
            "print(json.dumps(found))"
        )
        return {int(pid): tuple(state) for pid, state in json.loads(self.python(code)).items()}

    def logs(self):
        done = docker("logs", self.name, check=False)
        return done.stdout + done.stderr

    def inspect(self):
        return json.loads(docker("inspect", self.name).stdout)[0]

    @property
    def address(self):
        """Its own address, for ports that are not published."""
        return self.inspect()["NetworkSettings"]["IPAddress"]

    def state(self):
        return self.inspect()["State"]

    def stop(self):
        """Run `docker stop` with Docker's default grace period, and return the exit code."""
        docker("stop", self.name)
        return self.state()["ExitCode"]

    def ended(self):
        """Wait until it has exited by itself, and return the exit code."""
        until(lambda: not self.state()["Running"], what="the container to exit")
        return self.state()["ExitCode"]

    def close(self):
        self.http.close()
        docker("rm", "-f", "-v", self.name, check=False)
