"""A server uses no more of the machine than it may, and runs as whom it was asked to; where that cannot be, it is said."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import httpx
import psutil
import pytest

from harness import (
    KeeperProcess,
    PassableKeeper,
    alive,
    forked,
    give_hands,
    low_ports_take_a_right,
    parent_of,
    run_cell,
    run_in_server,
    start_kernel,
    until,
)
from labkeeper.backends.local import hierarchies, limits

USER = f"labkeeper-{os.getpid()}"
FOUND = {**hierarchies.version_1(), **hierarchies.version_2()} if sys.platform == "linux" else {}

pytestmark = pytest.mark.root
needs_groups = pytest.mark.skipif(
    not {"memory", "cpu", "pids"} <= FOUND.keys(), reason="needs control groups that can be written"
)


@pytest.fixture(scope="module")
def passable():
    """A directory that everybody can pass through; those of pytest are for their owner."""
    directory = Path(tempfile.mkdtemp(prefix="labkeeper-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def user(passable):
    """A user of this machine, for this module only."""
    home = passable / "home"
    subprocess.run(
        ["useradd", "--create-home", "--home-dir", home, "--user-group", "--groups", "users", USER],
        check=True,
    )
    yield pwd.getpwnam(USER)
    subprocess.run(["userdel", "--force", USER], check=True)


class LimitingKeeper(PassableKeeper):
    """One that leaves no control group behind."""

    def close(self):
        super().close()
        assert not groups(self)


@pytest.fixture(scope="module")
def shared(passable):
    """A keeper that is not harmed by any test."""
    keeper = LimitingKeeper(passable / "keeper", runtime_dir=passable / "run", launch_by="fork")
    keeper.base.chmod(0o755)
    keeper.notebook_dir.chmod(0o777)
    keeper.variables.update(SECRET_OF_ROOT="hunter2", XDG_RUNTIME_DIR="/run/user/0")
    yield keeper.start()
    keeper.close()


def groups(keeper, name="*"):
    """The control groups of a keeper's server, or of all."""
    prefix = limits.ControlGroups(keeper.server_dirs.resolve())._prefix
    return sorted(
        {path for hierarchy in FOUND.values() for path in hierarchy.base.glob(f"{prefix}{name}")}
    )


def cell(server, source):
    return run_cell(server, start_kernel(server), textwrap.dedent(source)).strip()


# Limits


@needs_groups
def test_a_server_says_what_limits_it_and_by_what_and_its_groups_go_with_it(shared):
    asked = {"memory_limit": 2**30, "cpu_limit": 0.2, "process_limit": 200}
    server = forked(shared, "limited", **asked)
    by = {
        name: str(FOUND[controller].version)
        for name, controller in (("memory", "memory"), ("cpus", "cpu"), ("processes", "pids"))
    }
    assert {what: limit | {"used": None} for what, limit in server["limits"].items()} == {
        "memory": {"limit": 2**30, "used": None, "limited_by": by["memory"]},
        "cpus": {"limit": 0.2, "used": None, "limited_by": by["cpus"]},
        "processes": {"limit": 200, "used": None, "limited_by": by["processes"]},
    }
    kernel = int(cell(server, "import os; os.getpid()"))
    for group in groups(shared, "limited"):
        members = (group / "cgroup.procs").read_text().split()
        assert {str(server["pid"]), str(kernel)} <= set(members)
        assert str(parent_of(server)) not in members
        assert str(shared.process.pid) not in members
    # The limit holds for all processes of the server together. It is low enough to be reached on a busy machine, too.
    loops = "[subprocess.Popen([sys.executable, '-c', 'while True: pass']).pid for _ in range(3)]"
    cell(server, f"import subprocess, sys; {loops}")

    def times_held_back():
        (counts,) = {
            path.read_text()
            for group in groups(shared, "limited")
            for path in group.glob("cpu.stat")
        }
        return int(dict(line.split() for line in counts.splitlines())["nr_throttled"])

    until(times_held_back, what="they are held back")
    assert shared.delete("limited").status_code == 200
    assert not groups(shared, "limited")


