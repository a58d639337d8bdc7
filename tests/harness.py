"""Shared by the end-to-end tests: a keeper as a process, and kernels that run real cells."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import websocket

import labkeeper
from labkeeper.backends.local.limits import ControlGroups

PATIENCE = 60.0
"""Seconds until a condition counts as never met; generous, for slow machines."""


def until(condition, *, what="a condition"):
    """Wait until `condition()` is true, and return its value.

    Tests set no limit of their own: bench/ measures durations.
    """
    begun = time.monotonic()
    while True:
        value = condition()
        if value:
            return value
        waited = time.monotonic() - begun
        assert waited < PATIENCE, (
            f"timed out after {PATIENCE:g} s waiting for {what() if callable(what) else what}"
        )
        # Polling costs time as well, so it slows down the longer the condition has not been met.
        time.sleep(min(max(0.02, waited / 20), 0.2))


def _own_ports():
    """Return ports that neither another worker nor the kernel hands out (Linux begins at 32768)."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 12_000 + worker % 8 * 2_500
    begin = random.Random(os.getpid()).randrange(2_500)
    return itertools.cycle(first + (begin + number) % 2_500 for number in range(2_500))


_ports = _own_ports()

HOLD_PORTS = """
from labkeeper.forkserver.patches import hold_ports
hold_ports()
"""
"""A configuration file for Jupyter programs that are not servers of ours.

Their kernels listen half a second after their ports were chosen. Without this, another test was
given such a port in the meantime, the kernel could not start, and tests of gateways were flaky.
"""


def free_port():
    """Return a free port that is not handed out again soon."""
    while True:
        port = next(_ports)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def low_ports_take_a_right():
    try:
        return int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) > 81
    except OSError:
        return True


