"""Nothing outlives its server, however it hides; and nothing that a keeper left outlives the store that knew of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from harness import (
    alive,
    fork_servers_of,
    forked,
    give_hands,
    kill_all,
    processes_marked,
    processes_where,
    run_cell,
    run_in_server,
    start_kernel,
    until,
    working_in,
)
from labkeeper.backends.local.limits import ControlGroups
from labkeeper.core.errors import SettingsError
from labkeeper.serve.process import earlier_dirs, only_keeper

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
needs_groups = pytest.mark.skipif(
    sys.platform != "linux" or ControlGroups(Path("/no/such"))._base is None,
    reason="needs control groups that can be written",
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
        kill_all(processes_where(lambda process, note=note: str(note) in process.cmdline()))


RUN = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', {!r}], env={{}})"


def in_cell(server, source):
    run_cell(server, start_kernel(server), RUN.format(source))


def in_child_of_server(server, source):
    run_in_server(server, RUN.format(source))


def noted(note):
    return until(lambda: note.exists() and note.read_text(), what="a hidden process runs")


def goes_on(note):
    """Whether a chain of processes still grows; each of them has the note among its arguments."""
    before = note.read_text()
    seen = any(processes_where(lambda process: str(note) in process.cmdline()) for _ in range(5))
    return seen or note.read_text() != before


def start(keeper, launch_by):
    if launch_by == "fork":
        return forked(keeper)
    server = keeper.post(env={"LC_LABKEEPER": "1"}).json()
    assert server["launched_by"] == "exec"
    return server


def groups_of(keeper):
    """The control groups of a keeper's servers; a fork server that loads has one of its own, whose name goes on with a dot."""
    groups = ControlGroups(keeper.server_dirs.resolve())
    return sorted(
        group.name for base in groups._bases for group in base.glob(f"{groups._prefix}[!.]*")
    )


@needs_groups
@pytest.mark.parametrize(
    ("launch_by", "place"),
    [("fork", in_cell), ("exec", in_child_of_server)],
    ids=["forked, in a cell", "executed, in a child"],
)
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
    assert not {plain, stopped} & {process.pid for process in processes_marked(keeper.server_dirs)}
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
    again = until(
        lambda: (
            (s := keeper.get())["generation"] > server["generation"]
            and s["state"] == "running"
            and s
        )
    )
    assert not alive(pid)
    assert len(groups_of(keeper)) == 1
    assert alive(again["pid"])


@needs_groups
def test_what_hides_is_asked_to_end_before_it_is_ended(make_keeper, hide):
    keeper = make_keeper().start()
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


@pytest.mark.root
def test_where_groups_are_read_only_nothing_changes_and_no_start_complains(make_keeper):
    """As in most containers."""
    keeper = make_keeper(launch_by="exec")
    command = keeper.command
    keeper.command = lambda *arguments: [
        "unshare",
        "-m",
        "sh",
        "-c",
        READ_ONLY,
        "sh",
        *command(*arguments),
    ]
    server = keeper.start().post().json()
    assert (server["state"], server["limits"]) == ("running", {})
    kernel = int(run_cell(server, start_kernel(server), "import os; os.getpid()"))
    assert groups_of(keeper) == []
    assert keeper.delete().status_code == 200
    assert not alive(kernel)
    warnings = [
        line for line in keeper.log.read_text().splitlines() if '"level": "warning"' in line
    ]
    assert [line for line in warnings if "names no user runs as root" not in line] == []


FORGED = "while :; do LABKEEPER_SERVER={} sleep 1000; done"
"""Carries no mark itself, and starts one after the other that does."""


