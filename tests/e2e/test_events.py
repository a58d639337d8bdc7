"""The event log as callers see it: pages, streams with replay, and webhooks.

Events survive deletions, crashes and restarts of the keeper.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
from datetime import datetime

import httpx
import pytest

from harness import PATIENCE, free_port, start_kernel, until
from unit.events.test_webhooks import SECRET, Receiver


def events(keeper, path="/api/events", **query):
    return keeper.http.get(path, params=query).raise_for_status().json()["events"]


def state_changes(entries):
    return [
        (event["server"], event["details"].get("to"), event["actor"])
        for event in entries
        if event["kind"] == "state"
    ]


class Stream:
    """Follow events as a browser does."""

    def __init__(self, keeper, path="/api/events", **headers):
        self.lines = []
        self.ended = threading.Event()
        self._url, self._token = f"{keeper.url}{path}", keeper.token
        self._headers = headers
        self._answer = None
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        until(lambda: self.lines, what="the stream to begin")

    def _read(self):
        headers = {
            "Accept": "text/event-stream",
            "Authorization": f"Bearer {self._token}",
            **self._headers,
        }
        with httpx.stream(
            "GET", self._url, headers=headers, timeout=30, trust_env=False
        ) as self._answer:
            assert self._answer.status_code == 200
            assert self._answer.headers["content-type"].startswith("text/event-stream")
            with contextlib.suppress(httpx.TransportError, httpx.StreamError):
                for line in self._answer.iter_lines():
                    self.lines.append(line)
        self.ended.set()

    @property
    def events(self):
        return [
            json.loads(line.removeprefix("data: "))
            for line in list(self.lines)
            if line.startswith("data: ")
        ]

    @property
    def ids(self):
        return [event["id"] for event in self.events]

    def close(self):
        if not self.ended.is_set():
            for end in ("network_stream",):
                with contextlib.suppress(OSError):
                    self._answer.extensions[end].get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        self._thread.join()


def test_event_log_records_each_state_change_with_its_actor_and_cause(make_keeper):
    keeper = make_keeper(probe_period=0.5).start()
    created = keeper.http.post("/api/servers", json={"name": "lab"})
    pid = created.json()["pid"]
    os.kill(pid, signal.SIGKILL)
    until(
        lambda: (now := keeper.get("lab"))["state"] == "running" and now["pid"] != pid,
        what="the server to run again",
    )
    deleted = keeper.delete("lab")
    keeper.post(name="bad", root_dir="/nowhere")

    entries = events(keeper, "/api/servers/lab/events")
    assert state_changes(entries) == [
        ("lab", "starting", "token:owner"),
        ("lab", "running", "token:owner"),
        ("lab", "backoff", "keeper"),
        ("lab", "starting", "keeper"),
        ("lab", "running", "keeper"),
        ("lab", "stopping", "token:owner"),
        ("lab", "stopped", "token:owner"),
    ]
    assert entries[0]["request_id"] == created.headers["X-Request-Id"]
    assert entries[-1]["request_id"] == deleted.headers["X-Request-Id"]
    assert entries[2]["details"]["failure"]["failure_class"] == "killed"
    assert entries[2]["details"]["exit"] == {"code": None, "signal": "SIGKILL"}
    assert entries[-1]["details"]["stop_report"]["method"] == "shutdown"
    assert "is deleted" in entries[-1]["message"]
    assert [event["generation"] for event in entries] == [1, 1, 1, 2, 2, 2, 2]
    moments = [datetime.fromisoformat(event["at"]) for event in entries]
    assert moments == sorted(moments)
    assert not [
        secret
        for secret in (created.json()["token"], keeper.token)
        if secret in json.dumps(entries)
    ]

    everything = events(keeper)
    assert [event["id"] for event in everything] == [*range(1, len(everything) + 1)]
    assert events(keeper, after=3, limit=2) == everything[3:5]
    assert events(keeper, limit=2) == everything[-2:]
    page = keeper.http.get("/api/events", params={"after": 0, "limit": 4}).json()
    assert page["next"] == 4
    assert keeper.http.get("/api/events", params={"after": len(everything)}).json() == {
        "events": [],
        "next": None,
    }
    assert keeper.http.get("/api/servers/nobody/events").status_code == 404
    for query in ({"after": -1}, {"after": "x"}, {"limit": 0}, {"kind": "state"}):
        assert keeper.http.get("/api/events", params=query).status_code == 422
    wrong = keeper.http.get(
        "/api/events", headers={"Last-Event-ID": "x", "Accept": "text/event-stream"}
    )
    assert (wrong.status_code, "Last-Event-ID" in wrong.text) == (422, True)

    result = keeper.cli("events", "lab", "-n", "2")
    assert (result.returncode, len(result.stdout.splitlines())) == (0, 2)
    assert "has ended by shutdown" in result.stdout
    assert "[token:owner]" in result.stdout
    lines = keeper.cli("events", "--json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == everything


@pytest.mark.promise
def test_event_stream_resumes_after_the_keeper_was_killed(make_keeper):
    keeper = make_keeper(launch_by="fork").start_to_fork()
    keeper.post(name="one")
    first = Stream(keeper)
    assert first.ids == []
    keeper.post(name="two")
    until(lambda: len(first.ids) == 2, what="the events of server 'two'")
    seen = first.ids[-1]
    only_one = Stream(keeper, "/api/servers/one/events?after=0")
    until(lambda: len(only_one.ids) == 2, what="the earlier events of server 'one'")

    keeper.kill()
    assert first.ended.wait(PATIENCE)
    keeper.start()
    again = Stream(keeper, **{"Last-Event-ID": str(seen)})
    until(
        lambda: sum(event["details"].get("adopted", False) for event in again.events) == 2,
        what="both servers to be adopted",
    )
    assert again.ids == [*range(seen + 1, seen + 1 + len(again.ids))]
    assert again.events[0]["message"].endswith("is looked for by a new keeper")
    assert {event["server"] for event in only_one.events} == {"one"}

    # This reader gets each event at once,
    # including the end of the servers when the keeper shuts down.
    keeper.http.post("/api/servers/one/stop?wait=0", json={})
    until(
        lambda: again.events[-1]["details"].get("to") in {"stopping", "stopped"},
        what="the event about the stop",
    )
    keeper.stop()
    assert again.ended.wait(PATIENCE)
    assert {
        event["server"] for event in again.events if event["details"].get("to") == "stopped"
    } == {"one", "two"}
    for stream in (first, only_one, again):
        stream.close()


def test_idle_stream_gets_keepalives_and_a_slow_reader_blocks_no_other(make_keeper):
    keeper = make_keeper().start()
    quiet = Stream(keeper)
    with socket.create_connection(("127.0.0.1", keeper.port)) as slow:
        # This reader requests all events and never reads the response.
        ask = (
            "GET /api/events?follow=true&after=0 HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {keeper.token}\r\n\r\n"
        )
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.sendall(ask.encode())
        keeper.post(name="lab")
        for _ in range(3):
            assert keeper.http.post("/api/servers/lab/restart", json={}).status_code == 201
        until(lambda: len(quiet.ids) == 2 + 3 * 3, what="the other reader to receive all events")
    until(lambda: ": keep-alive" in quiet.lines, what="a keep-alive comment")
    quiet.close()


def test_limited_token_cannot_evict_the_events_of_others(make_keeper):
    keeper = make_keeper(history_size=100).start()
    keeper.post(name="mine", port=keeper.port)
    limited = keeper.http.post(
        "/api/tokens", json={"name": "ada", "scope": "manage", "servers": ["its-*"]}
    ).json()
    before = events(keeper, after=0, limit=50)
    with httpx.Client(
        base_url=keeper.url,
        headers={"Authorization": f"Bearer {limited['token']}"},
        trust_env=False,
    ) as ada:
        ada.post("/api/servers", json={"name": "its-one", "port": keeper.port})
        for _ in range(300):
            assert ada.post("/api/servers/its-one/snooze", json={"for": "1h"}).status_code == 200
    entries = events(keeper, after=0, limit=500)
    assert entries[: len(before)] == before
    assert len(entries) <= 200
    stream = Stream(keeper, **{"Last-Event-ID": str(before[-1]["id"])})
    until(lambda: stream.events)
    assert stream.events[0] == {"missed": entries[-1]["id"] - len(entries)}
    stream.close()


def test_stream_reports_how_many_events_have_expired(make_keeper):
    keeper = make_keeper(history_size=100).start()
    root = keeper.notebook_dir / "gone"
    root.mkdir()
    keeper.post(name="lab", root_dir=str(root))
    keeper.http.post("/api/servers/lab/stop", json={})
    root.rmdir()
    while keeper.http.get("/api/events", params={"limit": 1}).json()["events"][0]["id"] < 210:
        keeper.http.post("/api/servers/lab/start", json={})
    oldest = events(keeper, after=0, limit=1)[0]["id"]
    assert oldest > 50
    stream = Stream(keeper, **{"Last-Event-ID": "10"})
    until(lambda: len(stream.events) > 50)
    assert stream.events[0] == {"missed": oldest - 11}
    assert stream.events[1]["id"] == oldest
    stream.close()


def test_webhook_receives_all_events_including_those_of_the_shutdown(make_keeper):
    receiver = Receiver()
    try:
        keeper = make_keeper(webhook_url=receiver.url, webhook_secret=SECRET).start()
        server = keeper.post(name="lab").json()
        start_kernel(server)
        until(lambda: receiver.accepted == [1, 2], what="the receiver to get events 1 and 2")
        bodies = [json.loads(body) for _, body in receiver.received]
        assert bodies == events(keeper)
        (webhook,) = keeper.http.get("/api/webhooks").json()["webhooks"]
        assert webhook == {
            "place": receiver.url.partition("/hook")[0],
            "delivered": 2,
            "dead": 0,
            "pending": 0,
            "error": None,
        }

        receiver.status = 503
        keeper.http.post("/api/servers/lab/restart", json={})
        until(
            lambda: keeper.http.get("/api/webhooks").json()["webhooks"][0]["error"],
            what="the API to report the webhook's error",
        )
        keeper.kill()
        receiver.status = 200
        keeper.start()
        keeper.wait_for("running", "lab")
        until(
            lambda: (
                len(receiver.accepted) > 6 and receiver.accepted[-1] == events(keeper)[-1]["id"]
            ),
            what="the receiver to get all events",
        )
        assert receiver.accepted == [*range(1, len(receiver.accepted) + 1)]
        assert keeper.stop() == 0
        assert "keeper ends" in json.loads(receiver.received[-1][1])["reason"]
        logged = keeper.log.read_text()
        assert "hidden" not in logged
        assert SECRET not in logged
    finally:
        receiver.close()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"webhook_url": "ftp://x", "webhook_secret": SECRET}, "LABKEEPER_WEBHOOK_URL"),
        ({"webhook_url": "http://x"}, "no LABKEEPER_WEBHOOK_SECRET"),
        ({"webhook_url": "http://x", "webhook_secret": "short"}, "24 to 64 bytes in base64"),
    ],
)
def test_invalid_webhook_settings_are_rejected_at_startup(make_keeper, settings, why):
    keeper = make_keeper(**settings)
    result = keeper.cli("serve", "--port", str(free_port()))
    assert result.returncode == 2
    assert why in result.stderr
    assert "short" not in result.stderr
