"""The doctor examines real keepers, and machines without one."""

from __future__ import annotations

import json
import os

import pytest

from harness import PassableKeeper, forked, start_kernel, until, working_in


def examined(keeper, *arguments, code=0):
    """Run the command, and return its findings by subject and status."""
    done = keeper.cli("doctor", "--json", *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    found = {}
    for finding in json.loads(done.stdout)["findings"]:
        found.setdefault((finding["subject"], finding["status"]), []).append(finding)
    return found


def problems(found):
    return [subject for subject, status in found if status == "problem"]


def test_a_machine_is_ready_for_a_keeper_and_stays_as_it_was(make_keeper, tmp_path):
    keeper = make_keeper(launch_by="fork")
    (tmp_path / "temporary").mkdir()
    keeper.variables["TMPDIR"] = tmp_path / "temporary"
    found = examined(keeper)
    for subject in ("interpreter", "JupyterLab", "fork server", "state directory", "disk", "edge"):
        assert (subject, "ok") in found
    assert len(found["ports", "ok"]) == 2
    assert found["keeper", "skipped"]
    assert not keeper.state_dir.exists()
    assert not list((tmp_path / "temporary").iterdir())
    assert not working_in(tmp_path)


def test_a_running_keeper_is_asked_why_a_server_was_executed(make_keeper):
    keeper = make_keeper(launch_by="fork").start_to_fork()
    forked(keeper, "fast")
    assert keeper.post(name="slow", env={"PYTHONTEST": "1"}).status_code == 201
    found = examined(keeper)
    (executed,) = found["fork server", "warning"]
    assert executed["message"].startswith(
        "'slow' was executed: the environment variable PYTHONTEST"
    )
    assert executed["mend"] == "remove PYTHONTEST from `env` of the request for 'slow'"
    count, process = [one["message"] for one in found["fork server", "ok"]]
    assert count == "1 of 2 running servers were forked"
    assert process.startswith("one runs as process ")
    assert found["servers", "ok"][0]["message"] == "2 running"
    assert found["edge", "ok"][0]["message"] == f"it answers at {keeper.url}"
    assert keeper.token not in str(found)
    assert not problems(found)


def test_kernels_that_were_executed_are_listed(make_keeper):
    keeper = make_keeper().start()
    server = keeper.post(name="lab").json()
    kernel = start_kernel(server)
    (found,) = examined(keeper)["kernels", "ok"]
    (line,) = found["details"]
    assert line.startswith(f"lab: python3 {kernel} was executed: the server itself was executed")
    assert server["token"] not in str(found)


def test_what_a_killed_keeper_left_is_no_problem(make_keeper):
    keeper = make_keeper().start()
    assert keeper.post().status_code == 201
    keeper.kill()
    found = examined(keeper)
    api, lab = found["ports", "ok"]
    assert "which the next keeper takes over" in api["message"]
    assert "which the next keeper takes over" in lab["message"]
    assert "none runs on" in found["keeper", "skipped"][0]["message"]
    keeper.start()
    assert keeper.get()["state"] == "running"


@pytest.mark.root
def test_a_user_without_rights_is_told_what_to_do(passable, user):
    keeper = PassableKeeper(passable / "keeper")
    keeper.runs_as = user.pw_name
    keeper.environment  # noqa: B018 - creates its interpreter, as root
    keeper.state_dir.mkdir(mode=0o700)
    os.chown(keeper.base, user.pw_uid, user.pw_gid)
    found = examined(keeper, code=1)
    (mine,) = found["state directory", "problem"]
    assert mine["mend"] == f"sudo chown -R $(id -u):$(id -g) {keeper.state_dir}"
    assert (user.pw_name in found["users", "ok"][0]["message"], problems(found)) == (
        True,
        ["state directory"],
    )


def test_a_gateway_that_a_server_uses_is_watched_by_the_keeper(make_keeper, gateway):
    keeper = make_keeper(gateway_period=0.2).start()
    assert keeper.post(name="lab", **gateway.options).status_code == 201
    found = examined(keeper)
    assert gateway.url in found["gateway", "ok"][0]["message"]
    assert f"as that of {gateway.url}" in found["clock", "ok"][0]["message"]
    gateway.stop()
    until(lambda: keeper.get("lab")["gateway"]["error"], what="the keeper to notice")
    (gone,) = examined(keeper, code=1)["gateway", "problem"]
    assert (gateway.url in gone["message"], gateway.token in str(gone)) == (True, False)
