"""The SQLite store: what it keeps, migrates and wipes, and the damaged files it refuses."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from harness import until
from labkeeper.core.access import SessionUse, TokenLimits
from labkeeper.core.errors import StoreError
from labkeeper.core.lifecycle import Goal, State
from labkeeper.core.server import (
    Endpoint,
    Exit,
    Failure,
    FailureClass,
    GatewayHealth,
    Instance,
    OrphanedKernel,
    OwnKernel,
    Session,
    Snapshot,
    StopMethod,
    StopReport,
)
from labkeeper.core.spec import Gateway, ServerName, ServerSpec
from labkeeper.core.usage import Point
from labkeeper.store.queries import SqliteStore

FULL = Snapshot(
    spec=ServerSpec(
        ServerName("full"),
        "/notebooks",
        base_url="/x/",
        port=8888,
        env={"A": "1"},
        labels={"team": "ä"},
        jupyter_options={"A.switch": False, "A.count": 1, "A.rate": 1.5},
        kernels_by="exec",
        gateway=Gateway(
            "http://g", "ws://g", auth_token="secret", headers={"X": "y"}, request_timeout=2.5
        ),
    ),
    state=State.FAILED,
    goal=Goal.UP,
    since=2.5,
    created_at=1.5,
    generation=7,
    endpoint=Endpoint(
        "http://h:8888/x/", "token", "/x/", "h", 8888, False, False, "/notebooks", "2.0"
    ),
    instance=Instance("boot/12/345", 12, "exec", "why", {"memory": "cgroup2"}),
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
BARE = Snapshot(
    ServerSpec(ServerName("bare"), "/notebooks"),
    State.STOPPED,
    Goal.DOWN,
    since=1.0,
    created_at=1.0,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "labkeeper.sqlite"


@pytest.fixture
def store(path):
    opened = SqliteStore(path)
    yield opened
    opened.close()


def test_saved_snapshots_are_loaded_unchanged_by_the_next_keeper(store, path):
    for snapshot in (FULL, BARE):
        store.save(snapshot)
    store.save(replace(BARE, state=State.RUNNING))
    other = SqliteStore(path)
    assert other.load() == [replace(BARE, state=State.RUNNING), FULL]
    other.close()


def test_a_spec_of_an_earlier_version_has_the_defaults_of_later_fields(store):
    store.save(BARE)
    store._db.execute("UPDATE servers SET snapshot = json_remove(snapshot, '$.spec.kernels_by')")
    assert "kernels_by" not in str(store._rows("SELECT snapshot FROM servers"))
    assert store.load() == [BARE]


def test_a_forgotten_server_is_gone(store):
    store.save(BARE)
    store.forget(BARE.name)
    store.forget(BARE.name)
    assert store.load() == []


def test_the_files_are_private(store, path):
    store.save(FULL)
    for part in path.parent.iterdir():
        assert part.stat().st_mode & 0o077 == 0, part


def test_a_file_that_is_not_a_database_is_refused_and_kept(path):
    path.write_bytes(b"something else " * 100)
    with pytest.raises(StoreError, match="damaged"):
        SqliteStore(path)
    assert path.read_bytes() == b"something else " * 100


def test_a_row_that_is_not_a_snapshot_is_refused(store, path):
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute("INSERT INTO servers VALUES ('x', '{\"state\": 7}')")
    other.close()
    with pytest.raises(StoreError, match="damaged"):
        store.load()


def test_a_newer_schema_is_refused(store, path):
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(StoreError, match="newer"):
        SqliteStore(path)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(StoreError, match="nowhere"):
        SqliteStore(tmp_path / "nowhere" / "x.sqlite")


def test_a_full_disk_is_distinguished_from_other_errors(store):
    store._db.execute("PRAGMA max_page_count = 1")
    with pytest.raises(StoreError, match=r"cannot write the store .*full") as caught:
        store.save(replace(BARE, spec=replace(BARE.spec, root_dir="/" + "x" * 100_000)))
    assert caught.value.details == {"failure_class": "disk-full"}
    store._db.execute("PRAGMA query_only = ON")
    with pytest.raises(StoreError, match=r"cannot write the store .*readonly") as caught:
        store.save(BARE)
    assert caught.value.details == {}


def test_a_row_that_is_not_text_is_a_store_error(store):
    store._db.execute("INSERT INTO servers VALUES ('lab', CAST(x'ff' AS TEXT))")
    with pytest.raises(StoreError, match="cannot read the store"):
        store.load()


def test_a_failed_statement_is_a_store_error(store, path):
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute("DROP TABLE servers")
    other.close()
    for call in (lambda: store.save(BARE), lambda: store.forget(BARE.name), store.load):
        with pytest.raises(StoreError, match="cannot"):
            call()


ORPHANS = [
    OrphanedKernel(
        "k1",
        Gateway("http://g", "ws://g", auth_token="secret", headers={"X": "y"}),
        ServerName("lab"),
        1.5,
    ),
    OrphanedKernel("k2", Gateway("http://h", "ws://h"), ServerName("lab"), 2.5),
]


def test_orphaned_kernels_are_kept_across_keepers_until_discarded(path):
    store = SqliteStore(path)
    store.add_orphans(ORPHANS)
    store.add_orphans(ORPHANS[:1])
    store.close()
    store = SqliteStore(path)
    assert store.orphans() == ORPHANS
    store.discard_orphans(["k1", "k9"])
    assert store.orphans() == ORPHANS[1:]
    store.close()


def test_an_unreadable_orphaned_kernel_is_reported_as_damage(path, store):
    store.add_orphans(ORPHANS)
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute("UPDATE orphans SET kernel = '{}'")
    with pytest.raises(StoreError, match="damaged"):
        store.orphans()


def a_point(at, memory=4096, cpus=0.5, *, generation=1, samples=12, kernels=1):
    return Point(at, generation, samples, memory, 2 * memory, cpus, 2 * cpus, kernels)


def test_usage_is_kept_across_keepers_by_level_and_merged_as_points_are(path):
    """A mean is weighted with the number of samples."""
    first = [a_point(60), a_point(120, 8192, 1.25, kernels=-1)]
    later = [a_point(120, 12288, 0.5, generation=2, samples=4, kernels=3), a_point(180)]
    hour = [a_point(0, 5)]
    with contextlib.closing(SqliteStore(path)) as store:
        store.save(BARE)
        store.add_usage({(BARE.name, 60): first, (BARE.name, 3600): hour})
    with contextlib.closing(SqliteStore(path)) as store:
        store.add_usage({(BARE.name, 60): later})
        merged = first[1].merged(later[0])
        assert store.usage(BARE.name, 60, since=0) == [first[0], merged, later[1]]
        assert store.usage(BARE.name, 60, since=120) == [merged, later[1]]
        assert store.usage(BARE.name, 3600, since=0) == hour
        assert merged == Point(120, 2, 16, 9216.0, 24576, 1.0625, 2.5, 3)


def test_usage_ends_with_the_server(store):
    for snapshot in (BARE, FULL):
        store.save(snapshot)
        store.add_usage({(snapshot.name, 60): [a_point(60)]})
    store.forget(BARE.name)
    store.add_usage({(BARE.name, 60): [a_point(120)], (FULL.name, 60): [a_point(120)]})
    store.save(BARE)
    assert store.usage(BARE.name, 60, since=0) == []
    assert len(store.usage(FULL.name, 60, since=0)) == 2


def test_only_the_newest_usage_remains_after_a_trim(store):
    for snapshot in (BARE, FULL):
        store.save(snapshot)
        store.add_usage({(snapshot.name, 60): [a_point(60 * n) for n in range(5)]})
    store.add_usage({(BARE.name, 3600): [a_point(0), a_point(3600)]})
    store.trim_usage({60: 2, 3600: 2})
    for snapshot in (BARE, FULL):
        assert [point.at for point in store.usage(snapshot.name, 60, since=0)] == [180, 240]
    assert len(store.usage(BARE.name, 3600, since=0)) == 2


def test_usage_is_added_as_a_whole_or_not_at_all(store):
    """On a disk that is full before the end."""
    store.save(BARE)
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(StoreError, match="full"):
        store.add_usage({(BARE.name, 60): [a_point(60 * n) for n in range(5000)]})
    assert store.usage(BARE.name, 60, since=0) == []
    store.add_usage({(BARE.name, 60): [a_point(60)]})
    assert store.load() == [BARE]


def test_usage_that_is_no_number_is_damage(store, monkeypatch):
    store.save(BARE)
    monkeypatch.setattr(store, "_rows", lambda *_: [(60, None, 1, 1, 1, 1.0, 1.0, 1)])
    with pytest.raises(StoreError, match="damaged"):
        store.usage(BARE.name, 60, since=0)


@pytest.fixture
def files_with(path):
    """Return the names of the store's files that contain a text."""

    def files_with(text):
        return sorted(
            file.name for file in path.parent.iterdir() if text.encode() in file.read_bytes()
        )

    return files_with


