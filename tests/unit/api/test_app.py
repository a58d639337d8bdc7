"""The application over the fake backend: routes, responses, problem documents."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import urlsplit

import psutil
import pytest
import structlog
from werkzeug.test import EnvironBuilder

from fake_keeper import TOKEN, FakeKeeper, fake_keeper
from harness import PATIENCE, until
from labkeeper.api.app import create_app
from labkeeper.api.concurrency import ConcurrencyLimit
from labkeeper.api.routes import ROUTES
from labkeeper.api.services import Services
from labkeeper.api.views import server_model
from labkeeper.api.wsgi import WsgiServer
from labkeeper.backends.local.paths import Paths
from labkeeper.core.access import ANYBODY
from labkeeper.core.durations import format_time
from labkeeper.core.errors import BackendRefused, BackendUnavailable, InvalidSpec
from labkeeper.core.lifecycle import Goal, State
from labkeeper.core.policy import Policy
from labkeeper.core.ports import Library
from labkeeper.core.server import (
    Failure,
    FailureClass,
    GatewayHealth,
    Kernel,
    Load,
    OrphanedKernel,
    OwnKernel,
    Sample,
    Snapshot,
    Usage,
)
from labkeeper.core.spec import Gateway, ServerName
from labkeeper.schema.requests.gateway import ws_url_of
from labkeeper.schema.requests.servers import Defaults, RestartRequest, ServerRequest


@pytest.fixture
def running(tmp_path) -> Iterator[FakeKeeper]:
    with fake_keeper(tmp_path, policy=Policy(max_servers=3)) as made:
        made.probe.kernels_there = [Kernel("k-1", "python3", "idle", "2026-01-01T00:00:00Z")]
        yield made


@pytest.fixture
def world(running):
    return running.world


@pytest.fixture
def services(running) -> Services:
    return running.services


@pytest.fixture
def client(services):
    client = create_app(services).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {TOKEN}"
    return client


def test_usage_over_time_is_returned_in_columns(running, client):
    """For the last hour by default, or since a time; also of a server that has been stopped."""
    client.post("/api/servers")
    name, now = ServerName("default"), time.time()
    for at, memory in ((now - 7000, 100), (now - 65, 200), (now, 300)):
        usage = Usage(memory, 1.0, 1, 1)
        running.usage_log.record({name: Sample(1, at, usage, 0.5, Load(2, 1))})
    client.post("/api/servers/default/stop")
    hour = client.get("/api/servers/default/usage").json
    assert (hour["resolution"], hour["memory"][0], hour["memory"][-1]) == (5, 200, 300)
    assert hour["memory"].count(None) == len(hour["memory"]) - 2 == 12
    assert hour["cpus"][0] == hour["cpus_max"][0] == 0.5
    assert (hour["kernels"][0], hour["generation"][0]) == (2, 1)
    assert hour["since"] < hour["start"] < hour["until"]
    assert client.get("/api/servers/default/usage?since=1m").json["memory"] == [300]
    since = format_time(now - 7200)
    for query in ("2h", "7200", since, since.replace("Z", "%2B00:00")):
        day = client.get(f"/api/servers/default/usage?since={query}").json
        assert (day["resolution"], day["memory_max"][0]) == (60, 100), query
    assert client.get("/api/servers/default/usage?since=8d").json["resolution"] == 3600


@pytest.mark.parametrize("since", ["0001-01-01T00:00:00%2B14:00", "9999-12-31T23:59:59Z", "366d"])
def test_usage_since_any_time_is_within_what_is_kept(client, since):
    client.post("/api/servers")
    found = client.get(f"/api/servers/default/usage?since={since}").json
    assert found["memory"] == []
    assert format_time(time.time() - 31 * 86400) < found["since"] <= found["until"]


@pytest.mark.parametrize("since", ["", "soon", "-1h", "367d", "2026-12-01", "2026-12-01T08:00:00"])
def test_usage_since_no_time_is_rejected_with_examples(client, since):
    client.post("/api/servers")
    answer = client.get(f"/api/servers/default/usage?since={since}")
    assert answer.status_code == 422
    assert "'2h'" in answer.json["errors"][0]["rule"]
    assert answer.json["errors"][0]["field"] == "since"


def test_usage_over_time_of_an_unknown_server_or_from_a_store_that_fails(running, client):
    assert client.get("/api/servers/none/usage").status_code == 404
    client.post("/api/servers")
    running.store.failing = True
    assert client.get("/api/servers/default/usage?since=1d").status_code == 503


def test_an_unexpected_error_is_a_problem_whose_id_is_in_the_log_with_the_traceback(services):
    """The response does not reveal the cause."""

    class Broken:
        def kernels(self, endpoint):
            raise RuntimeError("a secret detail")

    client = create_app(replace(services, probe=Broken())).test_client()
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert client.post("/api/servers", headers=headers).status_code == 201
    with structlog.testing.capture_logs() as log:
        answer = client.get("/api/servers/default/kernels", headers=headers)
    assert answer.status_code == 500
    problem = answer.json
    assert problem["code"] == "internal_error"
    assert answer.headers["X-Request-Id"] == problem["request_id"]
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    (entry,) = [entry for entry in log if entry.get("exc_info")]
    assert (entry["request_id"], entry["server"]) == (problem["request_id"], "default")
    assert "a secret detail" in str(entry["exc_info"])


@pytest.mark.parametrize(
    ("path", "server"), [("/api/servers/x", "x"), ("/api/tokens/x", None), ("/api/nowhere", None)]
)
def test_a_log_line_about_a_request_names_its_server(client, path, server):
    with structlog.testing.capture_logs() as log:
        client.delete(path)
    (entry,) = [entry for entry in log if entry["event"] == "request"]
    assert entry["server"] == server


def test_a_valid_request_id_from_the_caller_is_used(client):
    def answered(sent):
        return client.get("/healthz", headers={"X-Request-Id": sent}).headers["X-Request-Id"]

    for sane in ("a", "Root-1.5_x", "9" * 64):
        assert answered(sane) == sane
    for other in ("", "9" * 65, "a b", "ä", 'a"', "a;b"):
        assert re.fullmatch("[0-9a-f]{32}", answered(other))


def test_requests_are_counted_by_route_and_metrics_require_a_token(client):
    client.get("/api/servers/stranger")
    client.get("/nowhere/at/all")
    found = client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert found.content_type.startswith("application/openmetrics-text")
    assert 'route="/api/servers/<name>",status="404"' in found.text.replace('method="GET",', "")
    assert 'route="none"' in found.text
    assert "stranger" not in found.text
    assert "nowhere" not in found.text


def test_http_errors_are_problem_documents(client):
    for answer, status, code in [
        (client.get("/nope"), 404, "not_found"),
        (client.put("/api/servers"), 405, "method_not_allowed"),
        (client.post("/api/servers", data="x"), 415, "unsupported_media_type"),
        (
            client.post("/api/servers", data="{", content_type="application/json"),
            400,
            "bad_request",
        ),
        (
            client.post("/api/servers", data=b"x" * 2_000_000, content_type="application/json"),
            413,
            "request_entity_too_large",
        ),
    ]:
        assert (answer.status_code, answer.json["code"]) == (status, code)
        assert answer.content_type == "application/problem+json"
    assert "POST" in client.put("/api/servers").headers["Allow"]


@pytest.mark.parametrize(
    "path",
    [
        "/api//servers",
        "/api/servers//x",
        "/api/servers/",
        "/api/docs/static//css",
        "/open//x",
        "//",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_path_that_is_almost_a_route_is_not_found(client, path, method):
    """It is not redirected: clients would drop the body or the token."""
    answer = client.open(f"http://localhost{path}", method=method)
    assert (answer.status_code, answer.json["code"]) == (404, "not_found")
    assert answer.content_type == "application/problem+json"


def test_a_failed_precondition_of_a_static_file_is_a_problem_document(client):
    answer = client.get(BUNDLE, headers={"If-Match": '"another"'})
    assert (answer.status_code, answer.json["code"]) == (412, "precondition_failed")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"name": "a", "name": "b"}', "name"),
        ('{"name": "a", "env": {"A": "1", "B": "2", "A": "1"}}', "A"),
        ('{"port": 1, "port": null}', "port"),
    ],
)
def test_duplicate_names_in_a_body_are_refused(client, body, field):
    """A proxy that checks requests may see the other value."""
    answer = client.post("/api/servers", data=body, content_type="application/json")
    assert (answer.status_code, answer.json["errors"]) == (
        422,
        [{"field": field, "rule": "must not be given twice"}],
    )
    assert client.get("/api/servers").json["servers"] == []


def test_a_duplicate_query_parameter_is_refused_unless_it_is_a_list(client):
    answer = client.post("/api/servers?wait=0&wait=5", json={})
    assert (answer.status_code, answer.json["errors"]) == (
        422,
        [{"field": "wait", "rule": "must not be given twice"}],
    )
    assert client.get("/api/servers?label=a&label=b&state=failed&state=running").status_code == 200


def test_the_openapi_document_describes_every_route_and_the_server_model(client):
    document = client.get("/api/openapi.json").json
    assert document["openapi"].startswith("3.1")
    described = {
        (method.upper(), path) for path, methods in document["paths"].items() for method in methods
    }
    assert described == {(route.method, re.sub("<(.*?)>", r"{\1}", route.path)) for route in ROUTES}
    for route in ROUTES:
        operation = document["paths"][re.sub("<(.*?)>", r"{\1}", route.path)][route.method.lower()]
        assert bool(operation.get("security")) == (route.rule.scope is not None)
        assert operation["summary"]
    created = client.post("/api/servers", json={}).json
    schema = document["components"]["schemas"]["Server"]
    assert set(created) == set(schema["properties"])


@pytest.mark.parametrize(
    ("host", "link"),
    [
        ("keeper.example:8000", "http://127.0.0.1:"),
        (None, "http://127.0.0.1:"),
    ],
)
def test_the_link_of_a_lab_on_loopback_uses_the_loopback_address(services, host, link):
    headers = {"Authorization": f"Bearer {TOKEN}"} | ({"Host": host} if host else {})
    client = create_app(replace(services, hosts=["keeper.example"])).test_client()
    assert client.post("/api/servers", json={}, headers=headers).json["lab_url"].startswith(link)


@pytest.mark.parametrize(
    ("host", "link"),
    [
        ("keeper.example:8000", "http://keeper.example:"),
        ("[::1]:8000", "http://[::1]:"),
    ],
)
def test_the_link_of_a_lab_on_all_addresses_uses_the_host_of_the_request(
    services, world, host, link
):
    services = replace(
        services, defaults=replace(services.defaults, lab_ip="0.0.0.0"), hosts=["keeper.example"]
    )
    client = create_app(services).test_client()
    answer = client.post(
        "/api/servers", json={}, headers={"Authorization": f"Bearer {TOKEN}", "Host": host}
    )
    assert answer.json["lab_url"].startswith(link), answer.json


def test_the_advertised_host_takes_precedence(services):
    client = create_app(replace(services, advertised_host="labs.example")).test_client()
    answer = client.post(
        "/api/servers",
        headers={"Authorization": f"Bearer {TOKEN}"},
        json={"default_url": "/lab?reset"},
    )
    assert answer.json["lab_url"].startswith("http://labs.example:")
    assert "/lab?reset&token=" in answer.json["lab_url"]


@pytest.mark.parametrize(
    ("page", "path", "query", "fragment"),
    [
        ("/", "/", "token={}", ""),
        ("/lab#heading", "/lab", "token={}", "heading"),
        ("/lab#why?", "/lab", "token={}", "why?"),
        ("/lab?reset#a#b", "/lab", "reset&token={}", "a#b"),
        ("/lab?a=b?c", "/lab", "a=b?c&token={}", ""),
        ("/lab//tree/a:b@c\\d", "/lab//tree/a:b@c\\d", "token={}", ""),
    ],
)
def test_the_token_is_in_the_query_of_the_link_whatever_the_page(
    services, page, path, query, fragment
):
    """A fragment is not sent to the server."""
    client = create_app(services).test_client()
    server = client.post(
        "/api/servers", headers={"Authorization": f"Bearer {TOKEN}"}, json={"default_url": page}
    ).json
    parts = urlsplit(server["lab_url"])
    assert (parts.path, parts.query, parts.fragment) == (
        path,
        query.format(server["token"]),
        fragment,
    )
    assert (parts.hostname, parts.port) == (server["hostname"], server["port"])


@pytest.mark.parametrize(
    "page", ["//evil.example", "/a b", "/a\nb", "/a\tb", "/a\x7f", "/\u00e9", "lab", ""]
)
def test_a_page_that_cannot_be_part_of_a_link_is_refused(services, page):
    client = create_app(services).test_client()
    answer = client.post(
        "/api/servers", headers={"Authorization": f"Bearer {TOKEN}"}, json={"default_url": page}
    )
    assert answer.status_code == 422, answer.text


BUNDLE = "/api/docs/static/js/swagger-ui-bundle.js"


def test_static_files_of_the_documentation_have_type_length_and_etag(client):
    """No other files are served."""
    shown = client.get(BUNDLE)
    assert (shown.status_code, shown.content_length) == (200, len(shown.data))
    assert shown.mimetype.endswith("/javascript")
    again = client.get(BUNDLE, headers={"If-None-Match": shown.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")
    assert client.get("/api/docs/static/js/../../__init__.py").status_code == 404


def test_clients_that_do_not_read_static_files_occupy_no_threads_and_descriptors(
    services,
):
    """More clients than threads, without a token; other requests are answered."""
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as opened:
        server = WsgiServer(create_app(services), [listener], threads=4, max_body=2**20)
        server.start()
        opened.callback(server.close)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        readers = [opened.enter_context(socket.socket()) for _ in range(12)]
        for reader in readers:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(listener.getsockname())
            reader.sendall(f"GET {BUNDLE} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        channels = server._servers[0].active_channels
        until(
            lambda: (
                sum(bool(channel.total_outbufs_len) for channel in list(channels.values())) == 12
            ),
            what="all responses to be buffered",
        )
        until(lambda: server._threads.active_count == 0, what="all threads to be idle")
        assert not [path for path in opened_files() if "swagger" in path]
        asking = http.client.HTTPConnection(*listener.getsockname(), timeout=PATIENCE)
        opened.callback(asking.close)
        asking.request("GET", "/healthz")
        assert asking.getresponse().status == 200
        for reader in readers:
            reader.close()
        # Waitress closes its copies of what was not read only with their connections.
        until(lambda: len(channels) == 1, what="the readers to leave")


def opened_files():
    return [file.path for file in psutil.Process().open_files()]


def test_lists_are_paginated_and_filtered(client):
    for name in ("a", "b", "c"):
        assert (
            client.post("/api/servers", json={"name": name, "labels": {"of": name}}).status_code
            == 201
        )
    names, cursor = [], ""
    while cursor is not None:
        page = client.get(f"/api/servers?limit=2&cursor={cursor}").json
        names += [server["name"] for server in page["servers"]]
        cursor = page["next"]
    assert names == ["a", "b", "c"]
    assert [s["name"] for s in client.get("/api/servers?label=of=b").json["servers"]] == ["b"]
    assert len(client.get("/api/servers?label=of").json["servers"]) == 3
    assert client.get("/api/servers?state=failed").json["servers"] == []
    assert client.get("/api/servers?state=asleep").status_code == 422


def test_a_start_that_was_stopped_meanwhile_is_a_conflict(client, world):
    world.temper("default").boots = False
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.post, "/api/servers", json={})
        until(lambda: client.get("/api/servers/default?wait_for=starting").status_code == 200)
        assert client.post("/api/servers/default/stop").status_code == 200
        answer = waiting.result()
    assert (answer.status_code, answer.json["code"]) == (409, "conflict")
    assert "stopped meanwhile" in answer.json["detail"]


def test_a_server_being_deleted_cannot_be_started(client, world):
    assert client.post("/api/servers", json={}).status_code == 201
    world.temper("default").obeys = False
    assert client.delete("/api/servers/default?wait=0").json["state"] == "stopping"
    refused = client.post("/api/servers/default/start?wait=0")
    assert (refused.status_code, "being deleted" in refused.json["detail"]) == (409, True)
    assert (
        client.delete("/api/servers/default?force=true").json["stop_report"]["method"] == "sigkill"
    )
    assert client.get("/api/servers/default").status_code == 404


def test_a_start_during_a_stop_makes_the_stop_a_conflict(client, world):
    assert client.post("/api/servers", json={}).status_code == 201
    world.temper("default").obeys = False
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(client.post, "/api/servers/default/stop")
        until(lambda: client.get("/api/servers/default").json["state"] == "stopping")
        assert client.post("/api/servers/default/start?wait=0").status_code == 202
        assert stopping.result().status_code == 409
    world.temper("default").obeys = True
    assert client.delete("/api/servers/default?force=true").status_code == 200


@pytest.mark.parametrize("way", ["follow", "browser", "page"])
def test_an_event_id_from_the_future_returns_all_events_after_a_gap(running, client, way):
    """It belongs to another event log: ours was reset, or restored from a backup."""
    client.post("/api/servers", json={"name": "a"})
    events = client.get("/api/events?after=0").json["events"]
    newest = events[-1]["id"]
    if way == "page":
        assert client.get(f"/api/events?after={newest + 1}").json["events"] == events
        assert client.get(f"/api/servers/a/events?after={2**62}").json["events"] == events
        assert client.get(f"/api/events?after={newest}").json["events"] == []
        return
    shown = {"Last-Event-ID": str(newest + 1)} if way == "browser" else {}
    asked = (
        "/api/events?follow=true"
        if way == "browser"
        else f"/api/events?follow=true&after={newest + 1}"
    )
    with client.get(asked, headers=shown, buffered=False) as stream:
        running.services.event_log.close()
        pieces = stream.text.split("\n\n")
    assert pieces[1] == 'event: gap\ndata: {"missed": null}'
    assert [json.loads(piece.partition("data: ")[2]) for piece in pieces[2:-1]] == events


def test_at_the_concurrency_limit_callers_are_answered_without_waiting(services, world):
    """A start is still accepted, with 202, and requests that do not wait are not affected."""
    world.temper("default").boots = False
    client = create_app(replace(services, concurrency=ConcurrencyLimit(3))).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {TOKEN}"
    client.post("/api/servers?wait=0", json={})
    with client.get("/api/servers/default/logs?follow=true", buffered=False) as follower:
        assert follower.status_code == 200
        refused = client.get("/api/servers/default/logs?follow=true")
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "10")
        assert client.post("/api/servers", json={}).status_code == 202
        assert client.get("/api/servers/default?wait_for=running").json["state"] == "starting"
    until(lambda: world.living("default"), what="the server's process to be launched")
    world.answer("default")
    assert client.post("/api/servers", json={}).status_code == 200


def test_reading_a_large_part_of_a_log_counts_against_the_concurrency_limit(services):
    client = create_app(replace(services, concurrency=ConcurrencyLimit(3))).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {TOKEN}"
    client.post("/api/servers", json={})
    assert client.get("/api/servers/default/logs?tail=100000").status_code == 200
    with client.get("/api/servers/default/logs?follow=true", buffered=False):
        refused = client.get("/api/servers/default/logs?tail=1001")
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "10")
        assert client.get("/api/servers/default/logs?tail=1000").status_code == 200
    assert client.get("/api/servers/default/logs?tail=1001").status_code == 200


@pytest.mark.parametrize("query", ["tail=100000", "tail=0&follow=true"])
def test_large_reads_of_logs_are_limited_to_two_at_a_time(services, monkeypatch, query):
    """Whatever the concurrency limit: a third read waits until another has its lines."""
    backend, limit, reading, go_on = services.backend, ConcurrencyLimit(8), [], threading.Event()

    def read(*_):
        reading.append(1)
        go_on.wait(PATIENCE)
        return iter(["line\n"])

    def follow(*_):
        yield from read()

    monkeypatch.setattr(backend, "log", read)
    monkeypatch.setattr(backend, "follow", follow)
    client = create_app(replace(services, concurrency=limit)).test_client()
    headers = {"Authorization": f"Bearer {TOKEN}"}
    client.post("/api/servers", json={}, headers=headers)
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(client.get, f"/api/servers/default/logs?{query}", headers=headers)
            for _ in range(4)
        ]
        until(lambda: limit._held == 4, what="all requests to count towards the limit")
        until(lambda: len(reading) >= 2, what="two requests to read the log")
        at_a_time = len(reading)
        go_on.set()
        assert at_a_time == 2
        assert [answer.result().status_code for answer in asked] == [200] * 4


def test_a_long_log_is_truncated_to_its_end_with_a_note(client, world):
    """To as many whole lines as fit into 2 MiB."""
    client.post("/api/servers", json={})
    for number in range(3000):
        world.write("default", f"{number} {'ö' * 500}")
    whole = sum(len(line.encode()) + 1 for line in world.logs["default"])
    answer = client.get("/api/servers/default/logs?tail=100000").data
    note, _, rest = answer.partition(b"\n")
    left_out = int(
        re.fullmatch(
            rb"\[labkeeper\] left out: the first (\d+) bytes of what was asked for; .*", note
        )[1]
    )
    assert len(rest) == whole - left_out
    assert 2**21 - 1100 < len(rest) <= 2**21
    assert rest.decode().endswith("\n")
    assert re.match(r"\d+ ö", rest.decode())
    assert client.get("/api/servers/default/logs?tail=1000").data.count(b"\n") == 1000


def test_a_follower_that_disconnects_before_the_first_byte_releases_its_slot(services):
    app = create_app(replace(services, concurrency=ConcurrencyLimit(3)))
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {TOKEN}"
    client.post("/api/servers", json={})
    asking = EnvironBuilder(
        "/api/servers/default/logs?follow=true", headers={"Authorization": f"Bearer {TOKEN}"}
    )

    def gone(*_):
        def write(_):
            raise ConnectionResetError

        return write

    with pytest.raises(ConnectionResetError):
        app(asking.get_environ(), gone)
    asking.close()
    with client.get("/api/servers/default/logs?follow=true", buffered=False) as follower:
        assert follower.status_code == 200


def test_a_wait_ends_when_its_caller_disconnects(services, world):
    """Within a second, however long it was supposed to last."""
    world.temper("default").boots = False
    client = create_app(services).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {TOKEN}"
    left = {"waitress.client_disconnected": lambda: True}
    assert client.post("/api/servers?wait=3600", json={}, environ_overrides=left).status_code == 202


def test_a_follower_receives_the_log_until_the_server_ends(client):
    client.post("/api/servers", json={})
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(client.get, "/api/servers/default/logs?follow=true")
        client.post("/api/servers/default/stop")
        assert following.result().text.strip()
    assert client.get("/api/servers/default/logs?tail=1").text.count("\n") == 1


def test_kernels_are_listed_for_running_servers_only(client, services):
    assert client.get("/api/servers/none/kernels").status_code == 404
    client.post("/api/servers", json={})
    assert client.get("/api/servers/default/kernels").json["kernels"][0]["id"] == "k-1"
    services.probe.error = BackendUnavailable("cannot list the kernels")
    assert client.get("/api/servers/default/kernels").status_code == 503
    client.post("/api/servers/default/stop")
    assert client.get("/api/servers/default/kernels").status_code == 409


def test_kernels_are_listed_with_how_they_were_launched(client, running):
    launched = [("fork", None), ("exec", "it is no IPython kernel"), (None, None)]
    running.probe.kernels_there = [
        Kernel(f"k-{count}", "python3", launched_by=launched_by, exec_reason=reason)
        for count, (launched_by, reason) in enumerate(launched)
    ]
    client.post("/api/servers", json={})
    listed = client.get("/api/servers/default/kernels").json["kernels"]
    assert [(one["launched_by"], one["exec_reason"]) for one in listed] == launched
    assert listed[1] == {
        "id": "k-1",
        "name": "python3",
        "execution_state": "unknown",
        "last_activity": "",
        "launched_by": "exec",
        "exec_reason": "it is no IPython kernel",
    }


def test_readiness_names_the_libraries_to_preload(services, world):
    client = create_app(services).test_client()
    assert client.get("/readyz").json == {"status": "ok", "preload": []}
    world.libraries = (Library("numpy", loaded=True), Library("x", loaded=False, reason="why"))
    assert client.get("/readyz").json["preload"] == [
        {"name": "numpy", "loaded": True, "reason": None},
        {"name": "x", "loaded": False, "reason": "why"},
    ]


def test_a_keeper_that_has_stopped_is_neither_healthy_nor_ready(services):
    client = create_app(services).test_client()
    assert {client.get(path).status_code for path in ("/healthz", "/readyz")} == {200}
    services.keeper.close()
    assert {client.get(path).status_code for path in ("/healthz", "/readyz")} == {503}
    services.keeper._thread = type(
        "Ended", (), {"is_alive": lambda self: False, "join": lambda self: None}
    )()


def test_version(client):
    assert client.get("/api/version").json == {"name": "labkeeper", "version": "1.2.3"}


def test_request_fields_are_accepted_in_snake_case_and_kebab_case():
    """The document has snake_case only."""
    for name, field in ServerRequest.model_fields.items():
        assert name in field.validation_alias.choices
        assert name.replace("_", "-") in field.validation_alias.choices


@pytest.mark.parametrize(
    ("url", "ws_url"),
    [
        ("http://Host/Team/http-api", "ws://Host/Team/http-api"),
        ("https://gateway:8443", "wss://gateway:8443"),
    ],
)
def test_the_websocket_url_of_a_gateway_differs_in_its_scheme_only(url, ws_url):
    assert ws_url_of(url) == ws_url


def spec_of(request, notebook_dir, **defaults):
    """Return the spec of a request to a keeper with this notebook directory."""
    chosen = Defaults("127.0.0.1", 8888, **defaults)
    return request.spec(chosen, ANYBODY, Paths(notebook_dir).validate)


def test_an_authorization_header_for_the_gateway_becomes_its_token(tmp_path):
    """Otherwise Jupyter would overwrite it with its own Authorization header."""
    request = ServerRequest.model_validate(
        {
            "gateway-url": "http://g",
            "gateway-headers": {"authorization": "Bearer abc", "X-Team": "a"},
        }
    )
    gateway = spec_of(request, tmp_path).gateway
    assert (gateway.auth_scheme, gateway.auth_token, gateway.headers) == (
        "Bearer",
        "abc",
        {"X-Team": "a"},
    )


def test_a_client_key_without_a_certificate_is_refused():
    with pytest.raises(ValueError, match="gateway_client_cert"):
        ServerRequest.model_validate({"gateway_url": "http://g", "gateway_client_key": "k"})


def test_only_the_default_server_gets_the_default_port(tmp_path):
    assert spec_of(ServerRequest(), tmp_path).port == 8888
    assert spec_of(ServerRequest(name="other"), tmp_path).port is None
    assert spec_of(ServerRequest(port=9999), tmp_path).port == 9999


def test_a_server_runs_as_the_requested_or_the_default_user(tmp_path):
    assert spec_of(ServerRequest(), tmp_path, user="alice").user == "alice"
    assert spec_of(ServerRequest(user="bob"), tmp_path, user="alice").user == "bob"


def test_a_missing_root_directory_is_refused(tmp_path):
    with pytest.raises(InvalidSpec) as caught:
        spec_of(ServerRequest(), tmp_path / "gone")
    assert caught.value.details["errors"][0]["field"] == "root_dir"


def test_a_problem_document_has_all_required_fields(client):
    document = client.get("/api/openapi.json").json
    problem = client.get("/api/servers/none").json
    assert set(document["components"]["schemas"]["Problem"]["required"]) <= set(problem)


# Restarts with changes

FULL_GATEWAY = {
    "gateway_url": "http://g:1/team",
    "gateway_auth_token": "t",
    "gateway_auth_scheme": "Bearer",
    "gateway_headers": {"X": "y"},
    "gateway_connect_timeout": 3.0,
}


def revised(tmp_path, before, after):
    """Return the spec of a request, and its revision by the fields of a restart."""
    spec = spec_of(ServerRequest.model_validate(before), tmp_path)
    request, validate = RestartRequest.model_validate(after), Paths(tmp_path).validate
    return spec, request.revise(spec, Defaults("127.0.0.1", 8888), ANYBODY, validate)


def test_a_restart_without_fields_revises_nothing(tmp_path):
    assert revised(tmp_path, {"name": "x", "env": {"A": "b"}}, {"keep-kernels": True})[1] is None
    assert revised(tmp_path, {}, None)[1] is None


def test_a_restart_revises_only_the_fields_it_names(tmp_path):
    before = {
        "name": "x",
        "env": {"A": "b"},
        "port": 9000,
        "memory_limit": 2**27,
        "cpu_limit": 2.0,
        **FULL_GATEWAY,
    }
    old, new = revised(
        tmp_path,
        before,
        {"labels": {"a": "b"}, "kernel-env": {"KERNEL_A": "1"}, "memory-limit": 2**28},
    )
    limits = replace(old.limits, memory=2**28)
    assert new == replace(old, labels={"a": "b"}, kernel_env={"KERNEL_A": "1"}, limits=limits)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"gateway_auth_token": "u"}, {"auth_token": "u"}),
        ({"gateway_url": "http://g:1/team", "gateway_auth_token": "u"}, {"auth_token": "u"}),
        ({"gateway_headers": {"Z": "z"}}, {"headers": {"Z": "z"}}),
        (
            {"gateway_headers": {"Authorization": "Basic abc"}},
            {"headers": {}, "auth_scheme": "Basic", "auth_token": "abc"},
        ),
        (
            {"require_gateway": False, "gateway_validate_cert": False},
            {"required": False, "validate_cert": False},
        ),
    ],
)
def test_gateway_options_can_be_revised_individually(tmp_path, options, changes):
    old, new = revised(tmp_path, FULL_GATEWAY, options)
    assert new == replace(old, gateway=replace(old.gateway, **changes))


def test_credentials_of_one_gateway_are_not_sent_to_another(tmp_path):
    _, new = revised(tmp_path, FULL_GATEWAY, {"gateway_url": "http://h:1"})
    assert new.gateway == Gateway("http://h:1", "ws://h:1")


def test_gateway_options_require_a_gateway(tmp_path):
    with pytest.raises(InvalidSpec, match="gateway_auth_token only together with gateway_url"):
        revised(tmp_path, {}, {"gateway_auth_token": "u"})
    _, new = revised(tmp_path, {}, {"gateway_url": "http://h:1", "gateway_auth_token": "u"})
    assert new.gateway == Gateway("http://h:1", "ws://h:1", "u")


def test_a_client_key_requires_a_certificate_after_a_restart_too(tmp_path):
    for name in ("cert", "key"):
        (tmp_path / name).write_text("")
    key = {"gateway_client_key": str(tmp_path / "key")}
    with pytest.raises(
        InvalidSpec, match="gateway_client_key only together with gateway_client_cert"
    ):
        revised(tmp_path, FULL_GATEWAY, key)
    _, new = revised(tmp_path, {**FULL_GATEWAY, "gateway_client_cert": str(tmp_path / "cert")}, key)
    assert new.gateway.client_key == str(tmp_path / "key")


def test_a_restart_accepts_changes_over_the_api(client, tmp_path):
    client.post("/api/servers", json={"name": "x"})
    answer = client.post(
        "/api/servers/x/restart", json={"env": {"A": "b"}, "labels": {"team": "blue"}}
    )
    assert (answer.status_code, answer.json["labels"], answer.json["generation"]) == (
        201,
        {"team": "blue"},
        2,
    )
    assert client.post("/api/servers/x/restart").json["labels"] == {"team": "blue"}


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"name": "y"}, 422, "name: is not a known field"),
        ({"keep_kernels": "yes"}, 422, "keep_kernels"),
        ({"colour": "red"}, 422, "colour"),
        ({"root_dir": "/no/such/directory"}, 422, "root_dir"),
        ({"kernel_env": {"KERNEL_ID": "x"}}, 422, "KERNEL_ID"),
        ({"kernel_env": {"a,b": "x"}}, 422, "bad name"),
        ({"keep_kernels": True}, 409, "not on a gateway"),
    ],
)
def test_an_invalid_restart_is_refused_and_changes_nothing(client, body, status, word):
    before = client.post("/api/servers", json={"name": "x"}).json
    answer = client.post("/api/servers/x/restart", json=body)
    assert answer.status_code == status
    assert word in answer.get_data(as_text=True)
    assert client.get("/api/servers/x").json == before


def test_orphaned_kernels_are_listed(services):
    orphan = OrphanedKernel("k1", Gateway("http://g", "ws://g", "secret"), ServerName("x"), 0.0)
    client = create_app(replace(services, orphans=lambda: [orphan])).test_client()
    answer = client.get("/api/orphaned-kernels", headers={"Authorization": f"Bearer {TOKEN}"})
    listed = {
        "kernel_id": "k1",
        "gateway_url": "http://g",
        "server": "x",
        "since": "1970-01-01T00:00:00.000Z",
    }
    assert answer.json == {"orphaned_kernels": [listed]}


def test_a_response_has_the_health_of_the_gateway(tmp_path):
    _, spec = revised(
        tmp_path, {}, {**FULL_GATEWAY, "kernel_env": {"KERNEL_B": "1", "KERNEL_A": "2", "FOO": "3"}}
    )
    snapshot = Snapshot(spec, State.STOPPED, Goal.DOWN, since=0.0, created_at=0.0)
    shown = server_model(snapshot, None).gateway
    assert (shown.url, shown.required, shown.reachable, shown.since, shown.error) == (
        "http://g:1/team",
        True,
        None,
        None,
        None,
    )
    assert (shown.kernel_env_passed, shown.kernel_env_if_allowed) == (
        ["KERNEL_A", "KERNEL_B"],
        ["FOO"],
    )
    ill = replace(
        snapshot,
        gateway=GatewayHealth(1.0, Failure(FailureClass.GATEWAY_REFUSED, "no")),
        kernels_kept=(OwnKernel("k"),),
    )
    shown = server_model(ill, None)
    assert (shown.gateway.reachable, shown.gateway.error.message, shown.kernels_kept) == (
        False,
        "no",
        ["k"],
    )
    well = server_model(replace(snapshot, gateway=GatewayHealth(1.0, kernelspecs=3)), None).gateway
    assert (well.reachable, well.since, well.kernelspecs) == (True, "1970-01-01T00:00:01.000Z", 3)


def test_a_queued_server_has_its_position_and_starts_in_turn(services, world):
    """One start slot: the others queue, which callers learn when their wait ends."""
    services.keeper._fleet._policy = replace(services.keeper._fleet._policy, max_starts=1)
    client = create_app(services).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {TOKEN}"
    world.temper("a").boots = False
    for name in ("a", "b", "c"):
        assert client.post("/api/servers?wait=0", json={"name": name}).status_code == 202
    listed = {
        s["name"]: (s["state"], s["queue_position"])
        for s in client.get("/api/servers").json["servers"]
    }
    assert listed == {"a": ("starting", None), "b": ("queued", 1), "c": ("queued", 2)}
    answer = client.post("/api/servers?wait=0.05", json={"name": "b"})
    assert (answer.status_code, answer.json["queue_position"]) == (202, 1)
    assert client.post("/api/servers/b/stop").json["state"] == "stopped"
    assert client.get("/api/servers/c").json["queue_position"] == 1
    until(lambda: world.living("a"), what="server 'a' to be launched")
    world.answer("a")
    assert client.get("/api/servers/c?wait_for=running&wait=5").json["state"] == "running"


def test_a_bulk_start_has_a_result_for_each_server(client, world):
    """A failure does not affect the others, and the request can be repeated."""
    world.temper("bad").refusal = BackendRefused("cannot start server 'bad': told to refuse")
    answer = client.post(
        "/api/bulk/start", json={"names": ["one", "bad", "two"], "labels": {"of": "many"}}
    )
    assert answer.status_code == 207
    results = {result["name"]: result for result in answer.json["results"]}
    assert [result["name"] for result in answer.json["results"]] == ["one", "bad", "two"]
    assert {name: result["status"] for name, result in results.items()} == {
        "one": 201,
        "bad": 502,
        "two": 201,
    }
    assert results["one"]["server"]["labels"] == {"of": "many"}
    assert results["one"]["problem"] is None
    assert results["bad"]["problem"]["code"] == "start_failed"
    again = client.post("/api/bulk/start", json={"names": ["one", "two"], "labels": {"of": "many"}})
    assert (again.status_code, [result["status"] for result in again.json["results"]]) == (
        200,
        [200, 200],
    )
    other = client.post("/api/bulk/start", json={"names": ["one", "two"]})
    assert [result["problem"]["code"] for result in other.json["results"]] == [
        "conflict",
        "conflict",
    ]


def test_a_bulk_start_reports_servers_that_are_still_starting(client, world):
    world.temper("slow").boots = False
    client.post("/api/servers", json={"name": "runs"})
    answer = client.post("/api/bulk/start?wait=0.2", json={"names": ["runs", "slow"]})
    assert answer.status_code == 202
    assert [result["status"] for result in answer.json["results"]] == [200, 202]


def test_a_bulk_start_beyond_capacity_refuses_the_rest(client):
    answer = client.post("/api/bulk/start", json={"names": ["one", "two", "three", "four"]})
    assert answer.status_code == 207
    assert [result["status"] for result in answer.json["results"]] == [201, 201, 201, 429]
    assert answer.json["results"][3]["server"] is None


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"names": []},
        {"names": ["a", "a"]},
        {"names": ["a", "B"]},
        {"names": ["a", "b"], "port": 9000},
        {"names": ["a"], "name": "a"},
        {"names": ["a", "b"], "root_dir": "/no/such/place"},
        {"names": [f"n{i}" for i in range(201)]},
    ],
)
def test_an_invalid_bulk_start_starts_no_server(client, body):
    answer = client.post("/api/bulk/start", json=body)
    assert answer.status_code == 422
    assert client.get("/api/servers").json["servers"] == []


# How kernels are launched


def test_how_kernels_are_launched_is_part_of_the_server(client):
    made = client.post("/api/servers", json={"name": "x", "kernels_by": "exec"})
    assert (made.status_code, made.json["kernels_by"]) == (201, "exec")
    assert client.post("/api/servers", json={"name": "x", "kernels-by": "exec"}).status_code == 200
    other = client.post("/api/servers", json={"name": "x"})
    assert (other.status_code, other.json["differs"]) == (409, ["kernels_by"])
    assert client.post("/api/servers/x/restart").json["kernels_by"] == "exec"
    again = client.post("/api/servers/x/restart", json={"kernels_by": "fork"})
    assert again.json["kernels_by"] == "fork"


def test_a_keeper_that_executes_kernels_names_the_setting(services):
    defaults = replace(services.defaults, kernels_by="exec")
    client = create_app(replace(services, defaults=defaults)).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {TOKEN}"
    answer = client.post("/api/servers", json={"name": "x", "kernels_by": "fork"})
    assert (answer.status_code, answer.json["code"]) == (422, "invalid_spec")
    assert "LABKEEPER_KERNELS_BY=exec" in answer.json["detail"]
    assert client.post("/api/servers", json={"name": "x"}).json["kernels_by"] == "exec"


# Culling


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("idle_timeout", "1h30m", 5400),
        ("max-age", 60, 60),
        ("idle_timeout", None, None),
        ("max_age", 0, None),
    ],
)
def test_cull_rules_are_returned_in_seconds_and_null_disables_the_default(
    services, field, value, kept
):
    defaults = replace(services.defaults, idle_timeout=7200.0, max_age=9000.0)
    client = create_app(replace(services, defaults=defaults)).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {TOKEN}"
    made = client.post("/api/servers", json={"name": "x", field: value}).json
    expected = {"idle_timeout": 7200, "max_age": 9000, field.replace("-", "_"): kept}
    assert {name: made[name] for name in ("idle_timeout", "max_age")} == expected
    again = client.post("/api/servers/x/restart", json={"idle_timeout": "2d"}).json
    assert (again["idle_timeout"], again["max_age"]) == (2 * 86400, expected["max_age"])


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("", {"name": "y", "idle_timeout": "soon"}, "idle_timeout: must be seconds as a number"),
        ("", {"name": "y", "max_age": True}, "max_age: must be seconds as a number"),
        ("/x/snooze", {"for": "25h"}, "for must be at most 1 d (LABKEEPER_MAX_SNOOZE)"),
        ("/x/snooze", {}, "for: is required"),
        ("/x/snooze", [], "body must be a JSON object"),
        ("/x/snooze", None, "body: must be a JSON object"),
        ("/x/snooze", {"for": None}, "for: must be seconds"),
    ],
)
def test_an_invalid_duration_is_refused_with_the_rule(client, path, body, word):
    client.post("/api/servers", json={"name": "x"})
    answer = client.post(f"/api/servers{path}", json=body)
    assert answer.status_code == 422
    assert word in answer.json["detail"]


def test_a_snooze_returns_its_end_and_zero_cancels_it(client):
    client.post("/api/servers", json={"name": "x", "idle_timeout": 60})
    snoozed = client.post("/api/servers/x/snooze", json={"for": "1h"}).json
    assert snoozed["snoozed_until"] == client.get("/api/servers/x").json["snoozed_until"]
    assert snoozed["snoozed_until"] == client.get("/api/servers/x/idle").json["snoozed_until"]
    assert client.post("/api/servers/x/snooze", json={"for": 0}).json["snoozed_until"] is None
    assert client.post("/api/servers/nobody/snooze", json={"for": 0}).status_code == 404


def test_idle_lists_the_servers_that_stop_first_first(client):
    for name, rule in (("a", {}), ("b", {"max_age": "2h"}), ("c", {"max_age": "1h"})):
        client.post("/api/servers", json={"name": name, **rule})
    listed = client.get("/api/idle").json["servers"]
    assert [(one["name"], one["rule"]) for one in listed] == [
        ("c", "max_age"),
        ("b", "max_age"),
        ("a", None),
    ]
