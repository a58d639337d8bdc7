"""What a machine may do to a keeper, and how it comes back: disks that are full or read-only, damaged files, clocks that jump."""

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
def test_an_end_that_nobody_asked_about_keeps_no_fork_server_after_its_keeper(make_keeper):
    keeper = make_keeper(launch_by="fork").start()
    server = forked(keeper)
    keeper.kill()
    # As if it had been killed before it could note down who its server is: the next keeper ends that one, and asks no more.
    (keeper.server_dirs / "default" / "launch.json").unlink()
    keeper.start()
    again = until(lambda: (s := keeper.wait_for("running"))["pid"] != server["pid"] and s)
    parents = {parent_of(again)} if again["launched_by"] == "fork" else set()
    assert keeper.stop() == 0
    assert not [pid for pid in parents if alive(pid)]
    assert not keeper.in_server_dirs()


def as_before_generations(keeper):
    """Write what a keeper that has ended left as the one of version 6 of the store's schema wrote it."""
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


def test_servers_of_the_version_before_are_taken_over(make_keeper):
    keeper = make_keeper().start()
    lives = keeper.post(name="lives", env={"A": "b"}).json()
    keeper.http.post("/api/tokens", json={"name": "ci", "scope": "read", "servers": ["l*"]})
    keeper.kill()
    as_before_generations(keeper)
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


# A disk that is full


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path / "disk")
    yield made
    made.remove()


@pytest.fixture
def keeper_on(make_keeper, request):
    """Make keepers whose state directory is on a disk; they are gone before it is."""
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


def stored(keeper):
    with contextlib.closing(
        sqlite3.connect(f"file:{keeper.state_dir / 'labkeeper.sqlite'}?mode=ro", uri=True)
    ) as store:
        rows = store.execute(
            "SELECT name, json_extract(snapshot, '$.state'), json_extract(snapshot, '$.goal') FROM servers"
        )
        return {name: (state, goal) for name, state, goal in rows}


def refused(answer, keeper):
    """Whether a start was refused with the disk as its cause, by its place."""
    detail = answer.json()["detail"]
    assert answer.status_code in {502, 503}, answer.text
    assert "full" in detail or "No space left" in detail, detail
    assert str(keeper.state_dir) in detail, detail
    return True


