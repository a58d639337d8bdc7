"""The event log: ids without gaps, buffering while the disk is full, followers, and its bounds."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from dataclasses import replace

import pytest

from harness import until
from labkeeper.core.access import EVERYTHING, TokenLimits, View
from labkeeper.core.errors import StoreError
from labkeeper.core.lifecycle import Event, Goal, State
from labkeeper.core.messages import Change, HistoryEntry, HistoryKind, Origin
from labkeeper.core.server import Snapshot
from labkeeper.core.spec import ServerSpec
from labkeeper.events.log import EventLog
from labkeeper.store.queries import SqliteStore
from labkeeper.testing.fakes import MemoryStore

KIND = HistoryKind.SNOOZED


def record_many(event_log, count, server=None):
    for number in range(count):
        event_log.record(KIND, server, f"{number}")


def ids(entries):
    return [entry.id for entry in entries]


def test_a_recorded_entry_is_stored_completely(event_log, store, clock):
    origin = Origin("ada", "r1", "a reason")
    event_log.record(KIND, "lab", "put off", origin=origin, generation=3, details={"until": 5})
    (entry,) = store.history
    assert (entry.id, entry.at, entry.kind, entry.server, entry.message) == (
        1,
        clock.time(),
        KIND,
        "lab",
        "put off",
    )
    assert (entry.origin, entry.generation, entry.details) == (origin, 3, {"until": 5})


def test_ids_continue_under_the_next_keeper(event_log, store, clock):
    record_many(event_log, 3)
    record_many(EventLog(store, clock, size=100), 2)
    assert ids(store.history) == [1, 2, 3, 4, 5]


def test_entries_that_a_full_disk_refuses_are_published_and_stored_later(event_log, store):
    record_many(event_log, 1)
    store.failing = True
    record_many(event_log, 3)
    assert ids(event_log.after(1, limit=10)) == [2, 3, 4]
    store.failing = False
    assert ids(event_log.latest(limit=10)) == [1, 2, 3, 4]
    record_many(event_log, 1)
    assert ids(store.history) == [1, 2, 3, 4, 5]


def test_pages_from_memory_and_from_the_store_are_the_same(store, clock):
    record_many(EventLog(store, clock, size=10_000), 700, "old")
    event_log = EventLog(store, clock, size=10_000)
    record_many(event_log, 5, "new")
    assert ids(event_log.after(0, limit=1000)) == [*range(1, 706)]
    assert ids(event_log.after(698, limit=3)) == [699, 700, 701]
    assert ids(event_log.after(702, limit=2)) == [703, 704]
    assert ids(event_log.after(0, View(server="new"), limit=2)) == [701, 702]
    assert ids(event_log.latest(View(server="old"), limit=2)) == [699, 700]
    assert event_log.after(705, limit=2) == []
    assert event_log.forgotten(0) == 0


def test_a_slow_follower_receives_each_entry_once_and_in_order(store, clock):
    event_log = EventLog(store, clock, size=10_000)
    record_many(event_log, 5)
    seen, quiet, begun = [], [], threading.Event()

    def follow():
        for entry in event_log.follow(2, look=0.05):
            begun.set()
            (quiet if entry is None else seen).append(entry)

    follower = threading.Thread(target=follow)
    follower.start()
    begun.wait()
    # More than is kept in memory.
    record_many(event_log, 3000)
    until(lambda: quiet, what="the follower to catch up")
    event_log.close()
    follower.join(5)
    assert not follower.is_alive()
    assert ids(seen) == [*range(3, 3006)]


def test_a_follower_of_one_server_misses_nothing_among_other_entries(event_log):
    seen = []

    def follow():
        seen.extend(
            entry
            for entry in event_log.follow(0, View(server="lab"), look=0.05)
            if entry is not None
        )

    follower = threading.Thread(target=follow)
    follower.start()
    for number in range(2000):
        event_log.record(KIND, "lab" if number % 7 == 0 else "other", str(number))
    event_log.close()
    follower.join(5)
    assert [entry.message for entry in seen] == [
        str(number) for number in range(2000) if number % 7 == 0
    ]


def test_subscribers_receive_each_entry_with_its_id(store, clock):
    heard = []
    record_many(EventLog(store, clock, size=10, subscribers=[heard.append]), 2)
    assert ids(heard) == [1, 2]


def test_the_history_is_bounded_and_survives_the_keeper(tmp_path, clock):
    path = tmp_path / "store.sqlite"
    store = SqliteStore(path)
    event_log = EventLog(store, clock, size=150)
    record_many(event_log, 1000, "lab")
    store.close()
    store = SqliteStore(path)
    event_log = EventLog(store, clock, size=150)
    gone = event_log.forgotten(0)
    assert 150 <= 1000 - gone <= 250
    assert event_log.last_id == 1000
    assert ids(event_log.after(0, View(server="lab"), limit=2)) == [gone + 1, gone + 2]
    assert event_log.latest(View(server="other"), limit=5) == []
    store.close()


@pytest.fixture(params=["in memory", "in a file"])
def any_store(request, tmp_path):
    if request.param == "in memory":
        yield MemoryStore()
        return
    with contextlib.closing(SqliteStore(tmp_path / "store.sqlite")) as store:
        yield store


def by(event_log):
    return Counter(entry.origin.actor for entry in event_log.latest(limit=10_000))


def test_an_actor_with_many_entries_does_not_displace_others(any_store, clock):
    event_log = EventLog(any_store, clock, size=1000)
    for actor, count in (
        ("keeper", 30),
        ("ada", 200),
        ("bob", 5000),
        ("ada", 1),
        ("cy", 600),
        ("bob", 199),
    ):
        for number in range(count):
            event_log.record(KIND, "lab", str(number), origin=Origin(actor))
    kept = by(event_log)
    assert (kept["keeper"], kept["ada"]) == (30, 201)
    assert {
        actor: 370 <= count <= 484 for actor, count in kept.items() if actor in {"bob", "cy"}
    } == {"bob": True, "cy": True}
    assert sum(kept.values()) <= 1100
    newest = event_log.latest(limit=199)
    assert [entry.message for entry in newest] == [str(number) for number in range(199)]


def test_with_more_actors_than_entries_the_newest_entry_stays(any_store, clock):
    event_log = EventLog(any_store, clock, size=100)
    for number in range(1000):
        event_log.record(KIND, "lab", str(number), origin=Origin(f"actor {number % 150}"))
    assert event_log.latest(limit=1)[0].message == "999"


def test_dropped_entries_are_counted(any_store, clock):
    event_log = EventLog(any_store, clock, size=100)
    assert event_log.forgotten(0) == 0
    for number in range(1000):
        event_log.record(KIND, "lab", "", origin=Origin("ada" if number % 50 == 0 else "bob"))
    kept = ids(event_log.latest(limit=1000))
    assert kept[0] == 1
    for after in (0, 1, 2, 500, kept[-2], 1000, 2000):
        assert event_log.forgotten(after) == len(set(range(after + 1, 1001)) - set(kept)), after


@pytest.mark.parametrize("broken", ['{"id": 1}', "none"])
def test_an_unreadable_row_is_reported_as_damage(tmp_path, broken):
    store = SqliteStore(tmp_path / "store.sqlite")
    store._db.execute("INSERT INTO history VALUES (1, NULL, ?)", (broken,))
    with pytest.raises(StoreError, match="damaged"):
        store.latest(limit=1)
    store.close()


LIMITS = {
    "everything": (EVERYTHING, [1, 2, 3, 4, 5, 6]),
    "by name": (TokenLimits(("a-?", "c*")), [2, 3, 4]),
    "by a label": (TokenLimits(labels={"team": "blue"}), [2, 5]),
    "by labels with what a path of JSON would take for its own": (
        TokenLimits(labels={'o."dd': "it's", "team": "red"}),
        [3],
    ),
    "by a user": (TokenLimits(users=("ada", "bob")), [3, 5]),
    "by both": (TokenLimits(("a-*",), {"team": "blue"}), [2]),
    "nothing": (TokenLimits(("zz",)), []),
}


@pytest.mark.parametrize(("limits", "expected"), LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_token_limits_restrict_the_entries_that_are_returned(
    tmp_path, clock, kind, limits, expected
):
    """In memory as in the store; entries without a server require an unlimited token."""
    store = MemoryStore() if kind == "memory" else SqliteStore(tmp_path / "labkeeper.sqlite")
    names = [None, "a-1", "a-2", "c", "b", None]
    labels = [
        {},
        {"team": "blue"},
        {"team": "red", 'o."dd': "it's"},
        {"team": "green"},
        {"team": "blue"},
        {},
    ]
    users = [None, None, "ada", "eve", "bob", None]
    known = [
        HistoryEntry(number, 1.0, KIND, name, "m", labels=of, user=user)
        for number, (name, of, user) in enumerate(zip(names, labels, users, strict=True), start=1)
    ]
    store.remember(known, keep=100)
    event_log = EventLog(store, clock, size=100)
    assert ids(event_log.after(0, View(limits=limits), limit=10)) == expected
    assert ids(event_log.latest(View(limits=limits), limit=2)) == expected[-2:]
    assert ids(event_log.latest(View(server="a-1", limits=limits), limit=9)) == [
        number for number in expected if number == 2
    ]
    event_log._recent.extend(known)
    assert ids(event_log.after(0, View(limits=limits), limit=10)) == expected
    assert ids(event_log.after(0, View(server="b", limits=limits), limit=10)) == [
        number for number in expected if number == 5
    ]
    if kind == "sqlite":
        store.close()


ASKED = {
    "a kind": (View(kind=HistoryKind.GATEWAY), [2, 4]),
    "a part of an actor": (View(actor="en:a_"), [3, 4]),
    "what is older": (View(before=3), [1, 2]),
    "all of it": (View("lab", kind=HistoryKind.GATEWAY, actor="token", before=4), [2]),
}


@pytest.mark.parametrize(("view", "expected"), ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_view_restricts_the_entries_in_memory_as_in_the_store(
    tmp_path, clock, kind, view, expected
):
    store = MemoryStore() if kind == "memory" else SqliteStore(tmp_path / "labkeeper.sqlite")
    kinds = [KIND, HistoryKind.GATEWAY] * 2
    actors = ["token:ab", "token:ab", "token:a_", "token:a_"]
    known = [
        HistoryEntry(number, 1.0, of, "lab", "m", Origin(actor))
        for number, (of, actor) in enumerate(zip(kinds, actors, strict=True), start=1)
    ]
    store.remember(known, keep=100)
    event_log = EventLog(store, clock, size=100)
    assert ids(event_log.latest(view, limit=10)) == expected
    assert ids(event_log.latest(view, limit=1)) == expected[-1:]
    event_log._recent.extend(known)
    assert ids(event_log.after(0, view, limit=10)) == expected
    if kind == "sqlite":
        store.close()


def test_an_entry_has_the_labels_of_its_server_at_that_time(event_log, store):
    """An entry about a server that is gone has none."""
    spec = ServerSpec(name="lab", root_dir="/", labels={"team": "blue"}, user="ada")
    snapshot = Snapshot(spec, State.STARTING, Goal.UP, 1.0, 1.0)
    event_log.changed(Change(Event.START, None, snapshot, 1.0))
    record_many(event_log, 1, "lab")
    event_log.changed(
        Change(
            Event.EXITED, snapshot, replace(snapshot, state=State.STOPPED, goal=Goal.ABSENT), 2.0
        )
    )
    record_many(event_log, 1, "lab")
    assert [(dict(entry.labels), entry.user) for entry in store.history] == [
        ({"team": "blue"}, "ada")
    ] * 3 + [({}, None)]