@pytest.mark.root
def test_no_other_user_holds_a_server_by_its_mark(keeper):
    server = keeper.post().json()
    nobody = {"user": 65534, "group": 65534, "extra_groups": []}
    server_dir = keeper.server_dirs.resolve() / "default"
    with subprocess.Popen(
        ["sh", "-c", FORGED.format(server_dir)], **nobody, start_new_session=True
    ) as forger:
        try:
            until(
                lambda: [p for p in processes_marked(server_dir) if p.uids().real == 65534],
                what="a forged mark",
            )
            answer = keeper.post("/default/restart")
            assert answer.status_code == 201, answer.text
            assert answer.json()["state"] == "running", answer.text
            answer = keeper.delete()
            assert answer.status_code == 200, answer.text
            assert not alive(server["pid"])
            assert [p for p in processes_marked(server_dir) if p.uids().real == 65534]
        finally:
            forger.kill()
            kill_all(processes_marked(server_dir))


# The sweep


def forget_everything(keeper):
    for path in keeper.state_dir.glob("labkeeper.sqlite*"):
        path.unlink()


def make_strangers(server_dirs, elsewhere):
    """Make what no keeper made: a file, a link, directories of which one could be a room by its name; the inner ones first."""
    made = [
        elsewhere / "jupyter",
        elsewhere,
        server_dirs / "My Notes" / "jupyter",
        server_dirs / "My Notes",
        server_dirs / "notes" / "jupyter",
    ]
    for path in made:
        path.mkdir(parents=True, exist_ok=True)
    (server_dirs / "notes" / "draft").write_text("mine")
    (server_dirs / "file").write_text("mine")
    (server_dirs / "link").symlink_to(elsewhere)
    return [
        *made,
        server_dirs / "notes" / "draft",
        server_dirs / "notes",
        server_dirs / "file",
        server_dirs / "link",
    ]


def test_a_new_keeper_ends_what_its_store_does_not_know_and_nothing_else(
    make_keeper, tmp_path, hide
):
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
    half_made = keeper.server_dirs / "half-made"
    (half_made / "jupyter").mkdir(parents=True)
    (half_made / "launch.json.new").write_text("{")
    strangers = make_strangers(keeper.server_dirs, tmp_path / "elsewhere")
    with subprocess.Popen(
        ["sleep", "300"], env={"LABKEEPER_SERVER": f"{keeper.server_dirs}-of-another/one"}
    ) as stranger:
        try:
            keeper.start()
            assert keeper.http.get("/api/servers").json()["servers"] == []
            # What is asked for under such a name comes up, and is not taken for what was left.
            again = keeper.post(name="other").json()
            assert (again["state"], again["generation"]) == ("running", 1)
            until(lambda: not alive(one["pid"]), what="the forked one is ended")
            assert not any(alive(pid) for pid in (other["pid"], kernel))
            if grouped:
                assert not alive(hidden)
                assert len(groups_of(keeper)) == 1
            until(
                lambda: not (keeper.server_dirs / "one").exists() and not half_made.exists(),
                what="the rooms are removed",
            )
            here, marked = (
                str(keeper.server_dirs / "other"),
                processes_marked(keeper.server_dirs / "other"),
            )
            assert marked
            assert (
                processes_where(lambda p: p in marked and p.environ()["LABKEEPER_SERVER"] != here)
                == []
            )
            assert stranger.poll() is None
            assert alive(again["pid"])
        finally:
            stranger.kill()
    assert all(os.path.lexists(path) for path in strangers)
    assert (keeper.state_dir / "logs" / "one.log").stat().st_size > 0
    said = keeper.log.read_text()
    assert said.count("ended processes of an earlier keeper") == 2
    assert said.count("removed the directory of a server of an earlier keeper") == 1
    assert str(one["pid"]) in said
    told = [
        event
        for event in keeper.http.get("/api/events").json()["events"]
        if event["kind"] == "orphans"
    ]
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
    assert "of an earlier keeper" not in keeper.log.read_text()


