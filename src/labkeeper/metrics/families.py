"""Our Prometheus metrics. Label values come from closed lists, never from callers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from labkeeper.core.culling import Rule
from labkeeper.core.lifecycle import State
from labkeeper.core.server import FailureClass, StopMethod

Labels = tuple[str, ...]
Distribution = tuple[list[tuple[str, float]], float]
"""A histogram: the cumulative count up to each bound, and the sum of the values."""
Value = float | Distribution

NONE: Final = "none"
"""The label value without a failure class or rule."""
WAYS: Final = ("fork", "exec")
UNKNOWN_WAY: Final = "unknown"
"""For failed starts: only a server that is ready reports how it was launched."""


class Kind(StrEnum):
    """The types of metric families, in Prometheus' terms."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Family:
    """One family of metrics."""

    name: str
    kind: Kind
    about: str
    labels: Labels = ()
    known: tuple[Labels, ...] = ((),)
    """Labels present from the beginning: an alert only sees an increase if it saw 0 before."""
    buckets: tuple[float, ...] = ()


_CLASSES: Final = tuple(str(kind) for kind in FailureClass)

INFO: Final = Family("labkeeper_info", Kind.INFO, "The keeper's version.", ("version",))
SERVERS: Final = Family(
    "labkeeper_servers",
    Kind.GAUGE,
    "Servers by state.",
    ("state",),
    known=tuple((str(state),) for state in State),
)
STARTS: Final = Family(
    "labkeeper_starts_total",
    Kind.COUNTER,
    "Starts that were decided: ready, failed (by class), or stopped before either; "
    "by the way of launching where it is known.",
    ("outcome", "failure_class", "way"),
    known=(
        *(("ready", NONE, way) for way in WAYS),
        *(("failed", kind, UNKNOWN_WAY) for kind in _CLASSES),
        ("stopped", NONE, UNKNOWN_WAY),
    ),
)
START_DURATION: Final = Family(
    "labkeeper_start_duration_seconds",
    Kind.HISTOGRAM,
    "From the command to the server's being ready, by the way of launching; "
    "of a restart, from the end of the launch before.",
    ("way",),
    known=tuple((way,) for way in WAYS),
    buckets=(0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 60.0),
)
STOP_DURATION: Final = Family(
    "labkeeper_stop_duration_seconds",
    Kind.HISTOGRAM,
    "From the request to end a server to the proof that nothing is left, "
    "by the hardest method used; stops within a restart are not counted.",
    ("method",),
    known=tuple((str(method),) for method in StopMethod if method is not StopMethod.NONE),
    buckets=(0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 20.0, 60.0),
)
ENDS: Final = Family(
    "labkeeper_unrequested_ends_total",
    Kind.COUNTER,
    "Ends of servers that had been ready and were not asked to end, by class of the cause; "
    "none: shut down from inside.",
    ("failure_class",),
    known=tuple((kind,) for kind in (*_CLASSES, NONE)),
)
RESTARTS: Final = Family("labkeeper_restarts_total", Kind.COUNTER, "Launches after a crash.")
CULLS: Final = Family(
    "labkeeper_culls_total",
    Kind.COUNTER,
    "Servers that were stopped because they were not used, by rule.",
    ("rule",),
    known=tuple((str(rule),) for rule in Rule),
)
KERNEL_CULLS: Final = Family(
    "labkeeper_kernel_culls_total",
    Kind.COUNTER,
    "Kernels that were ended because they were not used.",
)
ORPHANS: Final = Family(
    "labkeeper_orphan_processes_total",
    Kind.COUNTER,
    "Processes that an earlier keeper had left, found and ended.",
)
ORPHANED_KERNELS: Final = Family(
    "labkeeper_orphaned_kernels", Kind.GAUGE, "Kernels that gateways still have to end."
)
GATEWAYS: Final = Family(
    "labkeeper_gateways",
    Kind.GAUGE,
    "Gateways of running servers, by whether they could be used when last looked at.",
    ("health",),
    known=(("reachable",), ("unreachable",)),
)
WEBHOOK_EVENTS: Final = Family(
    "labkeeper_webhook_events_total",
    Kind.COUNTER,
    "Events that the webhook took, and that were given up, by outcome; "
    "over all keepers of one state directory.",
    ("outcome",),
    known=(),
)
WEBHOOK_PENDING: Final = Family(
    "labkeeper_webhook_pending_events",
    Kind.GAUGE,
    "Events that the webhook is still to be told.",
    known=(),
)
HTTP_REQUESTS: Final = Family(
    "labkeeper_http_requests_total",
    Kind.COUNTER,
    "Answered requests, by the pattern of their path.",
    ("route", "method", "status"),
    known=(),
)
HTTP_DURATION: Final = Family(
    "labkeeper_http_request_duration_seconds",
    Kind.HISTOGRAM,
    "From a request to its answer, or the first of it where it is a stream; "
    "what waits for a server is in it.",
    ("route", "method"),
    known=(),
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0),
)
EDGE_CONNECTIONS: Final = Family(
    "labkeeper_edge_connections",
    Kind.GAUGE,
    "Open connections of clients to the edge.",
    ("kind",),
    known=(),
)
EDGE_HELD: Final = Family(
    "labkeeper_edge_held_requests",
    Kind.GAUGE,
    "Requests at the edge that wait for a keeper.",
    known=(),
)
EDGE_HANDSHAKES: Final = Family(
    "labkeeper_edge_waiting_handshakes",
    Kind.GAUGE,
    "TLS handshakes at the edge that wait for their turn.",
    known=(),
)
EDGE_REFUSED: Final = Family(
    "labkeeper_edge_refused_connections_total",
    Kind.COUNTER,
    "Connections that the edge has closed at once, because there were too many.",
    known=(),
)
EDGE_RESTARTS: Final = Family(
    "labkeeper_edge_restarts_total",
    Kind.COUNTER,
    "Edges that were started in place of one that had died.",
    known=(),
)
EDGE_ANSWERS: Final = Family(
    "labkeeper_edge_answers_total",
    Kind.COUNTER,
    "Requests that the edge has answered, by who made the answer (edge, keeper or lab), "
    "and by the class of its status.",
    ("to", "status"),
    known=(),
)
FAMILIES: Final = (
    INFO,
    SERVERS,
    STARTS,
    START_DURATION,
    STOP_DURATION,
    ENDS,
    RESTARTS,
    CULLS,
    KERNEL_CULLS,
    ORPHANS,
    ORPHANED_KERNELS,
    GATEWAYS,
    WEBHOOK_EVENTS,
    WEBHOOK_PENDING,
    HTTP_REQUESTS,
    HTTP_DURATION,
    EDGE_CONNECTIONS,
    EDGE_HELD,
    EDGE_HANDSHAKES,
    EDGE_REFUSED,
    EDGE_RESTARTS,
    EDGE_ANSWERS,
)
"""Our families, in output order; prometheus_client adds those of Python and the process."""
