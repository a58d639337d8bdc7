from __future__ import annotations

import pytest

from gateway_servers import KernelGateway
from harness import KeeperProcess


@pytest.fixture
def make_keeper(tmp_path):
    """Make keepers on a directory of this test; whatever is left of them is ended, and what a clean end leaves fails the test."""
    made = []

    def make(**settings):
        keeper = KeeperProcess(tmp_path / f"keeper{len(made)}", **settings)
        made.append(keeper)
        return keeper

    yield make
    for keeper in made:
        keeper.close()


@pytest.fixture
def keeper(make_keeper):
    """A keeper that runs, and must end in good order."""
    return make_keeper().start()


@pytest.fixture
def gateway(tmp_path):
    """A Jupyter Kernel Gateway that runs."""
    running = KernelGateway(tmp_path / "gateway").start()
    yield running
    running.stop()
