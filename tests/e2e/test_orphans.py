"""No process outlives its server, however it hides, and no server outlives its record."""

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

START_HIDDEN = """
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execve({python!r}, [{python!r}, "-c", {code!r}, {note!r}], {{}})
    os._exit(0)
os.wait()
"""
"""Starts a process with an empty environment that leaves its session and its parents."""
SLEEPING = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(300)"
STOPPED = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); os.kill(os.getpid(), 19)"
EXITS_ON_SIGTERM = (
    "import os, signal, sys, time\n"
    "signal.signal(15, lambda *_: (open(sys.argv[1], 'w').write('asked'), os._exit(0)))\n"
    "open(sys.argv[1], 'w').write(str(os.getpid()))\n"
    "time.sleep(300)"
)
FORKING_CHAIN = (
    "import os, sys, time\n"
    "for generation in range(6000):\n"
    "    open(sys.argv[1], 'w').write(str(generation + 1))\n"
    "    time.sleep(0.003)\n"
    "    if os.fork():\n"
    "        os._exit(0)"
)
"""Each process starts the next one, and exits."""


@pytest.fixture
def hidden_process(tmp_path):
    """Return code that starts a hidden process, and the file that it writes its pid to.

    The processes are killed after the test.
    """
    notes = []

    def make(code):
        note = tmp_path / f"note{len(notes)}"
        notes.append(note)
        return START_HIDDEN.format(python=sys.executable, code=code, note=str(note)), note

    yield make
    for note in notes:
        kill_all(processes_where(lambda process, note=note: str(note) in process.cmdline()))


RUN = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', {!r}], env={{}})"


def in_cell(server, source):
    run_cell(server, start_kernel(server), RUN.format(source))


def in_child_of_server(server, source):
    run_in_server(server, RUN.format(source))


def wait_for_note(note):
    return until(lambda: note.exists() and note.read_text(), what="the hidden process to start")


def chain_is_alive(note):
    """Return whether the chain still grows. The note is among the arguments of each process."""
    before = note.read_text()
    seen = any(processes_where(lambda process: str(note) in process.cmdline()) for _ in range(5))
    return seen or note.read_text() != before


def start(keeper, launch_by):
    if launch_by == "fork":
        return forked(keeper)
    server = keeper.post(env={"LC_LABKEEPER": "1"}).json()
    assert server["launched_by"] == "exec"
    return server


def control_groups(keeper):
    """Return the control groups of a keeper's servers.

    A loading fork server has one of its own, with a dot after the prefix.
    """
    groups = ControlGroups(keeper.server_dirs.resolve())
    return sorted(
        group.name for base in groups._bases for group in base.glob(f"{groups._prefix}[!.]*")
    )


@needs_groups
@pytest.mark.parametrize(
    ("launch_by", "run"),
    [("fork", in_cell), ("exec", in_child_of_server)],
    ids=["forked, in a cell", "executed, in a child"],
)
def test_hidden_processes_are_killed_with_their_server(make_keeper, hidden_process, launch_by, run):
    keeper = make_keeper(launch_by="fork")
    give_hands(keeper)
    keeper.start()
    server = start(keeper, launch_by)
    assert server["limits"] == {}
    notes = {}
    for code in (SLEEPING, STOPPED, FORKING_CHAIN):
        source, notes[code] = hidden_process(code)
        run(server, source)
    plain, stopped = int(wait_for_note(notes[SLEEPING])), int(wait_for_note(notes[STOPPED]))
    until(lambda: psutil.Process(stopped).status() == psutil.STATUS_STOPPED)
    wait_for_note(notes[FORKING_CHAIN])
    assert chain_is_alive(notes[FORKING_CHAIN])
    assert not {plain, stopped} & {process.pid for process in processes_marked(keeper.server_dirs)}
    assert keeper.delete(force="true" if run is in_cell else "false").status_code == 200
    assert not alive(plain)
    assert not alive(stopped)
    assert not chain_is_alive(notes[FORKING_CHAIN])
    assert control_groups(keeper) == []