@pytest.mark.parametrize("lost", ["its room", "the runtime directory"])
def test_a_server_whose_directory_was_lost_is_ended_before_it_is_launched_again(make_keeper, lost):
    keeper = make_keeper().start()
    server = keeper.post().json()
    kernel = int(run_cell(server, start_kernel(server), "import os; os.getpid()"))
    keeper.kill()
    shutil.rmtree(keeper.server_dirs / "default" if lost == "its room" else keeper.server_dirs)
    keeper.start()
    again = until(
        lambda: (
            (s := keeper.get())["generation"] > server["generation"]
            and s["state"] == "running"
            and s
        ),
        what=keeper.get,
    )
    assert not alive(server["pid"])
    assert not alive(kernel)
    assert alive(again["pid"])
    assert "ended processes of an earlier keeper" in keeper.log.read_text()


def test_what_was_left_in_an_earlier_runtime_directory_is_ended(make_keeper, tmp_path):
    """Known to the store or not; and the directory is nobody's then."""
    earlier = tmp_path / "earlier"
    keeper = make_keeper(runtime_dir=earlier, on_exit="leave").start()
    server, unknown = keeper.post().json(), keeper.post(name="unknown").json()
    assert keeper.stop() == 0
    assert alive(server["pid"])
    with contextlib.closing(sqlite3.connect(keeper.state_dir / "labkeeper.sqlite")) as store, store:
        store.execute("DELETE FROM servers WHERE name = 'unknown'")
    keeper.settings |= {"runtime_dir": tmp_path / "later", "on_exit": "stop"}
    keeper.start()
    said = make_keeper(runtime_dir=earlier).cli("serve")
    assert (said.returncode, "runs on the runtime directory" in said.stderr) == (2, True)
    again = until(
        lambda: (
            (s := keeper.get())["generation"] > server["generation"]
            and s["state"] == "running"
            and s
        ),
        what=keeper.get,
    )
    until(lambda: not any(alive(pid) for pid in (server["pid"], unknown["pid"])), what="their end")
    assert alive(again["pid"])
    until(
        lambda: not [path.name for path in earlier.iterdir() if path.name != "keeper.lock"],
        what="the rooms are removed",
    )
    assert keeper.log.read_text().count("ended processes of an earlier keeper") == 2
    assert keeper.stop() == 0
    assert keeper.start().stop() == 0
    other = make_keeper(runtime_dir=earlier).start()
    # Nothing of ours is there any more.
    keeper.start()
    assert other.http.get("/readyz").status_code == 200


def test_an_earlier_runtime_directory_that_cannot_be_locked_is_looked_into(tmp_path):
    own, free, held, gone = (tmp_path / name for name in ("own", "free", "held", "gone"))
    for directory in (own, free, held):
        directory.mkdir()
    by_another_path = tmp_path / "own-by-another-path"
    by_another_path.symlink_to(own)
    with only_keeper(own, "", ""), only_keeper(held, "", ""), contextlib.ExitStack() as stack:
        earlier = earlier_dirs([own, by_another_path, free, held, gone], own, stack)
        assert earlier == [by_another_path, free, gone]
        with pytest.raises(SettingsError, match=str(os.getpid())), only_keeper(free, "", ""):
            pass


def test_an_earlier_runtime_directory_that_another_keeper_has_by_now_is_left_alone(
    make_keeper, tmp_path
):
    earlier = tmp_path / "earlier"
    keeper = make_keeper(runtime_dir=earlier).start()
    assert keeper.stop() == 0
    other = make_keeper(runtime_dir=earlier).start()
    server = other.post().json()
    keeper.settings["runtime_dir"] = tmp_path / "later"
    keeper.start()
    assert keeper.post().json()["state"] == "running"
    assert (other.get()["state"], other.get()["generation"]) == ("running", 1)
    assert alive(server["pid"])


def test_a_directory_that_is_no_room_is_in_the_way_and_stays(keeper):
    place = keeper.server_dirs / "default"
    place.mkdir()
    try:
        (place / "draft").write_text("mine")
        answer = keeper.post()
        assert answer.status_code == 502, answer.text
        assert str(place) in answer.json()["detail"]
        assert (place / "draft").read_text() == "mine"
    finally:
        shutil.rmtree(place)
    assert keeper.post("/default/start").json()["state"] == "running"


