"""Nothing outlives its server, however it hides; and nothing that a keeper left outlives the store that knew of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness import alive, forked, give_hands, processes_marked, run_cell, run_in_server, start_kernel, until
from labkeeper.backends.limits import ControlGroups

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
needs_groups = pytest.mark.skipif(
    sys.platform != "linux" or ControlGroups(Path("/no/such"))._base is None, reason="needs control groups that can be written"
)

HIDE = """
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execve({python!r}, [{python!r}, "-c", {code!r}, {note!r}], {{}})
    os._exit(0)
os.wait()
"""
"""Clears its environment, and leaves both its session and its parents."""
PLAIN = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(300)"
STOPPED = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); os.kill(os.getpid(), 19)"
POLITE = (
    "import os, signal, sys, time\n"
    "signal.signal(15, lambda *_: (open(sys.argv[1], 'w').write('asked'), os._exit(0)))\n"
    "open(sys.argv[1], 'w').write(str(os.getpid()))\n"
    "time.sleep(300)"
)
CHAIN = (
    "import os, sys, time\n"
    "for generation in range(6000):\n"
    "    open(sys.argv[1], 'w').write(str(generation + 1))\n"
    "    time.sleep(0.003)\n"
    "    if os.fork():\n"
    "        os._exit(0)"
)
"""Each of its processes starts the next one, and ends."""


@pytest.fixture
def hide(tmp_path):
    """Give code that starts a process which hides, and the file where that says who it is; none outlives the test."""
    notes = []

    def make(code):
        note = tmp_path / f"note{len(notes)}"
        notes.append(note)
        return HIDE.format(python=sys.executable, code=code, note=str(note)), note

    yield make
    for note in notes:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(note) in process.cmdline():
                    process.kill()


RUN = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', {!r}], env={{}})"


def in_cell(server, source):
    run_cell(server, start_kernel(server), RUN.format(source))


def in_child_of_server(server, source):
    run_in_server(server, RUN.format(source))


def noted(note):
    return until(lambda: note.exists() and note.read_text(), what="a hidden process runs")


def goes_on(note):
    """Whether a chain of processes still grows."""
    before = note.read_text()
    time.sleep(0.3)
    return note.read_text() != before


def start(keeper, launch_by):
    if launch_by == "fork":
        return forked(keeper)
    server = keeper.post(env={"LC_LABKEEPER": "1"}).json()
    assert server["launched_by"] == "exec"
    return server


def groups_of(keeper):
    groups = ControlGroups(keeper.rooms.resolve())
    return sorted(group.name for base in groups._bases for group in base.glob(f"{groups._prefix}*"))


@needs_groups
@pytest.mark.parametrize("launch_by", ["fork", "exec"])
@pytest.mark.parametrize("place", [in_cell, in_child_of_server], ids=["cell", "child"])
def test_what_hides_ends_with_its_server(make_keeper, hide, launch_by, place):
    keeper = make_keeper(launch_by="fork")
    give_hands(keeper)
    keeper.start()
    server = start(keeper, launch_by)
    assert server["limits"] == {}
    notes = {}
    for code in (PLAIN, STOPPED, CHAIN):
        source, notes[code] = hide(code)
        place(server, source)
    plain, stopped = int(noted(notes[PLAIN])), int(noted(notes[STOPPED]))
    until(lambda: psutil.Process(stopped).status() == psutil.STATUS_STOPPED)
    noted(notes[CHAIN])
    assert goes_on(notes[CHAIN])
    assert not {plain, stopped} & {process.pid for process in processes_marked(keeper.rooms)}
    assert keeper.delete(force="true" if place is in_cell else "false").status_code == 200
    assert not alive(plain)
    assert not alive(stopped)
    assert not goes_on(notes[CHAIN])
    assert groups_of(keeper) == []


@needs_groups
def test_what_hides_ends_with_a_server_that_is_killed(make_keeper, hide):
    keeper = make_keeper(launch_by="fork").start()
    server = forked(keeper)
    source, note = hide(PLAIN)
    in_cell(server, source)
    pid = int(noted(note))
    os.kill(server["pid"], signal.SIGKILL)
    again = until(lambda: (s := keeper.get())["launch"] > server["launch"] and s["state"] == "running" and s)
    assert not alive(pid)
    assert len(groups_of(keeper)) == 1
    assert alive(again["pid"])


@needs_groups
def test_what_hides_is_asked_to_end_before_it_is_ended(keeper, hide):
    server = keeper.post().json()
    source, note = hide(POLITE)
    in_cell(server, source)
    pid = int(noted(note))
    assert keeper.delete().json()["stop_report"]["method"] == "shutdown"
    assert not alive(pid)
    assert note.read_text() == "asked"


@needs_groups
def test_what_hides_ends_with_a_server_that_the_next_keeper_took_over(make_keeper, hide):
    keeper = make_keeper(launch_by="exec").start()
    server = keeper.post().json()
    source, note = hide(PLAIN)
    in_cell(server, source)
    pid = int(noted(note))
    keeper.kill()
    keeper.start()
    assert keeper.wait_for("running")["pid"] == server["pid"]
    assert keeper.delete().status_code == 200
    assert not alive(pid)
    assert groups_of(keeper) == []


READ_ONLY = """
for place in $(awk '$0 ~ / - cgroup2? / {print $5}' /proc/self/mountinfo); do mount -o remount,bind,ro $place || exit 9; done
exec "$@"
"""


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs Linux, and root")
def test_where_groups_are_read_only_nothing_changes_and_no_start_complains(make_keeper):
    """As in most containers."""
    keeper = make_keeper(launch_by="exec")
    command = keeper.command
    keeper.command = lambda *arguments: ["unshare", "-m", "sh", "-c", READ_ONLY, "sh", *command(*arguments)]
    server = keeper.start().post().json()
    assert (server["state"], server["limits"]) == ("running", {})
    kernel = int(run_cell(server, start_kernel(server), "import os; os.getpid()"))
    assert groups_of(keeper) == []
    assert keeper.delete().status_code == 200
    assert not alive(kernel)
    warnings = [line for line in keeper.log.read_text().splitlines() if '"level": "warning"' in line]
    assert [line for line in warnings if "names no user runs as root" not in line] == []


# The sweep


def forget_everything(keeper):
    for path in keeper.state_dir.glob("labkeeper.sqlite*"):
        path.unlink()


def make_strangers(rooms, elsewhere):
    """Make what no keeper made: a file, a link, directories of which one could be a room by its name; the inner ones first."""
    made = [elsewhere / "jupyter", elsewhere, rooms / "My Notes" / "jupyter", rooms / "My Notes", rooms / "notes" / "jupyter"]
    for path in made:
        path.mkdir(parents=True, exist_ok=True)
    (rooms / "notes" / "draft").write_text("mine")
    (rooms / "file").write_text("mine")
    (rooms / "link").symlink_to(elsewhere)
    return [*made, rooms / "notes" / "draft", rooms / "notes", rooms / "file", rooms / "link"]


def test_a_new_keeper_ends_what_its_store_does_not_know_and_nothing_else(make_keeper, tmp_path, hide):
    keeper = make_keeper(launch_by="fork").start()
    one, other = forked(keeper, "one"), keeper.post(name="other", env={"LC_LABKEEPER": "1"}).json()
    assert (one["state"], other["state"]) == ("running", "running")
    kernel = int(run_cell(one, start_kernel(one), "import os; os.getpid()"))
    source, note = hide(PLAIN)
    in_cell(other, source)
    hidden = int(noted(note))
    grouped = len(groups_of(keeper))
    keeper.kill()
    forget_everything(keeper)
    half_made = keeper.rooms / "half-made"
    (half_made / "jupyter").mkdir(parents=True)
    (half_made / "launch.json.new").write_text("{")
    strangers = make_strangers(keeper.rooms, tmp_path / "elsewhere")
    with subprocess.Popen(["sleep", "300"], env={"LABKEEPER_SERVER": f"{keeper.rooms}-of-another/one"}) as stranger:
        try:
            began = time.monotonic()
            keeper.start()
            assert keeper.http.get("/api/servers").json()["servers"] == []
            # What is asked for under such a name comes up, and is not taken for what was left.
            again = keeper.post(name="other").json()
            assert (again["state"], again["launch"]) == ("running", 1)
            until(lambda: not alive(one["pid"]), what="the forked one is ended")
            assert not any(alive(pid) for pid in (other["pid"], kernel))
            if grouped:
                assert not alive(hidden)
                assert len(groups_of(keeper)) == 1
            until(lambda: not (keeper.rooms / "one").exists() and not half_made.exists(), what="the rooms are removed")
            assert {process.environ()["LABKEEPER_SERVER"] for process in processes_marked(keeper.rooms / "other")} == {
                str(keeper.rooms / "other")
            }
            assert stranger.poll() is None
            assert alive(again["pid"])
            assert time.monotonic() - began < 60
        finally:
            stranger.kill()
    assert all(os.path.lexists(path) for path in strangers)
    assert (keeper.state_dir / "logs" / "one.log").stat().st_size > 0
    said = keeper.log.read_text()
    assert said.count("ended what an earlier keeper left") == 2
    assert said.count("removed what an earlier keeper left") == 1
    assert str(one["pid"]) in said
    told = [event for event in keeper.http.get("/api/events").json()["events"] if event["kind"] == "orphans"]
    assert {event["server"] for event in told} == {"one", "other"}
    count = sum(event["details"]["pids"] for event in told)
    assert count >= 3
    assert f"labkeeper_orphan_processes_total {count}.0\n" in keeper.http.get("/metrics").text
    # For the end of the test, which wants an empty place.
    for path in strangers:
        path.unlink() if path.is_symlink() or path.is_file() else path.rmdir()


def test_servers_that_the_store_knows_are_not_swept(make_keeper):
    keeper = make_keeper(launch_by="exec").start()
    server = keeper.post().json()
    keeper.kill()
    keeper.start()
    assert keeper.wait_for("running")["pid"] == server["pid"]
    assert "an earlier keeper left" not in keeper.log.read_text()


def test_a_keeper_that_executes_removes_what_dead_fork_servers_left(make_keeper):
    keeper = make_keeper(launch_by="fork").start()
    server = forked(keeper)
    keeper.kill()
    parent = psutil.Process(psutil.Process(server["pid"]).ppid())
    parent.kill()
    os.kill(server["pid"], signal.SIGKILL)
    until(lambda: not alive(parent.pid) and not alive(server["pid"]))
    assert list((keeper.rooms / ".forkservers").iterdir())
    keeper.settings["launch_by"] = "exec"
    keeper.start()
    until(lambda: not (keeper.rooms / ".forkservers").exists(), what="it is removed")
