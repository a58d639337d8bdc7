"""A fork server in use: launches, exits, requests from others, staleness and replacement."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from harness import alive, children, kill_all, no_descriptors, processes_marked, until
from labkeeper.backends.local import supervisor
from labkeeper.backends.local.backend import LocalBackend
from labkeeper.backends.local.forking import CannotFork, ForkServer
from labkeeper.backends.local.forkserver import connect
from labkeeper.backends.local.launching import ReportPipe
from labkeeper.backends.local.limits import ControlGroups
from labkeeper.backends.local.options import LocalOptions
from labkeeper.backends.local.paths import Paths
from labkeeper.core.server import Exit, Progress
from labkeeper.core.spec import ServerName, ServerSpec
from labkeeper.forkserver import wire
from labkeeper.forkserver.marks import MARK
from labkeeper.jupyter.client import JupyterClient
from labkeeper.jupyter.config import base_config, base_environment
from labkeeper.jupyter.records import read_info
from labkeeper.threads import ThreadGroup
from launches import launch_in

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forking needs Linux")


CONFIG = """
import os
place = os.environ["JUPYTER_RUNTIME_DIR"]
if os.path.exists(place + "/gate"):
    open(place + "/here", "w").close()
    open(place + "/gate").read()
"""
"""A configuration of Jupyter that blocks a new server for as long as its test wants."""


@pytest.fixture(autouse=True, scope="module")
def _nothing_left_behind():
    """Checks leaks once for the module, since its tests share a fork server."""
    threads, processes = set(threading.enumerate()), children()
    yield
    until(
        lambda: set(threading.enumerate()) <= threads and children() <= processes,
        what="all threads and child processes to end",
    )


class Rig:
    """A fork server, with access to the keeper's side and to its socket."""

    def __init__(self, base: Path):
        self.base = base
        (base / "config" / "jupyter_server_config.d").mkdir(parents=True)
        (base / "config" / "jupyter_server_config.py").write_text(CONFIG)
        self.threads = ThreadGroup()
        self.environment = base_environment(os.environ) | {
            "JUPYTER_CONFIG_DIR": str(base / "config"),
            "HOME": str(base),
        }
        self.forkserver = ForkServer(
            self.threads,
            python=sys.executable,
            runtime_dir=base / "run",
            log_dir=base / "logs",
            groups=ControlGroups(base / "run"),
            environment=self.environment,
            config=base_config(),
            kernels_by="exec",
            preload=[],
        )
        (base / "logs").mkdir()
        self.forkserver.start()
        self.count = 0

    @property
    def process(self):
        return until(lambda: self.forkserver._current, what="a fork server").process

    @property
    def directory(self):
        return until(lambda: self.forkserver._current, what="a fork server").directory

    @property
    def log(self):
        return (self.base / "logs" / "_forkserver.log").read_text()

    def request(self, name=None):
        """Return a launch that ends at once with exit code 1: its directory does not exist."""
        self.count += 1
        server_dir = self.base / "run" / (name or f"server{self.count}")
        (server_dir / "jupyter").mkdir(parents=True)
        return replace(
            launch_in(server_dir),
            title=f"jupyter-lab (server '{server_dir.name}')",
            cwd=str(self.base / "nowhere"),
            env={**self.environment, MARK: str(server_dir)},
            umask=0o022,
            config=base_config(),
            kernels_by="exec",
        )

    def lasting(self):
        """Return a launch that blocks when it reads its configuration."""
        request = self.request()
        os.mkfifo(Path(request.server_dir) / "gate")
        request.env["JUPYTER_RUNTIME_DIR"] = request.server_dir
        return replace(request, cwd=request.server_dir)

    @contextlib.contextmanager
    def launched(self, request):
        report = ReportPipe()
        process, parent = until(lambda: self._fork(request, report), what="a fork server")
        report.close_writer()
        try:
            yield process, parent, report
        finally:
            process.send(signal.SIGKILL)
            until(lambda: not process.alive())
            report.close()

    def launch_twice(self, request):
        for _ in range(2):
            with self.launched(request):
                pass

    def _fork(self, request, report):
        until(lambda: self.forkserver._current, what="a fork server")
        try:
            with (self.base / "log").open("ab") as log:
                return self.forkserver.launch(request, log.fileno(), report.writer)
        except CannotFork as because:
            if "load" not in str(because):
                report.close()
                raise
            return None  # It has just been replaced.

    def ask(self, message, files=()):
        """Send a request as another process of the same user would."""
        with connect(self.directory) as connection:
            wire.send(connection, message, files)
            return wire.receive(connection)[0]

    def holds(self, path):
        """Return whether the fork server has a file open."""
        return str(path) in open_files(self.process.pid).values()

    def close(self):
        self.threads.close()