@needs_groups
def test_a_kernel_that_takes_too_much_memory_dies_and_nothing_else_does(shared):
    server = forked(shared, "greedy", memory_limit=400 * 2**20)
    kernel = start_kernel(server)
    victim = int(run_cell(server, kernel, "import os; os.getpid()"))
    source = "import threading; threading.Thread(target=lambda: [bytearray(b'x') * 2**20 for _ in range(2000)]).start()"
    run_cell(
        server,
        kernel,
        f"keep = []; import threading\n{source.replace('[byte', 'keep.extend(byte').replace('2000)]', '2000))')}",
    )
    until(lambda: not alive(victim), what="the kernel is killed")
    now = shared.get("greedy")
    assert (now["state"], now["pid"]) == ("running", server["pid"])
    assert shared.delete("greedy").status_code == 200
    assert not groups(shared, "greedy")


@needs_groups
def test_a_kernel_that_starts_too_many_processes_is_refused_more(shared):
    server = forked(shared, "fertile", process_limit=60)
    said = cell(
        server,
        """
        import subprocess
        children = []
        try:
            for _ in range(120):
                children.append(subprocess.Popen(["sleep", "1000"]))
        except OSError as error:
            print(error.errno, len(children))
        for child in children:
            child.kill()
            child.wait()
        """,
    )
    number, count = map(int, said.split())
    assert number == 11
    assert 10 < count < 60
    assert shared.get("fertile")["state"] == "running"
    assert shared.delete("fertile").status_code == 200
    assert not groups(shared, "fertile")


@needs_groups
def test_the_groups_of_a_killed_server_are_removed_and_those_of_its_next_launch_hold(shared):
    server = forked(shared, "killed", process_limit=100)
    psutil.Process(server["pid"]).kill()
    again = until(
        lambda: (
            (s := shared.get("killed"))["generation"] > server["generation"]
            and s["state"] == "running"
            and s
        )
    )
    (group,) = groups(shared, "killed")
    assert str(again["pid"]) in (group / "cgroup.procs").read_text().split()
    assert shared.delete("killed", force="true").status_code == 200
    assert not groups(shared, "killed")


@needs_groups
def test_the_groups_of_a_server_that_the_next_keeper_stops_are_removed(make_keeper):
    keeper = make_keeper(launch_by="fork").start()
    keeper.post(process_limit=100).raise_for_status()
    assert len(groups(keeper)) == 1
    keeper.kill()
    keeper.start()
    keeper.wait_for("running")
    try:
        assert keeper.delete().status_code == 200
        assert not groups(keeper)
    finally:
        for group in groups(keeper):
            group.rmdir()


GRAB = "import threading; threading.Thread(target=lambda: [bytearray(b'x') * 2**20 for _ in range(4000)], daemon=True).start()"
"""Takes 4 GiB, one MiB at a time."""


def ends_of(keeper, name="default"):
    """What the keeper's log says of each crash of a server: its class and its cause."""
    entries = [
        json.loads(line) for line in keeper.log.read_text().splitlines() if '"CRASHED"' in line
    ]
    return [
        (entry["failure_class"], entry["cause"])
        for entry in entries
        if entry["server"] == name and "cause" in entry
    ]


def launched_again(keeper, server):
    return until(
        lambda: (
            (s := keeper.get(server["name"]))["generation"] > server["generation"]
            and s["state"] == "running"
            and s
        ),
        what="it was launched again",
    )


