"""The users that servers run as, and their environments."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from labkeeper.backends.local.accounts import check_passage, common_environment, find_user
from labkeeper.backends.local.forking import _AT_START
from labkeeper.core.errors import BackendRefused
from labkeeper.core.server import FailureClass
from labkeeper.core.spec import ServerName, ServerSpec

OURSELVES = pwd.getpwuid(os.geteuid()).pw_name
OTHER = pwd.getpwuid(1).pw_name if os.geteuid() != 1 else "root"
root_only = pytest.mark.root


def spec(user):
    return ServerSpec(ServerName("a"), "/", user=user)


@pytest.mark.parametrize("user", [None, OURSELVES])
def test_the_keepers_own_user_and_none_need_no_account(user):
    assert find_user(spec(user)) is None


def test_an_unknown_user_is_refused():
    with pytest.raises(
        BackendRefused,
        match=r"cannot start server 'a' as user 'no-such-user': there is no such user",
    ) as caught:
        find_user(spec("no-such-user"))
    assert caught.value.details["failure_class"] is FailureClass.CONFIG_ERROR


@root_only
def test_another_user_has_its_groups_and_login_environment():
    entry = pwd.getpwnam(OTHER)
    account = find_user(spec(OTHER))
    assert (account.ids.uid, account.ids.gid) == (entry.pw_uid, entry.pw_gid)
    assert account.ids.groups == os.getgrouplist(OTHER, entry.pw_gid)
    assert account.environment["HOME"] == entry.pw_dir
    assert account.environment["USER"] == account.environment["LOGNAME"] == OTHER
    assert account.environment["SHELL"] == entry.pw_shell


@root_only
def test_a_keeper_without_root_cannot_start_servers_as_other_users():
    source = (
        "from labkeeper.backends.local.accounts import find_user\n"
        "from labkeeper.core.spec import ServerName, ServerSpec\n"
        "find_user(ServerSpec(ServerName('a'), '/', user='root'))"
    )
    done = subprocess.run(
        ["setpriv", "--reuid", OTHER, "--clear-groups", sys.executable, "-c", source],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 1
    assert (
        "cannot start server 'a' as user 'root':"
        " only a keeper that runs as root can start servers as other users" in done.stderr
    )


@pytest.mark.parametrize("euid", [0, 1])
def test_a_fork_server_of_root_gets_only_common_variables_and_those_read_at_startup(
    monkeypatch, euid
):
    """All its servers inherit its memory. Other variables come with a launch."""
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    early = {
        "PYTHONPATH",
        "JUPYTER_PREFER_ENV_PATH",
        "LD_PRELOAD",
        "LC_ALL",
        "LANG",
        "LANGUAGES",
        "MALLOC_ARENA_MAX",
        "GLIBC_TUNABLES",
    }
    secret = {"AWS_SECRET_ACCESS_KEY", "HOMEPAGE", "DATABASE_URL"}
    assert all(_AT_START.match(name) for name in early)
    for name in early | secret | {"HOME", "XDG_CONFIG_HOME", "JUPYTER_CONFIG_DIR"}:
        monkeypatch.setenv(name, "x")
    given = set(common_environment())
    assert early | {"HOME", "XDG_CONFIG_HOME", "JUPYTER_CONFIG_DIR"} <= given
    assert secret & given == (set() if euid == 0 else secret)


def test_a_runtime_directory_that_users_cannot_reach_is_refused_naming_the_obstacle(
    tmp_path,
):
    (tmp_path / "closed" / "inner").mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    with pytest.raises(
        BackendRefused,
        match=r"cannot traverse .*; set LABKEEPER_RUNTIME_DIR to a directory"
        r" that all users can reach",
    ):
        check_passage(spec(OTHER), tmp_path / "closed" / "inner" / "run")
    check_passage(spec(OTHER), Path("/run/labkeeper"))
