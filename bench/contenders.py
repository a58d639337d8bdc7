"""What is compared: four ways to come by a JupyterLab server, behind one face.

All run on this machine, as this user, with a home directory of their own that was empty, and with Jupyter's own settings but for
those that are named here.
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
from guard import started_by_us
from processes import end, spawn, tail
from progress import BenchError
from web import CREATED, OK, ask, ask_json, free_port, lines, wait_until_answering

POLL: Final = 0.005
"""Seconds between two looks at whether a server answers, where nobody tells us."""
_OPENING: Final = 60.0
"""Seconds that a keeper or a hub may take until it answers, and a fork server until it is warm."""
_LONG: Final = 600
"""Seconds for limits that would turn a slow burst into a failed one."""
_ACCEPTED: Final = 202
_NO_CONTENT: Final = 204


@dataclass(slots=True)
class Server:
    """One that is ready. `url` ends in a slash."""

    name: str
    url: str
    authorization: str
    pid: int = 0
    process: subprocess.Popen[bytes] | None = None


class Skipped(Exception):  # noqa: N818 - it is no error of the bench
    """This contender cannot take part; the message says why."""


class Contender:
    """What each can do. Only `launch` and `stop` are timed."""

    key: ClassVar[str]
    label: ClassVar[str]

    def __init__(self, environments: Environments, server_dir: Path) -> None:
        self.environments = environments
        self.home = server_dir / f"{self.key}-{secrets.token_hex(4)}"
        self.notebooks = self.home / "notebooks"
        self.log = self.home / "log"
        self.notebooks.mkdir(parents=True)

    def environment(self, *places: Path | None) -> dict[str, str]:
        """Give the environment of a login that has just begun."""
        kept = {
            name: os.environ[name]
            for name in ("LANG", "LC_ALL", "TZ", "USER")
            if name in os.environ
        }
        return kept | {"HOME": str(self.home), "PATH": self.environments.path(*places)}

    def open(self) -> None:
        """Start what must run before a server can be asked for."""

    def close(self) -> None:
        """End that."""

    def prepare(self, names: Sequence[str]) -> None:
        """Do for these servers what is done once, long before they are asked for."""

    def launch(self, name: str, poll: float = POLL) -> Server:
        """Ask for a server, and return when it is ready."""
        raise NotImplementedError

    def identify(self, server: Server) -> None:
        """Find the process of a server, where `launch` has not told it."""

    def stop(self, server: Server) -> None:
        """Ask a server to end; what answers when that is done has answered."""
        raise NotImplementedError

    def beside(self) -> dict[str, int]:
        """Name the processes that run beside the servers."""
        return {}


class Labkeeper(Contender):
    """A keeper, with the one setting that says how it makes processes."""

    launch_by: ClassVar[str]

    def open(self) -> None:
        """Start a keeper; where it forks, wait until it does."""
        self._port, self._token = free_port(), secrets.token_hex(16)
        self._authorization = f"Bearer {self._token}"
        self.state = self.home / "state"
        settings = {
            "LABKEEPER_PORT": str(self._port),
            "LABKEEPER_LAB_PORT": str(free_port()),
            "LABKEEPER_TOKEN": self._token,
            "LABKEEPER_STATE_DIR": str(self.state),
            "LABKEEPER_NOTEBOOK_DIR": str(self.notebooks),
            "LABKEEPER_START_TIMEOUT": str(_LONG),
            # What it can do is measured, not what one caller may ask of it.
            "LABKEEPER_MAX_REQUEST_RATE": "0",
            "LABKEEPER_LAUNCH_BY": self.launch_by,
        }
        command = [str(self.environments.lab / "bin/labkeeper"), "serve", "--log-format", "json"]
        self._keeper = spawn(
            command, self.environment(self.environments.lab) | settings, self.home, self.log
        )
        wait_until_answering_once(f"{self.url}/readyz", self._keeper, self.log)
        self._check()

    def close(self) -> None:
        """End the keeper; it ends its servers first."""
        end(self._keeper, self.log)

    @property
    def url(self) -> str:
        """Where the keeper answers."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def authorization(self) -> str:
        """What the keeper wants to be shown."""
        return self._authorization

    def launch(self, name: str, poll: float = POLL) -> Server:
        """POST answers when the server is ready; we look for ourselves all the same."""
        answer = ask_json("POST", f"{self.url}/api/servers", self._authorization, {"name": name})
        if answer["state"] != "running":
            raise BenchError(f"a server is {answer['state']}, not running")
        if answer["launched_by"] != self.launch_by:
            raise BenchError(
                f"a server was launched by {answer['launched_by']}, not by {self.launch_by}:\n{tail(self.log)}"
            )
        server = Server(name, answer["url"], f"token {answer['token']}", answer["pid"])
        wait_until_answering(server.url, server.authorization, poll=poll)
        return server

    def stop(self, server: Server) -> None:
        """DELETE answers when the server is proven to be gone."""
        ask_json("DELETE", f"{self.url}/api/servers/{server.name}", self._authorization, good=(OK,))

    def beside(self) -> dict[str, int]:
        """Name the keeper and, where there is one, the fork server."""
        found = {"keeper": self._keeper.pid}
        if self.launch_by == "fork":
            found["fork server"] = self._fork_server()
        return found

    def _fork_server(self) -> int:
        """Find it: forked servers show its command line, too, but it alone has a parent that does not."""
        named = {
            process.pid: process for process in started_by_us() if _mentions(process, "forkserver")
        }
        tops = [pid for pid, process in named.items() if process.ppid() not in named]
        if len(tops) != 1:
            raise BenchError(f"cannot tell which process is the fork server: found {len(tops)}")
        return tops[0]

    def _check(self) -> None:
        """See that this keeper launches as it was told, so that nothing is measured under a wrong name."""
        knows = "LABKEEPER_LAUNCH_BY" not in self.log.read_text(errors="replace")
        if self.launch_by == "exec":
            return
        if not knows:
            raise Skipped("this labkeeper does not know LABKEEPER_LAUNCH_BY: it cannot fork")
        until = time.monotonic() + _OPENING
        while True:
            answer = ask_json(
                "POST", f"{self.url}/api/servers", self._authorization, {"name": "trial"}
            )
            ask_json("DELETE", f"{self.url}/api/servers/trial", self._authorization, good=(OK,))
            if answer["launched_by"] == self.launch_by:
                return
            if time.monotonic() > until:
                raise BenchError(
                    f"the keeper has not forked a server within {_OPENING:.0f} s:\n{tail(self.log)}"
                )
            time.sleep(0.2)