def test_a_keeper_that_executes_removes_what_dead_fork_servers_left(make_keeper):
    keeper = make_keeper(launch_by="fork").start()
    server = forked(keeper)
    keeper.kill()
    parent = psutil.Process(psutil.Process(server["pid"]).ppid())
    parent.kill()
    os.kill(server["pid"], signal.SIGKILL)
    until(lambda: not alive(parent.pid) and not alive(server["pid"]))
    assert list((keeper.server_dirs / ".forkservers").iterdir())
    keeper.settings["launch_by"] = "exec"
    keeper.start()
    until(lambda: not (keeper.server_dirs / ".forkservers").exists(), what="it is removed")


PROGRAMS = """
import os, shutil, subprocess, time

def start():
    programs = [subprocess.Popen([shutil.which("sleep"), "300"], env=env, start_new_session=True).pid for env in (None, {{}})]
    if (fork := os.fork()) == 0:
        time.sleep(300)
        os._exit(0)
    with open({notes!r}, "a") as notes:
        print(*programs, fork, file=notes)

start()

def _load_jupyter_server_extension(app):
    start()
    if os.path.exists({hold!r}):
        open({hold!r}, "w").write("held")
        time.sleep(300)
"""


class Programs:
    """An extension of a keeper's servers that starts programs when it is imported, and when it is loaded; some of them hide."""

    def __init__(self, keeper):
        place = keeper.base / "extensions"
        place.mkdir()
        self.notes, self.hold = keeper.base / "notes", keeper.base / "hold"
        (place / "programs.py").write_text(
            PROGRAMS.format(notes=str(self.notes), hold=str(self.hold))
        )
        keeper.variables["PYTHONPATH"] = place
        enabled = keeper.config_dir / "jupyter_server_config.d" / "programs.json"
        enabled.parent.mkdir()
        enabled.write_text('{"ServerApp": {"jpserver_extensions": {"programs": true}}}')

    @property
    def started(self):
        return [int(pid) for pid in self.notes.read_text().split()] if self.notes.exists() else []

    def left(self):
        return [pid for pid in self.started if alive(pid)]

    def hold_rehearsal(self, keeper):
        """Start a keeper whose fork server goes on with its first rehearsal until it is ended."""
        self.hold.touch()
        keeper.start()
        until(self.hold.read_text, what="a rehearsal goes on")
        assert len(self.left()) == 6


@pytest.fixture
def programs(make_keeper):
    keeper = make_keeper(launch_by="fork")
    found = Programs(keeper)
    yield keeper, found
    kill_all(processes_where(lambda process: process.pid in found.started))


def test_what_extensions_start_does_not_outlive_the_rehearsals_of_a_fork_server(programs):
    keeper, started = programs
    keeper.start_to_fork()
    assert (len(started.started) > 6, started.left()) == (True, [])
    before = len(started.started)
    # Changed on disk: another fork server loads.
    (keeper.config_dir / "jupyter_server_config.json").write_text("{}")
    until(
        lambda: keeper.log.read_text().count("the fork server is ready") > 1,
        what="another fork server",
    )
    assert (len(started.started) > before, started.left()) == (True, [])
    assert keeper.stop() == 0
    assert started.left() == []


def test_a_keeper_that_ends_while_its_fork_server_rehearses_leaves_nothing_behind(programs):
    keeper, started = programs
    started.hold_rehearsal(keeper)
    assert len(working_in(keeper.server_dirs)) >= 2
    assert keeper.stop() == 0
    assert (started.left(), working_in(keeper.server_dirs), keeper.in_server_dirs()) == ([], [], [])


@needs_groups
def test_what_a_fork_server_leaves_that_dies_at_its_rehearsal_is_ended(programs):
    keeper, started = programs
    started.hold_rehearsal(keeper)
    started.hold.unlink()
    of_the_first = started.left()
    (loading,) = fork_servers_of(keeper)
    loading.kill()
    until(lambda: not [pid for pid in of_the_first if alive(pid)], what="its programs are ended")