@pytest.mark.root
def test_with_a_full_disk_servers_run_and_stop_and_starts_are_refused_until_there_is_room(
    disk, keeper_on
):
    keeper = keeper_on(disk)
    # Its own log and what it says are on the full disk, too.
    keeper.log = disk.path / "keeper.log"
    keeper.start()
    servers = {
        name: keeper.post(name=name).json() for name in ("stays", "stops", "crashes", "rests")
    }
    assert keeper.post("/rests/stop").status_code == 200

    disk.fill()
    assert refused(keeper.post(name="new"), keeper)
    disk.fill()
    assert refused(keeper.post("/rests/start"), keeper)
    stopped = keeper.post("/stops/stop")
    assert (stopped.status_code, stopped.json()["state"]) == (200, "stopped"), stopped.text
    assert stopped.json()["stop_report"]["method"] == "shutdown"
    assert not alive(servers["stops"]["pid"])
    os.kill(servers["crashes"]["pid"], signal.SIGKILL)
    # Each end leaves some room.
    crashed = until(
        lambda: disk.fill() or ((s := keeper.get("crashes"))["state"] == "failed" and s),
        what="it is given up",
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
    # What could not be stored is stored a few seconds later, without being asked for.
    until(lambda: stored(keeper) == now, what="the store says what is so")
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
def test_a_server_that_became_ready_on_a_full_disk_is_noted_as_such_when_there_is_room(
    disk, keeper_on
):
    """Else the next keeper would take it for one that has never been ready."""
    keeper = keeper_on(disk)
    go = keeper.base / "go"
    keeper.configure_jupyter(
        f"import pathlib, time\nwhile not pathlib.Path('{go}').exists():\n    time.sleep(0.02)"
    )
    keeper.start()
    assert keeper.post("?wait=0").status_code == 202
    record = keeper.server_dirs / "default" / "launch.json"
    until(record.exists, what="the launch is noted")
    disk.fill()
    go.touch()
    keeper.wait_for("running")
    disk.free()
    until(lambda: json.loads(record.read_text())["ready"], what="it is noted as ready")


@pytest.mark.root
def test_a_keeper_ends_in_good_order_on_a_full_disk(disk, keeper_on):
    """It says so on a disk that takes no word of it."""
    keeper = keeper_on(disk)
    keeper.log = disk.path / "keeper.log"
    keeper.start()
    server = keeper.post().json()
    disk.fill()
    assert keeper.stop() == 0
    assert not alive(server["pid"])
    assert not processes_marked(keeper.server_dirs)


@pytest.mark.root
@pytest.mark.parametrize("before", ["never used", "ended"])
def test_a_keeper_that_cannot_start_on_a_full_disk_says_so_in_one_line(disk, keeper_on, before):
    keeper = keeper_on(disk)
    if before != "never used":
        keeper.start()
        keeper.post("?wait=0", name="known")
        keeper.wait_for("running", "known")
        keeper.post("/known/stop")
        keeper.stop()
    disk.fill()
    said = keeper.cli("serve")
    assert (said.returncode, said.stdout) == (2, "")
    assert len(said.stderr.strip().splitlines()) == 1, said.stderr
    assert str(disk.path) in said.stderr
    assert "full" in said.stderr or "No space left" in said.stderr
    disk.free()
    keeper.start()
    assert states(keeper) == ({} if before == "never used" else {"known": ("stopped", "down")})


@pytest.mark.root
def test_a_keeper_that_was_killed_comes_back_to_its_servers_also_on_a_full_disk(disk, keeper_on):
    """All that it needs is there already."""
    keeper = keeper_on(disk).start()
    server = keeper.post(name="lives").json()
    disk.fill()
    keeper.kill()
    keeper.start()
    assert keeper.wait_for("running", "lives")["pid"] == server["pid"]
    assert refused(keeper.post(name="new"), keeper)
    assert keeper.delete("lives").status_code == 200
    assert not alive(server["pid"])
    disk.free()
    assert keeper.stop() == 0


# A disk that is read-only


@pytest.mark.root
def test_a_keeper_on_a_read_only_disk_says_so_in_one_line(disk, keeper_on):
    keeper = keeper_on(disk)
    keeper.start()
    assert keeper.stop() == 0
    disk.make_read_only()
    said = keeper.cli("serve")
    assert (said.returncode, said.stdout) == (2, "")
    assert len(said.stderr.strip().splitlines()) == 1, said.stderr
    assert str(keeper.state_dir) in said.stderr


class FailingDisk(Disk):
    """A disk with ext4, which the kernel makes read-only when it finds an error: also under those who write to it."""

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
        # What is not on the disk by now will never be, as with a machine that crashes; that is not what is looked at here.
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
        # The kernel lets go of the device with the last one who has something open there.
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
def test_when_the_disk_becomes_read_only_stops_work_and_starts_are_refused_until_it_is_repaired(
    failing_disk, keeper_on
):
    keeper = keeper_on(failing_disk).start()
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
    # The next one finds what was stored last; that a server has ended could not be stored, and one that was up comes back.
    keeper.start()
    assert set(states(keeper)) == set(servers)
    assert states(keeper)["rests"] == ("stopped", "down")
    keeper.wait_for("running", "stays")
    assert keeper.post("/rests/start").status_code == 201


# A damaged store


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


def empty_it_beside_a_log(store):
    os.truncate(store, 0)
    store.with_name(f"{store.name}-wal").write_bytes(os.urandom(8192))


def make_newer(store):
    with contextlib.closing(sqlite3.connect(store)) as db:
        db.execute("PRAGMA user_version = 99")


DAMAGES = {
    damage_header: "damaged",
    truncate: "damaged",
    flip_a_page: "damaged",
    empty_it_beside_a_log: "damaged",
    make_newer: "newer labkeeper",
}


MANY = {f"s{number}" for number in range(20)}


def order(keeper, names=MANY):
    """Order servers that fail, so that none has to run; their store is as long as any."""
    for name in names:
        assert (
            keeper.post(name=name, env={"FILLER": "x" * 2000}, port=keeper.port).json()[
                "failure_class"
            ]
            == "port-in-use"
        )


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """State directories that keepers have left behind: one in good order, one when it was killed."""
    base = tmp_path_factory.mktemp("stores")
    keeper = KeeperProcess(base / "keeper", launch_by="exec").start()
    try:
        order(keeper)
        assert keeper.stop() == 0
        shutil.copytree(keeper.state_dir, base / "in good order")
        # Its last writes are only in the log beside the file.
        keeper.start()
        order(keeper, ["last"])
        keeper.kill()
        shutil.copytree(keeper.state_dir, base / "killed", ignore=shutil.ignore_patterns("*.sock"))
    finally:
        keeper.close()
    return base


@pytest.mark.parametrize(
    ("damage", "ended"),
    [
        *((damage, "in good order") for damage in DAMAGES),
        # What stands in the log beside the file, such as the header, is no loss.
        *((damage, "killed") for damage in DAMAGES if damage is not damage_header),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_damaged_store_is_refused_in_one_line_and_kept_byte_for_byte(
    make_keeper, stores, damage, ended
):
    keeper = make_keeper()
    shutil.copytree(stores / ended, keeper.state_dir)
    store = keeper.state_dir / "labkeeper.sqlite"
    damage(store)
    before = {path.name: path.read_bytes() for path in keeper.state_dir.glob(f"{store.name}*")}
    said = keeper.cli("serve")
    assert (said.returncode, said.stdout) == (2, ""), said
    assert DAMAGES[damage] in said.stderr.splitlines()[-1]
    assert str(store) in said.stderr
    assert "Traceback" not in said.stderr
    after = {path.name: path.read_bytes() for path in keeper.state_dir.glob(f"{store.name}*")}
    # What SQLite keeps in shared memory holds nothing of ours.
    for parts in (before, after):
        parts.pop(f"{store.name}-shm", None)
    assert {name for name, content in after.items() if content} == {
        name for name, content in before.items() if content
    }
    assert all(content == before[name] for name, content in after.items() if content)


def test_a_damaged_store_is_no_loss_while_all_of_it_stands_in_its_log(make_keeper):
    keeper = make_keeper().start()
    order(keeper)
    keeper.kill()
    damage_header(keeper.state_dir / "labkeeper.sqlite")
    keeper.start()
    assert set(states(keeper)) == MANY


def test_a_keeper_that_was_killed_while_it_made_its_store_makes_it_anew(make_keeper):
    keeper = make_keeper()
    keeper.state_dir.mkdir()
    with contextlib.closing(sqlite3.connect(keeper.state_dir / "labkeeper.sqlite")) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE servers (name TEXT PRIMARY KEY, snapshot TEXT NOT NULL) STRICT")
    keeper.start()
    assert states(keeper) == {}


# Clocks that jump


SLEEP = """
import select, time
# That of libfaketime refuses a sleep until a moment of a clock that it leaves alone, which is how Python sleeps.
time.sleep = lambda seconds: select.select([], [], [], seconds) and None
"""


class FakedClock:
    """The wall clock of a keeper and of all that it starts; the monotonic one is left as it is, as by a real jump."""

    def __init__(self, path, keeper):
        self._path = path / "clock"
        self._keeper = keeper
        site = path / "site"
        site.mkdir(parents=True)
        (site / "sitecustomize.py").write_text(SLEEP)
        self._be(0)
        self.variables = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])),
            "LD_PRELOAD": FAKETIME,
            "FAKETIME_TIMESTAMP_FILE": self._path,
            "FAKETIME_NO_CACHE": 1,
            "FAKETIME_DONT_FAKE_MONOTONIC": 1,
            "FAKETIME_DISABLE_SHM": 1,
            # Files keep their times when a clock jumps.
            "NO_FAKE_STAT": 1,
        }

    def jump(self, seconds):
        """Let it be so many seconds from the real time."""
        self._be(seconds)
        # A connection that rests counts as abandoned by then: it is closed as it is used, and the client makes another one.
        with contextlib.suppress(httpx.TransportError):
            self._keeper.http.get("/healthz")

    def _be(self, seconds):
        new = self._path.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.replace(self._path)


