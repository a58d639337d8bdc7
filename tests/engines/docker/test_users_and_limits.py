"""The container as other users, and with restrictions: it works, or reports what it needs."""

from __future__ import annotations

import os

import pytest

from engine import FORK, docker
from harness import run_cell, start_kernel, until

HARDENING = (
    *("--read-only", "--tmpfs", "/tmp", "--tmpfs", "/var/lib/labkeeper"),
    *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
)


def test_container_does_not_run_as_root_by_default(make_container):
    container = make_container().start()
    assert container.exec("id", "-u").stdout.strip() == "1000"
    kernel = start_kernel(server := container.server())
    assert run_cell(server, kernel, "import os; os.getuid()") == "1000"
    assert (
        run_cell(server, kernel, "import pathlib; pathlib.Path.home()")
        == "PosixPath('/var/lib/labkeeper/home')"
    )


def test_root_container_switches_to_the_owner_of_the_notebooks(make_container, notebooks):
    owner = notebooks.stat().st_uid
    container = make_container("--user", "root", notebooks=notebooks).start()
    server = container.server()
    kernel = start_kernel(server)
    assert (
        run_cell(
            server, kernel, "import os; open('mine', 'w').close(); (os.getuid(), os.getgroups())"
        )
        == f"({owner}, [])"
    )
    assert (notebooks / "mine").stat().st_uid == owner
    assert container.stop() == 0


def test_notebooks_of_another_user_cause_a_warning_with_advice(make_container, notebooks):
    uid, gid = notebooks.stat().st_uid, notebooks.stat().st_gid
    container = make_container("--user", "5555:5555", notebooks=notebooks).start()
    assert "WARNING: /notebooks belongs to user" in container.logs()
    assert f"docker run --user {uid}:{gid}" in container.logs()


def test_missing_notebook_directory_is_reported(make_container):
    container = make_container(environment={"LABKEEPER_NOTEBOOK_DIR": "/nowhere"}).run()
    assert container.ended() == 2
    assert "cannot find /nowhere" in container.logs()


def test_container_works_with_all_hardening_options(make_container, notebooks):
    owner = notebooks.stat().st_uid
    limits = ("--memory", "1g", "--cpus", "1.5", "--pids-limit", "300")
    container = make_container(
        "--user", f"{owner}:{owner}", *HARDENING, *limits, notebooks=notebooks, environment=FORK
    ).start()
    server = container.forked()
    kernel = start_kernel(server)
    assert run_cell(server, kernel, "open('mine', 'w').write('1')") == "1"
    container.exec("labkeeper", "ls")
    assert container.stop() == 0
    assert [file.name for file in notebooks.iterdir()] == ["mine"]


def test_read_only_container_reports_the_tmpfs_mounts_it_needs(make_container):
    container = make_container("--read-only").run()
    assert container.ended() == 2
    assert "--tmpfs /tmp --tmpfs /var/lib/labkeeper" in container.logs()


def test_root_without_capabilities_reports_the_user_option_it_needs(make_container, notebooks):
    if os.getuid() != 0:
        pytest.skip("needs root on the host, to change the owner of the notebooks")
    container = make_container("--user", "root", "--cap-drop", "ALL", notebooks=notebooks).run()
    assert container.ended() == 2
    assert "--user 4321:4321" in container.logs()


def test_oom_kill_in_the_container_affects_only_the_kernel(make_container):
    # A process that enters the container takes memory of its limit. For milliseconds after a kill,
    # the memory of the killed process still counts: Linux would kill the server, too.
    container = make_container(
        "--memory", "600m", "--memory-swap", "600m", "--no-healthcheck", environment=FORK
    ).start()
    server = container.forked()
    other = container.server(name="other", port=9999)
    kernel = start_kernel(server)
    run_cell(server, kernel, "import threading; x = 1")

    def kernels():
        """Return the pids of kernels as the engine sees them, from outside of the container."""
        lines = docker("top", container.name, "-eo", "pid,args").stdout.splitlines()
        return [line.split()[0] for line in lines if "ipykernel_launcher" in line]

    first = kernels()
    # After the response, so that nothing waits for one that never comes.
    run_cell(server, kernel, "threading.Timer(0.5, lambda: b'x' * 2**31).start()")

    # Jupyter restarts the kernel, and no other process is affected. The kernel's state does not
    # show that: until a client connects, JupyterLab may report the dead kernel as idle and the
    # new one as starting.
    until(lambda: kernels() not in ([], first), what="a new kernel")
    assert run_cell(server, kernel, "'x' in globals()") == "False"
    assert container.state()["Running"]
    assert [
        (s["name"], s["state"], s["pid"])
        for s in container.http.get("/api/servers").json()["servers"]
    ] == [
        ("default", "running", server["pid"]),
        ("other", "running", other["pid"]),
    ]
    assert container.stop() == 0


def test_too_low_pids_limit_is_reported(make_container):
    container = make_container("--pids-limit", "5").run()
    assert container.ended() == 2
    assert "--pids-limit" in container.logs()


def test_server_starts_with_a_cpu_limit(make_container):
    container = make_container("--cpus", "0.5").start()
    assert container.server()["state"] == "running"
