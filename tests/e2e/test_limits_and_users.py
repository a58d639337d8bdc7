"""Resource limits, and servers that run as other users."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import textwrap
import uuid
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
    plain_python,
    run_cell,
    run_in_server,
    start_kernel,
    until,
)
from labkeeper.backends.local import hierarchies, limits
from users import USER

CONTROLLERS = (
    {**hierarchies.version_1(), **hierarchies.version_2()} if sys.platform == "linux" else {}
)

pytestmark = pytest.mark.root
needs_groups = pytest.mark.skipif(
    not {"memory", "cpu", "pids"} <= CONTROLLERS.keys(),
    reason="needs control groups that can be written",
)


class LimitingKeeper(PassableKeeper):
    """A keeper that must leave no control groups behind."""

    def close(self):
        super().close()
        assert not control_groups(self)


@pytest.fixture(scope="module")
def shared(passable):
    """A keeper that all tests of this module share, and none may harm."""
    keeper = LimitingKeeper(passable / "keeper", runtime_dir=passable / "run", launch_by="fork")
    keeper.base.chmod(0o755)
    keeper.notebook_dir.chmod(0o777)
    keeper.variables.update(SECRET_OF_ROOT="hunter2", XDG_RUNTIME_DIR="/run/user/0")
    yield keeper.start()
    keeper.close()


def control_groups(keeper, name="*"):
    """Return the control groups of one of a keeper's servers, or of all."""
    prefix = limits.ControlGroups(keeper.server_dirs.resolve())._prefix
    return sorted(
        {
            path
            for hierarchy in CONTROLLERS.values()
            for path in hierarchy.base.glob(f"{prefix}{name}")
        }
    )


def run_source(server, source):
    return run_cell(server, start_kernel(server), textwrap.dedent(source)).strip()


# Limits


@needs_groups
def test_limits_are_enforced_by_control_groups_that_go_with_the_server(shared):
    requested = {"memory_limit": 2**30, "cpu_limit": 0.2, "process_limit": 200}
    server = forked(shared, "limited", **requested)
    by = {
        name: str(CONTROLLERS[controller].version)
        for name, controller in (("memory", "memory"), ("cpus", "cpu"), ("processes", "pids"))
    }
    assert {what: limit | {"used": None} for what, limit in server["limits"].items()} == {
        "memory": {"limit": 2**30, "used": None, "limited_by": by["memory"]},
        "cpus": {"limit": 0.2, "used": None, "limited_by": by["cpus"]},
        "processes": {"limit": 200, "used": None, "limited_by": by["processes"]},
    }
    kernel = int(run_source(server, "import os; os.getpid()"))
    for group in control_groups(shared, "limited"):
        members = (group / "cgroup.procs").read_text().split()
        assert {str(server["pid"]), str(kernel)} <= set(members)
        assert str(parent_of(server)) not in members
        assert str(shared.process.pid) not in members
    # The CPU limit covers all processes of the server together,
    # and is low enough to be reached even on a busy machine.
    loops = "[subprocess.Popen([sys.executable, '-c', 'while True: pass']).pid for _ in range(3)]"
    run_source(server, f"import subprocess, sys; {loops}")

    def throttled_periods():
        (counts,) = {
            path.read_text()
            for group in control_groups(shared, "limited")
            for path in group.glob("cpu.stat")
        }
        return int(dict(line.split() for line in counts.splitlines())["nr_throttled"])

    until(throttled_periods, what="the server to be throttled")
    assert shared.delete("limited").status_code == 200
    assert not control_groups(shared, "limited")


@needs_groups
def test_kernel_over_the_memory_limit_is_oom_killed_and_its_server_survives(shared):
    server = forked(shared, "greedy", memory_limit=400 * 2**20)
    kernel = start_kernel(server)
    kernel_pid = int(run_cell(server, kernel, "import os; os.getpid()"))
    source = (
        "import threading; threading.Thread("
        "target=lambda: [bytearray(b'x') * 2**20 for _ in range(2000)]).start()"
    )
    run_cell(
        server,
        kernel,
        "keep = []; import threading\n"
        f"{source.replace('[byte', 'keep.extend(byte').replace('2000)]', '2000))')}",
    )
    until(lambda: not alive(kernel_pid), what="the kernel to be killed")
    now = shared.get("greedy")
    assert (now["state"], now["pid"]) == ("running", server["pid"])
    assert shared.delete("greedy").status_code == 200
    assert not control_groups(shared, "greedy")


