"""Limits by control groups, or else by rlimits, and a truthful report of what enforces them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import psutil
import pytest

from harness import no_descriptors, until
from labkeeper.backends.local import hierarchies, limits
from labkeeper.backends.local.cleanup import end_leftovers
from labkeeper.backends.local.hierarchies import LimitedBy
from labkeeper.backends.local.limits import ControlGroups, Enforced, MemoryKills
from labkeeper.core.spec import UNLIMITED, Limits, ServerName

NAME = ServerName("a")
ALL = Limits(memory=2**28, cpus=1.5, processes=50)


def can_limit(by):
    return (
        all(
            hierarchy.version is by
            for hierarchy in {**hierarchies.version_1(), **hierarchies.version_2()}.values()
        )
        and {
            "memory",
            "cpu",
            "pids",
        }
        <= {**hierarchies.version_1(), **hierarchies.version_2()}.keys()
    )


version_1 = pytest.mark.skipif(
    not can_limit(LimitedBy.CGROUP1), reason="needs control groups of version 1 that can be written"
)


needs_groups = pytest.mark.skipif(
    sys.platform != "linux" or ControlGroups(Path("/no/such"))._base is None,
    reason="needs control groups that can be written",
)


def end(groups, runtime_dir):
    return end_leftovers(NAME, runtime_dir / NAME, set(), grace=0.0, groups=groups)


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
        for stream in filter(None, (child.stdin, child.stdout)):
            stream.close()


@pytest.fixture
def nothing_mounted(monkeypatch):
    monkeypatch.setattr(hierarchies, "all_mounts", list)


@pytest.fixture
def groups(tmp_path):
    """Control groups of a runtime directory that no keeper uses."""
    made = ControlGroups(tmp_path)
    yield made
    made.remove(NAME)


def test_without_control_groups_memory_is_limited_per_process_and_cpus_not_at_all(
    nothing_mounted, groups
):
    enforced = groups.limit(NAME, ALL, own_user=False)
    assert enforced.by == {"memory": "rlimit", "cpus": "nothing", "processes": "nothing"}
    assert enforced.rlimits == {"RLIMIT_DATA": 2**28}
    assert enforced.members == ()


def test_without_control_groups_processes_are_limited_if_the_user_runs_one_server(
    nothing_mounted, groups
):
    enforced = groups.limit(NAME, Limits(processes=50), own_user=True)
    assert (enforced.by, enforced.rlimits) == ({"processes": "rlimit"}, {"RLIMIT_NPROC": 50})


def test_without_limits_no_group_is_created(groups):
    assert groups.limit(NAME, UNLIMITED, own_user=True) == Enforced()


def test_a_hierarchy_that_is_not_writable_is_not_used(monkeypatch, tmp_path):
    (tmp_path / "memory").touch()
    found = {"memory": hierarchies.Hierarchy(LimitedBy.CGROUP1, tmp_path / "memory")}
    monkeypatch.setattr(limits, "version_1", lambda *_: found)
    monkeypatch.setattr(limits, "version_2", lambda *_: {})
    enforced = ControlGroups(tmp_path).limit(NAME, ALL, own_user=False)
    assert enforced.by == {"memory": "rlimit", "cpus": "nothing", "processes": "nothing"}


@version_1
def test_a_server_has_a_group_in_each_version_1_hierarchy_until_it_ends(groups):
    enforced = groups.limit(NAME, ALL, own_user=False)
    assert set(enforced.by.values()) == {"cgroup1"}
    assert enforced.rlimits == {}
    made = [Path(members).parent for members in enforced.members]
    assert len(made) == 3
    values = {
        path.name: path.read_text().strip()
        for group in made
        for path in group.iterdir()
        if path.name in SETTINGS
    }
    assert values == {
        "memory.limit_in_bytes": str(2**28),
        "cpu.cfs_period_us": "100000",
        "cpu.cfs_quota_us": "150000",
        "pids.max": "50",
    }
    with subprocess.Popen(["sleep", "1000"]) as child:
        for members in enforced.members:
            Path(members).write_text(str(child.pid))
        # While it lives its groups stay, and removing them does not block.
        groups.remove(NAME)
        assert all(group.exists() for group in made)
        child.kill()
    groups.remove(NAME)
    assert not any(group.exists() for group in made)
    groups.remove(NAME)


@needs_groups
def test_a_server_without_limits_has_a_group_by_which_its_descendants_are_killed(
    groups, spawn, tmp_path
):
    """Also those started before it joined, without its mark, or in nested groups."""
    server = spawn("sh", "-c", "sleep 1000 & setsid env -i sleep 1000 & wait")
    until(lambda: len(psutil.Process(server.pid).children()) == 2)
    children = {child.pid for child in psutil.Process(server.pid).children()}
    groups.hold(NAME, server.pid)
    groups.hold(NAME, server.pid)
    assert groups.members(NAME) == {server.pid, *children}
    (group,) = groups._of(NAME)
    (group / "nested").mkdir()
    (group / "nested" / "cgroup.procs").write_text(str(children.pop()))
    assert groups.names() == {NAME}
    end(groups, tmp_path)
    assert server.wait() == -signal.SIGKILL
    assert groups.members(NAME) == set()
    groups.remove(NAME)
    assert groups.names() == set()
    assert not group.exists()


CHAIN = """
import os, time
os.read(0, 1)
for _ in range(3000):
    time.sleep(0.001)
    if os.fork():
        os._exit(0)
