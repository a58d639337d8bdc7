"""Peers of the Unix socket that descend from a server are recognized: real servers and kernels."""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from harness import plain_python, run_cell, start_kernel, until
from labkeeper.api.wsgi import WsgiServer
from labkeeper.backends.local import ancestry
from labkeeper.backends.local.ancestry import Ancestry
from labkeeper.backends.local.backend import LocalBackend
from labkeeper.backends.local.limits import ControlGroups
from labkeeper.backends.local.options import LocalOptions
from labkeeper.backends.local.paths import Paths
from labkeeper.backends.local.processes import Process
from labkeeper.core.messages import Ready
from labkeeper.core.server import Progress
from labkeeper.core.spec import ServerName, ServerSpec
from labkeeper.forkserver.marks import MARK, stat
from labkeeper.identity.peers import Listener
from labkeeper.jupyter.client import JupyterClient
from labkeeper.jupyter.records import url_of

ASK = """
import os, socket, sys, time
door, out, how = sys.argv[1:4]
if how == "daemon":
    if os.fork():
        os._exit(0)
    os.setsid()
    before = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == before:
        time.sleep(0.01)
os.chdir("/")
connection = socket.socket(socket.AF_UNIX)
connection.connect(door)
connection.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
answer = b""
while piece := connection.recv(65536):
    answer += piece
with open(out + ".new", "wb") as file:
    file.write(answer.rpartition(b"\\n")[2])
os.rename(out + ".new", out)
"""


