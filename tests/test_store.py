"""Snapshots outlive the keeper, whole; a file that cannot be trusted is refused and kept."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

import pytest

from labkeeper.core.errors import StoreError
from labkeeper.core.lifecycle import Goal, State
from labkeeper.core.model import (
    Endpoint,
    Exit,
    Failure,
    FailureClass,
    Gateway,
    GatewayHealth,
    KernelDebt,
    OwnKernel,
    ServerName,
    ServerSpec,
    Session,
    Snapshot,
    StopMethod,
    StopReport,
)
from labkeeper.store import SqliteStore

FULL = Snapshot(
    spec=ServerSpec(
        ServerName("full"),
        "/notebooks",
        base_url="/x/",
        port=8888,
        env={"A": "1"},
        labels={"team": "ä"},
        jupyter_options={"A.switch": False, "A.count": 1, "A.rate": 1.5},
        gateway=Gateway("http://g", "ws://g", auth_token="secret", headers={"X": "y"}, request_timeout=2.5),
    ),
    state=State.FAILED,
    goal=Goal.UP,
    since=2.5,
    created_at=1.5,
    launch=7,
    endpoint=Endpoint("/x/", "h", "/notebooks", False, 12, 8888, False, "token", "http://h:8888/x/", "2.0"),
    started_at=2.0,
    exit=Exit(signal="SIGKILL"),
    failure=Failure(FailureClass.KILLED, "why", Exit(code=1), ("a", "b")),
    stop_report=StopReport(StopMethod.SIGTERM, 0.5, ("k1",), ("k2",)),
    restarts=2,
    revised=ServerSpec(ServerName("full"), "/elsewhere", kernel_env={"KERNEL_A": "1"}),
    gateway=GatewayHealth(2.5, Failure(FailureClass.GATEWAY_TIMEOUT, "slow")),
    kernels_kept=(OwnKernel("k3", (Session("a.ipynb", "a.ipynb", "notebook"),)), OwnKernel("k4")),
    up_since=1.75,
    snoozed_until=9.5,
)
BARE = Snapshot(ServerSpec(ServerName("bare"), "/notebooks"), State.STOPPED, Goal.DOWN, since=1.0, created_at=1.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "labkeeper.sqlite"


@pytest.fixture
def store(path):
    opened = SqliteStore(path)
    yield opened
    opened.close()


def test_what_is_saved_is_loaded_the_same_by_the_next_keeper(store, path):
    for snapshot in (FULL, BARE):
        store.save(snapshot)
    store.save(replace(BARE, state=State.RUNNING))
    other = SqliteStore(path)
    assert other.load() == [replace(BARE, state=State.RUNNING), FULL]
    other.close()


def test_what_is_forgotten_is_gone(store):
    store.save(BARE)
    store.forget(BARE.name)
    store.forget(BARE.name)
    assert store.load() == []


def test_the_file_is_private(store, path):
    store.save(FULL)
    for part in path.parent.iterdir():
        assert part.stat().st_mode & 0o077 == 0, part


def test_a_file_that_is_no_database_is_refused_and_kept(path):
    path.write_bytes(b"something else " * 100)
    with pytest.raises(StoreError, match="damaged"):
        SqliteStore(path)
    assert path.read_bytes() == b"something else " * 100


def test_a_row_that_is_no_snapshot_is_refused(store, path):
    with sqlite3.connect(path) as other:
        other.execute("INSERT INTO servers VALUES ('x', '{\"state\": 7}')")
    other.close()
    with pytest.raises(StoreError, match="damaged"):
        store.load()


def test_a_newer_file_is_refused(store, path):
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(StoreError, match="newer"):
        SqliteStore(path)


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StoreError, match="nowhere"):
        SqliteStore(tmp_path / "nowhere" / "x.sqlite")


def test_a_write_that_fails_says_so(store, path):
    with sqlite3.connect(path) as other:
        other.execute("DROP TABLE servers")
    other.close()
    for call in (lambda: store.save(BARE), lambda: store.forget(BARE.name), store.load):
        with pytest.raises(StoreError, match="cannot"):
            call()


DEBTS = [
    KernelDebt("k1", Gateway("http://g", "ws://g", auth_token="secret", headers={"X": "y"}), ServerName("lab"), 1.5),
    KernelDebt("k2", Gateway("http://h", "ws://h"), ServerName("lab"), 2.5),
]


def test_debts_outlive_the_keeper_until_they_are_settled(path):
    store = SqliteStore(path)
    store.owe(DEBTS)
    store.owe(DEBTS[:1])
    store.close()
    store = SqliteStore(path)
    assert store.debts() == DEBTS
    store.settle(["k1", "k9"])
    assert store.debts() == DEBTS[1:]
    store.close()


def test_a_debt_that_cannot_be_read_is_damage(path, store):
    store.owe(DEBTS)
    with sqlite3.connect(path) as other:
        other.execute("UPDATE debts SET debt = '{}'")
    with pytest.raises(StoreError, match="damaged"):
        store.debts()


def test_a_file_of_the_layout_before_is_carried_over(path):
    """It had servers, and no debts."""
    store = SqliteStore(path)
    store.save(BARE)
    store.close()
    with sqlite3.connect(path) as older:
        older.execute("DROP TABLE debts")
        older.execute("PRAGMA user_version = 1")
    store = SqliteStore(path)
    assert (store.load(), store.debts()) == ([BARE], [])
    store.owe(DEBTS)
    store.close()
