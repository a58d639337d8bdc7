"""Limits are held by control groups where this machine lets us, by rlimits where not, and what holds each is said truly."""

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


holds = pytest.mark.skipif(
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
    """Control groups of a runtime directory that no keeper has."""
    made = ControlGroups(tmp_path)
    yield made
    made.remove(NAME)


def test_without_control_groups_memory_is_limited_for_each_process_and_processors_not_at_all(
    nothing_mounted, groups
):
    enforced = groups.limit(NAME, ALL, own_user=False)
    assert enforced.by == {"memory": "rlimit", "cpus": "nothing", "processes": "nothing"}
    assert enforced.rlimits == {"RLIMIT_DATA": 2**28}
    assert enforced.members == ()


def test_without_control_groups_processes_are_limited_only_where_nobody_else_runs_as_that_user(
    nothing_mounted, groups
):
    enforced = groups.limit(NAME, Limits(processes=50), own_user=True)
    assert (enforced.by, enforced.rlimits) == ({"processes": "rlimit"}, {"RLIMIT_NPROC": 50})


def test_what_is_not_limited_makes_no_group(groups):
    assert groups.limit(NAME, UNLIMITED, own_user=True) == Enforced()


def test_a_hierarchy_that_cannot_be_written_is_not_used(monkeypatch, tmp_path):
    (tmp_path / "memory").touch()
    found = {"memory": hierarchies.Hierarchy(LimitedBy.CGROUP1, tmp_path / "memory")}
    monkeypatch.setattr(limits, "version_1", lambda *_: found)
    monkeypatch.setattr(limits, "version_2", lambda *_: {})
    enforced = ControlGroups(tmp_path).limit(NAME, ALL, own_user=False)
    assert enforced.by == {"memory": "rlimit", "cpus": "nothing", "processes": "nothing"}


@version_1
def test_a_group_of_each_controller_holds_the_process_and_goes_with_it(groups):
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
        # As long as it lives its groups stay, and nobody waits for ever.
        groups.remove(NAME)
        assert all(group.exists() for group in made)
        child.kill()
    groups.remove(NAME)
    assert not any(group.exists() for group in made)
    groups.remove(NAME)


@holds
def test_a_server_without_limits_has_a_group_which_ends_what_it_starts_and_goes(
    groups, spawn, tmp_path
):
    """Also what was started before it came to the group, what hides, and what made groups of its own."""
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


CHAIN = "import os, time\nos.read(0, 1)\nfor _ in range(3000):\n time.sleep(0.001)\n if os.fork(): os._exit(0)"


@holds
@pytest.mark.parametrize("means", ["kill", "freeze", "pids"])
def test_a_chain_of_short_lives_is_ended_whatever_the_host_can_do(
    monkeypatch, spawn, tmp_path, means
):
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
    until(lambda: first.poll() is not None, what="the chain is under way")
    end(groups, tmp_path)
    (group,) = groups._of(NAME)
    assert group.is_relative_to(groups._base)
    assert not limits._pids([group])
    groups.remove(NAME)
    assert not group.exists()


@holds
def test_what_others_made_is_neither_named_nor_touched(groups, spawn, tmp_path):
    """A group of another keeper, and one of a name like ours that no server could have."""
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


@holds
def test_groups_that_a_keeper_made_from_another_shell_are_found(groups, spawn, tmp_path):
    """Where that has a group of its own, in which its keeper made others; of an empty one nobody knows whose it is."""
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


@holds
@pytest.mark.root
def test_a_group_that_another_user_made_is_no_server_s(groups, spawn, tmp_path):
    """As below a group that was given to that user, who knows the names of ours."""
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


@holds
def test_a_keeper_that_was_started_in_its_servers_terminal_is_not_ended_with_that(
    groups, spawn, tmp_path
):
    code = (
        "import os, sys; from pathlib import Path; from labkeeper.backends.local.cleanup import end_leftovers\n"
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
    said, _ = shell.communicate(b"go\n")
    assert other.wait() == -signal.SIGKILL
    assert shell.returncode == 0
    # It makes groups where the keeper before it did.
    assert said.decode().strip() == str(groups._base)


def test_where_no_group_can_be_made_nothing_changes(nothing_mounted, tmp_path, spawn):
    groups, server = ControlGroups(tmp_path), spawn()
    groups.hold(NAME, server.pid)
    groups.kill(NAME)
    groups.remove(NAME)
    assert (groups.members(NAME), groups.names()) == (set(), set())
    assert server.poll() is None


def test_where_a_group_cannot_be_made_after_all_nothing_changes(monkeypatch, tmp_path, spawn):
    """Its place is a file, say; or what is to be held has died already."""
    place, server = tmp_path / "place", spawn()
    place.touch()
    monkeypatch.setattr(limits, "base_of_all", lambda *_: place)
    ControlGroups(tmp_path).hold(NAME, server.pid)
    assert server.poll() is None


@holds
def test_what_has_died_is_not_held(groups, spawn):
    dead = spawn("true")
    dead.wait()
    groups.hold(NAME, dead.pid)
    assert groups.members(NAME) == set()


def oom_kills(file):
    return int(dict(line.split() for line in file.read_text().splitlines())["oom_kill"])


def test_oom_kills_are_counted_by_the_machine_if_no_group_counts_them(groups, monkeypatch):
    monkeypatch.setattr(limits, "memory_groups", lambda pid: [])
    machine = Path("/proc/vmstat")
    kills = groups.memory_kills(NAME, os.getpid())
    assert (kills, kills.count()) == (MemoryKills(machine, certain=False), oom_kills(machine))


@version_1
def test_oom_kills_are_counted_by_the_group_that_a_server_shares_or_by_its_own(groups, spawn):
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
def test_a_group_that_is_still_there_is_used_again_with_the_new_limit(groups):
    groups.limit(NAME, Limits(processes=50), own_user=False)
    (members,) = groups.limit(NAME, Limits(processes=60), own_user=False).members
    assert Path(members).with_name("pids.max").read_text().strip() == "60"


@version_1
def test_groups_that_an_earlier_keeper_made_are_removed_too(groups, tmp_path):
    enforced = groups.limit(NAME, ALL, own_user=False)
    ControlGroups(tmp_path).remove(NAME)
    assert not any(Path(members).exists() for members in enforced.members)


@version_1
def test_servers_of_one_name_under_two_keepers_have_groups_of_their_own(groups, tmp_path):
    other = ControlGroups(tmp_path / "other")
    ours, theirs = (each.limit(NAME, ALL, own_user=False).members for each in (groups, other))
    assert not set(ours) & set(theirs)
    other.remove(NAME)
    assert all(Path(members).exists() for members in ours)


def test_memberships_and_mounts_are_those_of_this_machine():
    """The controllers that the kernel names for us are those that it has, and each mount is a directory."""
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


@holds
def test_a_group_that_cannot_be_looked_into_is_not_taken_for_empty(groups, spawn):
    child = spawn()
    groups.hold(NAME, child.pid)
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        groups.members(NAME)
    assert groups.members(NAME) == {child.pid}
    child.kill()
    child.wait()


def test_a_process_can_enter_a_group_that_is_no_servers(groups, spawn):
    name = ServerName(".rehearsal")
    (door,) = groups.door(name)
    try:
        inside = spawn("sh", "-c", f"echo $$ > {door}; exec sleep 1000")
        until(lambda: groups.members(name) == {inside.pid}, what="it is in there")
        assert groups.names() == set()
        groups.kill(name)
        inside.kill()
        inside.wait()
    finally:
        groups.remove(name)
    assert not Path(door).exists()


def test_without_control_groups_there_is_none_to_enter(nothing_mounted, tmp_path):
    assert ControlGroups(tmp_path).door(NAME) == []
