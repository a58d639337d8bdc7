"""What the doctor says of directories, disks, users, control groups, descriptors and the clock."""

from __future__ import annotations

import contextlib
import os
import resource
import sqlite3
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from fake_keeper import a_server
from gateway_servers import HostileGateway
from labkeeper.backends.local import hierarchies, limits
from labkeeper.core.spec import Gateway
from labkeeper.doctor import host, storage
from labkeeper.doctor.case import Answers, Case
from labkeeper.schema.requests.gateway import ws_url_of
from labkeeper.serve.process import LOCK, only_keeper
from labkeeper.settings.model import Settings
from labkeeper.store.migrations import VERSION
from shortages import Disk

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the checks are those of Linux")


def a_case(directory, *, keeper=None, gateway=None, **chosen):
    notebooks = directory / "notebooks"
    notebooks.mkdir(exist_ok=True)
    settings = Settings(**{"state_dir": directory / "state", "notebook_dir": notebooks} | chosen)
    return Case(settings, "1", keeper=keeper, gateway=gateway)


def answers(*servers):
    return Answers("http://127.0.0.1:1", "1", servers, (), (), "")


@contextlib.contextmanager
def acting_as(user):
    """Run the block as another user, with root saved for its end."""
    os.setresuid(user.pw_uid, user.pw_uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def only(findings):
    (found,) = findings
    return found


# State directory


def test_a_state_directory_that_does_not_exist_can_be_created(tmp_path):
    found = only(storage.state_directory(a_case(tmp_path)))
    assert (found.status, found.mend) == ("ok", None)
    assert not (tmp_path / "state").exists()


def test_a_private_state_directory_is_usable(tmp_path):
    (tmp_path / "state").mkdir(mode=0o700)
    assert only(storage.state_directory(a_case(tmp_path))).status == "ok"
    assert list((tmp_path / "state").iterdir()) == []


def test_a_file_is_no_state_directory(tmp_path):
    (tmp_path / "state").touch()
    found = only(storage.state_directory(a_case(tmp_path)))
    assert (found.status, "not a directory" in found.message) == ("problem", True)


def test_a_state_directory_that_others_can_write_to_is_a_problem_that_the_command_mends(tmp_path):
    directory = tmp_path / "state"
    directory.mkdir()
    directory.chmod(0o777)
    case = a_case(tmp_path)
    found = only(storage.state_directory(case))
    assert found.status == "problem"
    subprocess.run(found.mend, shell=True, check=True)
    assert only(storage.state_directory(case)).status == "ok"


@pytest.mark.root
def test_a_state_directory_of_another_user_is_not_writable(passable, user):
    directory = passable / "of-root"
    directory.mkdir(mode=0o700)
    above = a_case(passable, state_dir=passable / "new" / "state")
    case = a_case(passable, state_dir=directory)
    with acting_as(user):
        found = only(storage.state_directory(case))
        not_created = only(storage.state_directory(above))
    assert (found.status, found.mend) == ("problem", f"sudo chown -R $(id -u):$(id -g) {directory}")
    assert f"{directory}: it is not writable by this user" in found.message
    assert not_created.status == "problem"
    assert f"this user cannot write to {passable}" in not_created.message
    assert not_created.mend.startswith("sudo install -d -m 700 ")


@pytest.mark.root
def test_a_state_directory_that_belongs_to_another_user_is_a_warning(passable, user):
    directory = passable / "of-user"
    directory.mkdir(mode=0o700)
    os.chown(directory, user.pw_uid, user.pw_gid)
    case = a_case(passable, state_dir=directory)
    found = only(storage.state_directory(case))
    assert (found.status, str(user.pw_uid) in found.message) == ("warning", True)
    subprocess.run(found.mend.removeprefix("sudo "), shell=True, check=True)
    assert only(storage.state_directory(case)).status == "ok"


def test_a_keeper_that_holds_the_lock_but_cannot_be_asked_is_named(tmp_path):
    directory = tmp_path / "state"
    directory.mkdir()
    case = a_case(tmp_path)
    with only_keeper(directory, "state directory", "LABKEEPER_STATE_DIR"):
        locked = [found for found in storage.state_directory(case) if found.status == "problem"]
    assert only(locked).mend == f"kill {os.getpid()}"
    assert (directory / LOCK).exists()
    assert only(storage.state_directory(case)).status == "ok"


@pytest.mark.parametrize("version", [VERSION + 1, None])
def test_a_store_that_a_keeper_could_not_open_is_a_problem(tmp_path, version):
    directory = tmp_path / "state"
    directory.mkdir()
    store = directory / "labkeeper.sqlite"
    if version is None:
        store.write_bytes(b"this is no database" * 100)
    else:
        with contextlib.closing(sqlite3.connect(store)) as db:
            db.execute(f"PRAGMA user_version = {version}")
    case = a_case(tmp_path)
    before = store.read_bytes()
    found = only([found for found in storage.state_directory(case) if found.status == "problem"])
    assert store.read_bytes() == before
    assert ("damaged" if version is None else "newer labkeeper") in found.message
    subprocess.run(found.mend, shell=True, check=True)
    assert only(storage.state_directory(case)).status == "ok"


@pytest.mark.root
def test_a_lock_that_cannot_be_read_is_a_problem(passable, user):
    directory = passable / "of-all"
    directory.mkdir()
    os.chown(directory, user.pw_uid, user.pw_gid)
    (directory / LOCK).touch(mode=0o600)
    case = a_case(passable, state_dir=directory)
    with acting_as(user):
        found = [found for found in storage.state_directory(case) if found.status == "problem"]
    assert "cannot read a file" in only(found).message


# Notebook directory


def test_the_notebook_directory_must_be_there(tmp_path):
    assert only(storage.notebook_directory(a_case(tmp_path))).status == "ok"
    found = only(storage.notebook_directory(a_case(tmp_path, notebook_dir=tmp_path / "none")))
    assert (found.status, found.mend) == ("problem", f"export LABKEEPER_NOTEBOOK_DIR={Path.home()}")
    assert str(tmp_path / "none") in found.message


# Disk


@pytest.mark.parametrize(("share", "status"), [(4, "problem"), (0.25, "warning"), (0.001, "ok")])
def test_the_disk_must_have_space_for_logs(tmp_path, share, status):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    case = a_case(tmp_path, log_max_bytes=int(free * share / 2) + 1024)
    found = only(storage.disk(case))
    assert (found.status, found.mend is None) == (status, status == "ok")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 16 MiB."""
    disk = Disk(tmp_path / "state")
    yield disk
    disk.remove()


@pytest.mark.root
def test_a_full_disk_is_a_problem_and_so_is_one_without_room_for_files(tmp_path, small_disk):
    case = a_case(tmp_path, log_max_bytes=1024, runtime_dir=tmp_path)
    assert [found.status for found in storage.disk(case)] == ["ok", "ok"]
    small_disk.fill()
    full, other = storage.disk(case)
    assert (full.status, other.status) == ("problem", "ok")
    assert full.message.startswith("only 0 MiB are free")
    small_disk.free()
    small_disk.exhaust_inodes()
    full, _ = storage.disk(case)
    assert (full.status, "more files can be created" in full.message) == ("problem", True)


# Users


@pytest.mark.root
def test_servers_of_a_root_keeper_run_as_root_unless_a_user_is_set(passable, user):
    found = only(host.users(a_case(passable)))
    assert found.status == "warning"
    assert found.mend.startswith("export LABKEEPER_USER=")
    fine = a_case(passable, user=user.pw_name, runtime_dir=passable / "run" / "labkeeper")
    assert only(host.users(fine)).status == "ok"


@pytest.mark.root
def test_without_people_the_command_creates_one(passable, monkeypatch):
    monkeypatch.setattr("labkeeper.doctor.host.pwd.getpwall", list)
    found = only(host.users(a_case(passable)))
    assert found.mend == "useradd --create-home lab && export LABKEEPER_USER=lab"


@pytest.mark.root
def test_another_user_must_reach_the_directories_of_servers(passable, user):
    closed = passable / "closed"
    closed.mkdir(mode=0o700)
    found = only(host.users(a_case(passable, user=user.pw_name, runtime_dir=closed / "a" / "run")))
    assert (found.status, found.mend) == ("problem", "export LABKEEPER_RUNTIME_DIR=/run/labkeeper")
    assert found.message == f"that user cannot traverse {closed}"


@pytest.mark.root
def test_a_user_who_does_not_exist_can_be_created(passable):
    found = only(host.users(a_case(passable, user="no-such-user")))
    assert (found.status, found.mend) == ("problem", "useradd --create-home no-such-user")


@pytest.mark.root
def test_only_root_can_start_servers_as_others(passable, user):
    passable.joinpath("notebooks").mkdir(exist_ok=True)
    passable.joinpath("notebooks").chmod(0o755)
    with acting_as(user):
        own = only(host.users(a_case(passable)))
        others = only(host.users(a_case(passable, user="daemon")))
    assert (own.status, f"as {user.pw_name};" in own.message) == ("ok", True)
    assert (others.status, others.mend) == ("problem", "sudo labkeeper serve")


def test_users_without_a_name_have_a_number(monkeypatch):
    def unknown(_):
        raise KeyError

    monkeypatch.setattr("labkeeper.doctor.host.pwd.getpwuid", unknown)
    assert host._own_name() == f"user {os.geteuid()}"


def test_users_are_not_checked_without_a_notebook_directory(tmp_path):
    found = only(host.users(a_case(tmp_path, notebook_dir=tmp_path / "none")))
    assert found.status == "skipped"


# Control groups


def test_a_trial_of_control_groups_agrees_with_the_keeper_and_leaves_none(tmp_path):
    found = only(host.control_groups(a_case(tmp_path)))
    expected = limits.ControlGroups(tmp_path).limit(host._TRIAL, host._LIMITS, own_user=False).by
    limits.ControlGroups(tmp_path).remove(host._TRIAL)
    assert all(f"{limit} by {how}" in found.message for limit, how in expected.items())
    left = [*Path("/sys/fs/cgroup").rglob("labkeeper-*.doctor")]
    assert left == []


@pytest.mark.parametrize("systemd", [True, False])
def test_limits_without_control_groups_are_a_warning(tmp_path, monkeypatch, systemd):
    monkeypatch.setattr(hierarchies, "all_mounts", list)
    monkeypatch.setattr(limits, "all_mounts", list)
    monkeypatch.setattr(host, "_SYSTEMD", tmp_path if systemd else tmp_path / "none")
    found = only(host.control_groups(a_case(tmp_path)))
    assert found.status == "warning"
    assert "memory by rlimit, cpus by nothing" in found.message
    assert found.details == ("control groups of version 2 are not mounted",)
    assert ("-p Delegate=yes labkeeper serve" in found.mend) == systemd


def group_of(directory, monkeypatch, controllers="memory cpu pids"):
    """Pretend that this process is in a control group of version 2 that is a plain directory."""
    (directory / "cgroup.controllers").write_text(controllers)
    (directory / "cgroup.subtree_control").write_text("")
    (directory / "cgroup.procs").touch()
    mounts = [(directory, "cgroup2", "rw")]
    monkeypatch.setattr(hierarchies, "all_mounts", lambda: mounts)
    monkeypatch.setattr(hierarchies, "_memberships", lambda *_: [([""], "/")])
    return directory


@pytest.fixture
def group(tmp_path, monkeypatch):
    directory = tmp_path / "group"
    directory.mkdir()
    return group_of(directory, monkeypatch)


def test_what_a_trial_has_divided_is_restored(group):
    """Linux would enable and disable what is written; a plain file only keeps it."""
    written = []

    with hierarchies.restored():
        assert hierarchies.why_not_version_2() == ""
        enabled = group / "cgroup.subtree_control"
        written.append(enabled.read_text())
        assert (group / hierarchies.LEAF / "cgroup.procs").read_text() == str(os.getpid())
        enabled.write_text("memory cpu pids")
        (group / hierarchies.LEAF / "cgroup.procs").unlink()
    written.append((group / "cgroup.subtree_control").read_text())
    assert written == ["+memory +cpu +pids", "-memory -cpu -pids"]
    assert (group / "cgroup.procs").read_text() == str(os.getpid())
    assert not (group / hierarchies.LEAF).exists()


def test_a_group_that_was_divided_before_stays_divided(group):
    (group / "cgroup.subtree_control").write_text("memory cpu pids")
    with hierarchies.restored():
        assert hierarchies.why_not_version_2() == ""
    assert (group / "cgroup.subtree_control").read_text() == "memory cpu pids"


def test_why_version_2_cannot_be_used_is_said(group):
    (group / "cgroup.controllers").write_text("")
    assert hierarchies.why_not_version_2() == f"the control group {group} has no controller"
    (group / "cgroup.controllers").unlink()
    with hierarchies.restored():
        assert "cannot be used: [Errno 2]" in hierarchies.why_not_version_2()


def limited(name, by):
    limit = {"limit": 2**30, "used": None, "limited_by": by}
    return a_server(name=name, limits={"memory": limit})


def test_what_limits_running_servers_is_asked_of_the_keeper(tmp_path):
    none = only(host.control_groups(a_case(tmp_path, keeper=answers(a_server()))))
    fine = only(host.control_groups(a_case(tmp_path, keeper=answers(limited("a", "cgroup2")))))
    bad = only(
        host.control_groups(
            a_case(tmp_path, keeper=answers(limited("a", "nothing"), limited("b", "cgroup2")))
        )
    )
    assert (none.status, fine.status, bad.status) == ("skipped", "ok", "warning")
    assert bad.message == "limits are not enforced for a"
    assert bad.details == ("a: memory by nothing", "b: memory by cgroup2")


def test_other_systems_have_no_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert only(host.control_groups(a_case(tmp_path))).status == "skipped"


# Descriptors


@pytest.mark.parametrize(
    ("hard", "status"), [(1024, "warning"), (10**6, "ok"), (resource.RLIM_INFINITY, "ok")]
)
def test_a_keeper_wants_many_descriptors(tmp_path, monkeypatch, hard, status):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, hard))
    found = only(host.descriptors(a_case(tmp_path)))
    assert (found.status, found.mend is None) == (status, status == "ok")


# Clock


def test_files_from_the_future_show_that_the_clock_is_behind(tmp_path):
    case = a_case(tmp_path)
    assert only(host.clock(case)).status == "ok"
    case.settings.state_dir.mkdir()
    file = case.settings.state_dir / "labkeeper.sqlite"
    file.touch()
    os.utime(file, (time.time() + 3600, time.time() + 3600))
    found = only(host.clock(case))
    assert (found.status, found.mend) == ("problem", "sudo timedatectl set-ntp true")


class Timekeeper(HostileGateway):
    """A gateway that refuses every caller, and says what time it is."""

    date = "Sat, 01 Jan 2000 00:00:00 GMT"

    def send(self, stream, status, content=None, *, kind="application/json", more=""):
        more = f"Date: {self.date}\r\n" if self.date else more
        super().send(stream, status, content, kind=kind, more=more)


@pytest.mark.parametrize(
    ("date", "status", "says"),
    [
        ("Sat, 01 Jan 2000 00:00:00 GMT", "warning", "s ahead of that of the gateway"),
        ("Fri, 01 Jan 2100 00:00:00 GMT", "warning", "s behind that of the gateway"),
        ("today", "ok", "UTC"),
        ("", "ok", "UTC"),
    ],
)
def test_the_clock_is_compared_with_that_of_a_gateway(tmp_path, date, status, says):
    with Timekeeper("401") as gateway:
        gateway.date = date
        there = Gateway(gateway.url, ws_url_of(gateway.url))
        found = only(host.clock(a_case(tmp_path, gateway=there)))
    assert (found.status, says in found.message) == (status, True)


def test_the_clocks_of_the_gateways_of_servers_are_compared_without_their_tokens(tmp_path):
    with Timekeeper("401") as gateway:
        gateway.date = formatdate(usegmt=True)
        about = {"url": gateway.url, "required": True, "reachable": True, "since": None}
        about |= {"error": None, "kernelspecs": 1, "kernel_env_passed": []}
        server = a_server(gateway=about | {"kernel_env_if_allowed": []})
        found = only(host.clock(a_case(tmp_path, keeper=answers(server))))
        (asked,) = gateway.asked
    assert f"as that of {gateway.url}" in found.message
    assert "authorization" not in asked.headers
