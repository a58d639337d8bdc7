"""Recovery from full and read-only disks, damaged stores, and clocks that jump."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from harness import (
    KeeperProcess,
    alive,
    forked,
    parent_of,
    processes_marked,
    run_cell,
    servers_in,
    start_kernel,
    until,
)
from shortages import Disk

pytestmark = pytest.mark.timeout(300)
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="forking needs Linux")
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
DAY = 24 * 3600


@needs_linux
def test_uncollected_exit_status_does_not_keep_the_fork_server_alive(make_keeper):
    keeper = make_keeper(launch_by="fork").start()
    server = forked(keeper)
    keeper.kill()
    # As if the keeper had been killed before it recorded the server's process:
    # the next keeper ends that process, and never asks for its exit status.
    (keeper.server_dirs / "default" / "launch.json").unlink()
    keeper.start()
    again = until(lambda: (s := keeper.wait_for("running"))["pid"] != server["pid"] and s)
    parents = {parent_of(again)} if again["launched_by"] == "fork" else set()
    assert keeper.stop() == 0
    assert not [pid for pid in parents if alive(pid)]
    assert not keeper.in_server_dirs()


def downgrade_to_schema_6(keeper):
    """Rewrite the files of a stopped keeper to those of one with schema 6 of the store."""
    with contextlib.closing(sqlite3.connect(keeper.state_dir / "labkeeper.sqlite")) as db, db:
        for table, column, now, then in (
            ("servers", "snapshot", "generation", "launch"),
            ("history", "entry", "generation", "launch"),
            ("tokens", "token", "limits", "reach"),
        ):
            for row, text in db.execute(f"SELECT rowid, {column} FROM {table}").fetchall():
                fields = json.loads(text)
                fields[then] = fields.pop(now)
                db.execute(
                    f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (json.dumps(fields), row)
                )
        db.execute("ALTER TABLE orphans RENAME COLUMN kernel TO debt")
        db.execute("ALTER TABLE orphans RENAME TO debts")
        db.execute("PRAGMA user_version = 6")
    for path in keeper.server_dirs.glob("*/launch.json"):
        record = json.loads(path.read_text())
        del record["version"]
        path.write_text(json.dumps({"launch": record.pop("generation")} | record))
    for path in (
        keeper.state_dir / "keeper.json",
        *keeper.server_dirs.glob("*/jupyter/kernels.json"),
    ):
        record = json.loads(path.read_text())
        del record["version"]
        path.write_text(json.dumps(record))


def test_servers_of_the_previous_store_schema_are_adopted(make_keeper):
    keeper = make_keeper().start()
    lives = keeper.post(name="lives", env={"A": "b"}).json()
    keeper.http.post("/api/tokens", json={"name": "ci", "scope": "read", "servers": ["l*"]})
    keeper.kill()
    downgrade_to_schema_6(keeper)
    keeper.start()
    now = keeper.wait_for("running", "lives")
    assert (now["pid"], now["token"], now["generation"]) == (
        lives["pid"],
        lives["token"],
        lives["generation"],
    )
    again = keeper.post(name="lives", env={"A": "b"})
    assert (again.status_code, again.json()["pid"]) == (200, lives["pid"])
    assert [token["servers"] for token in keeper.http.get("/api/tokens").json()["tokens"]] == [
        ["l*"]
    ]
    assert {
        event["generation"]
        for event in keeper.http.get("/api/servers/lives/events").json()["events"]
    } == {1}
    assert json.loads((keeper.server_dirs / "lives" / "launch.json").read_text())["version"] == 2
    assert keeper.stop() == 0


# Full disks


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path / "disk")
    yield made
    made.remove()


@pytest.fixture
def make_keeper_on(make_keeper, request):
    """Return a factory of keepers with their state directory on a disk, closed before it goes."""
    made = []

    def make(disk, **settings):
        keeper = make_keeper(stop_grace=4, kill_wait=1, **settings)
        keeper.state_dir = disk.path / "state"
        made.append(keeper)
        return keeper

    yield make
    for keeper in made:
        keeper.close()


def states(keeper):
    return {
        server["name"]: (server["state"], server["goal"])
        for server in keeper.http.get("/api/servers").json()["servers"]
    }


def stored_states(keeper):
    with contextlib.closing(
        sqlite3.connect(f"file:{keeper.state_dir / 'labkeeper.sqlite'}?mode=ro", uri=True)
    ) as store:
        rows = store.execute(
            "SELECT name, json_extract(snapshot, '$.state'), json_extract(snapshot, '$.goal')"
            " FROM servers"
        )
        return {name: (state, goal) for name, state, goal in rows}


def is_refused_for_lack_of_space(answer, keeper):
    """Assert that a start was refused because of the disk, and that the error names its path."""
    detail = answer.json()["detail"]
    assert answer.status_code in {502, 503}, answer.text
    assert "full" in detail or "No space left" in detail, detail
    assert str(keeper.state_dir) in detail, detail
    return True


@pytest.mark.root
def test_full_disk_refuses_starts_but_servers_keep_running_and_can_be_stopped(disk, make_keeper_on):
    keeper = make_keeper_on(disk)
    # The keeper's own log is on the full disk, too.
    keeper.log = disk.path / "keeper.log"
    keeper.start()
    servers = {
        name: keeper.post(name=name).json() for name in ("stays", "stops", "crashes", "rests")
    }
    assert keeper.post("/rests/stop").status_code == 200

    disk.fill()
    assert is_refused_for_lack_of_space(keeper.post(name="new"), keeper)
    disk.fill()
    assert is_refused_for_lack_of_space(keeper.post("/rests/start"), keeper)
    stopped = keeper.post("/stops/stop")
    assert (stopped.status_code, stopped.json()["state"]) == (200, "stopped"), stopped.text
    assert stopped.json()["stop_report"]["method"] == "shutdown"
    assert not alive(servers["stops"]["pid"])
    os.kill(servers["crashes"]["pid"], signal.SIGKILL)
    # Each exit frees some space.
    crashed = until(
        lambda: disk.fill() or ((s := keeper.get("crashes"))["state"] == "failed" and s),
        what="the keeper to give up the server",
    )
    assert (
        "full" in crashed["failure"]["message"] or "No space left" in crashed["failure"]["message"]
    )
    assert states(keeper)["stays"] == ("running", "up")
    assert keeper.get("stays")["pid"] == servers["stays"]["pid"]
    assert servers_in(keeper.server_dirs) == [servers["stays"]["pid"]]
    assert keeper.process.poll() is None

    disk.free()
    now = states(keeper)
    # What could not be stored is stored within seconds, without another request.
    until(lambda: stored_states(keeper) == now, what="the store to match the API")
    assert now["stops"] == ("stopped", "down")
    keeper.kill()
    keeper.start()
    keeper.wait_for("running", "stays")
    assert states(keeper) == now
    assert keeper.get("stays")["pid"] == servers["stays"]["pid"]
    for name in ("rests", "crashes"):
        assert keeper.post(f"/{name}/start").status_code == 201
    assert keeper.post(name="new").status_code in {200, 201}
    assert keeper.stop() == 0


@pytest.mark.root
def test_readiness_on_a_full_disk_is_recorded_once_there_is_space(disk, make_keeper_on):
    """Otherwise the next keeper would assume that the server was never ready."""
    keeper = make_keeper_on(disk)
    go = keeper.base / "go"
    keeper.configure_jupyter(
        f"import pathlib, time\nwhile not pathlib.Path('{go}').exists():\n    time.sleep(0.02)"
    )
    keeper.start()
    assert keeper.post("?wait=0").status_code == 202
    record = keeper.server_dirs / "default" / "launch.json"
    until(record.exists, what="the launch record")
    disk.fill()
    go.touch()
    keeper.wait_for("running")
    disk.free()
    until(
        lambda: json.loads(record.read_text())["ready"],
        what="the launch record to say that the server is ready",
    )


@pytest.mark.root
def test_keeper_shuts_down_gracefully_on_a_full_disk(disk, make_keeper_on):
    """Even though it cannot write to its log."""
    keeper = make_keeper_on(disk)
    keeper.log = disk.path / "keeper.log"
    keeper.start()
    server = keeper.post().json()
    disk.fill()
    assert keeper.stop() == 0
    assert not alive(server["pid"])
    assert not processes_marked(keeper.server_dirs)


@pytest.mark.root
@pytest.mark.parametrize("before", ["never used", "ended"])
def test_keeper_reports_a_full_disk_at_startup_in_one_line(disk, make_keeper_on, before):
    keeper = make_keeper_on(disk)
    if before != "never used":
        keeper.start()
        keeper.post("?wait=0", name="known")
        keeper.wait_for("running", "known")
        keeper.post("/known/stop")
        keeper.stop()
    disk.fill()
    result = keeper.cli("serve")
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert str(disk.path) in result.stderr
    assert "full" in result.stderr or "No space left" in result.stderr
    disk.free()
    keeper.start()
    assert states(keeper) == ({} if before == "never used" else {"known": ("stopped", "down")})


@pytest.mark.root
def test_servers_of_a_killed_keeper_are_adopted_on_a_full_disk(disk, make_keeper_on):
    """Everything that it needs exists already."""
    keeper = make_keeper_on(disk).start()
    server = keeper.post(name="lives").json()
    disk.fill()
    keeper.kill()
    keeper.start()
    assert keeper.wait_for("running", "lives")["pid"] == server["pid"]
    assert is_refused_for_lack_of_space(keeper.post(name="new"), keeper)
    assert keeper.delete("lives").status_code == 200
    assert not alive(server["pid"])
    disk.free()
    assert keeper.stop() == 0


# Read-only disks


@pytest.mark.root
def test_keeper_reports_a_read_only_disk_at_startup_in_one_line(disk, make_keeper_on):
    keeper = make_keeper_on(disk)
    keeper.start()
    assert keeper.stop() == 0
    disk.make_read_only()
    result = keeper.cli("serve")
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert str(keeper.state_dir) in result.stderr


class FailingDisk(Disk):
    """An ext4 disk that the kernel remounts read-only on an error, even while it is written to."""

    def __init__(self, path):
        self.path = path
        self.image = path.with_suffix(".img")
        path.mkdir()
        with self.image.open("wb") as image:
            image.truncate(64 * 1024 * 1024)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", self.image], check=True)
        self.mount()

    def mount(self):
        subprocess.run(["mount", "-o", "loop,errors=remount-ro", self.image, self.path], check=True)

    def make_read_only(self):
        # As in a crash, unsynced data would be lost, but that is not the subject here.
        subprocess.run(["sync", "-f", self.path], check=True)
        found = subprocess.run(
            ["findmnt", "-no", "SOURCE", self.path], check=True, capture_output=True, text=True
        )
        Path(f"/sys/fs/ext4/{Path(found.stdout.strip()).name}/trigger_fs_error").write_text("1")

    def repair(self):
        self.remove()
        subprocess.run(["fsck.ext4", "-p", "-f", self.image], check=False, capture_output=True)
        self.mount()

    def remove(self):
        super().remove()
        # The kernel releases the device once nothing on it is open any more.
        until(
            lambda: (
                str(self.image)
                not in subprocess.run(
                    ["losetup", "-a"], capture_output=True, text=True, check=True
                ).stdout
            )
        )


@pytest.fixture
def failing_disk(tmp_path):
    made = FailingDisk(tmp_path / "failing")
    yield made
    made.remove()


@pytest.mark.root
@pytest.mark.programs("mkfs.ext4")
@pytest.mark.skipif(not Path("/dev/loop-control").exists(), reason="needs loop devices")
def test_disk_turned_read_only_refuses_starts_but_servers_can_be_stopped(
    failing_disk, make_keeper_on
):
    keeper = make_keeper_on(failing_disk).start()
    servers = {name: keeper.post(name=name).json() for name in ("stays", "stops", "rests")}
    assert keeper.post("/rests/stop").status_code == 200
    failing_disk.make_read_only()

    for answer in (keeper.post(name="new"), keeper.post("/rests/start")):
        assert answer.status_code in {502, 503}, answer.text
        assert "read-only" in answer.json()["detail"].lower().replace("readonly", "read-only")
        assert str(keeper.state_dir) in answer.json()["detail"]
    assert keeper.http.get("/api/servers/new").status_code == 404
    stopped = keeper.post("/stops/stop")
    assert (stopped.status_code, stopped.json()["state"]) == (200, "stopped"), stopped.text
    assert not alive(servers["stops"]["pid"])
    assert states(keeper) == {
        "stays": ("running", "up"),
        "stops": ("stopped", "down"),
        "rests": ("stopped", "down"),
    }
    assert keeper.get("stays")["pid"] == servers["stays"]["pid"]

    assert keeper.stop() == 0
    assert not processes_marked(keeper.server_dirs)
    failing_disk.repair()
    # The next keeper finds the last stored state. Stops after that could not be stored,
    # so a server that was up by then is started again.
    keeper.start()
    assert set(states(keeper)) == set(servers)
    assert states(keeper)["rests"] == ("stopped", "down")
    keeper.wait_for("running", "stays")
    assert keeper.post("/rests/start").status_code == 201


# Damaged stores


def damage_header(store):
    with store.open("r+b") as file:
        file.write(os.urandom(16))


def truncate(store):
    os.truncate(store, store.stat().st_size // 2)


def flip_a_page(store):
    with store.open("r+b") as file:
        file.seek((store.stat().st_size // 4096 // 2) * 4096)
        page = file.read(4096)
        file.seek(-len(page), os.SEEK_CUR)
        file.write(bytes(byte ^ 0xFF for byte in page))


def truncate_to_zero_beside_a_wal(store):
    os.truncate(store, 0)
    store.with_name(f"{store.name}-wal").write_bytes(os.urandom(8192))


def make_newer(store):
    with contextlib.closing(sqlite3.connect(store)) as db:
        db.execute("PRAGMA user_version = 99")


DAMAGES = {
    damage_header: "damaged",
    truncate: "damaged",
    flip_a_page: "damaged",
    truncate_to_zero_beside_a_wal: "damaged",
    make_newer: "newer labkeeper",
}


FAILED_SERVERS = {f"s{number}" for number in range(20)}


def create_failing_servers(keeper, names=FAILED_SERVERS):
    """Create servers that fail without a process, to fill the store."""
    for name in names:
        assert (
            keeper.post(name=name, env={"FILLER": "x" * 2000}, port=keeper.port).json()[
                "failure_class"
            ]
            == "port-in-use"
        )


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """State directories that keepers left behind: one after a clean shutdown, one after a kill."""
    base = tmp_path_factory.mktemp("stores")
    keeper = KeeperProcess(base / "keeper", launch_by="exec").start()
    try:
        create_failing_servers(keeper)
        assert keeper.stop() == 0
        no_sockets = shutil.ignore_patterns("*.sock")
        shutil.copytree(keeper.state_dir, base / "in good order", ignore=no_sockets)
        # The last writes are only in the write-ahead log.
        keeper.start()
        create_failing_servers(keeper, ["last"])
        keeper.kill()
        shutil.copytree(keeper.state_dir, base / "killed", ignore=no_sockets)
    finally:
        keeper.close()
    return base


@pytest.mark.parametrize(
    ("damage", "shutdown"),
    [
        *((damage, "in good order") for damage in DAMAGES),
        # The write-ahead log has the header, so damaging it in the file loses nothing.
        *((damage, "killed") for damage in DAMAGES if damage is not damage_header),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_damaged_store_is_refused_and_left_byte_for_byte_unchanged(
    make_keeper, stores, damage, shutdown
):
    keeper = make_keeper()
    shutil.copytree(stores / shutdown, keeper.state_dir)
    store = keeper.state_dir / "labkeeper.sqlite"
    damage(store)
    before = {path.name: path.read_bytes() for path in keeper.state_dir.glob(f"{store.name}*")}
    result = keeper.cli("serve")
    assert (result.returncode, result.stdout) == (2, ""), result
    assert DAMAGES[damage] in result.stderr.splitlines()[-1]
    assert str(store) in result.stderr
    assert "Traceback" not in result.stderr
    after = {path.name: path.read_bytes() for path in keeper.state_dir.glob(f"{store.name}*")}
    # SQLite's shared memory file contains none of our data.
    for parts in (before, after):
        parts.pop(f"{store.name}-shm", None)
    assert {name for name, content in after.items() if content} == {
        name for name, content in before.items() if content
    }
    assert all(content == before[name] for name, content in after.items() if content)


def test_damaged_store_is_recovered_from_a_complete_write_ahead_log(make_keeper):
    keeper = make_keeper().start()
    create_failing_servers(keeper)
    keeper.kill()
    damage_header(keeper.state_dir / "labkeeper.sqlite")
    keeper.start()
    assert set(states(keeper)) == FAILED_SERVERS


def test_store_left_incomplete_by_a_killed_keeper_is_created_again(make_keeper):
    keeper = make_keeper()
    keeper.state_dir.mkdir()
    with contextlib.closing(sqlite3.connect(keeper.state_dir / "labkeeper.sqlite")) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE servers (name TEXT PRIMARY KEY, snapshot TEXT NOT NULL) STRICT")
    keeper.start()
    assert states(keeper) == {}


# Clocks that jump


PATCHED_SLEEP = """
import select, time
# libfaketime breaks clock_nanosleep() with an absolute time, which is how Python sleeps,
# for a clock that it does not fake.
time.sleep = lambda seconds: select.select([], [], [], seconds) and None
"""


class FakedClock:
    """The wall clock of a keeper and of all that it starts.

    As in a real jump, the monotonic clock is unaffected.
    """

    def __init__(self, path, keeper):
        self._path = path / "clock"
        self._keeper = keeper
        site = path / "site"
        site.mkdir(parents=True)
        (site / "sitecustomize.py").write_text(PATCHED_SLEEP)
        self._set_offset(0)
        self.variables = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])),
            "LD_PRELOAD": FAKETIME,
            "FAKETIME_TIMESTAMP_FILE": self._path,
            "FAKETIME_NO_CACHE": 1,
            "FAKETIME_DONT_FAKE_MONOTONIC": 1,
            "FAKETIME_DISABLE_SHM": 1,
            # File times do not change when a clock jumps.
            "NO_FAKE_STAT": 1,
        }

    def jump(self, seconds):
        """Set the offset from the real time."""
        self._set_offset(seconds)
        # An idle connection counts as expired after the jump: the keeper closes it,
        # and the client opens another one.
        with contextlib.suppress(httpx.TransportError):
            self._keeper.http.get("/healthz")

    def _set_offset(self, seconds):
        new = self._path.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.replace(self._path)


def seconds_from_now(format_time):
    """Return how many seconds from now a time of the API is."""
    return datetime.fromisoformat(format_time).timestamp() - time.time()


@pytest.mark.programs("faketime")
@pytest.mark.parametrize("jumps", [(DAY, -DAY), (-DAY, DAY)], ids=["forward", "back"])
def test_clock_jump_stops_no_server_and_affects_no_timer(make_keeper, tmp_path, jumps):
    keeper = make_keeper(
        launch_by="fork", probe_period=0.3, hung_after=30, start_timeout=50, stop_grace=6
    )
    clock = FakedClock(tmp_path / "faked", keeper)
    keeper.variables.update(clock.variables)
    keeper.start()
    # Waiting for its threads, a kernel hangs now and then with libfaketime.
    # The test looks at none of the kernels' times, so they run without it.
    servers = {
        name: forked(keeper, name, kernel_env={"LD_PRELOAD": ""})
        for name in ("lives", "crashes", "stops")
    }
    kernel = start_kernel(servers["lives"])
    run_cell(servers["lives"], kernel, "x = 42")
    assert abs(seconds_from_now(keeper.get("lives")["since"])) < 60

    # Jump in the middle of a start, a backoff and a stop. The third backoff is long: 8 s.
    keeper.post("?wait=0", name="starts")
    for _ in range(3):
        pid = keeper.wait_for("running", "crashes")["pid"]
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: keeper.get("crashes")["pid"] != pid, what="the crash to be noticed")
    keeper.http.post("/api/servers/stops/stop?wait=0", json={})
    clock.jump(jumps[0])
    started = keeper.wait_for("running", "starts")
    again = keeper.wait_for("running", "crashes")
    assert keeper.wait_for("stopped", "stops")["stop_report"]["method"] == "shutdown"
    assert (again["restarts"], started["restarts"]) == (3, 0)
    assert seconds_from_now(again["since"]) == pytest.approx(jumps[0], abs=60)
    # A requested restart resets the restart budget.
    assert keeper.post("/crashes/restart").status_code in {200, 201}
    again = keeper.wait_for("running", "crashes")

    # A keeper started after the jump adopts all servers.
    keeper.kill()
    keeper.start()
    for expected in (servers["lives"], started, again):
        after = keeper.wait_for("running", expected["name"])
        assert (after["pid"], after["generation"]) == (expected["pid"], expected["generation"])
    clock.jump(jumps[1])
    # The backoff takes a while, during which each server is probed several times.
    os.kill(again["pid"], signal.SIGKILL)
    relaunched = until(
        lambda: (s := keeper.wait_for("running", "crashes"))["pid"] != again["pid"] and s
    )
    assert relaunched["generation"] == again["generation"] + 1
    for expected in (servers["lives"], started):
        assert keeper.get(expected["name"])["pid"] == expected["pid"]
    assert run_cell(servers["lives"], kernel, "x") == "42"
    for name in ("lives", "starts", "crashes", "stops"):
        assert keeper.delete(name).status_code == 200
    assert keeper.stop() == 0


@pytest.mark.programs("faketime")
@pytest.mark.parametrize("jump", [DAY, -DAY], ids=["forward", "back"])
def test_start_timeout_is_unaffected_by_a_clock_jump(make_keeper, tmp_path, jump):
    keeper = make_keeper(start_timeout=6, stop_grace=1, kill_wait=1)
    clock = FakedClock(tmp_path / "faked", keeper)
    keeper.variables.update(clock.variables)
    keeper.configure_jupyter("import threading; threading.Event().wait(1000)")
    keeper.start()
    keeper.http.post("/api/servers?wait=0", json={}).raise_for_status()
    clock.jump(jump)
    failed = keeper.wait_for("failed")
    assert failed["failure"]["failure_class"] == "start-timeout"
