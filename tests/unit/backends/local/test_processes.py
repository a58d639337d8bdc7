"""Processes: identified by pid and start time, found by their mark, and ended reliably."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from harness import PATIENCE, free_port, until
from labkeeper.backends.local import processes
from labkeeper.backends.local.cleanup import end_leftovers, strays
from labkeeper.backends.local.limits import ControlGroups
from labkeeper.backends.local.processes import (
    Process,
    boot_id,
    carries,
    end_all,
    marked,
    sees,
    server_dirs_marked,
    wait_until_ended,
)
from labkeeper.core.errors import BackendUnavailable
from labkeeper.core.spec import ServerName

STUBBORN = (
    "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    " print('up', flush=True); signal.pause()"
)


@pytest.fixture
def spawn():
    children = []

    def start(*command, **options):
        child = subprocess.Popen(command or ["sleep", "1000"], **options)
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()
        if child.stdout:
            child.stdout.close()


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def test_a_process_is_identified_by_pid_and_start_time(spawn):
    child = spawn()
    process = Process.find(child.pid)
    assert process.alive()
    assert process == Process.find(child.pid)
    assert not Process(child.pid, "another start").alive()
    assert not Process(child.pid, "another start").send(signal.SIGKILL)
    assert child.poll() is None


def test_an_ended_process_is_neither_alive_nor_found(spawn):
    child = spawn("true")
    until(lambda: not Process(child.pid, "").alive() and child.poll() is not None)
    assert Process.find(child.pid) is None
    gone = Process(child.pid, "1")
    assert not gone.alive()
    assert not gone.send(signal.SIGTERM)
    assert gone.descendants() == []
    assert not gone.listens_on(1)


def test_a_zombie_is_not_alive(spawn):
    child = spawn()
    process = Process.find(child.pid)
    process.send(signal.SIGKILL)
    until(lambda: not process.alive())
    assert child.returncode is None


def test_descendants_include_grandchildren(spawn):
    child = spawn("sh", "-c", "sh -c 'sleep 1000 & wait' & wait")
    process = Process.find(child.pid)
    until(lambda: len(process.descendants()) == 2)
    assert end_all(process.descendants(), grace=1, within=2) == []


def test_a_mark_is_found_in_processes_that_inherited_it(spawn):
    mark = f"test-{os.getpid()}"
    child = spawn("sh", "-c", "setsid sleep 1000 & wait", env={**os.environ, "A_MARK": mark})
    until(lambda: len(marked("A_MARK", mark)) == 2)
    found = marked("A_MARK", mark)
    assert child.pid in {process.pid for process in found}
    assert end_all(found, grace=0, within=2) == []
    assert marked("A_MARK", mark) == []


@pytest.mark.skipif(
    sys.platform != "linux", reason="only on Linux can an environment be missing during an exec"
)
def test_a_mark_is_found_during_an_exec(spawn, tmp_path):
    """A server may be ended while it executes another program."""
    program = tmp_path / "again"
    program.write_text("#!/bin/sh\nexec $0\n")
    program.chmod(0o755)
    spawned = spawn(program, env={**os.environ, "A_MARK": "x"})
    until(lambda: carries(spawned.pid, "A_MARK") == b"x")
    assert {carries(spawned.pid, "A_MARK") for _ in range(3000)} == {b"x"}


HIDES = """
import ctypes, os, signal
fields = open("/proc/self/stat").read().rpartition(")")[2].split()
page, end = int(fields[47]) & ~4095, int(fields[48])
size = -(-(end - page) // 4096) * 4096
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(size), 0) == 0
print("hidden", flush=True)
signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads environments as on Linux")
def test_a_process_that_hides_its_environment_does_not_slow_down_the_search(spawn):
    # The argument fills the page below its environment, which would else be part of its stack.
    hidden = spawn(
        sys.executable,
        "-c",
        HIDES,
        2 * 4096 * "x",
        env={**os.environ, "A_MARK": "x"},
        stdout=subprocess.PIPE,
    )
    assert hidden.stdout.readline() == b"hidden\n"
    without = spawn("sleep", "1000", env={})
    # At half a second each, this would exceed the test's timeout.
    assert {carries(spawned.pid, "A_MARK") for spawned in (hidden, without) * 400} == {b""}


