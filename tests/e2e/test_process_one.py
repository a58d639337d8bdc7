"""As process 1, a keeper has an init that reaps orphans, forwards signals and exits with it."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from harness import (
    PATIENCE,
    KeeperProcess,
    alive,
    kill_all,
    processes_where,
    run_cell,
    start_kernel,
    until,
)

pytestmark = pytest.mark.root


class ContainedKeeper(KeeperProcess):
    """A keeper that is process 1 of a pid namespace."""

    def command(self, *arguments):
        return ["unshare", "--pid", "--fork", "--mount-proc", *super().command(*arguments)]

    @property
    def init(self):
        """Process 1, as seen from outside of the namespace."""
        return psutil.Process(self.process.pid).children()[0]

    @property
    def keeper_process(self):
        """The process of the keeper itself."""
        init = self.init.pid
        (keeper,) = processes_where(
            lambda process: process.ppid() == init and "labkeeper" in process.cmdline()
        )
        return keeper

    def namespace_processes(self):
        """Return all live processes of the namespace."""
        space = Path(f"/proc/{self.init.pid}/ns/pid").readlink()
        return processes_where(
            lambda process: Path(f"/proc/{process.pid}/ns/pid").readlink() == space
        )

    def zombies(self):
        return [
            child
            for child in self.init.children(recursive=True)
            if not alive(child.pid) and child.is_running()
        ]

    def exit_code_after(self, number, who):
        """Send a signal, wait until every process has exited, and return the exit code."""
        everything = self.namespace_processes()
        who.send_signal(number)
        code = self.process.wait(PATIENCE)
        until(
            lambda: not any(process.is_running() for process in everything),
            what="all processes to end",
        )
        return code

    def close(self):
        if self.process is not None and self.process.poll() is None:
            self.init.kill()
            self.process.wait()
        if self.http is not None:
            self.http.close()
        # A container's control groups go with it; here, those of a killed keeper are left over.
        self.sweep()


@pytest.fixture
def contained_keeper(tmp_path):
    keeper = ContainedKeeper(tmp_path / "keeper", launch_by="exec")
    yield keeper
    keeper.close()


ORPHANS = """
import subprocess
for _ in range(20):
    subprocess.run(["sh", "-c", "sleep 1000 & exit"])
"""


def test_init_reaps_orphans_and_a_stop_ends_everything(contained_keeper):
    server = contained_keeper.start().post().json()
    assert server["state"] == "running", server
    assert contained_keeper.keeper_process.pid != contained_keeper.init.pid
    # Orphaned processes are reparented to process 1.
    run_cell(server, start_kernel(server), ORPHANS)
    orphans = [
        process for process in contained_keeper.namespace_processes() if process.name() == "sleep"
    ]
    assert len(orphans) == 20
    assert {process.ppid() for process in orphans} == {contained_keeper.init.pid}
    kill_all(orphans)
    until(
        lambda: not any(process.is_running() for process in orphans),
        what="the orphans to be reaped",
    )
    until(lambda: not contained_keeper.zombies(), what="all zombies to be reaped")
    # The init is small, and has loaded none of the keeper's modules.
    assert (
        contained_keeper.init.memory_info().rss
        < contained_keeper.keeper_process.memory_info().rss / 2
    )
    assert contained_keeper.init.num_threads() == 1
    assert contained_keeper.exit_code_after(signal.SIGTERM, contained_keeper.init) == 0
    assert "keeper ends; no server is left" in contained_keeper.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_init_forwards_other_signals(contained_keeper, number):
    contained_keeper.start()
    assert contained_keeper.exit_code_after(number, contained_keeper.init) == 0


def test_container_exits_if_the_keeper_is_killed(contained_keeper):
    server = contained_keeper.start().post().json()
    assert server["state"] == "running", server
    assert (
        contained_keeper.exit_code_after(signal.SIGKILL, contained_keeper.keeper_process)
        == 128 + signal.SIGKILL
    )


def test_exit_code_is_that_of_the_keeper(contained_keeper):
    contained_keeper.settings["log_level"] = "no-such-level"
    assert (
        subprocess.run(
            contained_keeper.command("serve"),
            env=contained_keeper.environment,
            capture_output=True,
            check=False,
        ).returncode
        == 2
    )