def open_files(pid):
    files = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            files[int(entry.name)] = str(entry.readlink())
    return files


def wait_for_gate(request):
    return until((Path(request.server_dir) / "here").exists, what="the server to load its config")


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    made = Rig(tmp_path_factory.mktemp("rig"))
    yield made
    made.close()
    until(
        lambda: not (made.base / "run" / ".forkservers").exists(),
        what="the fork servers' directory to be removed",
    )


def test_a_server_is_forked_and_its_exit_reported_exactly(rig):
    with rig.launched(rig.lasting()) as (process, parent, report):
        assert parent == rig.directory.name
        assert psutil.Process(process.pid).ppid() == rig.process.pid
        process.send(signal.SIGSEGV)
        assert report.exit(within=10) == Exit(signal="SIGSEGV")
    with rig.launched(rig.request()) as (process, _, report):
        assert report.exit(within=10) == Exit(code=1)
    assert "nowhere" in (rig.base / "log").read_text()


def test_its_socket_is_private(rig):
    modes = {path: path.stat().st_mode & 0o777 for path in (rig.directory, rig.directory.parent)}
    assert set(modes.values()) == {0o700}, modes
    files = {path.name: path.stat().st_mode & 0o777 for path in rig.directory.iterdir()}
    assert files == {"socket": 0o600, "rehearsal.json": 0o600}


def test_it_has_a_single_thread(rig):
    assert len(list(Path(f"/proc/{rig.process.pid}/task").iterdir())) == 1


@pytest.fixture
def attachment(tmp_path):
    """A file to send with a request."""
    path = tmp_path / "attachment"
    path.touch()
    return path


