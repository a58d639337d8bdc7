"""Launching: reports and exits through the pipe, and executing servers that cannot be forked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from harness import until
from labkeeper.backends.local.launching import Launcher, ReportPipe, exit_of
from labkeeper.core.server import Exit
from labkeeper.forkserver.marks import MARK
from labkeeper.forkserver.wire import LARGEST, WireError
from launches import launch_in


@pytest.fixture
def report():
    pipe = ReportPipe()
    yield pipe
    pipe.close()


def say(report, message):
    os.write(report.writer, json.dumps(message).encode() + b"\n")


def test_a_message_is_available_under_its_key_once_its_line_is_complete(report):
    assert report.said("ready") is None
    os.write(report.writer, b'{"ready": {"po')
    assert report.said("ready") is None
    os.write(report.writer, b'rt": 1}}\n{"status"')
    assert report.said("ready") == {"port": 1}
    os.write(report.writer, b": 256}\n")
    assert report.exit() == Exit(code=1)
    assert report.said("ready") == {"port": 1}


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense\n",
        b"[1]\n",
        b"\xff\xfe\n",
        b'"status"\n',
        b'{"status": "exit"}\n',
        b"[" * 50_000 + b"\n",
        b'{"status": 9, "version": 2}\n',
    ],
)
def test_an_invalid_line_is_not_an_exit_and_hides_no_later_one(report, line):
    os.write(report.writer, line)
    assert report.exit(within=0.0) is None
    say(report, {"status": 9})
    assert report.exit() == Exit(signal="SIGKILL")


def test_an_endless_line_is_not_kept_in_memory(report):
    pieces = [b"x" * 4096] * 32
    writer = os.dup(report.writer)

    def shout():
        with os.fdopen(writer, "wb", buffering=0) as stream:
            try:
                for piece in pieces:
                    stream.write(piece)
            except BrokenPipeError:
                pieces.clear()

    report.close_writer()
    thread = threading.Thread(target=shout)
    thread.start()
    until(
        lambda: report.said("ready") is None and not report.readable,
        what="the report pipe to be closed",
    )
    thread.join()
    assert report.exit() is None


def test_a_late_exit_is_awaited_unless_no_writer_is_left(report):
    teller = threading.Timer(0.05, say, (report, {"status": 7 << 8}))
    teller.start()
    assert report.exit(within=10.0) == Exit(code=7)
    teller.join()
    silent = ReportPipe()
    silent.close_writer()
    assert silent.exit(within=10.0) is None
    assert silent.readable == []
    silent.close()


@pytest.mark.parametrize(
    ("code", "end"),
    [
        (0, Exit(code=0)),
        (7, Exit(code=7)),
        (-signal.SIGSEGV, Exit(signal="SIGSEGV")),
        (-(signal.SIGRTMIN + 6), Exit(signal=f"signal {signal.SIGRTMIN + 6}")),
    ],
)
def test_an_exit_code_is_interpreted_as_by_subprocess(code, end):
    assert exit_of(code) == end


@pytest.mark.parametrize("interpreter", ["its own", "one without Jupyter"])
def test_a_server_that_cannot_be_forked_is_executed_and_the_reason_reported(tmp_path, interpreter):
    """Its launch is invalid on purpose, so that it ends at once."""
    python = sys.executable if interpreter == "its own" else "/usr/bin/python3"
    server_dir = tmp_path / "server"
    launch = replace(
        launch_in(server_dir),
        cwd=str(tmp_path / "nowhere"),
        env={MARK: str(server_dir), "PATH": os.environ["PATH"]},
        kernels_by="exec",
    )
    with (tmp_path / "log").open("wb") as log:
        launched = Launcher(python, None, "forking is turned off here").launch(launch, log.fileno())
    assert (launched.by, launched.reason, launched.forkserver) == (
        "exec",
        "forking is turned off here",
        None,
    )
    assert launched.child.wait(60) == 1
    assert launched.process.pid == launched.child.pid
    assert "cannot start the server" in (tmp_path / "log").read_text()
    assert str(tmp_path / "nowhere") in (tmp_path / "log").read_text()
    # Only the process had the other end.
    assert launched.report.said("ready") is None
    assert launched.report.readable == []
    launched.report.close()


ANY = launch_in("/")
FAILURES = {
    "an interpreter that does not exist": ("/no-python", ANY, FileNotFoundError),
    "a control group that does not exist": (
        sys.executable,
        replace(ANY, cgroups=["/no/group/cgroup.procs"]),
        FileNotFoundError,
    ),
    "a launch that is too large": (
        sys.executable,
        replace(ANY, config={"A": {"b": "x" * LARGEST}}),
        WireError,
    ),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_failed_execution_leaves_no_process_and_no_descriptor(tmp_path, what):
    python, launch, error = FAILURES[what]
    before = len(list(Path("/proc/self/fd").iterdir()))
    with (tmp_path / "log").open("wb") as log, pytest.raises(error):
        Launcher(Path(python), None, "it is turned off").launch(launch, log.fileno())
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_process_that_dies_before_it_reads_its_launch_has_an_exit(tmp_path):
    """The launch exceeds the pipe's buffer."""
    launch = replace(ANY, config={"A": {"b": "x" * (LARGEST // 2)}})
    with (tmp_path / "log").open("wb") as log:
        launched = Launcher(Path(shutil.which("false")), None, "it is turned off").launch(
            launch, log.fileno()
        )
    assert launched.child.wait(60) == 1
    launched.report.close()