def shown(format_time):
    """How many seconds from now a time of the API is."""
    return datetime.fromisoformat(format_time).timestamp() - time.time()


@pytest.mark.programs("faketime")
@pytest.mark.parametrize("jumps", [(DAY, -DAY), (-DAY, DAY)], ids=["forward", "back"])
def test_when_the_clock_jumps_nobody_is_ended_and_timers_hold(make_keeper, tmp_path, jumps):
    keeper = make_keeper(
        launch_by="fork", probe_period=0.3, hung_after=30, start_timeout=50, stop_grace=6
    )
    clock = FakedClock(tmp_path / "faked", keeper)
    keeper.variables.update(clock.variables)
    keeper.start()
    # A kernel waits for its threads by calls in which libfaketime hangs now and then; no time of its is looked at.
    servers = {
        name: forked(keeper, name, kernel_env={"LD_PRELOAD": ""})
        for name in ("lives", "crashes", "stops")
    }
    kernel = start_kernel(servers["lives"])
    run_cell(servers["lives"], kernel, "x = 42")
    assert abs(shown(keeper.get("lives")["since"])) < 60

    # In the middle of a start, of a wait after a crash, and of a stop. The third wait after a crash is long: 8 s.
    keeper.post("?wait=0", name="starts")
    for _ in range(3):
        pid = keeper.wait_for("running", "crashes")["pid"]
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: keeper.get("crashes")["pid"] != pid, what="it has crashed")
    keeper.http.post("/api/servers/stops/stop?wait=0", json={})
    clock.jump(jumps[0])
    started = keeper.wait_for("running", "starts")
    again = keeper.wait_for("running", "crashes")
    assert keeper.wait_for("stopped", "stops")["stop_report"]["method"] == "shutdown"
    assert (again["restarts"], started["restarts"]) == (3, 0)
    assert shown(again["since"]) == pytest.approx(jumps[0], abs=60)
    # A restart that is asked for gives it all its restarts after crashes back.
    assert keeper.post("/crashes/restart").status_code in {200, 201}
    again = keeper.wait_for("running", "crashes")

    # A keeper that comes after the jump knows everybody again.
    keeper.kill()
    keeper.start()
    for known in (servers["lives"], started, again):
        after = keeper.wait_for("running", known["name"])
        assert (after["pid"], after["generation"]) == (known["pid"], known["generation"])
    clock.jump(jumps[1])
    # There is a wait after a crash, and each server is looked at several times meanwhile.
    os.kill(again["pid"], signal.SIGKILL)
    thrice = until(
        lambda: (s := keeper.wait_for("running", "crashes"))["pid"] != again["pid"] and s
    )
    assert thrice["generation"] == again["generation"] + 1
    for known in (servers["lives"], started):
        assert keeper.get(known["name"])["pid"] == known["pid"]
    assert run_cell(servers["lives"], kernel, "x") == "42"
    for name in ("lives", "starts", "crashes", "stops"):
        assert keeper.delete(name).status_code == 200
    assert keeper.stop() == 0


@pytest.mark.programs("faketime")
@pytest.mark.parametrize("jump", [DAY, -DAY], ids=["forward", "back"])
def test_a_start_that_is_late_is_ended_at_its_timeout_whatever_the_clock_does(
    make_keeper, tmp_path, jump
):
    keeper = make_keeper(start_timeout=6, stop_grace=1, kill_wait=1)
    clock = FakedClock(tmp_path / "faked", keeper)
    keeper.variables.update(clock.variables)
    keeper.configure_jupyter("import threading; threading.Event().wait(1000)")
    keeper.start()
    keeper.http.post("/api/servers?wait=0", json={}).raise_for_status()
    clock.jump(jump)
    failed = keeper.wait_for("failed")
    assert failed["failure"]["failure_class"] == "start-timeout"