def test_wiping_removes_every_trace_of_dropped_rows_from_the_disk(store, files_with):
    """A row of many pages, its shorter predecessor, and an orphaned kernel; another row stays."""
    bare = replace(BARE.spec, env={"A": "a-secret", "B": "x" * 20_000, "C": "another-secret"})
    store.save(BARE)
    store.save(replace(BARE, spec=replace(BARE.spec, env={"A": "first-secret"})))
    store.save(replace(BARE, spec=bare))
    store.save(FULL)
    store.add_orphans(
        [
            OrphanedKernel(
                "k1",
                Gateway("http://g", "ws://g", auth_token="gateway-secret"),
                ServerName("bare"),
                1.5,
            )
        ]
    )
    store.forget(ServerName("bare"))
    store.discard_orphans(["k1"])
    store.wipe()
    assert not [
        text
        for text in ("first-secret", "a-secret", "another-secret", "gateway-secret")
        if files_with(text)
    ]
    assert files_with('"token":"token"')
    assert store.load() == [FULL]


def test_wiping_does_not_wait_for_readers_and_is_completed_later(store, path, files_with):
    store.save(replace(BARE, spec=replace(BARE.spec, env={"A": "a-secret"})))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN")
        assert len(other.execute("SELECT * FROM servers").fetchall()) == 1
        store.forget(ServerName("bare"))
        store.wipe()
        assert len(other.execute("SELECT * FROM servers").fetchall()) == 1
    store.wipe()
    assert not files_with("a-secret")


