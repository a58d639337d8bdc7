"""Fixtures: keepers as processes, and a gateway."""

from __future__ import annotations

import pytest

from gateway_servers import KernelGateway
from harness import KeeperProcess


@pytest.fixture(scope="session")
def _shared(tmp_path_factory):
    running = KeeperProcess(tmp_path_factory.mktemp("shared") / "keeper").start_to_fork()
    yield running
    running.close()


@pytest.fixture
def keeper(_shared):
    """A keeper as users have it, which forks; all tests of a worker share it, so none may end or configure it."""
    yield _shared
    _shared.clear()


@pytest.fixture
def make_keeper(tmp_path):
    """Make keepers on a directory of this test; whatever is left of them is ended, and what a clean end leaves fails the test.

    They execute their servers unless a test asks for more: a fork server takes seconds to load, which are lost on a keeper that
    has one or two servers, and ends.
    """
    made = []

    def make(**settings):
        keeper = KeeperProcess(tmp_path / f"keeper{len(made)}", **{"launch_by": "exec"} | settings)
        made.append(keeper)
        return keeper

    yield make
    for keeper in made:
        keeper.close()


@pytest.fixture
def gateway(tmp_path):
    """A Jupyter Kernel Gateway that runs."""
    running = KernelGateway(tmp_path / "gateway").start()
    yield running
    running.stop()
