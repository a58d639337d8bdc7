"""A fork server answers its keeper, bears all that others send, and parts from what it cannot serve."""

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
import structlog

from harness import alive, children, kill_all, no_descriptors, processes_marked, until
from labkeeper.backends.local import supervisor
from labkeeper.backends.local.backend import LocalBackend
from labkeeper.backends.local.forking import CannotFork, ForkServer
from labkeeper.backends.local.forkserver import ForkServers, connect
from labkeeper.backends.local.launching import ReportPipe
from labkeeper.backends.local.limits import ControlGroups
from labkeeper.core.server import Exit
from labkeeper.core.spec import ServerName, ServerSpec
from labkeeper.forkserver import wire
from labkeeper.forkserver.marks import MARK
from labkeeper.forkserver.wire import Launch
from labkeeper.jupyter.client import JupyterClient
from labkeeper.jupyter.config import base_config, base_environment
from labkeeper.jupyter.records import read_info
from labkeeper.threads import ThreadGroup

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forking needs Linux")


CONFIG = """
import os
room = os.environ["JUPYTER_RUNTIME_DIR"]
if os.path.exists(room + "/gate"):
    open(room + "/here", "w").close()
    open(room + "/gate").read()
"""
"""Of Jupyter: holds a server up for as long as its test wants, when it has become a process of its own."""


@pytest.fixture(autouse=True, scope="module")
def _nothing_left_behind():
    """As for all tests, but once for all of this module: they share a fork server, which is replaced now and then."""
    threads, processes = set(threading.enumerate()), children()
    yield
    until(
        lambda: set(threading.enumerate()) <= threads and children() <= processes,
        what="all is gone",
    )


class Nursery:
    """One fork server, as the keeper sees it and as its socket does."""

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
        """A launch that ends at once, with exit code 1: its directory does not exist."""
        self.count += 1
        server_dir = self.base / "run" / (name or f"server{self.count}")
        (server_dir / "jupyter").mkdir(parents=True)
        return Launch(
            server_dir=str(server_dir),
            title=f"jupyter-lab (server '{server_dir.name}')",
            cwd=str(self.base / "nowhere"),
            env={**self.environment, MARK: str(server_dir)},
            kernel_env={},
            umask=0o022,
            config=base_config(),
            user=None,
            cgroups=[],
            rlimits={},
            encrypt_kernels=False,
        )

    def lasting(self):
        """A launch that is held up when it reads its configuration."""
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
            return None  # It was replaced just now.

    def ask(self, message, files=()):
        """Ask as another process of the same user would."""
        with connect(self.directory) as connection:
            wire.send(connection, message, files)
            return wire.receive(connection)[0]

    def holds(self, path):
        """Whether the fork server has a file open."""
        return str(path) in open_files(self.process.pid).values()

    def close(self):
        self.threads.close()


def open_files(pid):
    files = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            files[int(entry.name)] = str(entry.readlink())
    return files


def at_its_gate(request):
    return until((Path(request.server_dir) / "here").exists, what="it reads its configuration")


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    made = Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    made.close()
    until(
        lambda: not (made.base / "run" / ".forkservers").exists(), what="its directory is removed"
    )


def test_a_child_is_forked_from_it_and_its_end_is_told_exactly(nursery):
    with nursery.launched(nursery.lasting()) as (process, parent, report):
        assert parent == nursery.directory.name
        assert psutil.Process(process.pid).ppid() == nursery.process.pid
        process.send(signal.SIGSEGV)
        assert report.exit(within=10) == Exit(signal="SIGSEGV")
    with nursery.launched(nursery.request()) as (process, _, report):
        assert report.exit(within=10) == Exit(code=1)
    assert "nowhere" in (nursery.base / "log").read_text()


def test_its_socket_is_for_its_user_alone(nursery):
    modes = {
        path: path.stat().st_mode & 0o777 for path in (nursery.directory, nursery.directory.parent)
    }
    assert set(modes.values()) == {0o700}, modes
    files = {path.name: path.stat().st_mode & 0o777 for path in nursery.directory.iterdir()}
    assert files == {"socket": 0o600, "rehearsal.json": 0o600}


def test_it_has_one_thread_and_nothing_open_that_a_server_could_take_for_its_own(nursery):
    assert len(list(Path(f"/proc/{nursery.process.pid}/task").iterdir())) == 1