GARBAGE = {
    "nothing": b"",
    "text": b"GET / HTTP/1.0\r\n\r\n",
    "half a length": b"\0\0",
    "half a frame": struct.pack("!I", 100) + b"{",
    "an endless frame": struct.pack("!I", 2**32 - 1),
    "a list": struct.pack("!I", 2) + b"[]",
    "an unknown request": struct.pack("!I", 2) + b"{}",
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_neither_ends_nor_blocks_it(rig, what):
    pid = rig.process.pid
    with connect(rig.directory) as connection:
        connection.sendall(GARBAGE[what])
        with rig.launched(rig.request()) as (_, _, report):
            assert report.exit(within=10) == Exit(code=1)
    assert rig.process.pid == pid


def test_a_client_that_sends_byte_by_byte_does_not_block_it(rig):
    """Each byte arrives in time, but the whole request must as well."""
    pid = rig.process.pid
    end = threading.Event()

    def drip(connection):
        with contextlib.suppress(OSError):
            while not end.wait(0.3):
                connection.sendall(b" ")

    with connect(rig.directory) as connection:
        connection.sendall(struct.pack("!I", 1000))
        dripping = threading.Thread(target=drip, args=(connection,))
        dripping.start()
        try:
            with rig.launched(rig.request()) as (_, _, report):
                assert report.exit(within=10) == Exit(code=1)
        finally:
            end.set()
            dripping.join()
    assert rig.process.pid == pid


@pytest.mark.parametrize(
    ("message", "files", "answer"),
    [
        ({"do": "dance"}, 0, "bad request 'dance' with 0 files"),
        ({"do": "launch"}, 0, "bad request 'launch' with 0 files"),
        ({"do": "launch"}, 2, "bad request 'launch' with 2 files"),
        ({"do": "attach", "pid": 1}, 0, "bad request 'attach' with 0 files"),
        ({"do": ["launch"]}, 1, "with 1 files"),
    ],
)
def test_an_invalid_request_gets_an_error_and_leaves_no_descriptor(
    rig, attachment, message, files, answer
):
    with attachment.open() as file:
        assert answer in rig.ask(message, [file.fileno()] * files)["error"]
    until(lambda: not rig.holds(attachment), what="the fork server to close the attached file")


@pytest.mark.parametrize("pid", [1, -1, 2**40, "1", None, True, 1.5])
def test_it_reports_exits_of_its_own_children_only(rig, attachment, pid):
    with attachment.open() as file:
        assert rig.ask({"do": "attach", "pid": pid}, [file.fileno()]) == {"known": False}
    until(lambda: not rig.holds(attachment), what="the fork server to close the attached file")


def test_unexpected_descriptors_from_a_keeper_are_closed(rig, attachment):
    with connect(rig.directory) as connection, attachment.open() as file:
        wire.send(connection, {"do": "keep"}, [file.fileno()])
        assert wire.receive(connection)[0]["pid"] == rig.process.pid
    until(lambda: not rig.holds(attachment), what="the fork server to close the attached file")


def test_a_forked_server_inherits_no_descriptors_or_blocked_signals(rig):
    requests = [rig.lasting() for _ in range(3)]
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(rig.launched(request))[0] for request in requests[:2]]
        keeper = stack.enter_context(connect(rig.directory))
        wire.send(keeper, {"do": "keep"})
        wire.receive(keeper)
        children.append(stack.enter_context(rig.launched(requests[2]))[0])
        for child, request in zip(children, requests, strict=True):
            wait_for_gate(request)
            files = open_files(child.pid)
            assert (files[0], files[1], files[2]) == (
                os.devnull,
                str(rig.base / "log"),
                str(rig.base / "log"),
            )
            # Only its own report pipe: no sockets, epoll descriptors or other pipes.
            kinds = [file.partition(":")[0] for file in files.values() if not file.startswith("/")]
            assert kinds == ["pipe"], files
            status = Path(f"/proc/{child.pid}/status").read_text()
            assert "SigBlk:\t0000000000000000" in status
            assert "Threads:\t1" in status


def test_an_exit_that_no_keeper_received_is_reported_to_the_next_one(rig):
    with rig.launched(rig.lasting()) as (process, parent, report):
        report.close()
        process.send(signal.SIGTERM)
        until(lambda: not Path(f"/proc/{process.pid}").exists(), what="the process to be reaped")
        later = ReportPipe()
        assert rig.forkserver.attach(parent, process.pid, later.writer)
        later.close_writer()
        assert later.exit(within=10) == Exit(signal="SIGTERM")
        later.close()
        again = ReportPipe()
        assert not rig.forkserver.attach(parent, process.pid, again.writer)
        assert not rig.forkserver.attach("no-such-fork-server", process.pid, again.writer)
        again.close()


def test_the_exit_of_a_child_is_reported_to_the_last_keeper_that_attached(rig):
    with rig.launched(rig.lasting()) as (process, parent, first):
        second = ReportPipe()
        assert rig.forkserver.attach(parent, process.pid, second.writer)
        second.close_writer()
        process.send(signal.SIGKILL)
        assert second.exit(within=10) == Exit(signal="SIGKILL")
        assert first.exit(within=0.1) is None
        second.close()


