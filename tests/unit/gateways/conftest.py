from __future__ import annotations

from contextlib import closing

import pytest

from labkeeper.core.errors import BackendUnavailable
from labkeeper.core.server import Failure, FailureClass, GatewayHealth
from labkeeper.testing.fakes import FakeClock, MemoryStore
from labkeeper.threads import ThreadGroup


class StubClient:
    """Returns what the test says about gateways and kernels, and records calls."""

    def __init__(self, clock):
        self.clock = clock
        self.down = set()
        """URLs of gateways that are unreachable."""
        self.stubborn = set()
        """Kernels that cannot be deleted, and whose existence is unknown."""
        self.gone = set()
        """Kernels that no longer exist."""
        self.specs = 1
        self.checked = []
        self.ended = []
        self.before_check = lambda: None

    def check(self, gateway):
        self.checked.append(gateway.url)
        self.before_check()
        if gateway.url in self.down:
            return GatewayHealth(
                self.clock.time(),
                Failure(FailureClass.GATEWAY_UNREACHABLE, f"the gateway {gateway.url} is down"),
            )
        return GatewayHealth(self.clock.time(), kernelspecs=self.specs)

    def has_kernel(self, gateway, kernel_id):
        if kernel_id in self.stubborn:
            raise BackendUnavailable("it answered 500")
        return kernel_id not in self.gone

    def end_kernel(self, gateway, kernel_id):
        if kernel_id in self.stubborn:
            raise BackendUnavailable("it answered 500")
        self.ended.append(kernel_id)
        return kernel_id not in self.gone


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def store():
    return MemoryStore()


@pytest.fixture
def client(clock):
    return StubClient(clock)


@pytest.fixture
def threads():
    with closing(ThreadGroup()) as threads:
        yield threads


@pytest.fixture
def reports():
    """The reports received."""
    return []
