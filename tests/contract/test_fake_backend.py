"""The fake backend passes the contract for backends."""

from __future__ import annotations

import pytest

from labkeeper.core.errors import BackendRefused, BackendUnavailable
from labkeeper.core.messages import Ended, Ready, Seen
from labkeeper.core.server import Exit, StopMethod
from labkeeper.testing.contract import BackendContract
from labkeeper.testing.fakes import a_spec
from labkeeper.testing.world import FakeBackend, World


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

    def strike(self, instance):
        for process in self._find(instance):
            self.world.end(process, Exit(signal="SIGKILL"))

    def exists(self, instance):
        return bool(self._find(instance))

    def _find(self, instance):
        return [process for process in self.world.processes if process.pid == instance.pid]


class TestFakeBackend(BackendContract):
    @pytest.fixture
    def rig(self):
        return FakeRig()


@pytest.fixture
def reports():
    return []


@pytest.fixture
def backend(reports):
    return FakeBackend(reports.append)


def facts(reports):
    return [type(report.fact) for report in reports]


def test_a_server_becomes_ready_when_the_test_lets_it_answer(backend, reports):
    backend.world.temper("lab").boots = False
    backend.launch(a_spec("lab"), 1)
    assert backend.observe("lab", 1) == Seen(answers=False)
    assert reports == []
    backend.world.answer("lab")
    backend.world.answer("lab")
    assert facts(reports) == [Ready]


def test_a_process_that_ignores_signals_ends_when_the_test_ends_it(backend, reports):
    """It outlives SIGTERM, SIGKILL and the next launch; its end names the last method used."""
    temper = backend.world.temper("lab")
    temper.obeys = temper.killable = False
    backend.launch(a_spec("lab"), 1)
    backend.terminate("lab", 1, 1.0)
    backend.kill("lab", 1)
    with pytest.raises(BackendUnavailable, match="launch 1 of it cannot be ended"):
        backend.launch(a_spec("lab"), 2)
    (process,) = backend.world.living("lab")
    backend.world.crash("lab")
    backend.world.end(process, Exit())
    assert facts(reports) == [Ready, Ended]
    assert reports[-1].fact.method is StopMethod.SIGKILL


def test_calls_to_an_unreachable_machine_fail_and_change_nothing(backend, reports):
    backend.world.temper("lab").reachable = False
    calls = [
        lambda: backend.launch(a_spec("lab"), 1),
        lambda: backend.terminate("lab", 1, 1.0),
        lambda: backend.kill("lab", 1),
        lambda: backend.observe("lab", 1),
    ]
    for call in calls:
        with pytest.raises(BackendUnavailable):
            call()
    assert (reports, backend.world.processes) == ([], [])


def test_a_lost_response_leaves_an_unsupervised_process(backend, reports):
    """The launch took place, but neither the call nor a report says so."""
    backend.world.temper("lab").answers_lost = True
    with pytest.raises(BackendUnavailable):
        backend.launch(a_spec("lab"), 1)
    assert len(backend.world.living("lab")) == 1
    backend.world.leave("lab")
    assert reports == []


def test_a_follower_receives_new_lines_while_it_is_active(backend):
    """New lines arrive in order, between empty strings."""
    backend.launch(a_spec("lab"), 1)
    lines = backend.follow("lab", 0, lambda: len(backend.world.logs["lab"]) < 3)
    assert next(lines) == ""
    backend.world.write("lab", "two")
    assert [next(lines), next(lines)] == ["two\n", ""]
    backend.world.write("lab", "three")
    assert list(lines) == ["three\n"]
