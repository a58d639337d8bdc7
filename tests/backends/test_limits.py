"""Limits are held by control groups where this machine lets us, by rlimits where not, and what holds each is said truly."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from labkeeper.backends import limits
from labkeeper.backends.limits import ControlGroups, Enforced, LimitedBy
from labkeeper.core.model import UNLIMITED, Limits, ServerName

NAME = ServerName("a")
ALL = Limits(memory=2**28, cpus=1.5, processes=50)


def can_limit(by):
    return (
        all(hierarchy.version is by for hierarchy in {**limits._version_1(), **limits._version_2()}.values())
        and {
            "memory",
            "cpu",
            "pids",
        }
        <= {**limits._version_1(), **limits._version_2()}.keys()
    )


version_1 = pytest.mark.skipif(not can_limit(LimitedBy.CGROUP1), reason="needs control groups of version 1 that can be written")


@pytest.fixture
def nothing_mounted(monkeypatch):
    monkeypatch.setattr(limits, "_mounts", list)


@pytest.fixture
def groups(tmp_path):
    """Control groups of a runtime directory that no keeper has."""
    made = ControlGroups(tmp_path)
    yield made
    made.remove(NAME)


def test_without_control_groups_memory_is_limited_for_each_process_and_processors_not_at_all(nothing_mounted, groups):
    enforced = groups.limit(NAME, ALL, own_user=False)
    assert enforced.by == {"memory": "rlimit", "cpus": "nothing", "processes": "nothing"}
    assert enforced.rlimits == {"RLIMIT_DATA": 2**28}
    assert enforced.members == ()


def test_without_control_groups_processes_are_limited_only_where_nobody_else_runs_as_that_user(nothing_mounted, groups):
    enforced = groups.limit(NAME, Limits(processes=50), own_user=True)
    assert (enforced.by, enforced.rlimits) == ({"processes": "rlimit"}, {"RLIMIT_NPROC": 50})


def test_what_is_not_limited_makes_no_group(groups):
    assert groups.limit(NAME, UNLIMITED, own_user=True) == Enforced()


def test_a_hierarchy_that_cannot_be_written_is_not_used(monkeypatch, tmp_path):
    (tmp_path / "memory").touch()
    found = {"memory": limits._Hierarchy(LimitedBy.CGROUP1, tmp_path / "memory")}
    monkeypatch.setattr(limits, "_version_1", lambda: found)
    monkeypatch.setattr(limits, "_version_2", dict)
    enforced = ControlGroups(tmp_path).limit(NAME, ALL, own_user=False)
    assert enforced.by == {"memory": "rlimit", "cpus": "nothing", "processes": "nothing"}


@version_1
def test_a_group_of_each_controller_holds_the_process_and_goes_with_it(groups):
    enforced = groups.limit(NAME, ALL, own_user=False)
    assert set(enforced.by.values()) == {"cgroup1"}
    assert enforced.rlimits == {}
    made = [Path(members).parent for members in enforced.members]
    assert len(made) == 3
    values = {path.name: path.read_text().strip() for group in made for path in group.iterdir() if path.name in SETTINGS}
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
    memberships = limits._memberships()
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    assert [f"{','.join(controllers)}:{path}" for controllers, path in memberships] == [line.partition(":")[2] for line in lines]
    places = {mount for mount, kind, _ in limits._mounts() if kind.startswith("cgroup")}
    assert places == {
        Path(line.split()[1]) for line in Path("/proc/mounts").read_text().splitlines() if line.split()[2].startswith("cgroup")
    }
    assert all(os.path.ismount(place) for place in places)
