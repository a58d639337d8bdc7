"""The contenders: four ways to get a JupyterLab server, behind one interface.

All run on this machine, as this user, with a new home directory each, and with Jupyter's defaults
except for the settings in this module.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import psutil

from environments import Environments
from processes import end, spawn, tail
from progress import BenchError
from web import CREATED, OK, free_port, lines, request, request_json, wait_until_ready

POLL: Final = 0.005
"""Seconds between two polls of a server that is not ready."""
_STARTUP_TIMEOUT: Final = 60.0
"""Seconds for a keeper or a hub to respond, and for a fork server to warm up."""
_LONG_TIMEOUT: Final = 600
"""Seconds for start timeouts, so that a slow burst does not fail."""
_ACCEPTED: Final = 202
_NO_CONTENT: Final = 204


@dataclass(slots=True)
class Server:
    """A server that is ready. `url` ends in a slash."""

    name: str
    url: str
    authorization: str
    pid: int = 0
    process: subprocess.Popen[bytes] | None = None


class Skipped(Exception):  # noqa: N818 - the bench goes on without the contender
    """This contender cannot take part; the message says why."""


class Contender:
    """The interface of all contenders. Only `launch` and `stop` are timed."""

    key: ClassVar[str]
    label: ClassVar[str]

    def __init__(self, environments: Environments, server_dir: Path) -> None:
        self.environments = environments
        self.home = server_dir / f"{self.key}-{secrets.token_hex(4)}"
        self.notebooks = self.home / "notebooks"
        self.log = self.home / "log"
        self.notebooks.mkdir(parents=True)

    def environment(self, *environments: Path | None) -> dict[str, str]:
        """Return the environment of a fresh login, with these environments on its PATH."""
        kept = {
            name: os.environ[name]
            for name in ("LANG", "LC_ALL", "TZ", "USER")
            if name in os.environ
        }
        return kept | {"HOME": str(self.home), "PATH": self.environments.path(*environments)}

    def open(self) -> None:
        """Start the services that launch servers, if any."""

    def close(self) -> None:
        """Stop those services."""

    def prepare(self, names: Sequence[str]) -> None:
        """Do the setup of these servers that is not timed, such as creating users."""

    def launch(self, name: str, poll: float = POLL) -> Server:
        """Request a server, and return it when it is ready."""
        raise NotImplementedError

    def identify(self, server: Server) -> None:
        """Set `server.pid`, if `launch` did not."""

    def stop(self, server: Server) -> None:
        """Stop a server; return when the contender reports that it ended, if it does."""
        raise NotImplementedError

    def service_pids(self) -> dict[str, int]:
        """Return the PIDs of the services that run beside the servers, by name."""
        return {}


class Labkeeper(Contender):
    """A keeper; `launch_by` is its setting LABKEEPER_LAUNCH_BY."""

    launch_by: ClassVar[str]

    def open(self) -> None:
        """Start a keeper; in fork mode, wait until it forks servers."""
        self.boot()
        self._check_launch_method()

    def boot(self) -> None:
        """Start a keeper, and wait until its API responds."""
        self._port, self._token = free_port(), secrets.token_hex(16)
        self._authorization = f"Bearer {self._token}"
        self.state = self.home / "state"
        settings = {
            "LABKEEPER_PORT": str(self._port),
            "LABKEEPER_LAB_PORT": str(free_port()),
            "LABKEEPER_TOKEN": self._token,
            "LABKEEPER_STATE_DIR": str(self.state),
            "LABKEEPER_NOTEBOOK_DIR": str(self.notebooks),
            "LABKEEPER_START_TIMEOUT": str(_LONG_TIMEOUT),
            # Measure what the keeper can do, not its limit for one client.
            "LABKEEPER_MAX_REQUEST_RATE": "0",
            "LABKEEPER_LAUNCH_BY": self.launch_by,
        }
        command = [str(self.environments.lab / "bin/labkeeper"), "serve", "--log-format", "json"]
        self._keeper = spawn(
            command, self.environment(self.environments.lab) | settings, self.home, self.log
        )
        wait_until_up(f"{self.url}/readyz", self._keeper, self.log)

    def close(self) -> None:
        """Stop the keeper, which stops its servers first."""
        end(self._keeper, self.log)

    @property
    def url(self) -> str:
        """Return the base URL of the keeper."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def authorization(self) -> str:
        """Return the Authorization header of the keeper's owner."""
        return self._authorization

    def launch(self, name: str, poll: float = POLL) -> Server:
        """Create a server. The response implies that it is ready; we still poll it, as for all."""
        answer = request_json(
            "POST", f"{self.url}/api/servers", self._authorization, {"name": name}
        )
        if answer["state"] != "running":
            raise BenchError(f"a server is {answer['state']}, not running")
        if answer["launched_by"] != self.launch_by:
            raise BenchError(
                f"a server was launched by {answer['launched_by']}, not by {self.launch_by}:\n"
                f"{tail(self.log)}"
            )
        server = Server(name, answer["url"], f"token {answer['token']}", answer["pid"])
        wait_until_ready(server.url, server.authorization, poll=poll)
        return server

    def stop(self, server: Server) -> None:
        """Delete the server; the response proves that it is gone."""
        request_json(
            "DELETE", f"{self.url}/api/servers/{server.name}", self._authorization, good=(OK,)
        )

    def service_pids(self) -> dict[str, int]:
        """Return the PIDs of the keeper and, if there is one, the fork server."""
        found = {"keeper": self._keeper.pid}
        if self.launch_by == "fork":
            found["fork server"] = self._fork_server()
        return found

    def _fork_server(self) -> int:
        """Return the fork server's PID: this keeper has started it, and nothing else forks."""
        children = psutil.Process(self._keeper.pid).children()
        found = [child.pid for child in children if _mentions(child, "forkserver")]
        if len(found) != 1:
            raise BenchError(f"cannot tell which process is the fork server: found {len(found)}")
        return found[0]

    def _check_launch_method(self) -> None:
        """Check that this keeper launches as configured; raise Skipped if it cannot fork."""
        knows = "LABKEEPER_LAUNCH_BY" not in self.log.read_text(errors="replace")
        if self.launch_by == "exec":
            return
        if not knows:
            raise Skipped("this labkeeper cannot fork: it has no LABKEEPER_LAUNCH_BY")
        until = time.monotonic() + _STARTUP_TIMEOUT
        while True:
            answer = request_json(
                "POST", f"{self.url}/api/servers", self._authorization, {"name": "trial"}
            )
            request_json("DELETE", f"{self.url}/api/servers/trial", self._authorization, good=(OK,))
            if answer["launched_by"] == self.launch_by:
                return
            if time.monotonic() > until:
                raise BenchError(
                    f"the keeper has not forked a server within {_STARTUP_TIMEOUT:.0f} s:\n"
                    f"{tail(self.log)}"
                )
            time.sleep(0.2)


