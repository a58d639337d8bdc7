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
    """A forking keeper; all tests of a worker share it, so none may stop or configure it."""
    yield _shared
    _shared.clear()


@pytest.fixture
def make_keeper(tmp_path):
    """Create keepers below the test's directory; they must leave nothing behind.

    They execute servers unless a test sets `launch_by`: a fork server takes seconds to load, which
    does not pay off for one or two servers.
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
    """A running Jupyter Kernel Gateway."""
    running = KernelGateway(tmp_path / "gateway").start()
    yield running
    running.stop()