@needs_groups
def test_hidden_processes_of_a_killed_server_are_killed(make_keeper, hidden_process):
    keeper = make_keeper(launch_by="fork").start()
    server = forked(keeper)
    source, note = hidden_process(SLEEPING)
    in_cell(server, source)
    pid = int(wait_for_note(note))
    os.kill(server["pid"], signal.SIGKILL)
    again = until(
        lambda: (
            (s := keeper.get())["generation"] > server["generation"]
            and s["state"] == "running"
            and s
        )
    )
    assert not alive(pid)
    assert len(control_groups(keeper)) == 1
    assert alive(again["pid"])


@needs_groups
def test_hidden_processes_get_sigterm_first(make_keeper, hidden_process):
    keeper = make_keeper().start()
    server = keeper.post().json()
    source, note = hidden_process(EXITS_ON_SIGTERM)
    in_cell(server, source)
    pid = int(wait_for_note(note))
    assert keeper.delete().json()["stop_report"]["method"] == "shutdown"
    assert not alive(pid)
    assert note.read_text() == "asked"


@needs_groups
def test_hidden_processes_of_an_adopted_server_are_killed(make_keeper, hidden_process):
    keeper = make_keeper(launch_by="exec").start()
    server = keeper.post().json()
    source, note = hidden_process(SLEEPING)
    in_cell(server, source)
    pid = int(wait_for_note(note))
    keeper.kill()
    keeper.start()
    assert keeper.wait_for("running")["pid"] == server["pid"]
    assert keeper.delete().status_code == 200
    assert not alive(pid)
    assert control_groups(keeper) == []


READ_ONLY = """
for place in $(awk '$0 ~ / - cgroup2? / {print $5}' /proc/self/mountinfo); do
    mount -o remount,bind,ro $place || exit 9
done
exec "$@"
"""


@pytest.mark.root
def test_read_only_control_groups_cause_no_warning(make_keeper):
    """Most containers have read-only control groups."""
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
    assert control_groups(keeper) == []
    assert keeper.delete().status_code == 200
    assert not alive(kernel)
    warnings = [
        line for line in keeper.log.read_text().splitlines() if '"level": "warning"' in line
    ]
    assert [line for line in warnings if "names no user runs as root" not in line] == []


FORGE_MARK = "while :; do LABKEEPER_SERVER={} sleep 1000; done"
"""Has no mark itself, but starts processes that do, one after the other."""


