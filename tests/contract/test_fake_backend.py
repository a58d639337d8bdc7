"""The fake backend keeps the contract that real ones are held to."""

from __future__ import annotations

import pytest

from labkeeper.core.errors import BackendRefused
from labkeeper.core.model import Exit
from labkeeper.testing.contract import BackendContract
from labkeeper.testing.fakes import FakeBackend, World, a_spec


class FakeRig:
    patience = 1.0

    def __init__(self):
        self.world = World()
        self.world.temper("refused").refusal = BackendRefused("cannot start server 'refused'")

    def backend(self, report):
        return FakeBackend(report, self.world)

    def abandon(self, backend):
        backend.abandon()

    def spec(self):
        return a_spec("contract")

    def refused(self):
        return a_spec("refused")

    def strike(self, endpoint):
        for process in self._find(endpoint):
            self.world.end(process, Exit(signal="SIGKILL"))

    def exists(self, endpoint):
        return bool(self._find(endpoint))

    def _find(self, endpoint):
        return [process for process in self.world.processes if process.pid == endpoint.pid]


class TestFakeBackend(BackendContract):
    @pytest.fixture
    def rig(self):
        return FakeRig()
