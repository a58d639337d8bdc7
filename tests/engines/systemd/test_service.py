"""deploy/labkeeper.service on a real systemd, exactly as in docs/how-to/run-as-a-service.md."""

from __future__ import annotations

import json

import pytest

from harness import until

pytestmark = pytest.mark.timeout(900)

REPLACEMENTS = {
    "restart": "systemctl restart labkeeper",
    "upgrade": "upgrade",
    "stop and start": "systemctl stop labkeeper; systemctl start labkeeper",
    "crash": "systemctl kill --kill-whom=main --signal=KILL labkeeper",
}
"""Ways in which one keeper replaces another."""


def test_unit_file_is_valid(machine):
    output = machine.run("systemd-analyze verify /etc/systemd/system/labkeeper.service 2>&1")
    assert output == ""


def test_service_works_as_documented(machine):
    assert machine.service("ActiveState", "UnitFileState") == ["active", "enabled"]
    assert machine.run(
        "stat -c '%U %a' /var/lib/labkeeper /run/labkeeper /srv/notebooks"
    ).splitlines() == [
        "labkeeper 700",
        "labkeeper 700",
        "labkeeper 750",
    ]
    output = machine.follow("use").splitlines()
    assert len(output[0]) >= 16
    assert "/open/" in output[1]
    assert output[3].split()[:2] == ["demo", "running"]
    environment = machine.run(
        f"tr '\\0' '\\n' < /proc/{machine.server()['pid']}/environ"
    ).splitlines()
    assert {"HOME=/var/lib/labkeeper/home", "SHELL=/bin/bash", "USER=labkeeper"} <= set(environment)
    machine.cell('import pathlib; pathlib.Path("made").touch()')
    assert machine.run("stat -c %U /srv/notebooks/made") == "labkeeper"


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_next_keeper_adopts_the_servers(machine, replacement):
    before, keeper = machine.start(), machine.keeper
    machine.cell('x = 41; open("/tmp/seen", "w").write("by all")')
    if replacement == "upgrade":
        machine.follow("upgrade", timeout=600)
    else:
        machine.run(REPLACEMENTS[replacement])
    machine.wait(after=keeper)
    after = machine.running()
    assert machine.cell("print(x + 1)") == "42"
    assert {name: after[name] for name in ("pid", "token", "port", "lab_url")} == {
        name: before[name] for name in ("pid", "token", "port", "lab_url")
    }
    assert machine.run("cat /tmp/seen") == "by all"
    # The next keeper launches servers, and stops those that an earlier one launched.
    machine.start("another")
    assert machine.cell('print(open("/tmp/seen").read())', "another") == "by all"
    machine.follow("stop everything")
    until(lambda: machine.left() == [], what="all processes to end")


def test_systemctl_stop_ends_only_the_keeper(machine):
    server = machine.start()
    machine.run("systemctl stop labkeeper")
    assert machine.service("ActiveState", "Result") == ["inactive", "success"]
    assert machine.run(f"curl -sf '{server['url']}api/status?token={server['token']}'")
    # The documented command for when no keeper starts any more.
    machine.run("systemctl kill --kill-whom=all --signal=TERM labkeeper")
    until(lambda: machine.left() == [], what="all processes to end")


def test_stopping_everything_as_documented_leaves_nothing_behind(machine):
    machine.start()
    machine.cell("x = 1")
    machine.start("another")
    machine.follow("stop everything")
    until(lambda: machine.left() == [], what="all processes to end")
    assert machine.run("ls -A /run/labkeeper") == "keeper.lock"
    assert machine.run("find /sys/fs/cgroup/system.slice -name '*labkeeper*'") == ""
    machine.run("systemctl start labkeeper")
    machine.wait()
    servers = json.loads(machine.run("labkeeper ls --json"))["servers"]
    assert {server["name"]: server["state"] for server in servers} == {
        "another": "stopped",
        "demo": "stopped",
    }


def test_running_servers_are_started_again_after_a_reboot(machine):
    before = machine.start()
    machine.start("another")
    machine.run("labkeeper stop another")
    machine.reboot()
    machine.wait()
    after = machine.running()
    assert (after["name"], after["root_dir"]) == (before["name"], before["root_dir"])
    assert after["token"] != before["token"]
    assert machine.server("another")["state"] == "stopped"


