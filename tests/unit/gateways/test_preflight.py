"""A server is ready when it answers and its gateway can be used, in whatever order that is found out."""

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
    """Holds up the answer of a gateway until the test lets it come."""

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
def preflight(told, threads, client, probe):
    return GatewayPreflight(told.append, threads=threads, client=client, probe=probe)


@pytest.fixture
def held(client, threads):
    """The gateway's answer is held up."""
    answering = Answering(client)
    yield answering
    answering.go_on.set()


def report(fact, generation=1):
    return Report(SPEC.name, generation, fact)


def quiet(threads):
    until(lambda: not threads._running(), what="the gate has nothing under way")


def test_a_server_without_a_gateway_passes_at_once(preflight, told, client):
    preflight.begin(a_spec("lab"), 1, ())
    preflight.receive(report(READY))
    assert told == [report(READY)]
    assert client.checked == []


def test_ready_waits_for_the_gateway(preflight, told, threads, held):
    preflight.begin(SPEC, 1, ())
    assert held.asked.wait(60)
    preflight.receive(report(READY))
    assert told == []
    held.go_on.set()
    until(lambda: told)
    fact = told[0].fact
    assert (fact.endpoint, fact.gateway.kernelspecs, fact.not_taken_over) == (READY.endpoint, 1, ())
    quiet(threads)
    assert len(told) == 1


def test_the_gateway_may_be_sooner(preflight, told, threads):
    preflight.begin(SPEC, 1, ())
    quiet(threads)
    assert told == []
    preflight.receive(report(READY))
    assert [r.fact.gateway.reachable for r in told] == [True]


def test_a_gateway_that_cannot_be_used_ends_the_start_with_its_cause(
    preflight, told, threads, client
):
    client.down.add("http://one")
    preflight.begin(SPEC, 1, (KERNEL,))
    quiet(threads)
    assert [type(r.fact) for r in told] == [Vetoed]
    assert told[0].generation == 1
    assert told[0].fact.failure.kind == "gateway-unreachable"
    assert told[0].fact.failure.message.startswith(
        "cannot start server 'lab': the gateway http://one is down"
    )
    assert "require_gateway: false" in told[0].fact.failure.message
    # It may have become ready all the same, before it could be ended; nobody is told.
    preflight.receive(report(READY))
    assert len(told) == 1
    preflight.receive(report(Ended(Exit(signal="SIGKILL"))))
    assert [type(r.fact) for r in told] == [Vetoed, Ended]


def test_one_that_is_not_required_lets_the_server_pass_and_gives_it_no_kernels(
    preflight, told, threads, client, probe
):
    client.down.add("http://one")
    preflight.begin(replace(SPEC, gateway=a_gateway(required=False)), 1, (KERNEL,))
    preflight.receive(report(READY))
    until(lambda: told)
    assert not told[0].fact.gateway.reachable
    assert told[0].fact.not_taken_over == ("k1",)
    assert probe.given == []


def test_a_server_that_ended_first_is_not_ready_any_more(preflight, told, threads, held):
    preflight.begin(SPEC, 1, ())
    assert held.asked.wait(60)
    preflight.receive(report(READY))
    preflight.receive(report(Ended(Exit(code=0))))
    held.go_on.set()
    quiet(threads)
    assert [type(r.fact) for r in told] == [Ended]


def test_kernels_are_handed_over_before_anybody_hears_of_the_server(preflight, told, probe):
    preflight.begin(SPEC, 1, (KERNEL,))
    preflight.receive(report(READY))
    until(lambda: told)
    assert probe.given == [(8, KERNEL)]
    assert told[0].fact.not_taken_over == ()


def test_a_kernel_that_has_gone_meanwhile_is_nobodys_any_more(preflight, told, client, probe):
    client.gone.add("k1")
    preflight.begin(SPEC, 1, (KERNEL,))
    preflight.receive(report(READY))
    until(lambda: told)
    assert (probe.given, told[0].fact.not_taken_over) == ([], ())


@pytest.mark.parametrize("culprit", ["gateway", "server"])
def test_a_kernel_that_cannot_be_handed_over_is_named(preflight, told, client, probe, culprit):
    client.stubborn |= {"k1"} if culprit == "gateway" else set()
    probe.failing = culprit == "server"
    with structlog.testing.capture_logs() as log:
        preflight.begin(SPEC, 1, (KERNEL,))
        preflight.receive(report(READY))
        until(lambda: told)
    assert told[0].fact.not_taken_over == ("k1",)
    assert told[0].fact.gateway.reachable
    assert [(line["server"], line["generation"], line["kernel"]) for line in log] == [
        ("lab", 1, "k1")
    ]


def test_the_answer_of_an_earlier_launch_is_not_taken_for_that_of_this(
    preflight, told, threads, client, held
):
    preflight.begin(SPEC, 1, (KERNEL,))
    assert held.asked.wait(60)
    preflight.begin(SPEC, 2, ())
    preflight.receive(report(READY, generation=1))
    # It passes: nobody waits for it any more, and the fleet knows by its number that it is old.
    assert told == [report(READY, generation=1)]
    preflight.receive(report(READY, generation=2))
    held.go_on.set()
    quiet(threads)
    assert [r.generation for r in told] == [1, 2]
    assert told[1].fact.not_taken_over == ()


def test_another_server_does_not_wait(preflight, told, threads, held):
    preflight.begin(SPEC, 1, ())
    assert held.asked.wait(60)
    other = Report(a_spec("other").name, 1, READY)
    preflight.receive(other)
    assert told == [other]


def test_a_gateway_that_could_not_be_asked_is_not_blamed(preflight, told, client, threads):
    def cannot():
        raise BackendUnavailable("no descriptor is free")

    client.before_check = cannot
    preflight.begin(SPEC, 1, ())
    quiet(threads)
    ((_, _, fact),) = [(r.name, r.generation, r.fact) for r in told]
    assert isinstance(fact, Vetoed)
    assert (fact.failure.kind, fact.failure.message) == (
        FailureClass.OTHER,
        "cannot start server 'lab': no descriptor is free",
    )


def test_a_start_for_whose_gateway_there_is_no_thread_is_not_waited_for(
    preflight, told, no_threads
):
    with no_threads(), pytest.raises(BackendUnavailable):
        preflight.begin(SPEC, 1, ())
    preflight.receive(report(READY))
    assert told == [report(READY)]