def test_no_secret_of_a_launch_stays_in_memory_for_the_next_server(rig):
    """The next server inherits the fork server's memory."""
    secret = f"secret-{os.urandom(8).hex()}"
    first = rig.lasting()
    first.config["IdentityProvider"] = {"token": secret}
    first.env.update({f"MINE_{number}": f"{secret}-{number}" for number in range(100)})
    other = rig.lasting()
    with rig.launched(first), rig.launched(other) as (second, _, _):
        wait_for_gate(first)
        wait_for_gate(other)
        for pid in (rig.process.pid, second.pid):
            assert not in_memory(pid, secret.encode())


def in_memory(pid, text):
    found = 0
    with (
        Path(f"/proc/{pid}/maps").open() as maps,
        Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory,
    ):
        for line in maps:
            addresses, rights = line.split(" ")[:2]
            if rights.startswith("rw"):
                first, last = (int(address, 16) for address in addresses.split("-"))
                memory.seek(first)
                with contextlib.suppress(OSError):
                    found += memory.read(last - first).count(text)
    return found


def test_variables_that_take_effect_at_program_start_prevent_forking(rig):
    for name in (
        "PYTHONPATH",
        "LANG",
        "LC_ALL",
        "LD_PRELOAD",
        "JUPYTER_PATH",
        "JUPYTER_NO_CONFIG",
        "MALLOC_ARENA_MAX",
        "PYTHONHASHSEED",
    ):
        request = rig.request()
        request.env[name] = "/elsewhere"
        with pytest.raises(
            CannotFork, match=f"environment variable {name} takes effect only when a program starts"
        ):
            rig.forkserver.launch(request, 1, 1)


def test_a_burst_of_launches_gets_a_server_each(rig):
    pid = rig.process.pid
    with contextlib.ExitStack() as stack:
        requests = [rig.lasting() for _ in range(12)]
        children = [stack.enter_context(rig.launched(request))[0] for request in requests]
        assert len({child.pid for child in children}) == 12
        assert {psutil.Process(child.pid).ppid() for child in children} == {pid}
        # Each one shows its own server directory, by which it is found, and its own name.
        for child, request in zip(children, requests, strict=True):
            shown = psutil.Process(child.pid)
            wait_for_gate(request)
            assert shown.environ()[MARK] == request.server_dir
            assert shown.cmdline()[0].startswith("jupyter-lab (server")
            assert shown.name() == "jupyter-lab"


def test_a_killed_fork_server_is_replaced_and_its_children_live_on(rig):
    with rig.launched(rig.lasting()) as (process, _, report):
        old = rig.process
        old.send(signal.SIGKILL)
        until(lambda: not old.alive())
        until(
            lambda: rig.forkserver._current is not None and rig.process != old,
            what="another fork server",
        )
        assert process.alive()
        process.send(signal.SIGKILL)
        until(lambda: not process.alive())
        assert report.exit() is None
    assert not old_directories(rig)


def test_it_is_not_killed_if_the_keeper_lacks_descriptors(rig):
    process, report = rig.process, ReportPipe()
    try:
        with (
            (rig.base / "log").open("ab") as log,
            no_descriptors(),
            pytest.raises(CannotFork, match="Too many open files"),
        ):
            rig.forkserver.launch(rig.request(), log.fileno(), report.writer)
        with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
            rig.forkserver.attach(rig.directory.name, process.pid, report.writer)
    finally:
        report.close()
    assert rig.process == process
    assert process.alive()


def old_directories(rig):
    return [path for path in rig.directory.parent.iterdir() if path != rig.directory]


def test_no_server_is_forked_after_a_change_of_configuration(rig):
    """Not even the second of two in quick succession, whose caller may have made the change."""
    change = rig.base / "config" / "jupyter_server_config.d" / f"{os.urandom(4).hex()}.json"
    old = rig.process
    with rig.launched(rig.lasting()):
        change.write_text("{}")
        with rig.launched(rig.lasting()) as (process, _, _):
            assert psutil.Process(process.pid).ppid() != old.pid
    until(lambda: rig.process != old, what="another fork server")
    until(lambda: not alive(old.pid), what="the old fork server to exit after its last child")
    until(lambda: not old_directories(rig), what="the old fork server's directory to be removed")