def port_is_free(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def processes_where(condition):
    """Return the live processes that meet a condition, without those that end meanwhile."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if condition(process) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_all(processes):
    """Kill processes, some of which may have ended by now; return when none is alive."""
    killed = list(processes)
    for process in killed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    until(lambda: not any(alive(process.pid) for process in killed), what="killed processes to end")


def processes_marked(prefix, *, rehearsals=True):
    """Return the live processes that servers of this runtime directory started.

    A fork server rehearses one whenever it loads anew.
    """

    def is_of_server(process):
        mark = process.environ().get("LABKEEPER_SERVER", "")
        return mark.startswith(str(prefix)) and (rehearsals or "/.forkservers/" not in mark)

    return processes_where(is_of_server)


def working_in(directory):
    """Return the live processes whose working directory is below this one.

    For a runtime directory, those are its fork servers and servers.
    """
    return processes_where(lambda process: process.cwd().startswith(f"{directory}/"))


def fork_servers_of(keeper):
    return processes_where(
        lambda process: Path(process.cwd()).parent == keeper.server_dirs / ".forkservers"
    )


def edges_of(keeper):
    """Return the edges of a keeper's state directory, each in a directory of its own."""
    return working_in(keeper.state_dir / "edge")


def servers_in(prefix):
    """Return the pids of JupyterLab servers, without kernels and programs of extensions."""
    found = []
    for process in processes_marked(prefix, rehearsals=False):
        with contextlib.suppress(psutil.Error):
            if any(piece.startswith("jupyter-lab") for piece in process.cmdline()[:1]):
                found.append(process.pid)
    return found


class Found(NamedTuple):
    """A file or directory, as it was when it was looked at."""

    path: Path
    mode: int
    content: bytes
    """Empty for a directory."""


def everything_below(directory):
    """Return files and directories with modes and contents; links are left out."""
    found = []
    for parent, directories, files in os.walk(directory):
        for path in (Path(parent, name) for name in (*directories, *files)):
            with contextlib.suppress(FileNotFoundError):
                mode = path.lstat().st_mode
                if not stat.S_ISLNK(mode):
                    found.append(
                        Found(
                            path,
                            stat.S_IMODE(mode),
                            path.read_bytes() if stat.S_ISREG(mode) else b"",
                        )
                    )
    return found


def children():
    """Return this process's children from the kernel's lists; psutil would scan all processes."""
    lists = list(Path("/proc/self/task").glob("*/children"))
    if not lists:
        return {child.pid for child in psutil.Process().children()}
    found = set()
    for path in lists:
        with contextlib.suppress(OSError):  # The thread has ended meanwhile.
            found.update(int(pid) for pid in path.read_text().split())
    return found


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def no_descriptors():
    """Let this process open no descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def plain_python(directory: Path):
    """Make an interpreter that runs JupyterLab without coverage, which doubles start times."""
    directory.mkdir(parents=True, exist_ok=True)
    python = directory / "python3"
    if not python.exists():
        python.write_text(
            "#!/bin/sh\nunset COVERAGE_PROCESS_CONFIG COVERAGE_PROCESS_START\n"
            f'exec "{sys.executable}" "$@"\n'
        )
        python.chmod(0o755)
        (directory / "jupyter-lab").symlink_to(Path(sys.executable).parent / "jupyter-lab")
    return python


def quiet_node(directory: Path):
    """Make a `node` that does nothing.

    When JupyterLab is imported it runs one to read Yarn's configuration, which no test needs.
    """
    directory.mkdir(parents=True, exist_ok=True)
    node = directory / "node"
    if not node.exists():
        node.write_text("#!/bin/sh\n")
        node.chmod(0o755)
    return directory


class KeeperProcess:
    """`labkeeper serve` as a user runs it, on directories and ports of its own."""

    def __init__(self, base: Path, **settings):
        self.base = base
        self.state_dir = base / "state"
        self.notebook_dir = base / "notebooks"
        self.config_dir = base / "config"
        self.log = base / "keeper.log"
        for directory in (self.notebook_dir, self.config_dir):
            directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.lab_port = free_port()
        self.settings = settings
        self.variables = {}
        """Further environment variables, which its servers inherit."""
        self.verify = True
        """What to trust if it speaks TLS: httpx's `verify`."""
        self.process = None
        self.http = None

    @property
    def url(self):
        return f"{'https' if 'cert_file' in self.settings else 'http'}://127.0.0.1:{self.port}"

    @property
    def server_dirs(self):
        return Path(self.settings.get("runtime_dir", self.state_dir / "run"))

    def in_server_dirs(self):
        """Return the names in the runtime directory, except that of the lock file."""
        return (
            sorted({path.name for path in self.server_dirs.iterdir()} - {"keeper.lock"})
            if self.server_dirs.exists()
            else []
        )

    @property
    def environment(self):
        ours = {
            "LABKEEPER_PORT": self.port,
            "LABKEEPER_LAB_PORT": self.lab_port,
            "LABKEEPER_STATE_DIR": self.state_dir,
            "LABKEEPER_NOTEBOOK_DIR": self.notebook_dir,
            "LABKEEPER_LOG_FORMAT": "json",
            "LABKEEPER_JUPYTER_PYTHON": plain_python(self.base / "bin"),
            "JUPYTER_CONFIG_DIR": self.config_dir,
            "HOME": self.base,
            "PATH": f"{quiet_node(self.base / 'bin' / 'quiet')}:{os.environ['PATH']}",
        }
        ours.update({f"LABKEEPER_{name.upper()}": value for name, value in self.settings.items()})
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("LABKEEPER_", "PYTEST_"))
        }
        return clean | {name: str(value) for name, value in (ours | self.variables).items()}

    def command(self, *arguments):
        return [sys.executable, "-m", "labkeeper", *arguments]

    def cli(self, *arguments, **options):
        """Run the command line against this keeper, and return the completed process."""
        return subprocess.run(
            self.command(*arguments),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            **options,
        )

    def start(self):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command("serve"), env=self.environment, stdout=log, stderr=log
            )
        self.http = httpx.Client(
            base_url=self.url, timeout=PATIENCE, trust_env=False, verify=self.verify
        )
        until(self._ready, what="the keeper to be ready")
        if self.settings.get("auth") != "none":
            self.http.headers["Authorization"] = f"Bearer {self.token}"
        return self

    def start_to_fork(self):
        """Start it, and wait for its fork server, so that no server is executed for lack of one."""
        self.start()
        until(
            lambda: "the fork server is ready" in self.log.read_text(),
            what="the fork server to be ready",
        )
        return self

    def _ready(self):
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def token(self):
        return self.settings.get("token") or (self.state_dir / "token").read_text().strip()

    def post(self, path="", **body):
        return self.http.post(f"/api/servers{path}", json=body)

    def get(self, name="default"):
        return self.http.get(f"/api/servers/{name}").json()

    def delete(self, name="default", **query):
        return self.http.delete(f"/api/servers/{name}", params=query)

    def wait_for(self, state, name="default"):
        server = self.http.get(
            f"/api/servers/{name}", params={"wait_for": state, "wait": PATIENCE}
        ).json()
        assert server["state"] == state, server
        return server

    def configure_jupyter(self, source):
        """Write a configuration where the user's own would be."""
        (self.config_dir / "jupyter_server_config.py").write_text(source)

    def kill(self):
        """Kill the keeper, as a crash would."""
        self.process.kill()
        self.process.wait()
        self.http.close()

    def stop(self):
        """Stop the keeper with SIGTERM, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE)
        self.http.close()
        return code

    def clear(self):
        """Delete servers and tokens, and check that only the keeper and its fork server stay."""
        assert self.process.poll() is None, self.log.read_text()
        for server in self.http.get("/api/servers").json()["servers"]:
            assert self.delete(server["name"], force="true").status_code in {200, 404}
        for token in self.http.get("/api/tokens").json()["tokens"]:
            self.http.delete(f"/api/tokens/{token['name']}")
        for path in self.notebook_dir.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        server_dirs = [name for name in self.in_server_dirs() if name != ".forkservers"]
        left = processes_marked(self.server_dirs, rehearsals=False)
        assert not server_dirs, server_dirs
        assert not left, left
        assert not (self.config_dir / "jupyter_server_config.py").exists()

    def close(self):
        """Stop it if it runs, and check that nothing is left."""
        if self.process is not None and self.process.poll() is None:
            assert self.stop() == 0, self.log.read_text()
            left = processes_marked(self.server_dirs) + edges_of(self)
            server_dirs = self.in_server_dirs()
            self.sweep()
            assert not left, left
            assert not server_dirs, server_dirs
        if self.http is not None:
            self.http.close()
        self.sweep()

    def control_groups(self):
        """Return the names of the control groups of its servers."""
        groups = ControlGroups(self.server_dirs.resolve())
        # Names of rehearsals, which are not servers, begin with a dot.
        found = (group.name for base in groups._bases for group in base.glob(f"{groups._prefix}.*"))
        return groups.names() | {name.removeprefix(groups._prefix) for name in found}

    def sweep(self):
        kill_all(processes_marked(self.server_dirs) + edges_of(self))
        groups = ControlGroups(self.server_dirs.resolve())
        for name in self.control_groups():
            groups.kill(name)
            groups.remove(name)


def upgrade(keeper, directory):
    """Kill a keeper, and start one whose edge is made from other files, as after an upgrade."""
    keeper.kill()
    shutil.copytree(Path(labkeeper.__file__).parent, directory / "labkeeper")
    with (directory / "labkeeper" / "edge" / "limits.py").open("a") as source:
        source.write("# another build\n")
    keeper.variables["PYTHONPATH"] = directory
    keeper.start()


REACHABLE = """
set -e
mkdir "$1/kept"
mount --bind "$3" "$1/kept"
mount -t tmpfs -o mode=755 tmpfs "$2"
mkdir -p "$3"
mount --move "$1/kept" "$3"
shift 3
exec "$@"
"""
"""In a keeper's mount namespace, hides a directory that other users cannot traverse, but for one
inside it.
"""


class PassableKeeper(KeeperProcess):
    """A keeper that other users can use, or that runs as one: root owns none of its files alone."""

    runs_as = None
    """A user of the machine; root if None."""

    @property
    def environment(self):
        return {
            name: value
            for name, value in super().environment.items()
            if name != "JUPYTER_CONFIG_DIR"
        }

    def command(self, *arguments):
        plain = super().command(*arguments)
        if self.runs_as is not None:
            plain = [
                "setpriv",
                "--reuid",
                self.runs_as,
                "--regid",
                self.runs_as,
                "--clear-groups",
                *plain,
            ]
        prefix = Path(sys.base_prefix)
        closed = next(
            (parent for parent in reversed(prefix.parents) if not parent.stat().st_mode & 0o001),
            None,
        )
        return (
            ["unshare", "-m", "sh", "-c", REACHABLE, "sh", self.base, closed, prefix, *plain]
            if closed
            else plain
        )

    def start(self):
        if self.runs_as is not None:
            self.environment  # noqa: B018 - creates its interpreter, as root
            subprocess.run(["chown", "-R", f"{self.runs_as}:", self.base], check=True)
        return super().start()

    def close(self):
        code = self.stop()
        left = processes_marked(self.server_dirs) + edges_of(self)
        self.sweep()
        assert (code, left) == (0, []), self.log.read_text()
        assert not self.in_server_dirs()


HANDS = """
from jupyter_server.base.handlers import JupyterHandler
from tornado import web

