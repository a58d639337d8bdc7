"""Many servers at once, with a keeper that forks: starts are queued, and all succeed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from harness import KeeperProcess, until

COUNT = 30
MAX_STARTS = 4


@pytest.fixture
def keeper(tmp_path):
    running = KeeperProcess(tmp_path, max_starts=MAX_STARTS).start_to_fork()
    yield running
    running.close()


def state_changes(keeper):
    """Yield the server and the new state of every change of a state, from the history."""
    after = 0
    while after is not None:
        page = keeper.http.get("/api/events", params={"after": after}).raise_for_status().json()
        yield from (
            (event["server"], event["details"]["to"])
            for event in page["events"]
            if "to" in event["details"]
        )
        after = page["next"]


def most_in_state(state, changes):
    """Return how many servers were in a state at the same time, at most."""
    inside, most = set(), 0
    for server, new in changes:
        (inside.add if new == state else inside.discard)(server)
        most = max(most, len(inside))
    return most


@pytest.mark.promise
def test_thirty_concurrent_starts_are_queued_and_succeed(keeper):
    """By one bulk request, by thirty requests, and by the CLI: never more starts than allowed."""
    names = [f"s{number}" for number in range(COUNT)]
    answer = keeper.http.post("/api/bulk/start", json={"names": names})
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert [
        (result["name"], result["status"], result["server"]["state"]) for result in results
    ] == [(name, 201, "running") for name in names]
    changes = list(state_changes(keeper))
    assert most_in_state("starting", changes) == MAX_STARTS
    assert most_in_state("queued", changes) > 1

    stopped = keeper.cli("stop", "--all", "--delete")
    assert stopped.returncode == 0, stopped.stderr
    assert keeper.http.get("/api/servers").json()["servers"] == []

    with ThreadPoolExecutor(COUNT) as callers:
        statuses = list(callers.map(lambda name: keeper.post(name=name).status_code, names))
    assert statuses == [201] * COUNT
    assert most_in_state("starting", state_changes(keeper)) == MAX_STARTS
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