def test_settings_file_is_used_and_an_invalid_one_causes_no_restart_loop(machine):
    machine.follow("settings")
    machine.wait()
    assert (
        "LABKEEPER_START_TIMEOUT=120"
        in machine.run(f"tr '\\0' '\\n' < /proc/{machine.keeper}/environ").splitlines()
    )
    machine.run(
        "echo LABKEEPER_PORT=wrong >> /etc/labkeeper/labkeeper.env; ! systemctl restart labkeeper"
    )
    # `failed`, and not `activating`, as it would be before another restart.
    until(lambda: machine.service("ActiveState") == ["failed"], what="the keeper's unit to fail")
    assert machine.service("Result", "ExecMainStatus", "NRestarts") == ["exit-code", "2", "0"]
    assert "bad setting LABKEEPER_PORT" in machine.journal()


def test_systemd_gives_up_on_a_keeper_that_keeps_failing(machine):
    machine.run("systemctl stop labkeeper; mkdir -p /etc/systemd/system/labkeeper.service.d")
    machine.run(
        "printf '[Service]\\nExecStart=\\nExecStart=/bin/false\\n'"
        " > /etc/systemd/system/labkeeper.service.d/fails.conf"
    )
    machine.run(
        "systemctl daemon-reload; systemctl reset-failed labkeeper; ! systemctl start labkeeper"
    )
    until(lambda: machine.service("ActiveState") == ["failed"], what="systemd to give up")
    assert machine.service("NRestarts") == ["5"]


def test_token_can_be_a_systemd_credential(machine):
    keeper = machine.keeper
    machine.follow("token")
    machine.wait(after=keeper)
    token = machine.run("cat /etc/labkeeper/token")
    assert machine.run("stat -c %a /etc/labkeeper/token") == "600"
    assert machine.run(
        f"curl -sf -H 'Authorization: Bearer {token}' http://127.0.0.1:8000/api/servers"
    )
    assert machine.run("LABKEEPER_TOKEN_FILE=/etc/labkeeper/token labkeeper ls")
    # The credential is there for the next keeper, too.
    machine.run("LABKEEPER_TOKEN_FILE=/etc/labkeeper/token labkeeper start demo")
    keeper = machine.keeper
    machine.run("systemctl restart labkeeper")
    machine.wait(after=keeper)
    until(
        lambda: "running" in machine.run("LABKEEPER_TOKEN_FILE=/etc/labkeeper/token labkeeper ls"),
        what="the server to run",
    )


def test_limits_survive_a_restart_of_the_service(machine):
    if int(machine.run("systemctl --version").split()[1]) < 254:
        pytest.skip("needs control groups delegated below a subgroup: systemd 254 or later")
    machine.follow("stop everything")
    machine.follow("limits")
    machine.wait()
    if "memory" not in machine.run(
        "cat /sys/fs/cgroup/system.slice/labkeeper.service/cgroup.controllers"
    ):
        pytest.skip("needs control groups of version 2 with their controllers")
    server, keeper = machine.start("demo", "--memory-limit 1G"), machine.keeper
    assert server["limits"]["memory"]["limited_by"] == "cgroup2"
    machine.run("systemctl restart labkeeper")
    machine.wait(after=keeper)
    assert machine.running()["pid"] == server["pid"]
    assert machine.run(
        "cat /sys/fs/cgroup/system.slice/labkeeper.service/labkeeper-*-demo/memory.max"
    ) == str(2**30)


def test_servers_can_run_as_other_users(machine):
    machine.run("useradd -m alice")
    machine.follow("stop everything")
    machine.follow("users")
    machine.wait()
    server = machine.start("a", "--user alice --root-dir /home/alice")
    machine.cell("x = 41", "a")
    keeper = machine.keeper
    machine.run("systemctl restart labkeeper")
    machine.wait(after=keeper)
    assert machine.running("a")["pid"] == server["pid"]
    assert machine.cell("import getpass; print(getpass.getuser(), x + 1)", "a") == "alice 42"


def test_uninstalling_as_documented_leaves_nothing_behind(machine):
    machine.start()
    machine.follow("stop everything")
    machine.follow("uninstall")
    assert machine.run("getent passwd labkeeper", check=False) == ""
    assert (
        machine.run(
            "find / -xdev -iname '*labkeeper*' -not -path '/root/*'"
            " -not -path '/usr/local/libexec/*'"
        )
        == ""
    )
    assert machine.run("ls -A /run | grep labkeeper", check=False) == ""
    assert machine.run("pgrep -f '[l]abkeeper|[j]upyter' -a", check=False) == ""
    assert machine.run("systemctl list-unit-files labkeeper.service --no-legend", check=False) == ""
