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
    ServerName,
    ServerSpec,
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