class Keeper:
    """A backend with one server, and a socket that tells peers whether they descend from it."""

    def __init__(self, base, launch_by):
        self.base = base
        self.facts = queue.SimpleQueue()
        self.backend = LocalBackend(
            self.facts.put,
            LocalOptions(
                python=plain_python(base / "bin"),
                runtime_dir=base / "run",
                log_dir=base / "logs",
                launch_by=launch_by,
            ),
            paths=Paths(base),
            client=JupyterClient(),
        )
        self.door = base / "door"
        listener = Listener(socket.AF_UNIX)
        listener.bind(os.path.relpath(self.door))
        self.server = WsgiServer(self.answer, [listener], threads=4, max_body=1024)
        self.server.start()
        (base / "ask.py").write_text(ASK)
        self.count = 0

    def answer(self, environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [json.dumps(self.backend.is_server(environ["labkeeper.peer"].pid)).encode()]

    def launch(self, launch_by):
        if launch_by == "fork":
            until(lambda: self.backend._forkserver._current, what="a fork server")
        self.backend.launch(ServerSpec(ServerName("lab"), str(self.base)), 1)
        if launch_by == "exec":
            assert isinstance(self.facts.get(timeout=60).fact, Progress)
        ready = self.facts.get(timeout=60).fact
        assert isinstance(ready, Ready), ready
        assert ready.instance.launched_by == launch_by
        return {
            "url": url_of(ready.endpoint),
            "token": ready.endpoint.token,
            "pid": ready.instance.pid,
        }

    def command(self, how):
        self.count += 1
        out = self.base / f"answer{self.count}"
        return [
            sys.executable,
            "-I",
            str(self.base / "ask.py"),
            os.path.relpath(self.door, "/"),
            str(out),
            how,
        ], out

    def answer_in(self, out):
        until(out.exists, what="the answer in the file")
        return json.loads(out.read_text())

    def close(self):
        self.server.close()
        self.backend.kill(ServerName("lab"), 1)
        until(lambda: not self.backend._supervisors, what="the server's supervisor to finish")
        self.backend.close()


@pytest.fixture
def make_keeper(tmp_path):
    (tmp_path / "logs").mkdir()
    made = []

    def make(launch_by):
        made.append(Keeper(tmp_path, launch_by))
        return made[-1]

    yield make
    for keeper in made:
        keeper.close()


@pytest.fixture
def _no_groups(monkeypatch):
    """A host on which no control groups can be created."""
    monkeypatch.setattr(ControlGroups, "hold_any", lambda *_: False)
    monkeypatch.setattr(ControlGroups, "hold", lambda *_: None)


@pytest.mark.usefixtures("_no_groups")
@pytest.mark.parametrize("launch_by", ["fork", "exec"])
def test_processes_of_a_kernel_are_recognized_whatever_they_do(make_keeper, launch_by):
    keeper = make_keeper(launch_by)
    outside, out = keeper.command("daemon")
    subprocess.run(outside, check=True)
    assert keeper.answer_in(out) is False
    server = keeper.launch(launch_by)
    assert keeper.backend.is_server(server["pid"])
    kernel = start_kernel(server)
    command, out = keeper.command("itself")
    run_cell(
        server, kernel, f"import sys; sys.argv = {command[2:]!r}; exec(open(sys.argv[0]).read())"
    )
    assert keeper.answer_in(out) is True
    for how, environment in (
        ("itself", "None"),
        ("daemon", "None"),
        ("daemon", "{'HOME': '/'}"),
        ("daemon", "{}"),
    ):
        command, out = keeper.command(how)
        run_cell(
            server,
            kernel,
            f"import subprocess; subprocess.run({command!r}, env={environment}, check=True)",
        )
        assert keeper.answer_in(out) is True
    # A later process from elsewhere is only cleared by a chain of parents to a known ancestor.
    outside, out = keeper.command("daemon")
    subprocess.run(outside, check=True)
    assert keeper.answer_in(out) is (launch_by == "exec")


def test_a_control_group_identifies_processes_without_parents(make_keeper):
    keeper = make_keeper("exec")
    server = keeper.launch("exec")
    if not keeper.backend._groups.members(ServerName("lab")):
        pytest.skip("needs control groups")
    kernel = start_kernel(server)
    command, out = keeper.command("daemon")
    run_cell(
        server, kernel, f"import subprocess; subprocess.run({command!r}, env={{}}, check=True)"
    )
    assert keeper.answer_in(out) is True
    outside, out = keeper.command("daemon")
    subprocess.run(outside, check=True)
    assert keeper.answer_in(out) is False


@pytest.fixture
def ancestry_(tmp_path):
    return Ancestry({tmp_path: ControlGroups(tmp_path)})


def test_the_keeper_is_not_of_a_server_and_an_ended_process_is_not_trusted(ancestry_):
    child = subprocess.Popen(["true"])
    child.wait()
    assert ancestry_.is_of_server(child.pid, set())
    assert not ancestry_.is_of_server(os.getpid(), set())
    assert not ancestry_.is_of_server(os.getppid(), set())


@pytest.mark.parametrize(
    ("place", "known"), [("run", True), ("earlier", True), ("of-another-keeper", False)]
)
def test_processes_of_an_earlier_runtime_directory_are_recognized(tmp_path, place, known):
    ancestry_ = Ancestry(
        {
            directory: ControlGroups(directory)
            for directory in (tmp_path / "run", tmp_path / "earlier")
        }
    )
    environment = {**os.environ, MARK: str(tmp_path / place / "one")}
    shell = ["sh", "-c", "sleep 1000 > /dev/null & echo $!"]
    pid = int(
        subprocess.run(
            shell, env=environment, stdout=subprocess.PIPE, check=True, start_new_session=True
        ).stdout
    )
    try:
        assert ancestry_.is_of_server(pid, set()) is known
    finally:
        os.kill(pid, 9)


@pytest.fixture
def terminal():
    """A shell like one that starts a keeper, with a child inside and one outside its session."""
    line = (
        f"{sys.executable} -c 'import time; time.sleep(1000)' & echo $!;"
        " setsid sleep 1000 & echo $!; exec sleep 1000"
    )
    with subprocess.Popen(
        ["sh", "-c", line], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as shell:
        inside, outside = (int(shell.stdout.readline()) for _ in range(2))
        until(lambda: os.getsid(outside) == outside, what="the second child to get its own session")
        yield shell.pid, inside, outside
        for pid in (inside, outside, shell.pid):
            os.kill(pid, 9)


def test_without_a_known_parent_only_age_or_session_clear_a_process(
    ancestry_, terminal, monkeypatch
):
    shell, inside, outside = terminal
    monkeypatch.setattr(ancestry, "spared", lambda: {os.getpid(), shell})
    assert not ancestry_.is_of_server(inside, set())
    assert not ancestry_.is_of_server(outside, set())
    ancestry_.note_executed(Process(2**22, Process.find(outside).started))
    assert not ancestry_.is_of_server(inside, set())
    assert ancestry_.is_of_server(outside, set())
    ancestry_._first_loose += 1
    assert not ancestry_.is_of_server(outside, set())


INSIDE = """
import os, signal, sys
from pathlib import Path
from labkeeper.backends.local.ancestry import Ancestry
from labkeeper.backends.local.limits import ControlGroups

kin = Ancestry({Path(sys.argv[1]): ControlGroups(Path(sys.argv[1]))})
kin._first_loose = 0
left = os.fork()
if left == 0:
    if os.fork() == 0:
        os.setsid()
        print(os.getpid(), flush=True)
        signal.pause()
    os._exit(0)
os.waitpid(left, 0)
for line in sys.stdin:
    print(kin.is_of_server(int(line), set()), flush=True)
"""


@pytest.mark.root
def test_a_process_that_entered_our_pid_namespace_is_not_of_a_server(tmp_path):
    """As by `docker exec`: its parent is invisible, and never adopts orphans of a server."""
    around = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", INSIDE, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with around:
        left_behind = around.stdout.readline()
        inside = int(Path(f"/proc/{around.pid}/task/{around.pid}/children").read_text())
        enter = ["nsenter", "-t", str(inside), "-p", "-m", "sh", "-c", "echo $$; read line"]
        with subprocess.Popen(
            enter, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as stranger:
            results = []
            for pid in (left_behind, stranger.stdout.readline()):
                around.stdin.write(pid)
                around.stdin.flush()
                results.append(around.stdout.readline().strip())
            stranger.stdin.write("\n")
    assert results == ["True", "False"]


def test_an_endless_chain_of_parents_is_not_trusted(ancestry_, monkeypatch):
    its_own_parent = stat(os.getpid())._replace(parent=7)
    monkeypatch.setattr(ancestry, "stat", lambda _: its_own_parent)
    monkeypatch.setattr(ancestry, "spared", set)
    monkeypatch.setattr(Ancestry, "_is_known", lambda *_: False)
    assert ancestry_.is_of_server(7, set())


def test_a_process_that_cannot_be_inspected_is_not_a_fork_server(ancestry_, monkeypatch):
    def refuse(_):
        raise PermissionError

    monkeypatch.setattr(Path, "readlink", refuse)
    assert not ancestry_._is_known(os.getpid())