class LabkeeperFork(Labkeeper):
    """Servers forked from a process that has already imported Jupyter."""

    key = "labkeeper_fork"
    label = "labkeeper"
    launch_by = "fork"


class LabkeeperExec(Labkeeper):
    """Servers that each load JupyterLab themselves."""

    key = "labkeeper_exec"
    label = "labkeeper, exec"
    launch_by = "exec"


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
            _HUB_CONFIG.format(public=self._public, hub=hub, api=api, args=args, long=_LONG_TIMEOUT)
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
        if status not in {_ACCEPTED, _NO_CONTENT}:
            raise BenchError(f"the hub returned {status}: {body!r}")
        while (
            status == _ACCEPTED
            and request_json("GET", self._user(server.name), self._authorization)["servers"]
        ):
            time.sleep(POLL)

    def service_pids(self) -> dict[str, int]:
        """Return the PIDs of the hub and its proxy."""
        children = psutil.Process(self._hub.pid).children()
        proxies = [child.pid for child in children if _mentions(child, "configurable-http-proxy")]
        if len(proxies) != 1:
            raise BenchError(f"cannot tell which process is the hub's proxy: found {len(proxies)}")
        return {"hub": self._hub.pid, "proxy": proxies[0]}

    def _user(self, name: str) -> str:
        return f"{self.url}/hub/api/users/{name}"


ALL: Final[tuple[type[Contender], ...]] = (LabkeeperFork, LabkeeperExec, JupyterLab, JupyterHub)


def wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a keeper or a hub responds; raise BenchError if it ends or takes too long."""
    until = time.monotonic() + _STARTUP_TIMEOUT
    while True:
        try:
            if request("GET", url, timeout=5)[0] == OK:
                return
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > until:
            raise BenchError(f"cannot start {Path(str(process.args[0])).name}:\n{tail(log)}")  # type: ignore[index]
        time.sleep(POLL)


def _mentions(process: psutil.Process, word: str) -> bool:
    try:
        return any(word in piece for piece in process.cmdline())
    except psutil.Error:
        return False
