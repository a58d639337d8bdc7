"""Metrics: values, Prometheus naming conventions, and labels of bounded cardinality."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from labkeeper.core.lifecycle import Event, Goal, State
from labkeeper.core.messages import Change, HistoryEntry, HistoryKind, Origin, WebhookStatus
from labkeeper.core.server import (
    Endpoint,
    Failure,
    FailureClass,
    GatewayHealth,
    Instance,
    OrphanedKernel,
    Snapshot,
    StopMethod,
    StopReport,
)
from labkeeper.core.spec import Gateway, ServerName
from labkeeper.metrics.collector import Metrics, World
from labkeeper.metrics.families import FAMILIES, Kind
from labkeeper.testing.fakes import FakeClock, a_spec

LAB = Snapshot(a_spec("lab"), State.STOPPED, Goal.DOWN, since=0.0, created_at=0.0)
ENDPOINT = Endpoint(
    "http://127.0.0.1:8888/", "t", "/", "127.0.0.1", 8888, False, False, "/notebooks"
)
INSTANCE = Instance("4711", 4711, launched_by="fork")
GATEWAY = Gateway("http://gateway:8888", "ws://gateway:8888")
CRASH = Failure(FailureClass.KILLED, "it was killed")
BASE_UNITS = ("_seconds", "_bytes")


class Server:
    """Goes through changes, and passes each to the metrics."""

    def __init__(self, metrics, clock, snapshot=LAB):
        self.metrics = metrics
        self.clock = clock
        self.snapshot = snapshot

    def goes(self, event, state, *, after=0.0, origin=None, **more):
        self.clock.advance(after)
        more.setdefault("endpoint", self.snapshot.endpoint if state is State.RUNNING else None)
        before, self.snapshot = self.snapshot, replace(self.snapshot, state=state, **more)
        self.metrics.changed(Change(event, before, self.snapshot, 0.0, origin or Origin()))
        return self

    def starts(self):
        return self.goes(
            Event.START, State.STARTING, goal=Goal.UP, generation=self.snapshot.generation + 1
        )

    def runs(self, *, after=0.12):
        return self.starts().goes(
            Event.READY,
            State.RUNNING,
            after=after,
            endpoint=ENDPOINT,
            instance=INSTANCE,
            started_at=1.0,
        )


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def metrics(clock):
    return Metrics(clock, version="1.2.3")


@pytest.fixture
def server(metrics, clock):
    return Server(metrics, clock)


def samples(metrics):
    """Return the values that Prometheus scrapes, by name and labels."""
    text, media_type = metrics.exposition("")
    assert media_type.startswith("text/plain")
    families = text_string_to_metric_families(text.decode())
    return {
        (s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples
    }


def value(metrics, name, **labels):
    return samples(metrics)[(f"labkeeper_{name}", *sorted(labels.items()))]


def starts(metrics, outcome, way="unknown", failure_class="none"):
    return value(metrics, "starts_total", outcome=outcome, way=way, failure_class=failure_class)


def test_a_successful_start_is_counted_and_timed_by_launch_method(metrics, server):
    server.runs(after=0.12)
    assert starts(metrics, "ready", "fork") == 1
    assert starts(metrics, "ready", "exec") == 0
    assert value(metrics, "start_duration_seconds_count", way="fork") == 1
    assert value(metrics, "start_duration_seconds_sum", way="fork") == pytest.approx(0.12)
    assert value(metrics, "start_duration_seconds_bucket", way="fork", le="0.1") == 0
    assert value(metrics, "start_duration_seconds_bucket", way="fork", le="0.15") == 1


def test_a_failed_start_is_counted_by_failure_class(metrics, server):
    server.starts().goes(
        Event.CRASHED, State.FAILED, failure=replace(CRASH, kind=FailureClass.PORT_IN_USE)
    )
    assert starts(metrics, "failed", failure_class="port-in-use") == 1
    assert (
        sum(value(metrics, "unrequested_ends_total", failure_class=kind) for kind in FailureClass)
        == 0
    )


def test_a_start_that_is_stopped_has_not_failed(metrics, server):
    server.starts().goes(Event.STOP, State.STOPPING, goal=Goal.DOWN).goes(
        Event.EXITED, State.STOPPED
    )
    assert starts(metrics, "stopped") == 1
    assert sum(starts(metrics, "failed", failure_class=kind) for kind in FailureClass) == 0


def test_a_start_that_gets_lost_is_counted_once_its_outcome_is_known(metrics, server):
    server.starts().goes(Event.UNREACHABLE, State.LOST)
    assert starts(metrics, "ready", "fork") == 0
    server.goes(Event.READY, State.RUNNING, endpoint=ENDPOINT, instance=INSTANCE, after=3)
    assert starts(metrics, "ready", "fork") == 1
    assert value(metrics, "start_duration_seconds_sum", way="fork") == 3


def test_a_stop_is_timed_by_method_and_is_not_an_unrequested_end(metrics, server):
    server.runs().goes(Event.STOP, State.STOPPING, goal=Goal.DOWN)
    server.goes(Event.EXITED, State.STOPPED, stop_report=StopReport(StopMethod.SIGTERM, 1.5))
    assert value(metrics, "stop_duration_seconds_sum", method="sigterm") == 1.5
    assert value(metrics, "stop_duration_seconds_count", method="sigkill") == 0
    assert value(metrics, "unrequested_ends_total", failure_class="none") == 0


def test_a_crash_and_the_restart_after_it_are_counted(metrics, server):
    server.runs().goes(Event.CRASHED, State.BACKOFF, failure=CRASH)
    assert value(metrics, "unrequested_ends_total", failure_class="killed") == 1
    assert value(metrics, "restarts_total") == 0
    server.goes(Event.DEADLINE, State.STARTING, generation=2, restarts=1, failure=None)
    server.goes(Event.READY, State.RUNNING, endpoint=ENDPOINT, instance=INSTANCE, after=0.2)
    assert value(metrics, "restarts_total") == 1
    assert starts(metrics, "ready", "fork") == 2


def test_a_shutdown_from_inside_is_an_unrequested_end_without_failure_class(metrics, server):
    server.runs().goes(Event.EXITED, State.STOPPED, goal=Goal.DOWN)
    assert value(metrics, "unrequested_ends_total", failure_class="none") == 1


def test_an_adopted_server_is_not_a_start_but_its_crash_counts(metrics, clock):
    known = replace(LAB, state=State.LOST, goal=Goal.UP, generation=4, started_at=1.0)
    metrics.changed(Change(Event.UNREACHABLE, None, known, 0.0))
    server = Server(metrics, clock, known).goes(
        Event.READY, State.RUNNING, endpoint=ENDPOINT, instance=INSTANCE
    )
    assert starts(metrics, "ready", "fork") == 0
    server.goes(Event.CRASHED, State.BACKOFF, failure=CRASH)
    assert value(metrics, "unrequested_ends_total", failure_class="killed") == 1


@pytest.mark.parametrize(
    ("reason", "rule"),
    [
        ("idle_timeout: unused for 1h", "idle_timeout"),
        ("max_age: it has run for 9h", "max_age"),
        ("", "none"),
    ],
)
def test_a_cull_is_counted_by_rule(metrics, server, reason, rule):
    server.runs().goes(
        Event.STOP, State.STOPPING, goal=Goal.DOWN, origin=Origin("culler", reason=reason)
    )
    server.goes(Event.EXITED, State.STOPPED, origin=Origin("culler", reason=reason))
    assert value(metrics, "culls_total", rule=rule) == 1


def test_history_entries_are_counted(metrics):
    for kind, details in (
        (HistoryKind.ORPHANS, {"pids": 3}),
        (HistoryKind.ORPHANS, {}),
        (HistoryKind.KERNEL_CULLED, {}),
        (HistoryKind.SNOOZED, {}),
    ):
        metrics.heard(HistoryEntry(1, 0.0, kind, ServerName("lab"), "", details=details))
    assert value(metrics, "orphan_processes_total") == 3
    assert value(metrics, "kernel_culls_total") == 1


def test_gauges_are_computed_at_each_scrape(clock):
    bad = GatewayHealth(1.0, Failure(FailureClass.GATEWAY_UNREACHABLE, "it is gone"))
    running = replace(LAB, state=State.RUNNING, endpoint=ENDPOINT, instance=INSTANCE)
    behind = [
        replace(
            running, spec=replace(a_spec(name), gateway=replace(GATEWAY, url=url)), gateway=health
        )
        for name, url, health in (
            ("a", "http://one", GatewayHealth(1.0)),
            ("b", "http://one", GatewayHealth(1.0)),
            ("c", "http://two", bad),
            ("d", "http://three", None),
        )
    ]
    orphan = OrphanedKernel("k", GATEWAY, ServerName("lab"), 0.0)
    world = World(
        servers=lambda: [LAB, *behind],
        orphans=lambda: [orphan, orphan],
        webhooks=lambda: [WebhookStatus("https://hooks", 5, 2, 1, None)],
    )
    metrics = Metrics(clock, world)
    states = {state: value(metrics, "servers", state=state) for state in State}
    assert states == dict.fromkeys(State, 0) | {State.STOPPED: 1, State.RUNNING: 4}
    assert (
        value(metrics, "gateways", health="reachable"),
        value(metrics, "gateways", health="unreachable"),
    ) == (1, 1)
    assert value(metrics, "orphaned_kernels") == 2
    assert value(metrics, "webhook_events_total", outcome="delivered") == 5
    assert value(metrics, "webhook_events_total", outcome="dead") == 2
    assert value(metrics, "webhook_pending_events") == 1


def test_requests_are_counted_by_route_and_callers_cannot_create_labels(metrics):
    metrics.answered("/api/servers/<name>", "GET", 200, 0.003)
    metrics.answered("/api/servers/<name>", "GET", 404, 0.003)
    metrics.answered(None, "GET", 404, 0.001)
    metrics.answered(None, "BREW", 405, 0.001)
    assert (
        value(
            metrics, "http_requests_total", route="/api/servers/<name>", method="GET", status="404"
        )
        == 1
    )
    assert (
        value(
            metrics,
            "http_request_duration_seconds_count",
            route="/api/servers/<name>",
            method="GET",
        )
        == 2
    )
    assert value(metrics, "http_requests_total", route="none", method="other", status="405") == 1


def test_version_process_and_garbage_collector_are_reported(metrics):
    found = samples(metrics)
    assert found[("labkeeper_info", ("version", "1.2.3"))] == 1
    assert found[("process_resident_memory_bytes",)] > 0
    assert ("python_gc_collections_total", ("generation", "0")) in found


def test_openmetrics_is_sent_to_clients_that_accept_it(metrics, server):
    server.runs()
    text, media_type = metrics.exposition("application/openmetrics-text; version=1.0.0")
    assert media_type.startswith("application/openmetrics-text")
    assert "labkeeper_starts" in {
        family.name for family in openmetrics.text_string_to_metric_families(text.decode())
    }
    assert metrics.exposition("application/openmetrics-text; version=nonsense")[0]


def test_every_family_follows_the_naming_conventions_and_is_exposed(metrics):
    written = {
        family.name: family
        for family in text_string_to_metric_families(metrics.exposition("")[0].decode())
    }
    for family in FAMILIES:
        assert re.fullmatch(r"labkeeper(_[a-z]+)+", family.name), family.name
        assert family.about.endswith("."), family.name
        assert (family.kind is Kind.COUNTER) == family.name.endswith("_total"), family.name
        assert bool(family.buckets) == (family.kind is Kind.HISTOGRAM), family.name
        assert "duration" not in family.name or family.name.endswith(BASE_UNITS), family.name
        assert not {"server", "name", "path", "le", "quantile"} & set(family.labels), family.name
        assert list(family.buckets) == sorted(family.buckets), family.name
        found = written[family.name.removesuffix("_total")]
        assert (found.documentation, found.type) == (
            family.about,
            "gauge" if family.kind is Kind.INFO else family.kind,
        )
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
