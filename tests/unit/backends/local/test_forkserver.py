"""Fork servers whose program has another version of the protocol.

Not in `test_forking`: the fork server that its tests share may be replaced at any moment, and the
new one would run the program that these tests put in place.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest
import structlog

from harness import until
from labkeeper.backends.local.forking import ForkServer
from labkeeper.backends.local.forkserver import ForkServers
from labkeeper.backends.local.limits import ControlGroups
from labkeeper.jupyter.config import base_config, base_environment
from labkeeper.threads import ThreadGroup

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forking needs Linux")


OTHER_PROGRAM = """
import json, os, pathlib, socket, struct, sys

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
                kernels_by="exec",
                preload=[],
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


def test_what_is_left_of_a_rehearsal_is_removed_when_its_fork_server_is_taken_over(
    other_program, make_fork_servers
):
    """A keeper may be killed while a fork server rehearses, which then becomes ready."""
    other_program.write_text("{}")
    earlier = make_fork_servers().spawn()
    left = earlier.directory / "rehearsal"
    left.mkdir()
    later = make_fork_servers()
    members = later._groups.create(f".{earlier.name}")
    assert later.take_over().process == earlier.process
    assert not left.exists()
    assert not [path for path in members if Path(path).exists()]


def test_a_fork_server_of_a_newer_version_is_not_taken_over(other_program, make_fork_servers):
    other_program.write_text("{}")
    earlier = make_fork_servers().spawn()
    other_program.write_text('{"version": 2}')
    with structlog.testing.capture_logs() as log:
        assert make_fork_servers().take_over() is None
    assert [line["reason"] for line in log] == [
        "cannot understand the fork server: a frame has version 2, not 1"
    ]
    until(lambda: not earlier.process.alive(), what="the earlier fork server to end")
    assert not earlier.directory.exists()


def test_where_fork_servers_are_of_a_newer_version_servers_are_executed_with_the_reason(
    other_program, make_fork_servers
):
    """The files on disk may have been replaced while the keeper runs."""
    other_program.write_text('{"version": 2}')
    forkserver = make_fork_servers(ForkServer)
    forkserver.start()
    reason = until(lambda: forkserver._why_not, what="the reason why there is no fork server")
    assert reason.startswith("cannot understand the fork server: a frame has version 2, not 1")
