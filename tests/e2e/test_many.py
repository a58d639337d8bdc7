"""Many servers at once, with a keeper that forks: starts are queued, and all succeed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from harness import PATIENCE, KeeperProcess, until

COUNT = 30
MAX_STARTS = 4


@pytest.fixture
def keeper(tmp_path):
    running = KeeperProcess(tmp_path, max_starts=MAX_STARTS).start_to_fork()
    yield running
    running.close()


class ListPoller:
    """Poll the list of servers, and record how many were starting, and the queue positions seen."""

    def __init__(self, keeper):
        self.most_starting = 0
        self.queue_positions = set()
        self._keeper = keeper
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._poll)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _poll(self):
        headers = dict(self._keeper.http.headers)
        with httpx.Client(
            base_url=self._keeper.url, headers=headers, timeout=PATIENCE, trust_env=False
        ) as http:
            while not self._over.is_set():
                servers = http.get("/api/servers").json()["servers"]
                self.most_starting = max(
                    self.most_starting, sum(server["state"] == "starting" for server in servers)
                )
                self.queue_positions |= {server["queue_position"] for server in servers} - {None}


@pytest.mark.promise
def test_thirty_concurrent_starts_are_queued_and_succeed(keeper):
    """By one bulk request, by thirty requests, and by the CLI: never more starts than allowed."""
    names = [f"s{number}" for number in range(COUNT)]
    with ListPoller(keeper) as seen:
        answer = keeper.http.post("/api/bulk/start", json={"names": names})
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert [
        (result["name"], result["status"], result["server"]["state"]) for result in results
    ] == [(name, 201, "running") for name in names]
    assert 1 <= seen.most_starting <= MAX_STARTS
    assert 1 in seen.queue_positions

    stopped = keeper.cli("stop", "--all", "--delete")
    assert stopped.returncode == 0, stopped.stderr
    assert keeper.http.get("/api/servers").json()["servers"] == []

    with ThreadPoolExecutor(COUNT) as callers:
        statuses = list(callers.map(lambda name: keeper.post(name=name).status_code, names))
    assert statuses == [201] * COUNT
    assert keeper.cli("stop", "--all").returncode == 0

    started = keeper.cli("start", *names[:5], "new")
    assert started.returncode == 0, started.stderr
    assert len(started.stdout.split()) == 6
    taken = keeper.cli("start", names[0], "another", "--label", "of=another")
    assert taken.returncode == 1
    assert "differs in labels" in taken.stderr
    assert keeper.get("another")["state"] == "running"


def test_start_queue_survives_a_killed_keeper_in_order(tmp_path):
    keeper = KeeperProcess(tmp_path, launch_by="exec", max_starts=1).start()
    try:
        for name in ("b", "a", "c"):
            assert (
                keeper.http.post(
                    "/api/servers", json={"name": name}, params={"wait": 0}
                ).status_code
                == 202
            )
        assert [keeper.get(name)["queue_position"] for name in ("b", "a", "c")] == [None, 1, 2]
        keeper.kill()
        keeper.start()
        for name in ("b", "a", "c"):
            keeper.wait_for("running", name)
        ready = {name: keeper.get(name)["started_at"] for name in ("a", "c")}
        assert ready["a"] < ready["c"]
        until(lambda: keeper.get("c")["queue_position"] is None)
    finally:
        keeper.close()


def test_start_is_refused_if_too_little_memory_is_free(tmp_path):
    keeper = KeeperProcess(tmp_path, launch_by="exec", min_free_memory="100%").start()
    try:
        refused = keeper.post(name="one")
        assert refused.status_code == 429
        assert refused.headers["Retry-After"] == "5"
        assert refused.json()["code"] == "capacity_reached"
        assert refused.json()["available"] < refused.json()["reserve"]
        assert keeper.http.get("/api/servers").json()["servers"] == []
    finally:
        keeper.close()
