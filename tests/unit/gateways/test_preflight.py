"""Preflight: a server is ready once it responds and its gateway is usable, in either order."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import structlog

from gateway_servers import a_gateway
from harness import until
from labkeeper.core.errors import BackendTimeout, BackendUnavailable
from labkeeper.core.messages import Ended, Ready, Report, Vetoed
from labkeeper.core.server import Exit, FailureClass, OwnKernel, Session
from labkeeper.gateways.preflight import GatewayPreflight
from labkeeper.testing.fakes import a_spec
from labkeeper.testing.world import FakeProcess

KERNEL = OwnKernel("k1", (Session("a.ipynb", "a.ipynb", "notebook"),))
SPEC = replace(a_spec("lab"), gateway=a_gateway())
PROCESS = FakeProcess(SPEC, 1, pid=7, port=8)
READY = Ready(PROCESS.endpoint, PROCESS.instance)


class StubProbe:
    def __init__(self):
        self.given = []
        self.failing = False

    def take_over(self, endpoint, kernel):
        if self.failing:
            raise BackendTimeout("it did not answer in time")
        self.given.append((endpoint.port, kernel))


class Answering:
    """Holds back a gateway's response until the test releases it."""

    def __init__(self, client):
        self.asked, self.go_on = threading.Event(), threading.Event()
        client.before_check = self._wait

    def _wait(self):
        self.asked.set()
        assert self.go_on.wait(60)


@pytest.fixture
def probe():
    return StubProbe()


@pytest.fixture
def preflight(reports, threads, client, probe):
    return GatewayPreflight(reports.append, threads=threads, client=client, probe=probe)


@pytest.fixture
def held(client, threads):
    """A gateway whose response is held back."""
    answering = Answering(client)
    yield answering
    answering.go_on.set()


def report(fact, generation=1):
    return Report(SPEC.name, generation, fact)


def wait_until_idle(threads):
    until(lambda: not threads._running(), what="all threads of the preflight to end")


def test_a_server_without_a_gateway_passes_immediately(preflight, reports, client):
    preflight.begin(a_spec("lab"), 1, ())
    preflight.receive(report(READY))
    assert reports == [report(READY)]
    assert client.checked == []


def test_ready_waits_for_the_gateway(preflight, reports, threads, held):
    preflight.begin(SPEC, 1, ())
    assert held.asked.wait(60)
    preflight.receive(report(READY))
    assert reports == []
    held.go_on.set()
    until(lambda: reports)
    fact = reports[0].fact
    assert (fact.endpoint, fact.gateway.kernelspecs, fact.not_taken_over) == (READY.endpoint, 1, ())
    wait_until_idle(threads)
    assert len(reports) == 1


def test_the_gateway_may_respond_before_the_server(preflight, reports, threads):
    preflight.begin(SPEC, 1, ())
    wait_until_idle(threads)
    assert reports == []
    preflight.receive(report(READY))
    assert [r.fact.gateway.reachable for r in reports] == [True]


def test_an_unusable_gateway_vetoes_the_start(preflight, reports, threads, client):
    client.down.add("http://one")
    preflight.begin(SPEC, 1, (KERNEL,))
    wait_until_idle(threads)
    assert [type(r.fact) for r in reports] == [Vetoed]
    assert reports[0].generation == 1
    assert reports[0].fact.failure.kind == "gateway-unreachable"
    assert reports[0].fact.failure.message.startswith(
        "cannot start server 'lab': the gateway http://one is down"
    )
    assert "require_gateway: false" in reports[0].fact.failure.message
    # The server may become ready before it is killed; that is not reported.
    preflight.receive(report(READY))
    assert len(reports) == 1
    preflight.receive(report(Ended(Exit(signal="SIGKILL"))))
    assert [type(r.fact) for r in reports] == [Vetoed, Ended]


