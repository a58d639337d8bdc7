"""Gateways are looked at seldom, told about once, and freed of what is owed there as soon as they answer."""

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
    """A watch whose thread does not run: the test is its loop, and the fleet that it tells."""

    def __init__(self, clock, threads, client, store, told):
        self.clock, self.client, self.told = clock, client, told
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
        self.told.append(report)
        snapshot = self.servers[report.name]
        self.be(replace(snapshot, gateway=report.fact.health))

    def be(self, snapshot):
        self.servers[snapshot.name] = snapshot
        self.watch.changed(Change(Event.READY, None, snapshot, self.clock.time()))

    def run(self, name="lab", gateway=None, *, known=True, generation=1):
        health = GatewayHealth(self.clock.time(), kernelspecs=1) if known else None
        spec = replace(a_spec(name), gateway=gateway)
        self.be(
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
        self.be(replace(self.servers[name], state=State.STOPPING, gateway=None))

    def orphan(self, *ids, gateway=None):
        self.orphans.add(
            [
                OrphanedKernel(id_, gateway or a_gateway(), ServerName("lab"), self.clock.time())
                for id_ in ids
            ]
        )

    def look(self):
        """Do what the loop does once a second; give the URLs that were asked."""
        before = len(self.client.checked)
        for watched in self.watch._due():
            self.watch._ask(watched)
        return self.client.checked[before:]

    def pauses(self, count):
        """Give the seconds between one question and the next, so many times."""
        found = []
        for _ in range(count):
            seconds = 0
            while not self.look():
                seconds += 1
                self.clock.advance(1.0)
            found.append(seconds)
        return found


@pytest.fixture
def watched(clock, threads, client, store, told):
    return Watched(clock, threads, client, store, told)


def test_many_servers_are_one_question_and_other_credentials_another(watched):
    for number in range(50):
        watched.run(f"lab{number}", a_gateway())
    watched.run("other", a_gateway(auth_token="another"))
    watched.run("plain")
    assert watched.look() == []
    watched.clock.advance(PERIOD)
    assert watched.look() == ["http://one", "http://one"]
    assert watched.told == []


def test_a_gateway_that_answers_is_asked_once_a_period_and_one_that_does_not_more_and_more_seldom(
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


def test_a_change_is_told_once_to_each_server_with_the_time_since_when_it_is_so(watched):
    watched.run("a", a_gateway())
    watched.run("b", a_gateway(), generation=7)
    watched.client.down.add("http://one")
    watched.pauses(3)
    assert [(r.name, r.generation) for r in watched.told] == [("a", 1), ("b", 7)]
    assert {r.fact.health.since for r in watched.told} == {1_000_030.0}
    assert not watched.told[0].fact.health.reachable
    watched.client.down.clear()
    watched.pauses(2)
    assert [r.fact.health.reachable for r in watched.told] == [False, False, True, True]
    assert watched.told[2].fact.health.since == watched.clock.time() - 30


def test_another_number_of_kernelspecs_is_told_and_is_no_new_beginning(watched):
    watched.run(gateway=a_gateway())
    watched.client.specs = 5
    watched.pauses(2)
    assert [(r.fact.health.kernelspecs, r.fact.health.since) for r in watched.told] == [
        (5, 1_000_000.0)
    ]


def test_a_server_that_was_taken_over_has_its_gateway_asked_at_once(watched):
    watched.run("known", a_gateway())
    watched.run("taken", a_gateway(), known=False)
    assert watched.look() == ["http://one"]
    assert [r.name for r in watched.told] == ["taken"]


def test_a_gateway_that_nobody_needs_any_more_is_not_asked(watched):
    watched.run("a", a_gateway())
    watched.run("b", a_gateway("two"))
    watched.end("a")
    watched.clock.advance(PERIOD)
    assert watched.look() == ["http://two"]
    # A server that was started again with another gateway needs its first one no more.
    watched.run("b", a_gateway("three"))
    watched.clock.advance(PERIOD)
    assert watched.look() == ["http://three"]
    assert [w.gateway.url for w in watched.watch._watched] == ["http://three"]


def test_a_server_that_ends_while_its_gateway_is_asked_hears_nothing(watched):
    watched.run(gateway=a_gateway())
    watched.client.down.add("http://one")
    watched.client.before_check = watched.end
    watched.clock.advance(PERIOD)
    watched.look()
    assert watched.told == []


def test_a_gateway_that_is_being_asked_is_not_asked_beside_that(watched):
    watched.run(gateway=a_gateway())
    watched.clock.advance(PERIOD)
    answers = threading.Event()
    watched.client.before_check = answers.wait
    watched.watch._look()
    until(lambda: watched.client.checked, what="it is asked")
    watched.watch._look()
    answers.set()
    assert watched.client.checked == ["http://one"]


def test_a_look_that_cannot_be_made_says_nothing_of_a_gateway_and_is_made_up_for(
    watched, no_threads
):
    """For want of a thread of the watch's, or of what its client needs: the last word on the gateway stays."""
    watched.run(gateway=a_gateway())
    watched.clock.advance(PERIOD)
    with no_threads(), pytest.raises(BackendUnavailable):
        watched.watch._look()

    def cannot():
        raise BackendUnavailable("no descriptor is free")

    watched.client.before_check = cannot
    assert watched.look() == ["http://one"]
    assert watched.told == []
    watched.client.before_check = lambda: None
    watched.client.down.add("http://one")
    assert watched.look() == ["http://one"]
    assert [report.fact.health.reachable for report in watched.told] == [False]


def test_orphaned_kernels_are_collected_at_once_where_the_gateway_answers_and_then_it_is_left_alone(
    watched, store
):
    watched.orphan("k1", "k2")
    assert watched.look() == ["http://one"]
    assert sorted(watched.client.ended) == ["k1", "k2"]
    assert (watched.orphans.all(), store.kernels) == ([], {})
    watched.clock.advance(1000)
    assert watched.look() == []
    assert watched.watch._watched == []


def test_orphaned_kernels_wait_for_a_gateway_that_does_not_answer(watched):
    watched.client.down.add("http://one")
    watched.orphan("k1")
    assert watched.pauses(3) == [0, 4, 8]
    assert watched.client.ended == []
    watched.client.down.clear()
    assert watched.pauses(1) == [16]
    assert watched.client.ended == ["k1"]
    assert watched.orphans.all() == []


def test_a_kernel_that_may_still_come_is_waited_for_and_ended_when_it_does(watched):
    """Its gateway had not answered about it: it may be started yet; after five minutes it is not."""
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


def test_orphaned_kernels_of_a_gateway_that_others_use_are_collected_soon(watched):
    watched.run(gateway=a_gateway())
    watched.orphan("k1")
    watched.clock.advance(PERIOD)
    watched.look()
    assert watched.client.ended == ["k1"]
    assert watched.told == []


def test_one_that_cannot_be_ended_is_in_nobodys_way_and_is_tried_again_more_and_more_seldom(
    watched,
):
    watched.run(gateway=a_gateway())
    watched.client.stubborn |= {f"stubborn{number}" for number in range(5)}
    watched.orphan(*watched.client.stubborn, *(f"k{number}" for number in range(20)))
    watched.clock.advance(PERIOD)
    until(
        lambda: watched.pauses(1) and len(watched.client.ended) == 20,
        what="all others have been ended",
    )
    assert {orphan.kernel_id for orphan in watched.orphans.all()} == watched.client.stubborn
    assert watched.pauses(8)[-1] == PERIOD * 4
    # The gateway itself can be used all the while.
    assert watched.told == []
    watched.client.stubborn.clear()
    watched.pauses(1)
    assert watched.orphans.all() == []


def test_a_gateway_with_many_that_cannot_be_ended_is_left_alone_for_a_while(watched):
    watched.client.stubborn |= {f"k{number}" for number in range(100)}
    watched.orphan(*watched.client.stubborn)
    tried = []
    end = watched.client.end_kernel
    watched.client.end_kernel = lambda gateway, id_: (tried.append(id_), end(gateway, id_))
    watched.look()
    assert len(tried) == 3


def test_orphaned_kernels_are_left_to_the_next_keeper_when_this_one_ends(
    watched, threads, monkeypatch
):
    monkeypatch.setattr(type(threads), "closed", True)
    watched.orphan("k1")
    watched.look()
    assert watched.client.ended == []
    assert len(watched.orphans.all()) == 1


def test_its_thread_looks_by_itself_and_keeps_the_book(watched, threads, store, monkeypatch):
    monkeypatch.setattr(module, "_LOOK_EVERY", 0.01)
    store.failing = True
    watched.orphan("k1")
    watched.watch.start()
    until(lambda: watched.client.ended == ["k1"], what="the orphaned kernel is ended")
    watched.client.down.add("http://one")
    watched.orphan("k2")
    store.failing = False
    until(lambda: set(store.kernels) == {"k2"}, what="the store has what is so")
    watched.clock.advance(31 * 86400)
    until(lambda: not watched.orphans.all(), what="an old orphaned kernel is given up")
    assert any(thread.name == "gateways" for thread in threading.enumerate())
