"""`labkeeper top` at a real terminal, against an application that runs; and what it shows."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import pytest
import structlog
from rich.cells import cell_len
from rich.console import Console

from fake_keeper import TOKEN, a_server, listening, serving
from harness import until
from labkeeper.cli.top import top
from labkeeper.cli.top_view import SORTS, Display, Sample, table
from labkeeper.client import Client, Idle, Usage
from terminals import ALTERNATE_ON, Terminal

COMMAND = [sys.executable, "-m", "labkeeper", "top", "--interval", "0.5"]


@pytest.fixture
def served(tmp_path):
    """A keeper with three servers, of which one is stopped."""
    with structlog.testing.capture_logs(), serving(tmp_path) as there:
        with Client(there.url, token=TOKEN) as client:
            for name in ("ada", "bob", "eve"):
                client.create(name=name, idle_timeout=3600)
            client.stop("eve")
        yield there


@pytest.fixture
def env(served, tmp_path):
    ours = {"LABKEEPER_URL": served.url, "LABKEEPER_TOKEN": TOKEN, "LABKEEPER_STATE_DIR": tmp_path}
    others = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("LABKEEPER_") and name not in {"NO_COLOR", "FORCE_COLOR"}
    }
    # The size of the terminal counts, whatever a shell has exported.
    return others | {name: str(value) for name, value in ours.items()} | {"COLUMNS": "33"}


@pytest.fixture
def terminal(env):
    with Terminal(COMMAND, env=env) as running:
        running.shows("q quit")
        yield running


def test_it_draws_counts_servers_and_keys(terminal):
    """The head of the column by which it is sorted is marked."""
    lines = terminal.screen()
    assert lines[0].startswith("3 servers: 2 running, 1 stopped")
    assert lines[2].split() == [
        *("NAME", "STATE", "SINCE", "CPUS", "MEMORY"),
        *("KERNELS", "CONNECTIONS", "LAST", "USED", "STOPS"),
    ]
    assert [line.split()[:2] for line in lines[3:6]] == [
        ["ada", "running"],
        ["bob", "running"],
        ["eve", "stopped"],
    ]
    assert lines[-1].startswith("q quit   sort by  c cpu  m memory  n name  s state ")
    assert {len(line) for line in lines} == {100}
    assert len(lines) == 24
    assert not any("…" in line for line in lines)
    assert re.search(r"\x1b\[1;7mCPUS", terminal.read())


def test_q_quits_and_restores_the_terminal(terminal):
    assert terminal.attributes() != terminal.before
    terminal.press("q")
    assert terminal.ended() == 0
    assert terminal.is_restored()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)],
)
def test_a_signal_ends_it_and_restores_the_terminal(terminal, number, code):
    os.kill(terminal.process.pid, number)
    assert terminal.ended() == code
    assert terminal.is_restored()
    assert "Traceback" not in terminal.read()


def test_ctrl_c_quits_and_restores_the_terminal(terminal):
    terminal.press("\x03")
    assert terminal.ended() == 130
    assert terminal.is_restored()


def test_ctrl_z_gives_the_terminal_back_until_it_continues(terminal):
    terminal.stop_and_continue()
    until(lambda: terminal.attributes() != terminal.before, what="it to continue")
    terminal.press("q")
    assert terminal.ended() == 0
    assert terminal.is_restored()


def test_a_resize_redraws_to_the_new_size(terminal):
    """Less important columns go, and then as many servers as do not fit."""
    terminal.resize(50, 7)
    terminal.shows("^… and 1 more")
    lines = terminal.screen()[:7]
    assert {len(line) for line in lines} == {50}
    assert not any(line.endswith("…") for line in lines[2:])
    assert "CONNECTIONS" not in lines[2]
    assert lines[2].split()[:2] == ["NAME", "STATE"]
    assert lines[6].startswith("q quit")


def test_keys_sort_and_scroll(terminal):
    terminal.resize(100, 6)
    terminal.shows("^… and 2 more")
    terminal.press("n")
    terminal.shows("^ada ")
    terminal.press("\x1b[B\x1b[B")
    terminal.shows("^eve ")
    terminal.shows("^… 2 above")
    terminal.press("s")
    terminal.shows("^ada ")
    terminal.press("?q")
    assert terminal.ended() == 0


def test_a_keeper_that_is_gone_is_reported_until_it_is_back(served, env):
    """Meanwhile the last values are shown as old."""
    with contextlib.ExitStack() as closing:
        with listening(served.app) as url:
            running = closing.enter_context(Terminal(COMMAND, env=env | {"LABKEEPER_URL": url}))
            running.shows("^ada +running")
            assert running.screen()[1].strip() == ""
        running.shows(r"^values of \d+ s ago: cannot reach a keeper at http")
        running.shows("^ada +running")
        assert "\x1b[2mada" in running.read()
        with listening(served.app, urlsplit(url).port):
            until(lambda: not running.screen()[1].strip(), what="the problem to be over")
            running.press("q")
            assert running.ended() == 0


def test_without_a_keeper_it_exits_before_it_draws(tmp_path, env):
    with Terminal(COMMAND, env=env | {"LABKEEPER_URL": "http://127.0.0.1:1"}) as running:
        assert running.ended() == 3
        assert ALTERNATE_ON not in running.read()
        assert "cannot reach a keeper" in running.read()


def test_without_a_keyboard_it_can_still_be_interrupted(env):
    with Terminal(COMMAND, env=env, stdin=subprocess.DEVNULL) as running:
        running.shows("Ctrl-C quits")
        running.process.send_signal(signal.SIGINT)
        assert running.ended() == 130


def test_it_ends_when_the_terminal_has_gone(env):
    """As when a connection breaks and the signal was ignored (nohup)."""
    ignore = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    with Terminal([sys.executable, "-c", ignore, *COMMAND], env=env) as running:
        running.shows("q quit")
        running.hang_up()
        running.process.wait(60)
    assert running.process.returncode != 0


@pytest.mark.parametrize("dumb", [False, True])
def test_a_pipe_or_a_dumb_terminal_gets_a_plain_table_once(env, dumb):
    if dumb:
        with Terminal(COMMAND, env=env | {"TERM": "dumb"}) as running:
            assert running.ended() == 0
            text = running.read()
    else:
        done = subprocess.run(COMMAND, env=env, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        text = done.stdout
    assert "\x1b" not in text
    assert [line.split()[:2] for line in text.splitlines()] == [
        ["NAME", "STATE"],
        ["ada", "running"],
        ["bob", "running"],
        ["eve", "stopped"],
    ]


# What it shows


def usage(**changed):
    fields = {
        "at": "",
        "memory": 0,
        "memory_proportional": None,
        "cpu_seconds": 0.0,
        "cpus": None,
        "processes": 1,
        "threads": 1,
        "kernels": None,
        "connections": None,
    }
    return Usage(**fields | changed)


def idle(name, **changed):
    optional = ("rule", "warns_at", "stops_at", "last_used_at", "last_used", "snoozed_until")
    fields = dict.fromkeys((*optional, "looked_at"))
    fields |= {"name": name, "state": "off", "reason": "", "rules": [], "held_by": []}
    return Idle(**fields | changed)


SERVERS = [
    a_server(name="a", state="stopped"),
    a_server(name="b", usage=usage(cpus=0.5, memory=300 << 20, kernels=2, connections=1)),
    a_server(name="c", usage=usage(cpus=1.5, memory=900 << 20, memory_proportional=200 << 20)),
    a_server(name="d", state="failed"),
]


@pytest.mark.parametrize(
    ("sort", "names"), [("cpu", "cbad"), ("memory", "bcad"), ("name", "abcd"), ("state", "dbca")]
)
def test_rows_are_sorted_by_use_name_or_urgency(sort, names):
    rows = Sample(SERVERS, {}).rows(sort)
    assert "".join(row.server.name for row in rows) == names


def test_a_state_of_a_newer_keeper_comes_last():
    newer = type(SERVERS[0]).tolerant(json.dumps(SERVERS[0].model_dump() | {"state": "asleep"}))
    rows = Sample([newer, SERVERS[1]], {}).rows("state")
    assert [str(row.server.state) for row in rows] == ["running", "asleep"]
    assert "1 running, 1 asleep" in screen_of(Sample([newer, SERVERS[1]], {}))[0]


def test_the_options_offer_what_rows_can_be_sorted_by():
    assert top.params[0].type.choices == tuple(SORTS)


def screen_of(sample, *, problem="", size=(100, 10), keys="", has_keys=True):
    """Return the lines of a frame after keys."""
    display = Display("name", has_keys=has_keys)
    display.frame(sample, "", size)
    for key in keys:
        display.press(key)
    console = Console(width=size[0], height=size[1])
    lines = console.render_lines(display.frame(sample, problem, size))
    return ["".join(segment.text for segment in line) for line in lines]


def test_usage_is_shown_for_each_server_and_in_total():
    """Shared memory counts once."""
    lines = screen_of(Sample(SERVERS, {}))
    assert lines[0].split("  ")[0] == "4 servers: 1 failed, 2 running, 1 stopped"
    assert "2.00 CPUs, 500 MiB" in lines[0]
    assert lines[4].split()[-7:] == ["0.50", "300", "MiB", "2", "1", "-", "-"]
    assert lines[5].split()[-7:] == ["1.50", "200", "MiB", "-", "-", "-", "-"]


def test_when_a_server_stops_or_why_it_does_not():
    """When a server was last used is known only of those that are polled."""
    later = (datetime.now(UTC) + timedelta(minutes=10, seconds=30)).isoformat()
    told = {
        "a": idle("a", state="counting", stops_at=later, last_used_at=later, looked_at=later),
        "b": idle("b", state="in-use", last_used_at=later),
        "c": idle("c", state="snoozed"),
    }
    _, cells = table(Sample(SERVERS, told).rows("name"))
    assert [row[-1] for row in cells] == ["in 10 min", "in use", "snoozed", "-"]
    assert [row[-2] for row in cells] == ["0 s ago", "-", "-", "-"]


def test_without_servers_it_says_how_to_start_one():
    lines = screen_of(Sample([], {}))
    assert lines[0].strip() == "0 servers"
    assert lines[3].strip() == "no servers; `labkeeper start` starts one"


@pytest.mark.parametrize(
    ("keys", "first"),
    [
        (["down"], "s01"),
        (["page down"], "s05"),
        (["end"], "s15"),
        (["end", "up"], "s14"),
        (["end", "page up", "down"], "s11"),
        (["end", "home"], "s00"),
        (["down", "n"], "s00"),
        (["up", "x"], "s00"),
    ],
)
def test_keys_scroll_within_the_servers(keys, first):
    many = Sample([a_server(name=f"s{number:02}") for number in range(20)], {})
    lines = screen_of(many, keys=keys)
    assert lines[3].split()[0] == first
    above, below = int(first[1:]), 15 - int(first[1:])
    rest = [f"… {above} above"] * bool(above) + [f"… and {below} more"] * bool(below)
    assert lines[8].strip() == "  ".join(rest)


@pytest.mark.parametrize("size", [(1, 1), (5, 2), (30, 4), (80, 24), (300, 100)])
def test_a_frame_fits_any_terminal(size):
    lines = screen_of(Sample(SERVERS, {}), problem="cannot go on " * 9, size=size)
    assert len(lines) == size[1]
    assert {cell_len(line) for line in lines} == {size[0]}


HOSTILE = "x\x1b]52;c;eA==\x07\x1b[31m\u202e\nforged" + "y" * 10_000
"""Sets the clipboard and a colour, reverses its line, and adds one; of a keeper that is none."""


def test_hostile_text_cannot_control_the_terminal_or_add_lines():
    server = SERVERS[1].model_copy(update={"name": HOSTILE, "since": HOSTILE})
    sample = Sample(
        [server], {HOSTILE: idle(HOSTILE, stops_at=HOSTILE, last_used_at=HOSTILE, looked_at="")}
    )
    lines = screen_of(sample, problem=HOSTILE)
    assert len(lines) == 10
    assert all(line.isprintable() and len(line) == 100 for line in lines)
    assert lines[1].startswith(r"x\x1b]52;c;eA==\x07\x1b[31m\u202e\x0aforgedyyy")
    assert all(cell.isprintable() for row in table(sample.rows("name"))[1] for cell in row)