class Hands(JupyterHandler):
    @web.authenticated
    def post(self):
        exec(self.request.body.decode(), {})

    def check_xsrf_cookie(self):
        pass

def _load_jupyter_server_extension(app):
    app.web_app.add_handlers(".*", [(app.base_url + "hands", Hands)])
"""


def give_hands(keeper):
    """Configure a keeper, before its start, so that `run_in_server` works in its servers."""
    place = keeper.base / "extensions"
    place.mkdir()
    place.chmod(0o755)
    (place / "hands.py").write_text(HANDS)
    keeper.variables["PYTHONPATH"] = os.pathsep.join(
        [str(place), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    keeper.configure_jupyter("c.ServerApp.jpserver_extensions = {'hands': True}")


def run_in_server(server, code):
    """Run code in the server's own process."""
    known = {"Authorization": f"token {server['token']}"}
    answer = httpx.post(
        f"{server['url']}hands", headers=known, content=code, timeout=PATIENCE, trust_env=False
    )
    assert answer.status_code == 200, answer.text


def forked(keeper, name="default", **body):
    """Start servers until one is forked: without the right fork server, they are executed."""

    def ready():
        """Return how many times a fork server has become ready."""
        return keeper.log.read_text().count("the fork server is ready")

    until(ready, what="a fork server to be ready")
    while True:
        before = ready()
        answer = keeper.post(name=name, **body)
        assert answer.status_code == 201, answer.text
        if answer.json()["launched_by"] == "fork":
            return answer.json()
        assert keeper.delete(name, force="true").status_code == 200
        # Executed servers would only slow down the fork server.
        reason = answer.json()["exec_reason"]
        until(
            lambda before=before: ready() > before,
            what=lambda before=before, reason=reason: (
                f"fork server {before + 1} ({reason}):\n{keeper.log.read_text()[-6000:]}"
            ),
        )