"""


@needs_groups
@pytest.mark.parametrize("means", ["kill", "freeze", "pids"])
def test_a_chain_of_forks_is_ended_by_every_available_means(monkeypatch, spawn, tmp_path, means):
    if means != "kill":
        monkeypatch.setattr(limits, "_KILL", "cgroup.no-such-file")
    if means == "pids":
        if not can_limit(LimitedBy.CGROUP1):
            pytest.skip("needs control groups of version 1 that can be written")
        monkeypatch.setattr(hierarchies, "_base_2", lambda *_: None)
    groups = ControlGroups(tmp_path)
    if means == "freeze" and not groups._base.joinpath("cgroup.procs").exists():
        pytest.skip("needs control groups of version 2")
    first = spawn(sys.executable, "-c", CHAIN, env={}, stdin=PIPE)
    groups.hold(NAME, first.pid)
    first.stdin.close()
    until(lambda: first.poll() is not None, what="the chain of forks to begin")
    end(groups, tmp_path)
    (group,) = groups._of(NAME)
    assert group.is_relative_to(groups._base)
    assert not limits._pids([group])
    groups.remove(NAME)
    assert not group.exists()


@needs_groups
def test_groups_of_other_keepers_and_with_invalid_names_are_left_alone(groups, spawn, tmp_path):
    """One of another keeper, and one with our prefix but a name that no server can have."""
    other, stranger = ControlGroups(tmp_path / "other"), spawn()
    other.hold(NAME, stranger.pid)
    odd = groups._base / f"{groups._prefix}No_Name"
    odd.mkdir()
    try:
        assert groups.names() == set()
        end(groups, tmp_path)
        groups.remove(NAME)
        assert stranger.poll() is None
        assert other.members(NAME) == {stranger.pid}
    finally:
        odd.rmdir()
        stranger.kill()
        stranger.wait()
        other.remove(NAME)


@needs_groups
def test_groups_that_a_keeper_created_from_another_shell_are_found(groups, spawn, tmp_path):
    """Such a shell may have had a group of its own. The owner of an empty group is unknown."""
    shell, name = groups._base / f"test-{os.getpid()}", f"{groups._prefix}{NAME}"
    (shell / name).mkdir(parents=True)
    (shell / f"{groups._prefix}empty").mkdir()
    try:
        server = spawn()
        (shell / name / "cgroup.procs").write_text(str(server.pid))
        later = ControlGroups(tmp_path)
        assert later.names() == {NAME}
        later.hold(NAME, server.pid)
        assert not (groups._base / name).exists()
        end(later, tmp_path)
        later.remove(NAME)
        assert server.wait() == -signal.SIGKILL
        assert [path.name for path in shell.iterdir() if path.is_dir()] == [
            f"{groups._prefix}empty"
        ]
    finally:
        for path in (*filter(Path.is_dir, shell.iterdir()), shell):
            path.rmdir()


@needs_groups
@pytest.mark.root
def test_a_group_created_by_another_user_does_not_count(groups, spawn, tmp_path):
    """A user with a delegated group could create one with the name of ours."""
    theirs = groups._base / f"test-{os.getpid()}" / f"{groups._prefix}{NAME}"
    theirs.mkdir(parents=True)
    for group in (theirs.parent, theirs):
        os.chown(group, 1234, 1234)
    process = spawn()
    try:
        (theirs / "cgroup.procs").write_text(str(process.pid))
        later = ControlGroups(tmp_path)
        assert (later.names(), later.members(NAME)) == (set(), set())
        end(later, tmp_path)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
        for group in (theirs, theirs.parent):
            group.rmdir()


@needs_groups
def test_a_keeper_started_in_its_servers_terminal_does_not_end_itself(groups, spawn, tmp_path):
    code = (
        "import os, sys; from pathlib import Path\n"
        "from labkeeper.backends.local.cleanup import end_leftovers\n"
        "from labkeeper.backends.local.limits import ControlGroups\n"
        "sys.stdin.readline(); groups = ControlGroups(Path(sys.argv[1]))\n"
        "end_leftovers('a', Path(sys.argv[1]) / 'a', set(), grace=0.0, groups=groups)\n"
        "print(groups._base)"
    )
    command = f"{sys.executable} -c '{code.replace(chr(39), chr(34))}' {tmp_path}; exit 0"
    shell = spawn("sh", "-c", command, stdin=PIPE, stdout=PIPE)
    until(lambda: psutil.Process(shell.pid).children())
    groups.hold(NAME, shell.pid)
    other = spawn()
    groups.hold(NAME, other.pid)
    output, _ = shell.communicate(b"go\n")
    assert other.wait() == -signal.SIGKILL
    assert shell.returncode == 0
    # It creates groups where the previous keeper did.
    assert output.decode().strip() == str(groups._base)


def test_without_control_groups_every_call_does_nothing(nothing_mounted, tmp_path, spawn):
    groups, server = ControlGroups(tmp_path), spawn()
    groups.hold(NAME, server.pid)
    groups.kill(NAME)
    groups.remove(NAME)
    assert (groups.members(NAME), groups.names()) == (set(), set())
    assert server.poll() is None


def test_a_group_that_cannot_be_created_is_ignored(monkeypatch, tmp_path, spawn):
    """Here because its parent is a file."""
    place, server = tmp_path / "place", spawn()
    place.touch()
    monkeypatch.setattr(limits, "base_of_all", lambda *_: place)
    ControlGroups(tmp_path).hold(NAME, server.pid)
    assert server.poll() is None


@needs_groups
def test_an_ended_process_is_not_added_to_a_group(groups, spawn):
    dead = spawn("true")
    dead.wait()
    groups.hold(NAME, dead.pid)
    assert groups.members(NAME) == set()


def oom_kills(file):
    return int(dict(line.split() for line in file.read_text().splitlines())["oom_kill"])


def test_oom_kills_of_the_machine_are_counted_if_no_group_counts_them(groups, monkeypatch):
    monkeypatch.setattr(limits, "memory_groups", lambda pid: [])
    machine = Path("/proc/vmstat")
    kills = groups.memory_kills(NAME, os.getpid())
    assert (kills, kills.count()) == (MemoryKills(machine, certain=False), oom_kills(machine))


@version_1
def test_oom_kills_are_counted_in_a_shared_group_or_in_the_servers_own(groups, spawn):
    (memory,) = {
        mount
        for mount, kind, options in limits.all_mounts()
        if kind == "cgroup" and options.endswith("memory")
    }
    shared = memory / f"test-{os.getpid()}"
    shared.mkdir()
    server = spawn()
    try:
        (shared / "cgroup.procs").write_text(str(server.pid))
        kills = groups.memory_kills(NAME, server.pid)
        assert (kills, kills.count()) == (
            MemoryKills(shared / "memory.oom_control", certain=False),
            0,
        )
        assert groups.limit(NAME, ALL, own_user=False).by["memory"] == "cgroup1"
        own = groups.memory_kills(NAME, server.pid)
        assert (own.certain, own.count()) == (True, 0)
        groups.remove(NAME)
        assert own.count() == 0
    finally:
        server.kill()
        server.wait()
        until(lambda: not (shared / "cgroup.procs").read_text())
        shared.rmdir()


SETTINGS = {"memory.limit_in_bytes", "cpu.cfs_period_us", "cpu.cfs_quota_us", "pids.max"}


@version_1
def test_an_existing_group_is_reused_with_the_new_limit(groups):
    groups.limit(NAME, Limits(processes=50), own_user=False)
    (members,) = groups.limit(NAME, Limits(processes=60), own_user=False).members
    assert Path(members).with_name("pids.max").read_text().strip() == "60"


@version_1
def test_groups_of_an_earlier_keeper_are_removed(groups, tmp_path):
    enforced = groups.limit(NAME, ALL, own_user=False)
    ControlGroups(tmp_path).remove(NAME)
    assert not any(Path(members).exists() for members in enforced.members)


@version_1
def test_servers_with_the_same_name_under_two_keepers_have_separate_groups(groups, tmp_path):
    other = ControlGroups(tmp_path / "other")
    ours, theirs = (each.limit(NAME, ALL, own_user=False).members for each in (groups, other))
    assert not set(ours) & set(theirs)
    other.remove(NAME)
    assert all(Path(members).exists() for members in ours)


def test_memberships_and_mounts_match_those_of_the_machine():
    memberships = hierarchies._memberships()
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    assert [f"{','.join(controllers)}:{path}" for controllers, path in memberships] == [
        line.partition(":")[2] for line in lines
    ]
    places = {mount for mount, kind, _ in hierarchies.all_mounts() if kind.startswith("cgroup")}
    assert places == {
        Path(line.split()[1])
        for line in Path("/proc/mounts").read_text().splitlines()
        if line.split()[2].startswith("cgroup")
    }
    assert all(os.path.ismount(place) for place in places)


@needs_groups
def test_a_group_that_cannot_be_read_does_not_count_as_empty(groups, spawn):
    child = spawn()
    groups.hold(NAME, child.pid)
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        groups.members(NAME)
    assert groups.members(NAME) == {child.pid}
    child.kill()
    child.wait()


def test_a_process_can_join_a_group_that_belongs_to_no_server(groups, spawn):
    name = ServerName(".rehearsal")
    (procs_file,) = groups.create(name)
    try:
        inside = spawn("sh", "-c", f"echo $$ > {procs_file}; exec sleep 1000")
        until(lambda: groups.members(name) == {inside.pid}, what="the process to enter the group")
        assert groups.names() == set()
        groups.kill(name)
        inside.kill()
        inside.wait()
    finally:
        groups.remove(name)
    assert not Path(procs_file).exists()


def test_without_control_groups_there_is_none_to_join(nothing_mounted, tmp_path):
    assert ControlGroups(tmp_path).create(NAME) == []
