"""Prometheus metrics of a keeper whose servers start, crash and stop."""

from __future__ import annotations

import os
import signal

from prometheus_client.parser import text_string_to_metric_families

from harness import until


def scrape(keeper):
    answer = keeper.http.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"].startswith("text/plain")
    families = text_string_to_metric_families(answer.text)
    return {
        (s.name.removeprefix("labkeeper_"), *sorted(s.labels.values())): s.value
        for f in families
        for s in f.samples
    }


def test_starts_crashes_and_stops_are_counted(make_keeper):
    keeper = make_keeper().start()
    before = scrape(keeper)
    assert before["starts_total", "exec", "none", "ready"] == 0
    assert keeper.post().status_code == 201
    first = keeper.wait_for("running")
    os.kill(first["pid"], signal.SIGKILL)
    until(lambda: keeper.get()["restarts"] == 1, what="the restart")
    keeper.wait_for("running")
    up = scrape(keeper)
    assert (up["servers", "running"], up["servers", "stopped"]) == (1, 0)
    assert keeper.http.post("/api/servers/default/stop").status_code == 200

    after = scrape(keeper)
    assert after["starts_total", "exec", "none", "ready"] == 2
    assert after["start_duration_seconds_count", "exec"] == 2
    assert after["start_duration_seconds_sum", "exec"] > 0
    assert after["unrequested_ends_total", "killed"] == 1
    assert (after["restarts_total",], after["servers", "stopped"]) == (1, 1)
    assert sum(v for (name, *_), v in after.items() if name == "stop_duration_seconds_count") == 1
    assert after["http_requests_total", "/api/servers", "201", "POST"] == 1
    assert after["http_requests_total", "/api/servers/<name>/stop", "200", "POST"] == 1
    assert after["process_resident_memory_bytes",] > 0
    assert not any("default" in labels for _, *labels in after)

    unauthenticated = keeper.http.get("/metrics", headers={"Authorization": "Bearer wrong"})
    assert unauthenticated.status_code == 401
    assert "labkeeper_" not in unauthenticated.text
    assert scrape(keeper)["http_requests_total", "/metrics", "401", "GET"] == 1