@pytest.mark.root
def test_processes_of_other_users_with_a_forged_mark_are_ignored(keeper):
    server = keeper.post().json()
    other_user = {"user": 65534, "group": 65534, "extra_groups": []}
    server_dir = keeper.server_dirs.resolve() / "default"
    with subprocess.Popen(
        ["sh", "-c", FORGE_MARK.format(server_dir)], **other_user, start_new_session=True
    ) as forger:
        try:
            until(
                lambda: [p for p in processes_marked(server_dir) if p.uids().real == 65534],
                what="a process with a forged mark",
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


# Cleanup at startup


def delete_store(keeper):
    for path in keeper.state_dir.glob("labkeeper.sqlite*"):
        path.unlink()


def create_foreign_files(server_dirs, elsewhere):
    """Create files that no keeper made, and return them, inner ones first.

    One of the directories could be a server directory by its name.
    """
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


def test_servers_missing_from_the_store_are_ended_at_startup(make_keeper, tmp_path, hidden_process):
    keeper = make_keeper(launch_by="fork").start()
    one, other = forked(keeper, "one"), keeper.post(name="other", env={"LC_LABKEEPER": "1"}).json()
    assert (one["state"], other["state"]) == ("running", "running")
    kernel = int(run_cell(one, start_kernel(one), "import os; os.getpid()"))
    source, note = hidden_process(SLEEPING)
    in_cell(other, source)
    hidden = int(wait_for_note(note))
    grouped = len(control_groups(keeper))
    keeper.kill()
    delete_store(keeper)
    half_made = keeper.server_dirs / "half-made"
    (half_made / "jupyter").mkdir(parents=True)
    (half_made / "launch.json.new").write_text("{")
    foreign_files = create_foreign_files(keeper.server_dirs, tmp_path / "elsewhere")
    with subprocess.Popen(
        ["sleep", "300"], env={"LABKEEPER_SERVER": f"{keeper.server_dirs}-of-another/one"}
    ) as unrelated:
        try:
            keeper.start()
            assert keeper.http.get("/api/servers").json()["servers"] == []
            # A new server of such a name starts, and is not mistaken for the old one.
            again = keeper.post(name="other").json()
            assert (again["state"], again["generation"]) == ("running", 1)
            until(lambda: not alive(one["pid"]), what="the forked server to be ended")
            assert not any(alive(pid) for pid in (other["pid"], kernel))
            if grouped:
                assert not alive(hidden)
                assert len(control_groups(keeper)) == 1
            until(
                lambda: not (keeper.server_dirs / "one").exists() and not half_made.exists(),
                what="the server directories to be removed",
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
            assert unrelated.poll() is None
            assert alive(again["pid"])
        finally:
            unrelated.kill()
    assert all(os.path.lexists(path) for path in foreign_files)
    assert (keeper.state_dir / "logs" / "one.log").stat().st_size > 0
    log = keeper.log.read_text()
    assert log.count("ended processes of an earlier keeper") == 2
    assert log.count("removed the directory of a server of an earlier keeper") == 1
    assert str(one["pid"]) in log
    orphan_events = [
        event
        for event in keeper.http.get("/api/events").json()["events"]
        if event["kind"] == "orphans"
    ]
    assert {event["server"] for event in orphan_events} == {"one", "other"}
    count = sum(event["details"]["pids"] for event in orphan_events)
    assert count >= 3
    assert f"labkeeper_orphan_processes_total {count}.0\n" in keeper.http.get("/metrics").text
    # The fixture wants an empty runtime directory at the end.
    for path in foreign_files:
        path.unlink() if path.is_symlink() or path.is_file() else path.rmdir()


def test_servers_in_the_store_are_adopted_at_startup(make_keeper):
    keeper = make_keeper(launch_by="exec").start()
    server = keeper.post().json()
    keeper.kill()
    keeper.start()
    assert keeper.wait_for("running")["pid"] == server["pid"]
    assert "of an earlier keeper" not in keeper.log.read_text()


@pytest.mark.parametrize("lost", ["its server directory", "the runtime directory"])
def test_server_with_a_lost_directory_is_ended_before_its_relaunch(make_keeper, lost):
    keeper = make_keeper().start()
    server = keeper.post().json()
    kernel = int(run_cell(server, start_kernel(server), "import os; os.getpid()"))
    keeper.kill()
    shutil.rmtree(
        keeper.server_dirs / "default" if lost == "its server directory" else keeper.server_dirs
    )
    keeper.start()
    again = until(
        lambda: (
            (s := keeper.get())["generation"] > server["generation"]
            and s["state"] == "running"
            and s
        ),
        what=lambda: f"the server to be relaunched: {keeper.get()}",
    )
    assert not alive(server["pid"])
    assert not alive(kernel)
    assert alive(again["pid"])
    assert "ended processes of an earlier keeper" in keeper.log.read_text()


def test_servers_left_in_a_former_runtime_directory_are_ended(make_keeper, tmp_path):
    """Whether in the store or not; afterwards another keeper can use the directory."""
    earlier = tmp_path / "earlier"
    keeper = make_keeper(runtime_dir=earlier, on_exit="leave").start()
    server, unknown = keeper.post().json(), keeper.post(name="unknown").json()
    assert keeper.stop() == 0
    assert alive(server["pid"])
    with contextlib.closing(sqlite3.connect(keeper.state_dir / "labkeeper.sqlite")) as store, store:
        store.execute("DELETE FROM servers WHERE name = 'unknown'")
    keeper.settings |= {"runtime_dir": tmp_path / "later", "on_exit": "stop"}
    keeper.start()
    result = make_keeper(runtime_dir=earlier).cli("serve")
    assert (result.returncode, "runs on the runtime directory" in result.stderr) == (2, True)
    again = until(
        lambda: (
            (s := keeper.get())["generation"] > server["generation"]
            and s["state"] == "running"
            and s
        ),
        what=lambda: f"the server to be relaunched: {keeper.get()}",
    )
    until(
        lambda: not any(alive(pid) for pid in (server["pid"], unknown["pid"])),
        what="both old servers to be ended",
    )
    assert alive(again["pid"])
    until(
        lambda: not [path.name for path in earlier.iterdir() if path.name != "keeper.lock"],
        what="the server directories to be removed",
    )
    assert keeper.log.read_text().count("ended processes of an earlier keeper") == 2
    assert keeper.stop() == 0
    assert keeper.start().stop() == 0
    other = make_keeper(runtime_dir=earlier).start()
    # Nothing of the first keeper is left there.
    keeper.start()
    assert other.http.get("/readyz").status_code == 200


def test_former_runtime_directories_locked_by_another_keeper_are_skipped(tmp_path):
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


def test_former_runtime_directory_now_used_by_another_keeper_is_left_alone(make_keeper, tmp_path):
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


def test_foreign_directory_in_place_of_a_server_directory_is_not_removed(keeper):
    directory = keeper.server_dirs / "default"
    directory.mkdir()
    try:
        (directory / "draft").write_text("mine")
        answer = keeper.post()
        assert answer.status_code == 502, answer.text
        assert str(directory) in answer.json()["detail"]
        assert (directory / "draft").read_text() == "mine"
    finally:
        shutil.rmtree(directory)
    assert keeper.post("/default/start").json()["state"] == "running"


def test_directories_of_dead_fork_servers_are_removed(make_keeper):
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
    until(
        lambda: not (keeper.server_dirs / ".forkservers").exists(),
        what="the fork servers' directory to be removed",
    )


PROGRAMS = """
import os, shutil, subprocess, time

def start():
    programs = [
        subprocess.Popen([shutil.which("sleep"), "300"], env=env, start_new_session=True).pid
        for env in (None, {{}})
    ]
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


class ProgramStarter:
    """An extension that starts programs, some of them hidden, on import and when it is loaded."""

    def __init__(self, keeper):
        directory = keeper.base / "extensions"
        directory.mkdir()
        self.notes, self.hold = keeper.base / "notes", keeper.base / "hold"
        (directory / "programs.py").write_text(
            PROGRAMS.format(notes=str(self.notes), hold=str(self.hold))
        )
        keeper.variables["PYTHONPATH"] = directory
        enabled = keeper.config_dir / "jupyter_server_config.d" / "programs.json"
        enabled.parent.mkdir()
        enabled.write_text('{"ServerApp": {"jpserver_extensions": {"programs": true}}}')

    @property
    def started(self):
        return [int(pid) for pid in self.notes.read_text().split()] if self.notes.exists() else []

    def still_alive(self):
        return [pid for pid in self.started if alive(pid)]

    def hold_rehearsal(self, keeper):
        """Start a keeper whose fork server hangs in its first rehearsal."""
        self.hold.touch()
        keeper.start()
        until(self.hold.read_text, what="a rehearsal to begin")
        assert len(self.still_alive()) == 6


@pytest.fixture
def programs(make_keeper):
    keeper = make_keeper(launch_by="fork")
    found = ProgramStarter(keeper)
    yield keeper, found
    kill_all(processes_where(lambda process: process.pid in found.started))


def test_programs_started_during_a_rehearsal_are_ended(programs):
    keeper, started = programs
    keeper.start_to_fork()
    assert (len(started.started) > 6, started.still_alive()) == (True, [])
    before = len(started.started)
    # The change makes another fork server load.
    (keeper.config_dir / "jupyter_server_config.json").write_text("{}")
    until(
        lambda: keeper.log.read_text().count("the fork server is ready") > 1,
        what="another fork server",
    )
    assert (len(started.started) > before, started.still_alive()) == (True, [])
    assert keeper.stop() == 0
    assert started.still_alive() == []


def test_keeper_stopped_during_a_rehearsal_leaves_nothing_behind(programs):
    keeper, started = programs
    started.hold_rehearsal(keeper)
    assert len(working_in(keeper.server_dirs)) >= 2
    assert keeper.stop() == 0
    assert (started.still_alive(), working_in(keeper.server_dirs), keeper.in_server_dirs()) == (
        [],
        [],
        [],
    )


@needs_groups
def test_programs_of_a_fork_server_killed_during_a_rehearsal_are_ended(programs):
    keeper, started = programs
    started.hold_rehearsal(keeper)
    started.hold.unlink()
    of_the_first = started.still_alive()
    (loading,) = fork_servers_of(keeper)
    loading.kill()
    until(
        lambda: not [pid for pid in of_the_first if alive(pid)],
        what="the first fork server's programs to be ended",
    )