@needs_groups
def test_process_limit_makes_fork_fail_with_eagain(shared):
    server = forked(shared, "fertile", process_limit=60)
    output = run_source(
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
    number, count = map(int, output.split())
    assert number == 11
    assert 10 < count < 60
    assert shared.get("fertile")["state"] == "running"
    assert shared.delete("fertile").status_code == 200
    assert not control_groups(shared, "fertile")


@needs_groups
def test_relaunched_server_gets_new_control_groups(shared):
    server = forked(shared, "killed", process_limit=100)
    psutil.Process(server["pid"]).kill()
    again = until(
        lambda: (
            (s := shared.get("killed"))["generation"] > server["generation"]
            and s["state"] == "running"
            and s
        )
    )
    (group,) = control_groups(shared, "killed")
    assert str(again["pid"]) in (group / "cgroup.procs").read_text().split()
    assert shared.delete("killed", force="true").status_code == 200
    assert not control_groups(shared, "killed")


@needs_groups
def test_control_groups_of_an_adopted_server_are_removed_when_it_stops(make_keeper):
    keeper = make_keeper(launch_by="fork").start()
    keeper.post(process_limit=100).raise_for_status()
    assert len(control_groups(keeper)) == 1
    keeper.kill()
    keeper.start()
    keeper.wait_for("running")
    try:
        assert keeper.delete().status_code == 200
        assert not control_groups(keeper)
    finally:
        for group in control_groups(keeper):
            group.rmdir()


EXHAUST_MEMORY = (
    "import threading; threading.Thread("
    "target=lambda: [bytearray(b'x') * 2**20 for _ in range(4000)], daemon=True).start()"
)
"""Allocates 4 GiB, one MiB at a time."""
LOG_SIZE = 100_000
"""Bytes at which a server's log is rotated."""


def logged_crashes(keeper, name="default"):
    """Return the failure class and the cause of each logged crash of a server."""
    entries = [
        json.loads(line) for line in keeper.log.read_text().splitlines() if '"CRASHED"' in line
    ]
    return [
        (entry["failure_class"], entry["cause"])
        for entry in entries
        if entry["server"] == name and "cause" in entry
    ]


def wait_for_relaunch(keeper, server):
    return until(
        lambda: (
            (s := keeper.get(server["name"]))["generation"] > server["generation"]
            and s["state"] == "running"
            and s
        ),
        what="the server to be relaunched",
    )


def wait_for_log_rotation(keeper, server):
    """Wait until a server's log has been rotated, after which its OOM kills are counted."""
    line = f"line {uuid.uuid4()}"
    run_in_server(
        server,
        f"import sys; print('x' * {LOG_SIZE}, {line!r}, sep='\\n', file=sys.stderr, flush=True)",
    )
    older = keeper.state_dir / "logs" / f"{server['name']}.log.1"
    until(lambda: older.exists() and line in older.read_text(), what="the log to be rotated")


@needs_groups
def test_oom_kill_of_a_server_is_distinguished_from_other_kills(
    make_keeper,
):
    keeper = make_keeper(launch_by="fork", log_max_bytes=LOG_SIZE)
    give_hands(keeper)
    keeper.start()
    server = forked(keeper, memory_limit=400 * 2**20)
    kernel = start_kernel(server)
    kernel_pid = int(run_cell(server, kernel, "import os; os.getpid()"))
    run_cell(server, kernel, EXHAUST_MEMORY)
    until(lambda: not alive(kernel_pid), what="the kernel to be killed")
    # The OOM kill of its kernel must not be taken for the cause of a later exit of the server.
    for _ in range(3):
        wait_for_log_rotation(keeper, server)
    assert keeper.get()["pid"] == server["pid"]
    psutil.Process(server["pid"]).kill()
    server = wait_for_relaunch(keeper, server)
    run_in_server(server, EXHAUST_MEMORY)
    wait_for_relaunch(keeper, server)
    (killed, _), (out_of_memory, cause) = logged_crashes(keeper)[-2:]
    assert (killed, out_of_memory) == ("killed", "out-of-memory")
    assert "ask for a higher memory_limit" in cause


@needs_groups
def test_oom_kill_in_another_server_is_not_attributed_to_a_killed_server(
    make_keeper,
):
    keeper = make_keeper(launch_by="fork").start()
    server = forked(keeper)
    neighbour = forked(keeper, "neighbour", memory_limit=400 * 2**20)
    kernel = start_kernel(neighbour)
    kernel_pid = int(run_cell(neighbour, kernel, "import os; os.getpid()"))
    run_cell(neighbour, kernel, EXHAUST_MEMORY)
    until(lambda: not alive(kernel_pid), what="the neighbour's kernel to be killed")
    psutil.Process(server["pid"]).kill()
    wait_for_relaunch(keeper, server)
    assert [kind for kind, _ in logged_crashes(keeper)] == ["killed"]


@pytest.mark.skipif(
    "memory" not in CONTROLLERS or CONTROLLERS["memory"].version is not limits.LimitedBy.CGROUP1,
    reason="needs control groups of version 1 that can be written",
)
def test_kill_of_an_unlimited_server_is_attributed_to_an_oom_of_the_machine(
    make_keeper,
):
    """A control group around its servers plays the machine.

    The keeper is in another one: for milliseconds after a server was killed its memory may still
    count, and a keeper that needs memory just then is killed, too.
    """
    machine = CONTROLLERS["memory"].base / f"test-{os.getpid()}"
    machine.mkdir()
    (machine / "memory.limit_in_bytes").write_text(str(700 * 2**20))
    keeper = make_keeper(launch_by="exec")
    give_hands(keeper)
    python = plain_python(keeper.base / "bin")
    shebang, program = python.read_text().split("\n", 1)
    python.write_text(f"{shebang}\necho $$ > {machine}/cgroup.procs\n{program}")
    keeper.start()
    try:
        server = keeper.post().json()
        run_in_server(server, EXHAUST_MEMORY)
        wait_for_relaunch(keeper, server)
        ((kind, cause),) = logged_crashes(keeper)
        assert kind == "out-of-memory"
        assert "most likely" in cause
    finally:
        keeper.close()
        until(lambda: not (machine / "cgroup.procs").read_text())
        machine.rmdir()


def test_without_control_groups_limits_fall_back_to_rlimits_or_nothing(make_keeper, tmp_path):
    """The keeper finds none, in its own mount namespace."""
    keeper = make_keeper(launch_by="fork")
    command = keeper.command
    # exec, because a shell that waits would not pass signals on.
    hidden = (
        "while umount -l /sys/fs/cgroup 2>/dev/null; do :; done;"
        ' grep -q cgroup /proc/self/mounts && exit 9; exec "$@"'
    )
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
    assert run_source(server, source).split() == [str(600 * 2**20), "no"]
    assert not control_groups(keeper)


# Users


def test_server_runs_as_the_requested_user(shared, user, passable):
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

    output = run_source(
        server,
        "import os, pathlib; pathlib.Path('mine').touch();"
        " print(os.getuid(), os.environ['HOME'], os.environ['USER'])",
    )
    assert output.split() == [str(user.pw_uid), user.pw_dir, USER]
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
    assert run_source(
        server,
        f"import os; print(os.access({str(server_dir / 'generation.json')!r}, os.W_OK),"
        f" os.access({str(server_dir)!r}, os.W_OK))",
    ) == ("False False")
    # It can read neither its own log nor files of the keeper and other servers.
    closed = [
        server_dir.parent / ".forkservers",
        shared.state_dir / "logs" / "theirs.log",
        shared.state_dir / "token",
    ]
    assert (
        run_source(
            server,
            f"import os; print([os.access(path, os.R_OK) for path in {list(map(str, closed))}])",
        )
        == "[False, False, False]"
    )
    assert shared.delete("theirs").json()["stop_report"]["method"] == "shutdown"
    assert not server_dir.exists()
    (shared.notebook_dir / "mine").unlink()


def test_lab_settings_are_stored_in_the_users_home(shared, user):
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


def test_environment_of_root_is_not_passed_to_servers_of_other_users(shared, user):
    """Such as a password of the keeper's proxy, or directories that only root can use."""
    server = forked(shared, "poor", user=USER)
    assert (
        run_source(
            server,
            "import os; print(os.environ.get('SECRET_OF_ROOT'), os.environ.get('XDG_RUNTIME_DIR'))",
        )
        == "None None"
    )
    assert shared.delete("poor").status_code == 200


def test_executed_server_runs_as_the_requested_user(shared, user):
    server = shared.post(name="slow", user=USER, env={"LC_LABKEEPER": "1"}).json()
    assert (server["state"], server["launched_by"]) == ("running", "exec")
    assert run_source(server, "import os; print(os.getuid(), os.getgroups() != [])").split()[
        0
    ] == str(user.pw_uid)
    assert shared.delete("slow").status_code == 200


@needs_groups
def test_limits_apply_to_servers_of_other_users(shared, user):
    server = forked(shared, "both", user=USER, process_limit=100, memory_limit=2**30)
    assert all(
        str(server["pid"]) in (group / "cgroup.procs").read_text().split()
        for group in control_groups(shared, "both")
    )
    assert len(control_groups(shared, "both")) == 2
    made = list(map(str, control_groups(shared, "both")))
    assert (
        run_source(server, f"import os; print([os.access(path, os.W_OK) for path in {made}])")
        == "[False, False]"
    )
    assert shared.delete("both").status_code == 200
    assert not control_groups(shared, "both")


def test_servers_are_confined_to_their_users_own_directory(user, passable):
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


def test_unknown_user_fails_the_start(shared):
    answer = shared.post(name="nobody", user="no-such-user")
    assert (answer.status_code, answer.json()["failure_class"]) == (502, "config-error")
    assert "no such user" in answer.json()["detail"]
    assert shared.delete("nobody").status_code == 200


@pytest.mark.parametrize("mode", [0o700, 0o711])
def test_root_dir_that_the_user_cannot_access_fails_the_start(shared, user, mode):
    (shared.notebook_dir / "closed").mkdir(exist_ok=True)
    (shared.notebook_dir / "closed").chmod(mode)
    answer = shared.post(name="shut-out", user=USER, root_dir="closed")
    assert (answer.status_code, answer.json()["failure_class"]) == (502, "config-error")
    assert str(shared.notebook_dir / "closed") in answer.json()["detail"]
    assert shared.delete("shut-out").status_code == 200


def test_runtime_directory_that_the_user_cannot_reach_fails_the_start(make_keeper, user):
    keeper = make_keeper(launch_by="exec").start()
    answer = keeper.post(user=USER)
    assert (answer.status_code, answer.json()["failure_class"]) == (502, "config-error")
    assert "LABKEEPER_RUNTIME_DIR" in answer.json()["detail"]


def test_unprivileged_keeper_refuses_to_run_servers_as_other_users(passable, user):
    # An edge could not be executed: the interpreter may be in root's home directory.
    keeper = KeeperProcess(passable / "unprivileged", launch_by="exec", edge="off")
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
def test_privileged_port_for_an_unprivileged_user_fails_the_start(shared, user):
    """Even though the keeper itself could listen there."""
    refused = shared.post(name="low", port=81, user=user.pw_name)
    assert (refused.status_code, refused.json().get("failure_class")) == (502, "config-error"), (
        refused.text
    )
    assert "no right to listen on port 81" in refused.json()["detail"]
    assert "choose port 1024 or higher" in refused.json()["detail"]
    shared.delete("low")