def test_an_optional_unreachable_gateway_lets_the_server_pass_without_kernels(
    preflight, reports, threads, client, probe
):
    client.down.add("http://one")
    preflight.begin(replace(SPEC, gateway=a_gateway(required=False)), 1, (KERNEL,))
    preflight.receive(report(READY))
    until(lambda: reports)
    assert not reports[0].fact.gateway.reachable
    assert reports[0].fact.not_taken_over == ("k1",)
    assert probe.given == []


def test_a_server_that_has_ended_is_not_reported_as_ready(preflight, reports, threads, held):
    preflight.begin(SPEC, 1, ())
    assert held.asked.wait(60)
    preflight.receive(report(READY))
    preflight.receive(report(Ended(Exit(code=0))))
    held.go_on.set()
    wait_until_idle(threads)
    assert [type(r.fact) for r in reports] == [Ended]


def test_kernels_are_handed_over_before_ready_is_reported(preflight, reports, probe):
    preflight.begin(SPEC, 1, (KERNEL,))
    preflight.receive(report(READY))
    until(lambda: reports)
    assert probe.given == [(8, KERNEL)]
    assert reports[0].fact.not_taken_over == ()


def test_a_kept_kernel_that_no_longer_exists_is_forgotten(preflight, reports, client, probe):
    client.gone.add("k1")
    preflight.begin(SPEC, 1, (KERNEL,))
    preflight.receive(report(READY))
    until(lambda: reports)
    assert (probe.given, reports[0].fact.not_taken_over) == ([], ())


@pytest.mark.parametrize("culprit", ["gateway", "server"])
def test_a_kernel_that_cannot_be_handed_over_is_reported(
    preflight, reports, client, probe, culprit
):
    client.stubborn |= {"k1"} if culprit == "gateway" else set()
    probe.failing = culprit == "server"
    with structlog.testing.capture_logs() as log:
        preflight.begin(SPEC, 1, (KERNEL,))
        preflight.receive(report(READY))
        until(lambda: reports)
    assert reports[0].fact.not_taken_over == ("k1",)
    assert reports[0].fact.gateway.reachable
    assert [(line["server"], line["generation"], line["kernel"]) for line in log] == [
        ("lab", 1, "k1")
    ]


def test_the_response_for_an_earlier_generation_is_not_used(
    preflight, reports, threads, client, held
):
    preflight.begin(SPEC, 1, (KERNEL,))
    assert held.asked.wait(60)
    preflight.begin(SPEC, 2, ())
    preflight.receive(report(READY, generation=1))
    # It passes: the fleet drops it by its generation.
    assert reports == [report(READY, generation=1)]
    preflight.receive(report(READY, generation=2))
    held.go_on.set()
    wait_until_idle(threads)
    assert [r.generation for r in reports] == [1, 2]
    assert reports[1].fact.not_taken_over == ()


def test_another_server_does_not_wait(preflight, reports, threads, held):
    preflight.begin(SPEC, 1, ())
    assert held.asked.wait(60)
    other = Report(a_spec("other").name, 1, READY)
    preflight.receive(other)
    assert reports == [other]


def test_a_check_that_could_not_be_made_does_not_blame_the_gateway(
    preflight, reports, client, threads
):
    def cannot():
        raise BackendUnavailable("no descriptor is free")

    client.before_check = cannot
    preflight.begin(SPEC, 1, ())
    wait_until_idle(threads)
    ((_, _, fact),) = [(r.name, r.generation, r.fact) for r in reports]
    assert isinstance(fact, Vetoed)
    assert (fact.failure.kind, fact.failure.message) == (
        FailureClass.OTHER,
        "cannot start server 'lab': no descriptor is free",
    )


def test_a_start_without_a_free_thread_for_its_check_raises_and_passes(
    preflight, reports, no_threads
):
    with no_threads(), pytest.raises(BackendUnavailable):
        preflight.begin(SPEC, 1, ())
    preflight.receive(report(READY))
    assert reports == [report(READY)]