@needs_groups
def test_a_server_that_is_killed_for_want_of_memory_is_said_to_be_and_one_that_somebody_kills_is_not(
    make_keeper,
):
    keeper = make_keeper(launch_by="fork")
    give_hands(keeper)
    keeper.start()
    server = forked(keeper, memory_limit=400 * 2**20)
    kernel = start_kernel(server)
    victim = int(run_cell(server, kernel, "import os; os.getpid()"))
    run_cell(server, kernel, GRAB)
    until(lambda: not alive(victim), what="the kernel is killed")
    # That its kernel was killed so says nothing of an end later on: nothing shows when the keeper has looked twice, but time.
    time.sleep(8)
    assert keeper.get()["pid"] == server["pid"]
    psutil.Process(server["pid"]).kill()
    server = launched_again(keeper, server)
    run_in_server(server, GRAB)
    launched_again(keeper, server)
    (killed, _), (out_of_memory, cause) = ends_of(keeper)[-2:]
    assert (killed, out_of_memory) == ("killed", "out-of-memory")
    assert "ask for a higher memory_limit" in cause


@needs_groups
def test_a_server_killed_while_a_neighbour_runs_out_of_memory_is_not_taken_for_out_of_memory(
    make_keeper,
):
    keeper = make_keeper(launch_by="fork").start()
    server = forked(keeper)
    neighbour = forked(keeper, "neighbour", memory_limit=400 * 2**20)
    kernel = start_kernel(neighbour)
    victim = int(run_cell(neighbour, kernel, "import os; os.getpid()"))
    run_cell(neighbour, kernel, GRAB)
    until(lambda: not alive(victim), what="the neighbour's kernel is killed")
    psutil.Process(server["pid"]).kill()
    launched_again(keeper, server)
    assert [kind for kind, _ in ends_of(keeper)] == ["killed"]


@pytest.mark.skipif(
    "memory" not in FOUND or FOUND["memory"].version is not limits.LimitedBy.CGROUP1,
    reason="needs control groups of version 1 that can be written",
)
def test_a_server_without_a_limit_that_is_killed_when_the_machine_has_no_memory_left_most_likely_was(
    make_keeper,
):
    """What the machine is here is a group around the keeper."""
    machine = FOUND["memory"].base / f"test-{os.getpid()}"
    machine.mkdir()
    (machine / "memory.limit_in_bytes").write_text(str(700 * 2**20))
    keeper = make_keeper(launch_by="exec")
    give_hands(keeper)
    command = keeper.command
    enter = f'echo $$ > {machine}/cgroup.procs; exec "$@"'
    keeper.command = lambda *arguments: ["sh", "-c", enter, "sh", *command(*arguments)]
    keeper.start()
    try:
        server = keeper.post().json()
        run_in_server(server, GRAB)
        launched_again(keeper, server)
        ((kind, cause),) = ends_of(keeper)
        assert kind == "out-of-memory"
        assert "most likely" in cause
        assert keeper.process.poll() is None
    finally:
        keeper.close()
        until(lambda: not (machine / "cgroup.procs").read_text())
        machine.rmdir()


def test_without_control_groups_a_limit_is_that_of_each_process_or_none_and_said_to_be(
    make_keeper, tmp_path
):
    """Where the keeper sees none, in a mount namespace of its own."""
    keeper = make_keeper(launch_by="fork")
    command = keeper.command
    # A shell that waits would be in the way of signals.
    hidden = 'while umount -l /sys/fs/cgroup 2>/dev/null; do :; done; grep -q cgroup /proc/self/mounts && exit 9; exec "$@"'
    keeper.command = lambda *arguments: [
        "unshare",
        "-m",
        "sh",
        "-c",
        hidden,
        "sh",
        *command(*arguments),
    ]
    keeper.start()
    server = forked(keeper, memory_limit=600 * 2**20, cpu_limit=0.5, process_limit=100)
    assert {name: limit["limited_by"] for name, limit in server["limits"].items()} == {
        "memory": "rlimit",
        "cpus": "nothing",
        "processes": "nothing",
    }
    source = """
        import resource
        print(resource.getrlimit(resource.RLIMIT_DATA)[0])
        try: bytearray(2**30)
        except MemoryError: print("no")
        """
    assert cell(server, source).split() == [str(600 * 2**20), "no"]
    assert not groups(keeper)


# Users


