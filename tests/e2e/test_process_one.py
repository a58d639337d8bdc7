"""As process 1 a keeper has an init of its own: orphans are waited for, signals arrive, its end is that of the container."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from harness import KeeperProcess, alive, kill_all, processes_where, run_cell, start_kernel, until

pytestmark = pytest.mark.root


class ContainedKeeper(KeeperProcess):
    """A keeper that is process 1 of a namespace of processes."""

    def command(self, *arguments):
        return ["unshare", "--pid", "--fork", "--mount-proc", *super().command(*arguments)]

    @property
    def init(self):
        """Process 1, as it is known outside."""
        return psutil.Process(self.process.pid).children()[0]

    @property
    def inside(self):
        """The keeper's own process."""
        init = self.init.pid
        (keeper,) = processes_where(
            lambda process: process.ppid() == init and "labkeeper" in process.cmdline()
        )
        return keeper

    def contained(self):
        """All live processes of the namespace."""
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

    def ended(self, number, who):
        """Send a signal; wait for the end of all, and give its exit code."""
        everything = self.contained()
        who.send_signal(number)
        code = self.process.wait(30)
        until(
            lambda: not any(process.is_running() for process in everything), what="nothing is left"
        )
        return code

    def close(self):
        if self.process is not None and self.process.poll() is None:
            self.init.kill()
            self.process.wait()
        if self.http is not None:
            self.http.close()
        # A real container's groups go with it; those of a keeper that was killed are the next one's to remove.
        self.sweep()


@pytest.fixture
def contained(tmp_path):
    keeper = ContainedKeeper(tmp_path / "keeper", launch_by="exec")
    yield keeper
    keeper.close()


ORPHANS = """
import subprocess
for _ in range(20):
    subprocess.run(["sh", "-c", "sleep 1000 & exit"])
"""


def test_orphans_of_a_server_are_waited_for_and_a_stop_ends_all(contained):
    server = contained.start().post().json()
    assert server["state"] == "running", server
    assert contained.inside.pid != contained.init.pid
    # What ends without a parent comes to process 1.
    run_cell(server, start_kernel(server), ORPHANS)
    orphans = [process for process in contained.contained() if process.name() == "sleep"]
    assert len(orphans) == 20
    assert {process.ppid() for process in orphans} == {contained.init.pid}
    kill_all(orphans)
    until(
        lambda: not any(process.is_running() for process in orphans),
        what="the orphans are waited for",
    )
    until(lambda: not contained.zombies(), what="no zombie is left")
    # It holds little, and above all nothing that the keeper loads.
    assert contained.init.memory_info().rss < contained.inside.memory_info().rss / 2
    assert contained.init.num_threads() == 1
    assert contained.ended(signal.SIGTERM, contained.init) == 0
    assert "keeper ends; no server is left" in contained.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_other_signals_arrive_too(contained, number):
    contained.start()
    assert contained.ended(number, contained.init) == 0


def test_a_keeper_that_is_killed_ends_its_container(contained):
    server = contained.start().post().json()
    assert server["state"] == "running", server
    assert contained.ended(signal.SIGKILL, contained.inside) == 128 + signal.SIGKILL


def test_the_exit_code_is_the_keepers(contained):
    contained.settings["log_level"] = "no-such-level"
    assert (
        subprocess.run(
            contained.command("serve"), env=contained.environment, capture_output=True, check=False
        ).returncode
        == 2
    )
