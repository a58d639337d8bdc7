"""The other contenders: `jupyter lab` and JupyterHub."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from typing import Final

import psutil

from contenders import LONG_TIMEOUT, POLL, Contender, Server, wait_until_up
from processes import end, mentions, spawn, tail
from progress import BenchError
from web import CREATED, NO_CONTENT, free_port, lines, request, request_json, wait_until_ready

_ACCEPTED: Final = 202


class JupyterLab(Contender):
    """`jupyter-lab` as run in a terminal.

    `jupyter lab` would take longer, because it first searches for that program.
    """

    key = "jupyter_lab"
    label = "jupyter lab"

    def launch(self, name: str, poll: float = POLL) -> Server:
        """Start the program, and poll it until it is ready."""
        port, token = free_port(), secrets.token_hex(16)
        program = str(self.environments.lab / "bin/jupyter-lab")
        command = [program, "--no-browser", f"--port={port}", "--ServerApp.port_retries=0"]
        if os.geteuid() == 0:
            command.append("--allow-root")
        env = self.environment(self.environments.lab) | {"JUPYTER_TOKEN": token}
        process = spawn(command, env, self.notebooks, self.log)
        server = Server(name, f"http://127.0.0.1:{port}/", f"token {token}", process.pid, process)
        try:
            wait_until_ready(
                server.url, server.authorization, poll=poll, alive=lambda: process.poll() is None
            )
        except BenchError as error:
            raise BenchError(f"{error}:\n{tail(self.log)}") from None
        return server

    def stop(self, server: Server) -> None:
        """Send SIGTERM, as service managers do; Ctrl-C would ask for confirmation."""
        assert server.process is not None
        server.process.terminate()
        server.process.wait()


_HUB_CONFIG: Final = """\
import os
c = get_config()
here = os.environ["BENCH_HOME"]
c.JupyterHub.bind_url = "http://127.0.0.1:{public}"
c.JupyterHub.hub_bind_url = "http://127.0.0.1:{hub}"
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{api}"
c.JupyterHub.db_url = "sqlite:///" + here + "/hub.sqlite"
c.JupyterHub.cookie_secret_file = here + "/cookie_secret"
c.ConfigurableHTTPProxy.pid_file = here + "/proxy.pid"
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = here + "/notebooks/{{username}}"
c.Spawner.args = {args}
# With the default timeouts of 60 and 30 s, a slow burst on a small machine would fail.
c.Spawner.start_timeout = {long}
c.Spawner.http_timeout = {long}
c.JupyterHub.services = [{{"name": "bench", "api_token": os.environ["BENCH_TOKEN"]}}]
c.JupyterHub.load_roles = [{{
    "name": "bench",
    "services": ["bench"],
    "scopes": ["admin:users", "admin:servers", "admin:server_state", "access:servers"],
}}]
"""


class JupyterHub(Contender):
    """JupyterHub with SimpleLocalProcessSpawner and configurable-http-proxy.

    This is its lightest configuration that starts real servers. To be fair, users are created in
    advance, and nothing polls the hub while it works: the hub holds the POST until the server is
    ready, for up to its `slow_spawn_timeout` of 10 s, and after that we read its progress stream.
    The hub's own polling intervals and concurrency limits keep their defaults.
    """

    key = "jupyterhub"
    label = "JupyterHub"

    def open(self) -> None:
        """Start the hub, which starts its proxy."""
        self._public, hub, api = free_port(), free_port(), free_port()
        token = secrets.token_hex(16)
        self._authorization = f"token {token}"
        args = ["--allow-root"] if os.geteuid() == 0 else []
        config = self.home / "jupyterhub_config.py"
        config.write_text(
            _HUB_CONFIG.format(public=self._public, hub=hub, api=api, args=args, long=LONG_TIMEOUT)
        )
        env = self.environment(self.environments.hub) | {
            "BENCH_HOME": str(self.home),
            "BENCH_TOKEN": token,
        }
        assert self.environments.hub is not None
        command = [str(self.environments.hub / "bin/jupyterhub"), f"--config={config}"]
        self._hub = spawn(command, env, self.home, self.log)
        wait_until_up(f"{self.url}/hub/api/", self._hub, self.log)

    def close(self) -> None:
        """Stop the hub, which stops its servers and its proxy."""
        end(self._hub, self.log)

    @property
    def url(self) -> str:
        """Return the base URL of the proxy."""
        return f"http://127.0.0.1:{self._public}"

    def prepare(self, names: Sequence[str]) -> None:
        """Create a user, with a directory, for each server."""
        for name in names:
            status, _ = request("POST", self._user(name), self._authorization)
            if status not in {CREATED, 409}:
                raise BenchError(f"cannot create a user in the hub: it returned {status}")
            (self.notebooks / name).mkdir(exist_ok=True)

    def launch(self, name: str, poll: float = POLL) -> Server:
        """Request a server, wait for the hub, and poll the server through the proxy."""
        status, body = request("POST", f"{self._user(name)}/server", self._authorization)
        if status == _ACCEPTED:
            for line in lines(f"{self._user(name)}/server/progress", self._authorization):
                if b'"ready": true' in line:
                    break
                if b'"failed": true' in line:
                    raise BenchError(f"the hub did not start a server:\n{tail(self.log)}")
        elif status != CREATED:
            raise BenchError(f"the hub returned {status}: {body!r}\n{tail(self.log)}")
        server = Server(name, f"{self.url}/user/{name}/", self._authorization)
        wait_until_ready(server.url, server.authorization, poll=poll)
        return server

    def identify(self, server: Server) -> None:
        """Read the PID from the state of the hub's spawner."""
        user = request_json("GET", self._user(server.name), self._authorization)
        server.pid = int(user["servers"][""]["state"]["pid"])

    def stop(self, server: Server) -> None:
        """Delete the server; poll the hub if that takes longer than its `slow_stop_timeout`."""
        status, body = request("DELETE", f"{self._user(server.name)}/server", self._authorization)
        if status not in {_ACCEPTED, NO_CONTENT}:
            raise BenchError(f"the hub returned {status}: {body!r}")
        while (
            status == _ACCEPTED
            and request_json("GET", self._user(server.name), self._authorization)["servers"]
        ):
            time.sleep(POLL)

    def service_pids(self) -> dict[str, int]:
        """Return the PIDs of the hub and its proxy."""
        children = psutil.Process(self._hub.pid).children()
        proxies = [child.pid for child in children if mentions(child, "configurable-http-proxy")]
        if len(proxies) != 1:
            raise BenchError(f"cannot tell which process is the hub's proxy: found {len(proxies)}")
        return {"hub": self._hub.pid, "proxy": proxies[0]}

    def _user(self, name: str) -> str:
        return f"{self.url}/hub/api/users/{name}"
