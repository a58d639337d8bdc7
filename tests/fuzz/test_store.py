"""Fuzz the store: a modified file is loaded, or reported as damaged, without a crash."""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fuzzing import DEPTHS, FUZZ, JSON, nested
from labkeeper.core.errors import StoreError
from labkeeper.core.lifecycle import Goal, State
from labkeeper.core.messages import HistoryEntry
from labkeeper.core.server import OrphanedKernel, Snapshot
from labkeeper.core.usage import Point
from labkeeper.store.queries import SqliteStore
from labkeeper.testing.fakes import a_spec

TABLES = {
    "servers": ("name", "snapshot"),
    "orphans": ("kernel_id", "kernel"),
    "history": ("server", "entry"),
}
NAME = a_spec("a").qualified_name
CELLS = JSON.map(json.dumps) | st.text() | DEPTHS.map(nested).map(bytes.decode)


def read_all(path):
    with contextlib.suppress(StoreError), contextlib.closing(SqliteStore(path)) as store:
        for ask, kind in (
            (store.load, Snapshot),
            (store.orphans, OrphanedKernel),
            (lambda: store.latest(limit=10), HistoryEntry),
            (lambda: store.remembered(after=0, limit=10), HistoryEntry),
        ):
            with contextlib.suppress(StoreError):
                assert all(isinstance(one, kind) for one in ask())
        with contextlib.suppress(StoreError):
            assert isinstance(store.last_id() - store.forgotten(0), int)
        with contextlib.suppress(StoreError):
            store.webhook("https://hook")
        with contextlib.suppress(StoreError):
            assert all(isinstance(one, Point) for one in store.usage(NAME, 60, since=-(2**63)))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "store.sqlite"
    with contextlib.closing(SqliteStore(path)):
        return path


@contextlib.contextmanager
def emptied_tables(path):
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for table in (*TABLES, "webhooks", "usage"):
            db.execute(f"DELETE FROM {table}")
        yield db


@FUZZ
@given(table=st.sampled_from(sorted(TABLES)), cell=CELLS, as_bytes=st.booleans())
def test_row_may_contain_any_text(path, table, cell, as_bytes):
    key, column = TABLES[table]
    value = "CAST(? AS TEXT)"  # Applied to bytes, this stores invalid text.
    with emptied_tables(path) as db:
        given_ = (
            cell.encode(errors="surrogatepass") + b"\xff"
            if as_bytes
            else cell.encode(errors="replace")
        )
        db.execute(f"INSERT INTO {table} ({key}, {column}) VALUES ('a', {value})", (given_,))
    read_all(path)


@FUZZ
@given(numbers=st.tuples(*[st.none() | st.integers(-(2**63), 2**63 - 1)] * 3))
@example(numbers=(None, None, None))
def test_numbers_may_be_anything_or_missing(path, numbers):
    with emptied_tables(path) as db:
        db.execute("INSERT INTO webhooks VALUES ('https://hook', ?, ?, ?)", numbers)
    read_all(path)


@FUZZ
@given(
    numbers=st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 5),
    processors=st.tuples(*[st.floats(allow_nan=False)] * 2),
)
@example(numbers=(2**63 - 1,) * 5, processors=(math.inf, -math.inf))
def test_usage_may_be_any_numbers(path, numbers, processors):
    """It is added to, and read, as if they were right."""
    at, generation, samples, *memory = numbers
    row = ("a", 60, at, generation, samples, *memory, *processors, 1)
    with emptied_tables(path) as db:
        db.execute("INSERT INTO servers VALUES ('a', '{}')")
        db.execute(f"INSERT INTO usage VALUES ({', '.join('?' * len(row))})", row)
    with contextlib.closing(SqliteStore(path)) as store, contextlib.suppress(StoreError):
        store.add_usage({(NAME, 60): [Point(at, 1, 1, 1.0, 1.0, 1.0, 1.0, 1)]})
    read_all(path)


@FUZZ
@given(schema_version=st.integers(-(2**31), 2**31 - 1))
@example(schema_version=-1)
def test_schema_version_may_be_any_number(path, schema_version):
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {schema_version}")
    read_all(path)


@FUZZ
@given(data=st.data())
def test_any_bytes_of_the_file_may_change(path, data):
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    other = path.with_name("other.sqlite")
    other.write_bytes(content)
    read_all(other)


def test_sqlite_error_that_is_not_valid_text_is_reported(path):
    """SQLite's message quotes the damaged file."""
    other = path.with_name("other.sqlite")
    other.write_bytes(
        path.read_bytes().replace(b"(url TEXT PRIMARY KEY", b"(url TEXT PRIMARY \x80EY")
    )
    with (
        pytest.raises(StoreError, match="not text"),
        contextlib.closing(SqliteStore(other)) as store,
    ):
        store.webhook("https://hook")


SNAPSHOTS = st.builds(
    Snapshot,
    spec=st.just(a_spec()),
    state=st.sampled_from(State),
    goal=st.sampled_from(Goal),
    since=st.floats(0, 1e11),
    created_at=st.floats(0, 1e11),
)


@FUZZ
@given(snapshot=SNAPSHOTS)
def test_snapshot_survives_a_round_trip(path, snapshot):
    with contextlib.closing(SqliteStore(path)) as store:
        store.save(snapshot)
        assert store.load() == [snapshot]