def test_a_server_runs_as_the_user_that_was_asked_for(shared, user, passable):
    server = forked(shared, "theirs", user=USER)
    assert server["user"] == USER
    process = psutil.Process(server["pid"])
    assert set(process.uids()) == {user.pw_uid}
    assert set(process.gids()) == {user.pw_gid}
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
    )
    assert sorted(map(int, status["Groups"].split())) == sorted(os.getgrouplist(USER, user.pw_gid))
    assert int(status["CapEff"], 16) == 0

    said = cell(
        server,
        "import os, pathlib; pathlib.Path('mine').touch(); print(os.getuid(), os.environ['HOME'], os.environ['USER'])",
    )
    assert said.split() == [str(user.pw_uid), user.pw_dir, USER]
    assert (shared.notebook_dir / "mine").stat().st_uid == user.pw_uid

    server_dir = passable / "run" / "theirs"
    parts = {
        path: (path.stat().st_uid, path.stat().st_mode & 0o777)
        for path in (server_dir / "jupyter", server_dir, server_dir / "launch.json")
    }
    assert parts[server_dir / "jupyter"] == (user.pw_uid, 0o700)
    assert parts[server_dir][0] == 0
    assert parts[server_dir][1] & 0o022 == 0
    assert parts[server_dir / "launch.json"] == (0, 0o600)
    assert cell(
        server,
        f"import os; print(os.access({str(server_dir / 'generation.json')!r}, os.W_OK), os.access({str(server_dir)!r}, os.W_OK))",
    ) == ("False False")
    # Neither its own log nor what others have is open to it.
    closed = [
        server_dir.parent / ".forkservers",
        shared.state_dir / "logs" / "theirs.log",
        shared.state_dir / "token",
    ]
    assert (
        cell(
            server,
            f"import os; print([os.access(path, os.R_OK) for path in {list(map(str, closed))}])",
        )
        == "[False, False, False]"
    )
    assert shared.delete("theirs").json()["stop_report"]["method"] == "shutdown"
    assert not server_dir.exists()
    (shared.notebook_dir / "mine").unlink()


def test_settings_of_a_user_are_kept_in_its_own_home(shared, user):
    server = forked(shared, "settled", user=USER)
    log = shared.http.get("/api/servers/settled/logs", params={"tail": 1000}).text
    assert "Permission denied" not in log
    kept = httpx.put(
        f"{server['url']}lab/api/settings/@jupyterlab/apputils-extension:themes",
        headers={"Authorization": f"token {server['token']}"},
        json={"raw": '{"theme": "JupyterLab Dark"}'},
        trust_env=False,
    )
    assert kept.status_code == 204, kept.text
    (file,) = Path(user.pw_dir).rglob("*themes*")
    assert file.stat().st_uid == user.pw_uid
    assert shared.delete("settled").status_code == 200


def test_what_root_has_in_its_environment_is_not_given_to_a_user(shared, user):
    """As a password for the keeper's proxy, or directories that only root can use."""
    server = forked(shared, "poor", user=USER)
    assert (
        cell(
            server,
            "import os; print(os.environ.get('SECRET_OF_ROOT'), os.environ.get('XDG_RUNTIME_DIR'))",
        )
        == "None None"
    )
    assert shared.delete("poor").status_code == 200


def test_an_executed_server_runs_as_its_user_too(shared, user):
    server = shared.post(name="slow", user=USER, env={"LC_LABKEEPER": "1"}).json()
    assert (server["state"], server["launched_by"]) == ("running", "exec")
    assert cell(server, "import os; print(os.getuid(), os.getgroups() != [])").split()[0] == str(
        user.pw_uid
    )
    assert shared.delete("slow").status_code == 200


@needs_groups
def test_a_server_of_a_user_is_limited_as_any_other(shared, user):
    server = forked(shared, "both", user=USER, process_limit=100, memory_limit=2**30)
    assert all(
        str(server["pid"]) in (group / "cgroup.procs").read_text().split()
        for group in groups(shared, "both")
    )
    assert len(groups(shared, "both")) == 2
    made = list(map(str, groups(shared, "both")))
    assert (
        cell(server, f"import os; print([os.access(path, os.W_OK) for path in {made}])")
        == "[False, False]"
    )
    assert shared.delete("both").status_code == 200
    assert not groups(shared, "both")