def test_of_concurrent_wipes_only_one_waits_for_a_long_read(store, files_with):
    """Each one occupies a thread that starts servers."""
    store.save(replace(BARE, spec=replace(BARE.spec, env={"A": "a-secret"})))
    with store._reading:
        threads = [threading.Thread(target=store.wipe) for _ in range(4)]
        for thread in threads:
            thread.start()
        until(
            lambda: sum(thread.is_alive() for thread in threads) == 1, what="one thread to be left"
        )
        store.forget(ServerName("bare"))
    for thread in threads:
        thread.join()
    assert not files_with("a-secret")


def test_the_next_keeper_wipes_what_a_killed_one_had_dropped(store, path, files_with):
    store.save(replace(BARE, spec=replace(BARE.spec, env={"A": "a-secret"})))
    store.forget(ServerName("bare"))
    assert files_with("a-secret")
    with contextlib.closing(SqliteStore(path)):
        assert not files_with("a-secret")


of_each_older_version = pytest.mark.parametrize("version", [6, 7, 9, 10])


def older_file(path, version):
    """Create a store of an older schema version."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript((Path(__file__).parent / "data" / f"store-v{version}.sql").read_text())
    path.chmod(0o600)


def everything(store):
    return (
        store.load(),
        store.orphans(),
        store.latest(limit=10),
        store.tokens(),
        store.webhook("https://hook"),
        store.runtime_dirs(),
        store.sessions(),
    )


def test_the_last_use_of_sessions_is_replaced_as_a_whole(store):
    assert store.session_use() is None
    for use in (SessionUse(1.5, 2.5, {"a": 1.0, "b": 0.5}), SessionUse(3.0, 4.0, {})):
        store.save_session_use(use)
        assert store.session_use() == use


@of_each_older_version
def test_an_older_store_is_migrated(path, version):
    """Nothing is lost, renamed fields have their new names, and saving changes nothing."""
    older_file(path, version)
    with contextlib.closing(SqliteStore(path)) as store:
        before = everything(store)
        restarts, running, stopped = before[0]
        (orphan,), (token,), events = before[1], before[3], before[2]
        assert (restarts.name, restarts.goal) == ("restarts", Goal.AGAIN_KEEPING_KERNELS)
        assert (running.name, running.generation, running.goal) == ("running", 7, Goal.UP)
        # That of version 6 has other fields, and the server is asked again.
        assert (running.endpoint and running.endpoint.port) == (None if version == 6 else 8888)
        assert running.spec.env == {"A": 'ü "quoted"'}
        assert (running.since, running.kernels_kept[0].sessions[0].path) == (
            1764000000.25,
            "a.ipynb",
        )
        assert (stopped.generation, stopped.stop_report.seconds) == (3, 0.25)
        assert (orphan.kernel_id, orphan.gateway.auth_token, orphan.starting) == (
            "k9",
            "gateway-token",
            True,
        )
        assert [(event.id, event.generation, event.origin.actor) for event in events] == [
            (1, 7, "token:ci"),
            (2, None, "user:root"),
            (3, 2, "token:ci"),
        ]
        assert [event.details.get("goal") for event in events] == [
            None,
            None,
            "again-keeping-kernels",
        ]
        assert token.limits == TokenLimits(("team-*",), {"team": "physics"}, ("ada",))
        sessions = [(s.id, s.server, s.scope, s.parent) for s in store.sessions()]
        assert sessions == ([] if version < 9 else [("3f9a0c21d4e7", "running", "manage", None)])
        use = SessionUse(86400.5, 1764000001.0, {"3f9a0c21d4e7": 60.5})
        assert store.session_use() == (use if version == 10 else None)
        assert store.usage(running.qualified_name, 60, since=0) == []
        assert before[4:6] == ((2, 1, 0), [Path("/run/labkeeper")])
        for snapshot in before[0]:
            store.save(snapshot)
        assert everything(store) == before


@of_each_older_version
def test_a_store_is_copied_before_it_is_migrated(path, version):
    older_file(path, version)
    was = path.read_bytes()
    with contextlib.closing(SqliteStore(path)):
        pass
    copy = path.with_name(f"{path.name}.v{version}")
    assert copy.stat().st_mode & 0o777 == 0o600
    with (
        contextlib.closing(sqlite3.connect(copy)) as ours,
        contextlib.closing(sqlite3.connect(":memory:")) as theirs,
    ):
        theirs.deserialize(was)
        assert [*ours.iterdump()] == [*theirs.iterdump()]
        assert ours.execute("PRAGMA user_version").fetchone() == (version,)
    assert [file.name for file in path.parent.iterdir()] == [path.name, copy.name]


KILLED = """
import os, signal, sqlite3, sys
from pathlib import Path
from labkeeper.store.queries import SqliteStore