@pytest.mark.root
def test_a_mark_of_another_users_process_is_ignored(spawn):
    """The real user counts: any user can start setuid programs with any environment."""

    def become(*ids):
        return lambda: os.setresuid(*ids)

    # Unique to this run, since the whole machine is searched.
    mine = f"x{os.getpid()}"
    mark = {**os.environ, "A_MARK": mine}
    ours, theirs, lent = (
        spawn(env=mark, preexec_fn=become(*ids)) for ids in ((0, 0, 0), (1234,) * 3, (1234, 0, 0))
    )
    until(lambda: all(carries(child.pid, "A_MARK") for child in (ours, theirs, lent)))
    assert {found.pid for found in marked("A_MARK", mine, users={0})} == {ours.pid}
    assert {found.pid for found in marked("A_MARK", mine, users={0, 1234})} == {
        ours.pid,
        theirs.pid,
        lent.pid,
    }
    assert {found.pid for found in marked("A_MARK", mine)} == {ours.pid, theirs.pid, lent.pid}


@pytest.mark.root
def test_marks_of_other_users_name_no_server_directories(spawn, tmp_path):
    theirs = spawn(
        env={**os.environ, "A_MARK": str(tmp_path / "one")},
        preexec_fn=lambda: os.setresuid(1234, 1234, 1234),
    )
    until(lambda: carries(theirs.pid, "A_MARK"))
    assert server_dirs_marked("A_MARK", tmp_path) == set()


def test_the_search_excludes_the_searching_process_and_its_parents(spawn):
    """A keeper started in a server's terminal inherits the mark, and must not end itself."""
    # The whole machine is searched, and other tests run beside this one.
    mine = f"x{os.getpid()}"
    code = (
        "from labkeeper.backends.local.processes import marked;"
        f" print([p.pid for p in marked('A_MARK', '{mine}')])"
    )
    command = f'{sys.executable} -c "{code}"; true'
    shell = spawn("sh", "-c", command, env={**os.environ, "A_MARK": mine}, stdout=subprocess.PIPE)
    assert shell.stdout.read() == b"[]\n"


def test_server_directories_are_found_by_marks_of_processes(spawn, tmp_path):
    for value in ("one", "two/deeper", "three"):
        spawn(env={"A_MARK": str(tmp_path / value)})
    spawn(env={"A_MARK": f"{tmp_path}-of-another/four"})
    until(lambda: server_dirs_marked("A_MARK", tmp_path) == {tmp_path / "one", tmp_path / "three"})


@pytest.mark.root
def test_a_process_that_sees_another_directory_at_the_path_has_a_different_mark(spawn, tmp_path):
    """As in a container, whose keeper uses the same path."""
    server_dirs = tmp_path / "run"
    server_dirs.mkdir()

    def behind(place):
        """Start a marked process in whose mount namespace another directory is mounted there."""
        hidden = f"mount -t tmpfs tmpfs {place} && touch {place}/ready && exec sleep 1000"
        child = spawn(
            "unshare",
            "-m",
            "sh",
            "-c",
            hidden,
            env={**os.environ, "A_MARK": str(server_dirs / "one")},
        )
        until(Path(f"/proc/{child.pid}/root{place}/ready").exists)
        return child

    other = behind(server_dirs)
    assert not sees(other.pid, server_dirs)
    assert server_dirs_marked("A_MARK", server_dirs) == set()
    # A process in a chroot-like mount without that path is still ours.
    shut_in = behind(tmp_path)
    assert sees(shut_in.pid, server_dirs)
    assert server_dirs_marked("A_MARK", server_dirs) == {server_dirs / "one"}