@pytest.mark.programs("strace")  # delays a system call of the fork server
def test_a_launch_that_was_not_confirmed_in_time_leaves_no_forked_server(
    rig,
):
    old = rig.process
    tracer = subprocess.Popen(
        [
            "strace",
            "-f",
            "-q",
            "-p",
            str(old.pid),
            "-e",
            "inject=clone,clone3,fork,vfork:delay_exit=7000000",
            "-o",
            "/dev/null",
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        until(
            lambda: "TracerPid:\t0" not in Path(f"/proc/{old.pid}/status").read_text(),
            what="strace to attach to the fork server",
        )
        request = rig.lasting()
        # The first launch may use a child that was forked in advance; the second has to fork.
        with pytest.raises(CannotFork, match="did not answer"):
            rig.launch_twice(request)
        left = [process.pid for process in processes_marked(request.server_dir)]
    finally:
        tracer.kill()
        tracer.wait()
        kill_all(processes_marked(request.server_dir))
    assert not left


@pytest.fixture
def local(tmp_path):
    """A backend with its fork server, and the queue of its reports."""
    facts = queue.SimpleQueue()
    (tmp_path / "logs").mkdir()
    backend = LocalBackend(
        facts.put,
        LocalOptions(
            python=Path(sys.executable),
            runtime_dir=tmp_path / "run",
            log_dir=tmp_path / "logs",
        ),
        paths=Paths(tmp_path),
        client=JupyterClient(),
    )
    try:
        until(lambda: backend._forkserver._current, what="a fork server")
        yield backend, facts
    finally:
        backend.close()


def test_an_abandoned_child_leaves_no_files_for_the_executed_server(local, tmp_path, monkeypatch):
    """The fork server's answer is lost after the fork, and the child is faster than the keeper."""
    backend, facts = local
    name, forked = ServerName("lost"), []
    server_dir = tmp_path / "run" / name
    ask = backend._forkserver._processes.ask

    def lose_the_answer(parent, request, files):
        forked.append(ask(parent, request, files)["pid"])
        until(
            (server_dir / "jupyter" / f"jpserver-{forked[0]}.json").exists,
            what="the forked server's info file",
        )
        raise EOFError

    monkeypatch.setattr(backend._forkserver._processes, "ask", lose_the_answer)
    backend.launch(ServerSpec(name, str(tmp_path)), 1)
    try:
        assert isinstance(facts.get(timeout=60).fact, Progress)
        ready = facts.get(timeout=60).fact
        assert (ready.instance.launched_by, ready.instance.pid not in forked) == ("exec", True)
        assert not any(alive(pid) for pid in forked)
        assert [path.name for path in server_dir.glob("jupyter/jpserver-*")] == [
            f"jpserver-{ready.instance.pid}.json"
        ]
    finally:
        backend.kill(name, 1)
    assert facts.get(timeout=60).fact.exit == Exit(signal="SIGKILL")
    assert not server_dir.exists()


def test_a_forked_server_reports_itself_as_ready(local, tmp_path, monkeypatch):
    looks, (backend, facts) = [], local
    monkeypatch.setattr(
        supervisor,
        "read_info",
        lambda *arguments, real=read_info: looks.append(arguments) or real(*arguments),
    )
    name = ServerName("silent")
    backend.launch(ServerSpec(name, str(tmp_path)), 1)
    ready = facts.get(timeout=60).fact
    assert (ready.instance.launched_by, len(looks)) == ("fork", 0)
    backend.kill(name, 1)
    assert facts.get(timeout=60).fact.exit == Exit(signal="SIGKILL")