@pytest.fixture
def beside(tmp_path):
    """A file to send beside a request."""
    path = tmp_path / "beside"
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
def test_garbage_neither_ends_it_nor_holds_it_up_for_long(nursery, what):
    pid = nursery.process.pid
    with connect(nursery.directory) as connection:
        connection.sendall(GARBAGE[what])
        with nursery.launched(nursery.request()) as (_, _, report):
            assert report.exit(within=10) == Exit(code=1)
    assert nursery.process.pid == pid


def test_one_that_sends_drop_by_drop_does_not_hold_it_up(nursery):
    """Each drop comes in time; all of them together must not take for ever."""
    pid = nursery.process.pid
    end = threading.Event()

    def drip(connection):
        with contextlib.suppress(OSError):
            while not end.wait(0.3):
                connection.sendall(b" ")

    with connect(nursery.directory) as connection:
        connection.sendall(struct.pack("!I", 1000))
        dripping = threading.Thread(target=drip, args=(connection,))
        dripping.start()
        try:
            with nursery.launched(nursery.request()) as (_, _, report):
                assert report.exit(within=10) == Exit(code=1)
        finally:
            end.set()
            dripping.join()
    assert nursery.process.pid == pid


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
def test_a_request_that_cannot_be_is_answered_so_and_leaves_nothing_open(
    nursery, beside, message, files, answer
):
    with beside.open() as file:
        assert answer in nursery.ask(message, [file.fileno()] * files)["error"]
    until(lambda: not nursery.holds(beside), what="it is closed again")


@pytest.mark.parametrize("pid", [1, -1, 2**40, "1", None, True, 1.5])
def test_it_tells_the_end_of_its_own_children_only(nursery, beside, pid):
    with beside.open() as file:
        assert nursery.ask({"do": "attach", "pid": pid}, [file.fileno()]) == {"known": False}
    until(lambda: not nursery.holds(beside), what="it is closed again")


def test_a_keeper_that_sends_files_for_no_reason_leaves_none_open(nursery, beside):
    with connect(nursery.directory) as connection, beside.open() as file:
        wire.send(connection, {"do": "keep"}, [file.fileno()])
        assert wire.receive(connection)[0]["pid"] == nursery.process.pid
    until(lambda: not nursery.holds(beside), what="it is closed again")


def test_a_child_holds_nothing_of_its_parents(nursery):
    requests = [nursery.lasting() for _ in range(3)]
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(nursery.launched(request))[0] for request in requests[:2]]
        keeper = stack.enter_context(connect(nursery.directory))
        wire.send(keeper, {"do": "keep"})
        wire.receive(keeper)
        children.append(stack.enter_context(nursery.launched(requests[2]))[0])
        for child, request in zip(children, requests, strict=True):
            at_its_gate(request)
            files = open_files(child.pid)
            assert (files[0], files[1], files[2]) == (
                os.devnull,
                str(nursery.base / "log"),
                str(nursery.base / "log"),
            )
            # Its own pipe to report to, and no socket, poll or pipe of others.
            kinds = [file.partition(":")[0] for file in files.values() if not file.startswith("/")]
            assert kinds == ["pipe"], files
            status = Path(f"/proc/{child.pid}/status").read_text()
            assert "SigBlk:\t0000000000000000" in status
            assert "Threads:\t1" in status


def test_an_end_that_no_keeper_heard_is_told_to_the_next_one_that_asks(nursery):
    with nursery.launched(nursery.lasting()) as (process, parent, report):
        report.close()
        process.send(signal.SIGTERM)
        until(lambda: not Path(f"/proc/{process.pid}").exists(), what="it was reaped")
        later = ReportPipe()
        assert nursery.forkserver.attach(parent, process.pid, later.writer)
        later.close_writer()
        assert later.exit(within=10) == Exit(signal="SIGTERM")
        later.close()
        again = ReportPipe()
        assert not nursery.forkserver.attach(parent, process.pid, again.writer)
        assert not nursery.forkserver.attach("no-such-fork-server", process.pid, again.writer)
        again.close()


def test_a_living_child_tells_its_end_to_whoever_asked_last(nursery):
    with nursery.launched(nursery.lasting()) as (process, parent, first):
        second = ReportPipe()
        assert nursery.forkserver.attach(parent, process.pid, second.writer)
        second.close_writer()
        process.send(signal.SIGKILL)
        assert second.exit(within=10) == Exit(signal="SIGKILL")
        assert first.exit(within=0.1) is None
        second.close()