class LabkeeperFork(Labkeeper):
    """Servers forked from a process that has imported Jupyter already."""

    key = "labkeeper_fork"
    label = "labkeeper"
    launch_by = "fork"


class LabkeeperExec(Labkeeper):
    """Servers that load JupyterLab each by itself."""

    key = "labkeeper_exec"
    label = "labkeeper, exec"
    launch_by = "exec"


class JupyterLab(Contender):
    """`jupyter-lab` as typed into a terminal; `jupyter lab` would first look that program up, at its own cost."""

    key = "jupyter_lab"
    label = "jupyter lab"

    def launch(self, name: str, poll: float = POLL) -> Server:
        """Start the program, and look until it answers: it tells nobody."""
        port, token = free_port(), secrets.token_hex(16)
        program = str(self.environments.lab / "bin/jupyter-lab")
        command = [program, "--no-browser", f"--port={port}", "--ServerApp.port_retries=0"]
        if os.geteuid() == 0:
            command.append("--allow-root")
        env = self.environment(self.environments.lab) | {"JUPYTER_TOKEN": token}
        process = spawn(command, env, self.notebooks, self.log)
        server = Server(name, f"http://127.0.0.1:{port}/", f"token {token}", process.pid, process)
        try:
            wait_until_answering(
                server.url, server.authorization, poll=poll, alive=lambda: process.poll() is None
            )
        except BenchError as error:
            raise BenchError(f"{error}:\n{tail(self.log)}") from None
        return server

    def stop(self, server: Server) -> None:
        """SIGTERM is what service managers and `kill` send; Ctrl-C would ask for a confirmation."""
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
# With the default limits, of 60 and 30 s, a burst on a small machine would fail instead of being slow.
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
    """JupyterHub with SimpleLocalProcessSpawner and configurable-http-proxy: its lightest form that starts real servers.

    What we do for its sake: users exist before they are measured; POST waits for the server on the hub's side (up to the hub's
    `slow_spawn_timeout`, 10 s), and after that we read the hub's stream of progress, so that we never poll it while it works.
    What we leave alone: the intervals at which the hub itself looks for its servers, and its limits of concurrency.
    """

    key = "jupyterhub"
    label = "JupyterHub"

    def open(self) -> None:
        """Start the hub; it starts its proxy."""
        self._public, hub, api = free_port(), free_port(), free_port()
        token = secrets.token_hex(16)
        self._authorization = f"token {token}"
        args = ["--allow-root"] if os.geteuid() == 0 else []
        config = self.home / "jupyterhub_config.py"
        config.write_text(
            _HUB_CONFIG.format(public=self._public, hub=hub, api=api, args=args, long=_LONG)
        )
        env = self.environment(self.environments.hub) | {
            "BENCH_HOME": str(self.home),
            "BENCH_TOKEN": token,
        }
        assert self.environments.hub is not None
        self._hub = spawn(
            [self.environments.hub / "bin/jupyterhub", f"--config={config}"],
            env,
            self.home,
            self.log,
        )
        wait_until_answering_once(f"{self.url}/hub/api/", self._hub, self.log)

    def close(self) -> None:
        """End the hub; it ends its servers and its proxy."""
        end(self._hub, self.log)

    @property
    def url(self) -> str:
        """Where the proxy answers."""
        return f"http://127.0.0.1:{self._public}"

    def prepare(self, names: Sequence[str]) -> None:
        """Make users."""
        for name in names:
            status, _ = ask("POST", self._user(name), self._authorization)
            if status not in {CREATED, 409}:
                raise BenchError(f"cannot make a user of the hub: {status}")
            (self.notebooks / name).mkdir(exist_ok=True)

    def launch(self, name: str, poll: float = POLL) -> Server:
        """Ask the hub, wait for its word, and look through the proxy."""
        status, body = ask("POST", f"{self._user(name)}/server", self._authorization)
        if status == _ACCEPTED:
            for line in lines(f"{self._user(name)}/server/progress", self._authorization):
                if b'"ready": true' in line:
                    break
                if b'"failed": true' in line:
                    raise BenchError(f"the hub did not start a server:\n{tail(self.log)}")
        elif status != CREATED:
            raise BenchError(f"the hub answered {status}: {body!r}\n{tail(self.log)}")
        server = Server(name, f"{self.url}/user/{name}/", self._authorization)
        wait_until_answering(server.url, server.authorization, poll=poll)
        return server

    def identify(self, server: Server) -> None:
        """Ask the hub for the state of its spawner."""
        user = ask_json("GET", self._user(server.name), self._authorization)
        server.pid = int(user["servers"][""]["state"]["pid"])

    def stop(self, server: Server) -> None:
        """DELETE answers when the server has ended, or after the hub's `slow_stop_timeout` of 10 s; then we look."""
        status, body = ask("DELETE", f"{self._user(server.name)}/server", self._authorization)
        if status not in {_ACCEPTED, _NO_CONTENT}:
            raise BenchError(f"the hub answered {status}: {body!r}")
        while (
            status == _ACCEPTED
            and ask_json("GET", self._user(server.name), self._authorization)["servers"]
        ):
            time.sleep(POLL)

    def beside(self) -> dict[str, int]:
        """Name the hub and its proxy."""
        children = psutil.Process(self._hub.pid).children()
        proxies = [child.pid for child in children if _mentions(child, "configurable-http-proxy")]
        if len(proxies) != 1:
            raise BenchError(f"cannot tell which process is the hub's proxy: found {len(proxies)}")
        return {"hub": self._hub.pid, "proxy": proxies[0]}

    def _user(self, name: str) -> str:
        return f"{self.url}/hub/api/users/{name}"


ALL: Final[tuple[type[Contender], ...]] = (LabkeeperFork, LabkeeperExec, JupyterLab, JupyterHub)


def wait_until_answering_once(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a keeper or a hub answers."""
    until = time.monotonic() + _OPENING
    while True:
        try:
            if ask("GET", url, timeout=5)[0] == OK:
                return
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > until:
            raise BenchError(f"cannot start {Path(str(process.args[0])).name}:\n{tail(log)}")  # type: ignore[index]
        time.sleep(0.05)


def _mentions(process: psutil.Process, word: str) -> bool:
    try:
        return any(word in piece for piece in process.cmdline())
    except psutil.Error:
        return False
