"""The gateway monitor: check intervals, reports of changes, and ending orphaned kernels."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from gateway_servers import a_gateway
from harness import until
from labkeeper.core.errors import BackendUnavailable
from labkeeper.core.lifecycle import Event, Goal, State
from labkeeper.core.messages import Change
from labkeeper.core.server import GatewayHealth, OrphanedKernel, Snapshot
from labkeeper.core.spec import ServerName
from labkeeper.gateways import monitor as module
from labkeeper.gateways.monitor import GatewayWatch
from labkeeper.gateways.orphans import OrphanedKernels
from labkeeper.testing.fakes import a_spec

PERIOD = 30.0


class Watched:
    """A monitor without its thread, whose loop the test runs, and the reports it makes."""

    def __init__(self, clock, threads, client, store, reports):
        self.clock, self.client, self.reports = clock, client, reports
        self.orphans = OrphanedKernels(store, clock)
        self.watch = GatewayWatch(
            self.receive,
            threads=threads,
            client=client,
            orphans=self.orphans,
            clock=clock,
            period=PERIOD,
        )
        self.servers = {}

    def receive(self, report):
        self.reports.append(report)
        snapshot = self.servers[report.name]
        self.update(replace(snapshot, gateway=report.fact.health))

    def update(self, snapshot):
        self.servers[snapshot.name] = snapshot
        self.watch.changed(Change(Event.READY, None, snapshot, self.clock.time()))

    def run(self, name="lab", gateway=None, *, known=True, generation=1):
        health = GatewayHealth(self.clock.time(), kernelspecs=1) if known else None
        spec = replace(a_spec(name), gateway=gateway)
        self.update(
            Snapshot(
                spec,
                State.RUNNING,
                Goal.UP,
                since=0.0,
                created_at=0.0,
                generation=generation,
                gateway=health,
            )
        )

    def end(self, name="lab"):
        self.update(replace(self.servers[name], state=State.STOPPING, gateway=None))

    def orphan(self, *ids, gateway=None):
        self.orphans.add(
            [
                OrphanedKernel(id_, gateway or a_gateway(), ServerName("lab"), self.clock.time())
                for id_ in ids
            ]
        )

    def look(self):
        """Run one round of the loop, and return the URLs that were checked."""
        before = len(self.client.checked)
        for watched in self.watch._due():
            self.watch._ask(watched)
        return self.client.checked[before:]

    def pauses(self, count):
        """Return the seconds between this many checks."""
        found = []
        for _ in range(count):
            seconds = 0
            while not self.look():
                seconds += 1
                self.clock.advance(1.0)
            found.append(seconds)
        return found


@pytest.fixture
def watched(clock, threads, client, store, reports):
    return Watched(clock, threads, client, store, reports)


def test_servers_with_the_same_gateway_and_credentials_share_a_check(watched):
    for number in range(50):
        watched.run(f"lab{number}", a_gateway())
    watched.run("other", a_gateway(auth_token="another"))
    watched.run("plain")
    assert watched.look() == []
    watched.clock.advance(PERIOD)
    assert watched.look() == ["http://one", "http://one"]
    assert watched.reports == []


def test_a_reachable_gateway_is_checked_once_a_period_and_others_with_backoff(
    watched,
):
    watched.run(gateway=a_gateway())
    assert watched.pauses(3) == [30, 30, 30]
    watched.client.down.add("http://one")
    assert watched.pauses(8) == [30, 4, 8, 16, 32, 64, 120, 120]
    watched.client.down.clear()
    assert watched.pauses(3) == [120, 30, 30]
    watched.client.down.add("http://one")
    assert watched.pauses(3) == [30, 4, 8]


def test_a_change_is_reported_once_to_each_server_with_its_time(watched):
    watched.run("a", a_gateway())
    watched.run("b", a_gateway(), generation=7)
    watched.client.down.add("http://one")
    watched.pauses(3)
    assert [(r.name, r.generation) for r in watched.reports] == [("a", 1), ("b", 7)]
    assert {r.fact.health.since for r in watched.reports} == {1_000_030.0}
    assert not watched.reports[0].fact.health.reachable
    watched.client.down.clear()
    watched.pauses(2)
    assert [r.fact.health.reachable for r in watched.reports] == [False, False, True, True]
    assert watched.reports[2].fact.health.since == watched.clock.time() - 30


def test_a_new_number_of_kernelspecs_is_reported_without_a_new_time(watched):
    watched.run(gateway=a_gateway())
    watched.client.specs = 5
    watched.pauses(2)
    assert [(r.fact.health.kernelspecs, r.fact.health.since) for r in watched.reports] == [
        (5, 1_000_000.0)
    ]


def test_the_gateway_of_an_adopted_server_is_checked_immediately(watched):
    watched.run("known", a_gateway())
    watched.run("taken", a_gateway(), known=False)
    assert watched.look() == ["http://one"]
    assert [r.name for r in watched.reports] == ["taken"]


def test_a_gateway_without_servers_is_not_checked(watched):
    watched.run("a", a_gateway())
    watched.run("b", a_gateway("two"))
    watched.end("a")
    watched.clock.advance(PERIOD)
    assert watched.look() == ["http://two"]
    # After a restart with another gateway, the first one is no longer needed.
    watched.run("b", a_gateway("three"))
    watched.clock.advance(PERIOD)
    assert watched.look() == ["http://three"]
    assert [w.gateway.url for w in watched.watch._watched] == ["http://three"]


def test_a_server_that_ends_during_the_check_gets_no_report(watched):
    watched.run(gateway=a_gateway())
    watched.client.down.add("http://one")
    watched.client.before_check = watched.end
    watched.clock.advance(PERIOD)
    watched.look()
    assert watched.reports == []


def test_checks_of_a_gateway_do_not_overlap(watched):
    watched.run(gateway=a_gateway())
    watched.clock.advance(PERIOD)
    answers = threading.Event()
    watched.client.before_check = answers.wait
    watched.watch._look()
    until(lambda: watched.client.checked, what="the gateway to be checked")
    watched.watch._look()
    answers.set()
    assert watched.client.checked == ["http://one"]


def test_a_check_that_could_not_be_made_is_repeated_and_not_reported(watched, no_threads):
    """Without a thread, or without a descriptor: the last known health stays."""
    watched.run(gateway=a_gateway())
    watched.clock.advance(PERIOD)
    with no_threads(), pytest.raises(BackendUnavailable):
        watched.watch._look()

    def cannot():
        raise BackendUnavailable("no descriptor is free")

    watched.client.before_check = cannot
    assert watched.look() == ["http://one"]
    assert watched.reports == []
    watched.client.before_check = lambda: None
    watched.client.down.add("http://one")
    assert watched.look() == ["http://one"]
    assert [report.fact.health.reachable for report in watched.reports] == [False]


def test_orphaned_kernels_are_ended_immediately_if_the_gateway_is_reachable(watched, store):
    watched.orphan("k1", "k2")
    assert watched.look() == ["http://one"]
    assert sorted(watched.client.ended) == ["k1", "k2"]
    assert (watched.orphans.all(), store.kernels) == ([], {})
    watched.clock.advance(1000)
    assert watched.look() == []
    assert watched.watch._watched == []


def test_orphaned_kernels_wait_for_an_unreachable_gateway(watched):
    watched.client.down.add("http://one")
    watched.orphan("k1")
    assert watched.pauses(3) == [0, 4, 8]
    assert watched.client.ended == []
    watched.client.down.clear()
    assert watched.pauses(1) == [16]
    assert watched.client.ended == ["k1"]
    assert watched.orphans.all() == []


def test_a_kernel_that_may_still_start_is_awaited_and_ended(watched):
    """A request to start it was not answered; after five minutes it is given up."""
    watched.client.gone |= {"late", "never"}
    starting = [
        OrphanedKernel(id_, a_gateway(), ServerName("lab"), watched.clock.time(), starting=True)
        for id_ in ("late", "never")
    ]
    watched.orphans.add(starting)
    watched.pauses(1)
    assert {orphan.kernel_id for orphan in watched.orphans.all()} == {"late", "never"}
    watched.client.gone.remove("late")
    watched.pauses(1)
    assert {orphan.kernel_id for orphan in watched.orphans.all()} == {"never"}
    watched.clock.advance(300)
    watched.pauses(1)
    assert watched.orphans.all() == []


def test_orphaned_kernels_on_a_gateway_in_use_are_ended_at_its_next_check(watched):
    watched.run(gateway=a_gateway())
    watched.orphan("k1")
    watched.clock.advance(PERIOD)
    watched.look()
    assert watched.client.ended == ["k1"]
    assert watched.reports == []


def test_kernels_that_cannot_be_ended_are_retried_with_backoff_and_delay_no_others(
    watched,
):
    watched.run(gateway=a_gateway())
    watched.client.stubborn |= {f"stubborn{number}" for number in range(5)}
    watched.orphan(*watched.client.stubborn, *(f"k{number}" for number in range(20)))
    watched.clock.advance(PERIOD)
    until(
        lambda: watched.pauses(1) and len(watched.client.ended) == 20,
        what="all other orphaned kernels to be ended",
    )
    assert {orphan.kernel_id for orphan in watched.orphans.all()} == watched.client.stubborn
    assert watched.pauses(8)[-1] == PERIOD * 4
    # The gateway itself stays usable.
    assert watched.reports == []
    watched.client.stubborn.clear()
    watched.pauses(1)
    assert watched.orphans.all() == []


def test_after_several_failures_a_gateways_other_kernels_wait(watched):
    watched.client.stubborn |= {f"k{number}" for number in range(100)}
    watched.orphan(*watched.client.stubborn)
    tried = []
    end = watched.client.end_kernel
    watched.client.end_kernel = lambda gateway, id_: (tried.append(id_), end(gateway, id_))
    watched.look()
    assert len(tried) == 3


def test_orphaned_kernels_are_left_to_the_next_keeper_at_shutdown(watched, threads, monkeypatch):
    monkeypatch.setattr(type(threads), "closed", True)
    watched.orphan("k1")
    watched.look()
    assert watched.client.ended == []
    assert len(watched.orphans.all()) == 1


def test_the_thread_checks_gateways_and_saves_and_expires_orphaned_kernels(
    watched, threads, store, monkeypatch
):
    monkeypatch.setattr(module, "_LOOK_EVERY", 0.01)
    store.failing = True
    watched.orphan("k1")
    watched.watch.start()
    until(lambda: watched.client.ended == ["k1"], what="the orphaned kernel to be ended")
    watched.client.down.add("http://one")
    watched.orphan("k2")
    store.failing = False
    until(lambda: set(store.kernels) == {"k2"}, what="the store to hold only the new kernel")
    watched.clock.advance(31 * 86400)
    until(lambda: not watched.orphans.all(), what="the old orphaned kernel to be given up")
    assert any(thread.name == "gateways" for thread in threading.enumerate())