left = int(sys.argv[2])

def count(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

connect = SqliteStore._connect

def counting(self, **options):
    db = connect(self, **options)
    db.set_trace_callback(count)
    db.set_progress_handler(count, 50)
    return db

SqliteStore._connect = counting
SqliteStore(Path(sys.argv[1])).close()
print(left)
"""


@of_each_older_version
def test_a_migration_that_is_killed_at_any_point_loses_nothing(tmp_path, version):
    """Killed before each statement, and every few steps within them."""
    whole = tmp_path / "whole.sqlite"
    older_file(whole, version)
    with contextlib.closing(SqliteStore(whole)) as store:
        expected = everything(store)
    killed, moment = 0, 1
    while True:
        path = tmp_path / f"{moment}.sqlite"
        older_file(path, version)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, path, str(moment)],
            capture_output=True,
            text=True,
            check=False,
        )
        with contextlib.closing(SqliteStore(path)) as store:
            assert everything(store) == expected
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        killed, moment = killed + 1, moment + 3
    assert killed > 5


@of_each_older_version
def test_without_a_copy_a_store_is_not_migrated(path, version):
    older_file(path, version)
    path.with_name(f"{path.name}.v{version}.half").mkdir()
    with pytest.raises(StoreError, match=r"cannot copy the store .* before it is migrated"):
        SqliteStore(path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (version,)


def test_the_last_recorded_runtime_directories_are_returned(path):
    store = SqliteStore(path)
    assert store.runtime_dirs() == []
    store.note_runtime_dirs([Path("/two"), Path("/one"), Path(os.fsdecode(b"/\xff"))])
    store.close()
    store = SqliteStore(path)
    assert set(store.runtime_dirs()) == {Path("/one"), Path("/two"), Path(os.fsdecode(b"/\xff"))}
    store.note_runtime_dirs([Path("/two")])
    assert store.runtime_dirs() == [Path("/two")]
    store.close()


def test_a_runtime_directory_that_is_not_a_path_is_damage(path, store):
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute("INSERT INTO runtime_dirs VALUES (x'612f62')")
    with pytest.raises(StoreError, match="damaged"):
        store.runtime_dirs()