def test_a_process_whose_state_is_unknown_counts_as_alive(spawn, pipe, monkeypatch):
    """Without free descriptors nothing is known, and that proves no end."""
    child = spawn()
    process = Process.find(child.pid)

    def no_descriptor(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(processes, "_started", no_descriptor)
    monkeypatch.setattr(processes.os, "pidfd_open", no_descriptor)
    assert process.alive()
    assert not wait_until_ended(process, or_readable=[pipe[0]], timeout=0.01)


def test_a_search_that_fails_does_not_report_processes_as_ended(spawn, tmp_path):
    """Without free descriptors, marked processes cannot be recognized."""
    server_dir = tmp_path / "run" / "one"
    child = spawn(env={**os.environ, "LABKEEPER_SERVER": str(server_dir)})
    groups = ControlGroups(tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            end_leftovers(ServerName("one"), server_dir, set(), grace=0.0, groups=groups)
        with pytest.raises(
            BackendUnavailable, match="cannot look for processes of earlier keepers"
        ):
            strays(tmp_path / "run", groups)
        with pytest.raises(OSError, match="Too many open files"):
            carries(child.pid, "LABKEEPER_SERVER")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert end_leftovers(ServerName("one"), server_dir, set(), grace=0.0, groups=groups) == {
        child.pid
    }


def test_a_process_that_ignores_sigterm_gets_sigkill(spawn):
    child = spawn(sys.executable, "-c", STUBBORN, stdout=subprocess.PIPE)
    child.stdout.readline()
    assert end_all([Process.find(child.pid)], grace=0.1, within=5) == []
    assert child.wait() == -signal.SIGKILL


def test_processes_that_did_not_end_in_time_are_returned(spawn, monkeypatch):
    """As while the kernel writes a core dump or waits for a disk: SIGKILL takes effect later."""
    process, ended = Process.find(spawn().pid), Process.find(spawn().pid)
    send = Process.send
    monkeypatch.setattr(
        Process, "send", lambda self, number: True if self == process else send(self, number)
    )
    assert end_all([process, ended], grace=0.05, within=PATIENCE / 100) == [process]


def test_waiting_returns_when_the_process_ends(spawn, pipe):
    child = spawn()
    process = Process.find(child.pid)
    threading.Timer(0.05, child.kill).start()
    assert wait_until_ended(process, or_readable=[pipe[0]], timeout=10)
    assert wait_until_ended(process, or_readable=[pipe[0]], timeout=10)
    child.wait()
    assert wait_until_ended(process, or_readable=[pipe[0]], timeout=10)


def test_waiting_returns_at_its_timeout_or_when_cancelled(spawn, pipe):
    process = Process.find(spawn().pid)
    assert not wait_until_ended(process, or_readable=[pipe[0]], timeout=0.01)
    os.write(pipe[1], b"x")
    assert not wait_until_ended(process, or_readable=[pipe[0]], timeout=None)


def test_without_pidfd_ends_are_polled(spawn, pipe, monkeypatch):
    """As on macOS."""
    monkeypatch.setattr(processes.sys, "platform", "darwin")
    child = spawn()
    process = Process.find(child.pid)
    assert process.alive()
    assert not wait_until_ended(process, or_readable=[pipe[0]], timeout=0.01)
    assert process.send(signal.SIGKILL)
    assert wait_until_ended(process, or_readable=[pipe[0]], timeout=None)
    other = Process.find(spawn().pid)
    os.write(pipe[1], b"x")
    assert not wait_until_ended(other, or_readable=[pipe[0]], timeout=None)
    assert boot_id()


def test_listens_on_finds_the_owner_of_a_listening_socket(spawn):
    port = free_port()
    child = spawn(
        sys.executable,
        "-c",
        f"import socket; s = socket.create_server(('127.0.0.1', {port}));"
        " print('up', flush=True); s.accept()",
        stdout=subprocess.PIPE,
    )
    child.stdout.readline()
    assert Process.find(child.pid).listens_on(port)
    assert not Process.find(child.pid).listens_on(port + 1)
    assert not Process.find(os.getpid()).listens_on(port)


LISTENS = """
import os, socket, sys
os.setuid(int(sys.argv[1]))
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
listener.accept()
"""
LOOKS = (
    "import sys; from labkeeper.backends.local.processes import Process;"
    " print(Process.find({}).listens_on({}))"
)


@pytest.mark.root
@pytest.mark.programs("setpriv")
def test_if_processes_cannot_be_inspected_the_user_of_the_socket_decides(spawn):
    """As for root in a container without SYS_PTRACE, which cannot see other users' descriptors."""
    one, other = (
        spawn(sys.executable, "-c", LISTENS, uid, stdout=subprocess.PIPE)
        for uid in ("65534", "65533")
    )
    ports = [int(child.stdout.readline()) for child in (one, other)]
    blind = ["setpriv", "--bounding-set=-sys_ptrace", sys.executable, "-c"]
    assert [
        subprocess.check_output([*blind, LOOKS.format(one.pid, port)]).strip() for port in ports
    ] == [b"True", b"False"]
    assert [Process.find(one.pid).listens_on(port) for port in ports] == [True, False]