def test_nothing_of_a_launch_stays_in_its_memory_for_the_next_server(nursery):
    """What one server is told is secret, and the memory of the fork server is the next one's."""
    secret = f"secret-{os.urandom(8).hex()}"
    first = nursery.lasting()
    first.config["IdentityProvider"] = {"token": secret}
    first.env.update({f"MINE_{number}": f"{secret}-{number}" for number in range(100)})
    other = nursery.lasting()
    with nursery.launched(first), nursery.launched(other) as (second, _, _):
        at_its_gate(first)
        at_its_gate(other)
        for pid in (nursery.process.pid, second.pid):
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


def test_a_program_that_is_executed_is_asked_for_by_what_takes_effect_only_when_one_starts(nursery):
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
        request = nursery.request()
        request.env[name] = "/elsewhere"
        with pytest.raises(
            CannotFork, match=f"environment variable {name} takes effect only when a program starts"
        ):
            nursery.forkserver.launch(request, 1, 1)


def test_a_burst_gets_a_server_each(nursery):
    pid = nursery.process.pid
    with contextlib.ExitStack() as stack:
        requests = [nursery.lasting() for _ in range(12)]
        children = [stack.enter_context(nursery.launched(request))[0] for request in requests]
        assert len({child.pid for child in children}) == 12
        assert {psutil.Process(child.pid).ppid() for child in children} == {pid}
        # Each shows its own room, by which it is found, and its own name.
        for child, request in zip(children, requests, strict=True):
            shown = psutil.Process(child.pid)
            at_its_gate(request)
            assert shown.environ()[MARK] == request.server_dir
            assert shown.cmdline()[0].startswith("jupyter-lab (server")
            assert shown.name() == "jupyter-lab"


def test_one_that_is_killed_is_replaced_and_its_children_live_on(nursery):
    with nursery.launched(nursery.lasting()) as (process, _, report):
        old = nursery.process
        old.send(signal.SIGKILL)
        until(lambda: not old.alive())
        until(
            lambda: nursery.forkserver._current is not None and nursery.process != old,
            what="another one",
        )
        assert process.alive()
        process.send(signal.SIGKILL)
        until(lambda: not process.alive())
        assert report.exit() is None
    assert not old_directories(nursery)


def test_it_is_not_killed_for_what_its_keeper_lacks(nursery):
    process, report = nursery.process, ReportPipe()
    try:
        with (
            (nursery.base / "log").open("ab") as log,
            no_descriptors(),
            pytest.raises(CannotFork, match="Too many open files"),
        ):
            nursery.forkserver.launch(nursery.request(), log.fileno(), report.writer)
        with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
            nursery.forkserver.attach(nursery.directory.name, process.pid, report.writer)
    finally:
        report.close()
    assert nursery.process == process
    assert process.alive()


def old_directories(nursery):
    return [path for path in nursery.directory.parent.iterdir() if path != nursery.directory]


def test_no_server_is_forked_from_what_has_changed_a_moment_ago(nursery):
    """Not even the second of two in one burst: its caller may have made the change."""
    change = nursery.base / "config" / "jupyter_server_config.d" / f"{os.urandom(4).hex()}.json"
    old = nursery.process
    with nursery.launched(nursery.lasting()):
        change.write_text("{}")
        with nursery.launched(nursery.lasting()) as (process, _, _):
            assert psutil.Process(process.pid).ppid() != old.pid
    until(lambda: nursery.process != old, what="another one")
    until(lambda: not alive(old.pid), what="it ends when it has no child left")
    until(lambda: not old_directories(nursery), what="its directory is removed")


@pytest.mark.programs("strace")  # holds up one call of the fork server
def test_a_server_whose_launch_was_not_confirmed_in_time_does_not_live_beside_the_one_that_is_executed(
    nursery,
):
    old = nursery.process
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
            what="it is traced",
        )
        request = nursery.lasting()
        # The first one may take the child that was forked ahead; the next one has to be forked now.
        with pytest.raises(CannotFork, match="did not answer"):
            nursery.launch_twice(request)
        left = [process.pid for process in processes_marked(request.server_dir)]
    finally:
        tracer.kill()
        tracer.wait()
        kill_all(processes_marked(request.server_dir))
    assert not left


@pytest.fixture
def local(tmp_path):
    """A backend with its fork server, and the queue of what it reports."""
    facts = queue.SimpleQueue()
    (tmp_path / "logs").mkdir()
    backend = LocalBackend(
        facts.put,
        python=Path(sys.executable),
        runtime_dir=tmp_path / "run",
        log_dir=tmp_path / "logs",
        client=JupyterClient(),
    )
    try:
        until(lambda: backend._forkserver._current, what="a fork server")
        yield backend, facts
    finally:
        backend.close()