def test_a_user_s_servers_are_in_its_own_directory_and_in_no_other(user, passable):
    homes = passable / "homes"
    keeper = PassableKeeper(
        passable / "own",
        runtime_dir=passable / "own-run",
        launch_by="exec",
        notebook_dir=homes / "%u",
    )
    keeper.base.chmod(0o755)
    for name in (USER, "root"):
        (homes / name).mkdir(parents=True)
        os.chown(homes / name, pwd.getpwnam(name).pw_uid, -1)
    keeper.start()
    try:
        server = keeper.post(name="a", user=USER).json()
        assert server["notebook_dir"] == str(homes / USER)
        assert keeper.post(name="b").json()["notebook_dir"] == str(homes / "root")
        for other in ("../root", str(homes), "/root"):
            answer = keeper.post(name="c", user=USER, root_dir=other)
            assert answer.status_code == 422
            assert (
                f"must be within {homes / USER} (LABKEEPER_ALLOWED_ROOTS)"
                in answer.json()["detail"]
            )
    finally:
        keeper.close()


def test_a_user_that_does_not_exist_fails_the_start(shared):
    answer = shared.post(name="nobody", user="no-such-user")
    assert (answer.status_code, answer.json()["failure_class"]) == (502, "config-error")
    assert "no such user" in answer.json()["detail"]
    assert shared.delete("nobody").status_code == 200


@pytest.mark.parametrize("mode", [0o700, 0o711])
def test_a_directory_that_a_user_cannot_enter_or_read_fails_the_start_and_is_named(
    shared, user, mode
):
    (shared.notebook_dir / "closed").mkdir(exist_ok=True)
    (shared.notebook_dir / "closed").chmod(mode)
    answer = shared.post(name="shut-out", user=USER, root_dir="closed")
    assert (answer.status_code, answer.json()["failure_class"]) == (502, "config-error")
    assert str(shared.notebook_dir / "closed") in answer.json()["detail"]
    assert shared.delete("shut-out").status_code == 200


def test_a_runtime_directory_that_a_user_cannot_reach_fails_the_start_with_what_to_do(
    make_keeper, user
):
    keeper = make_keeper(launch_by="exec").start()
    answer = keeper.post(user=USER)
    assert (answer.status_code, answer.json()["failure_class"]) == (502, "config-error")
    assert "LABKEEPER_RUNTIME_DIR" in answer.json()["detail"]


def test_a_keeper_that_is_not_root_says_that_it_cannot(passable, user):
    keeper = KeeperProcess(passable / "unprivileged", launch_by="exec")
    keeper.environment  # noqa: B018 - makes its interpreter, as root
    subprocess.run(["chown", "-R", USER, keeper.base], check=True)
    command = keeper.command
    keeper.command = lambda *arguments: [
        "setpriv",
        "--reuid",
        USER,
        "--regid",
        USER,
        "--clear-groups",
        *command(*arguments),
    ]
    keeper.start()
    try:
        answer = keeper.post(user="root")
        assert (answer.status_code, answer.json()["failure_class"]) == (502, "config-error")
        assert "only a keeper that runs as root" in answer.json()["detail"]
    finally:
        keeper.close()


@pytest.mark.skipif(not low_ports_take_a_right(), reason="needs ports that take a right")
def test_a_user_is_told_that_a_low_port_takes_a_right(shared, user):
    """Though the keeper itself has it."""
    refused = shared.post(name="low", port=81, user=user.pw_name)
    assert (refused.status_code, refused.json().get("failure_class")) == (502, "config-error"), (
        refused.text
    )
    assert "no right to listen on port 81" in refused.json()["detail"]
    assert "choose port 1024 or higher" in refused.json()["detail"]
    shared.delete("low")