def parent_of(server):
    """Return the pid of the fork server that a server was forked from."""
    return psutil.Process(server["pid"]).ppid()


def start_kernel(server, name="python3", path=""):
    """Start a kernel through a server, for a notebook if `path` is set, and return its id."""
    answer = httpx.post(
        f"{server['url']}api/kernels",
        headers={"Authorization": f"token {server['token']}"},
        json={"name": name, "path": path},
        timeout=PATIENCE,
        trust_env=False,
    )
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


@contextlib.contextmanager
def kernel_websocket(server, kernel_id):
    """Open the server's websocket of a kernel, as the Lab does."""
    channel = f"{server['url']}api/kernels/{kernel_id}/channels".replace("http", "ws", 1)
    socket_ = websocket.create_connection(
        channel, header=[f"Authorization: token {server['token']}"], timeout=PATIENCE
    )
    try:
        yield socket_
    finally:
        socket_.close()


def run_cell(server, kernel_id, code):
    """Run code over a websocket of its own, and return its result and output."""
    with kernel_websocket(server, kernel_id) as socket_:
        return execute(socket_, code)


def execute(socket_, code):
    """Run code over a websocket, and return its result and output."""
    return _collect(socket_, send_cell(socket_, code))


def send_cell(socket_, code):
    """Request that code is run, without waiting for it; return the id of the message."""
    message_id = uuid.uuid4().hex
    header = {
        "msg_id": message_id,
        "msg_type": "execute_request",
        "username": "",
        "session": uuid.uuid4().hex,
        "version": "5.3",
    }
    content = {
        "code": code,
        "silent": False,
        "store_history": False,
        "user_expressions": {},
        "allow_stdin": False,
    }
    message = {"parent_header": {}, "metadata": {}, "channel": "shell", "buffers": []}
    socket_.send(json.dumps({"header": header, "content": content, **message}))
    return message_id


def _collect(socket_, message_id):
    output = []
    while True:
        message = json.loads(socket_.recv())
        if message["parent_header"].get("msg_id") != message_id:
            continue
        kind, content = message["header"]["msg_type"], message["content"]
        assert kind != "error", content
        if kind == "execute_result":
            output.append(content["data"]["text/plain"])
        elif kind == "stream":
            output.append(content["text"])
        elif kind == "status" and content["execution_state"] == "idle":
            return "".join(output)