def test_an_abandoned_child_leaves_no_files_to_the_server_that_is_executed_instead(
    local, tmp_path, monkeypatch
):
    """The fork server is lost between the fork and its answer, and the child is quicker than the keeper."""
    backend, facts = local
    name, forked = ServerName("lost"), []
    server_dir = tmp_path / "run" / name
    ask = backend._forkserver._processes.ask

    def lose_the_answer(parent, request, files):
        forked.append(ask(parent, request, files)["pid"])
        until((server_dir / "jupyter" / f"jpserver-{forked[0]}.json").exists, what="its file")
        raise EOFError

    monkeypatch.setattr(backend._forkserver._processes, "ask", lose_the_answer)
    backend.launch(ServerSpec(name, str(tmp_path)), 1)
    try:
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


def test_a_forked_server_is_not_looked_for_it_says_itself_when_it_is_ready(
    local, tmp_path, monkeypatch
):
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


OTHER_PROGRAM = """
import array, json, os, pathlib, socket, struct, sys

listener = socket.socket(fileno=int(sys.argv[2]))
listener.listen()
held = []
while True:
    connection = listener.accept()[0]
    held.append(connection)
    header, files, _, _ = socket.recv_fds(connection, 4, 4)
    request = json.loads(connection.recv(struct.unpack("!I", header)[0]))
    answer = {"pid": os.getpid()} if request["do"] == "keep" else {"known": True}
    answer.update(json.loads(pathlib.Path(__file__).with_name("version.json").read_text()))
    body = json.dumps(answer).encode()
    connection.sendall(struct.pack("!I", len(body)) + body)
    if request["do"] == "retire":
        sys.exit()
"""
"""A fork server whose answers carry what is in a file beside it."""


@pytest.fixture
def other_program(tmp_path, monkeypatch):
    """The file with what the fork servers of this test add to their answers."""
    program = tmp_path / "program"
    program.mkdir()
    (program / "__main__.py").write_text(OTHER_PROGRAM)
    monkeypatch.setattr("labkeeper.backends.local.forkserver.PROGRAM", program)
    return program / "version.json"


@pytest.fixture
def make_fork_servers(tmp_path):
    """Make the fork servers of one keeper after the other."""
    (tmp_path / "logs").mkdir()
    with contextlib.ExitStack() as keepers:

        def make(kind=ForkServers):
            threads = keepers.enter_context(contextlib.closing(ThreadGroup()))
            return kind(
                threads,
                python=Path(sys.executable),
                runtime_dir=tmp_path / "run",
                log_dir=tmp_path / "logs",
                groups=ControlGroups(tmp_path / "run"),
                environment=base_environment(os.environ),
                config=base_config(),
            )

        yield make


@pytest.mark.parametrize("version", ["{}", '{"version": 1}'])
def test_a_fork_server_that_sends_no_version_is_taken_over_as_one_of_the_first(
    other_program, make_fork_servers, version
):
    """It outlives its keeper, and a keeper before versions."""
    other_program.write_text(version)
    earlier = make_fork_servers().spawn()
    later = make_fork_servers()
    found = later.take_over()
    assert (found.name, found.process) == (earlier.name, earlier.process)
    assert later.ask(found.name, {"do": "attach", "pid": 1}) == {"known": True}


def test_a_fork_server_of_a_newer_version_is_not_taken_over(other_program, make_fork_servers):
    other_program.write_text("{}")
    earlier = make_fork_servers().spawn()
    other_program.write_text('{"version": 2}')
    with structlog.testing.capture_logs() as log:
        assert make_fork_servers().take_over() is None
    assert [line["reason"] for line in log] == [
        "cannot understand the fork server: a frame has version 2, not 1"
    ]
    until(lambda: not earlier.process.alive(), what="it has ended")
    assert not earlier.directory.exists()


def test_where_fork_servers_are_of_a_newer_version_servers_are_executed_with_the_reason(
    other_program, make_fork_servers
):
    """The files on disk may have been replaced while the keeper runs."""
    other_program.write_text('{"version": 2}')
    forkserver = make_fork_servers(ForkServer)
    forkserver.start()
    reason = until(lambda: forkserver._why_not, what="it has no fork server")
    assert reason.startswith("cannot understand the fork server: a frame has version 2, not 1")
