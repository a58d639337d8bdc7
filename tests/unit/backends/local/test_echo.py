"""Echoing server logs to the keeper's log: each record once, tracebacks whole, and limited."""

from __future__ import annotations

import pytest
import structlog

from labkeeper.backends.local.echo import Echo
from labkeeper.backends.local.logs import LogFile

TRACE = """\
[E 2026-11-23 22:19:20.559 ServerApp] Uncaught exception GET /api
    Traceback (most recent call last):
      File "x.py", line 1, in <module>
    ValueError: no
"""


@pytest.fixture
def log(tmp_path):
    return LogFile(tmp_path / "x.log", max_bytes=2**20)


@pytest.fixture
def entries():
    with structlog.testing.capture_logs() as entries:
        yield entries


def write(log, data):
    with log.path.open("ab") as stream:
        stream.write(data.encode() if isinstance(data, str) else data)


def echoed(entries):
    return [(entry["log_level"], entry["event"]) for entry in entries]


def test_each_record_is_echoed_once_with_its_level(log, entries):
    write(log, "[I 2026-11-23 22:19:20.559 ServerApp] old\n")
    echo = Echo("x", log, log.path.stat().st_size)
    write(log, "[I 2026-11-23 22:19:20.559 ServerApp] a\n[W 2026-11-23 22:19:20.560 LabApp] b\n")
    echo.repeat()
    echo.repeat()
    write(log, "[C 2026-11-23 22:19:20.561 ServerApp] c\n[D 2026-11-23 22:19:20.561 ServerApp] \n")
    echo.repeat()
    assert echoed(entries) == [("info", "a"), ("warning", "b"), ("critical", "c"), ("debug", "")]
    assert {entry["server"] for entry in entries} == {"x"}


def test_a_traceback_is_a_single_record(log, entries):
    write(log, "printed by a kernel\n" + TRACE + "[I 2026-11-23 22:19:20.561 ServerApp] after\n")
    Echo("x", log, 0).repeat()
    assert echoed(entries) == [
        ("info", "printed by a kernel"),
        ("error", "Uncaught exception GET /api"),
        ("info", "after"),
    ]
    assert entries[1]["exception"].splitlines() == TRACE.splitlines()[1:]


def test_an_incomplete_line_is_echoed_once_it_is_complete(log, entries):
    echo = Echo("x", log, 0)
    write(log, "half")
    echo.repeat()
    assert entries == []
    write(log, " and half\n")
    echo.repeat()
    assert echoed(entries) == [("info", "half and half")]


def test_tokens_are_scrubbed(log, entries):
    write(log, f"[I 2026-11-23 22:19:20.559 ServerApp] /lab?token={'0a' * 24}\n")
    Echo("x", log, 0).repeat()
    assert echoed(entries) == [("info", "/lab?token=[secret]")]


@pytest.mark.parametrize("line", [b"x" * 99 + b"\n", b"x" * 2**20, b"\xff\n"])
def test_excess_output_is_dropped_and_its_size_reported(log, entries, line):
    echo = Echo("x", log, 0)
    write(log, line * (2**20 // len(line)))
    echo.repeat()
    repeated = sum(len(entry["event"]) for entry in entries[1:]) + sum(
        len(entry.get("exception", "")) for entry in entries[1:]
    )
    assert entries[0]["log_level"] == "warning"
    assert entries[0]["bytes"] >= log.path.stat().st_size - 2**18
    assert 0 < repeated <= 2**18
    echo.repeat()
    assert sum(entry["log_level"] == "warning" for entry in entries) == 1


def test_a_rotated_log_is_read_from_its_beginning(log, entries):
    write(log, "before the rotation\n")
    echo = Echo("x", log, 0)
    echo.repeat()
    log.path.write_text("after\n")
    echo.repeat()
    assert echoed(entries) == [("info", "before the rotation"), ("info", "after")]


def test_a_missing_log_is_ignored(log, entries):
    Echo("x", log, 0).repeat()
    assert entries == []
