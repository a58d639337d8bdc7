"""Kernels of servers with limits, and of servers that run as other users."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest

from harness import PassableKeeper, forked, until
from labkeeper.backends.local import hierarchies
from users import USER

CONTROLLERS = (
    {**hierarchies.version_1(), **hierarchies.version_2()} if sys.platform == "linux" else {}
)
WITHOUT_GROUPS = (
    "while umount -l /sys/fs/cgroup 2>/dev/null; do :; done;"
    ' grep -q cgroup /proc/self/mounts && exit 9; exec "$@"'
)
"""Hides control groups in a mount namespace, so that memory is limited by an rlimit."""

pytestmark = pytest.mark.root
needs_groups = pytest.mark.skipif(
    not {"memory", "cpu", "pids"} <= CONTROLLERS.keys(),
    reason="needs control groups that can be written",
)


class Groupless(PassableKeeper):
    """A root keeper that finds no control groups."""

    def command(self, *arguments):
        return ["unshare", "-m", "sh", "-c", WITHOUT_GROUPS, "sh", *super().command(*arguments)]


@pytest.fixture(scope="module")
def groupless(passable, user):
    keeper = Groupless(passable / "keeper", runtime_dir=passable / "run", launch_by="fork")
    keeper.base.chmod(0o755)
    keeper.notebook_dir.chmod(0o777)
    yield keeper.start()
    keeper.close()


@pytest.fixture
def start_on(kernels_by, start):
    """Start a server on another keeper, and a kernel of it."""
    started = []

    def start_on(keeper, **body):
        server = forked(keeper, f"{kernels_by}-kernels", kernels_by=kernels_by, **body)
        started.append(keeper)
        return start(server)

    yield start_on
    for keeper in started:
        assert keeper.delete(f"{kernels_by}-kernels").status_code in {200, 404}


def status(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines)


def test_kernel_runs_as_the_user_of_its_server(groupless, start_on, user):
    kernel = start_on(groupless, user=USER)
    pid = kernel.process.pid
    of_kernel, of_server = status(pid), status(kernel.server["pid"])
    assert of_kernel["Uid"].split() == [str(user.pw_uid)] * 4
    assert of_kernel["Gid"].split() == [str(user.pw_gid)] * 4
    groups = sorted(os.getgrouplist(USER, user.pw_gid))
    assert len(groups) == 2
    assert sorted(map(int, of_kernel["Groups"].split())) == groups
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp"):
        assert of_kernel[name] == of_server[name], name
    assert int(of_kernel["CapEff"], 16) == 0
    assert kernel.value(
        "import getpass, os, pathlib\n"
        "os.getuid(), getpass.getuser(), os.environ['HOME'], str(pathlib.Path.home())"
    ) == (user.pw_uid, USER, user.pw_dir, user.pw_dir)
    assert kernel.value("get_ipython().ipython_dir") == f"{user.pw_dir}/.ipython"


def test_files_and_processes_of_the_kernel_belong_to_the_user(groupless, start_on, user):
    kernel = start_on(groupless, user=USER)
    kernel.run(
        "open('mine', 'w').close()\nimport subprocess\nchild = subprocess.Popen(['sleep', '1000'])"
    )
    mine = groupless.notebook_dir / "mine"
    assert (mine.stat().st_uid, mine.stat().st_gid) == (user.pw_uid, user.pw_gid)
    assert psutil.Process(kernel.value("child.pid")).uids().real == user.pw_uid
    assert kernel.value("import os\nos.access('/proc/1/environ', os.R_OK)") is False
    mine.unlink()


def test_kernel_of_another_user_can_be_interrupted_restarted_and_shut_down(
    groupless, start_on, user
):
    kernel = start_on(groupless, user=USER)
    cell = kernel.begin("print('begun', flush=True)\nwhile True: pass")
    kernel.wait_for_text(cell, "begun")
    kernel.interrupt()
    assert kernel.finish(cell).error == "KeyboardInterrupt: "
    kernel.restart()
    process = kernel.process
    assert process.uids().real == user.pw_uid
    kernel.shutdown()
    assert not process.is_running()


def test_children_of_a_kernel_without_their_mark_end_with_the_server(groupless, start_on):
    """Without control groups they are found below the kernel, which may not be below the server."""
    kernel = start_on(groupless)
    kernel.run(
        "import subprocess\n"
        "hidden = subprocess.Popen(['/bin/sleep', '1000'], start_new_session=True, env={})"
    )
    hidden = psutil.Process(kernel.value("hidden.pid"))
    assert groupless.delete(kernel.server["name"]).status_code == 200
    assert not hidden.is_running()


@pytest.mark.parametrize("whose", [None, USER], ids=["own", "another user"])
def test_kernel_has_the_rlimits_of_its_server(groupless, start_on, user, whose):
    kernel = start_on(groupless, memory_limit=600 * 2**20, **({"user": whose} if whose else {}))
    limited_by = kernel.server["limits"]["memory"]["limited_by"]
    assert limited_by == "rlimit"
    pid = kernel.process.pid
    assert kernel.value("import resource\nresource.getrlimit(resource.RLIMIT_DATA)[0]") == (
        600 * 2**20
    )
    of_kernel, of_server = (
        Path(f"/proc/{which}/limits").read_text() for which in (pid, kernel.server["pid"])
    )
    assert of_kernel == of_server
    assert kernel.execute("x = bytearray(2**30)").error.startswith("MemoryError")


@needs_groups
def test_kernel_and_its_children_are_in_the_control_groups_of_its_server(start_server, start):
    server = start_server(memory_limit=2**30, process_limit=200)
    kernel = start(server)
    child = kernel.value(
        "import subprocess\nchild = subprocess.Popen(['sleep', '1000'])\nchild.pid"
    )
    pids = [server["pid"], kernel.process.pid, child]
    of_server, of_kernel, of_child = (Path(f"/proc/{pid}/cgroup").read_text() for pid in pids)
    assert server["name"] in of_server
    assert of_server == of_kernel == of_child


@needs_groups
def test_kernel_over_the_memory_limit_is_killed_and_started_again(start_server, start):
    server = start_server(memory_limit=400 * 2**20)
    kernel = start(server)
    pid = kernel.process.pid
    kernel.begin("keep = [bytearray(b'x') * 2**20 for _ in range(2000)]")
    kernel.wait_for_status("restarting")
    until(lambda: not psutil.pid_exists(pid), what="the kernel to be killed")
    kernel.wait_until_responsive()
    assert kernel.execute("keep").error == "NameError: name 'keep' is not defined"
    assert psutil.Process(server["pid"]).is_running()
