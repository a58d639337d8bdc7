"""Messages into and out of the fleet: facts, commands, changes, and history entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from labkeeper.core.lifecycle import Action, Event
from labkeeper.core.server import (
    Endpoint,
    Exit,
    Failure,
    GatewayHealth,
    Instance,
    OwnKernel,
    Progress,
    Snapshot,
    StopMethod,
)
from labkeeper.core.spec import LOCAL, Owner, QualifiedName, ServerName, ServerSpec


@dataclass(frozen=True, slots=True)
class Ready:
    """The server answers as itself."""

    endpoint: Endpoint
    instance: Instance
    gateway: GatewayHealth | None = None
    """Result of the check of its gateway, if there was one."""
    not_taken_over: tuple[str, ...] = ()
    """Ids of kernels it should have taken over; they may still run without it."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The process and its descendants are proven gone."""

    exit: Exit
    method: StopMethod = StopMethod.NONE
    kernels_stopped: tuple[str, ...] = ()
    kernels_left: tuple[OwnKernel, ...] = ()
    """Kernels that may still run on its gateway, intended or not."""
    failure: Failure | None = None
    """The cause, with the last log lines; None after an orderly end."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The server was not launched; nothing of it exists."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Vetoed:
    """The server must not start: a dependency is unusable."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class GatewaySeen:
    """Its gateway has become reachable or unreachable."""

    health: GatewayHealth


@dataclass(frozen=True, slots=True)
class Unreachable:
    """The backend cannot determine the server's state."""

    reason: str


@dataclass(frozen=True, slots=True)
class Seen:
    """A process exists. `answers` is false if the server in it is silent, None if unknown."""

    answers: bool | None


@dataclass(frozen=True, slots=True)
class Gone:
    """No process exists, and how it ended is unknown."""


Fact = Ready | Ended | Refused | Vetoed | Progress | GatewaySeen | Unreachable | Seen | Gone


@dataclass(frozen=True, slots=True)
class Report:
    """A fact about one launch of a server."""

    name: QualifiedName
    generation: int
    fact: Fact
    observation: bool = False
    """Whether it is the result of a requested observation."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The actor and the reason of a command or change."""

    actor: str = "keeper"
    """`keeper`, `culler`, or a caller: `token:NAME`, `user:NAME` of the machine, `anybody` if
    access control is off."""
    request_id: str | None = None
    """The id of the request, if there was one."""
    reason: str = ""
    """The reason, unless obvious."""


KEEPER: Final = Origin()


CULLER: Final = "culler"
"""The actor that stops idle servers; its reason begins with the rule, as in `core.culling`."""


@dataclass(frozen=True, slots=True)
class Create:
    """Create and start a server of this spec; idempotent for an equal spec."""

    spec: ServerSpec
    origin: Origin = KEEPER


@dataclass(frozen=True, slots=True)
class Order:
    """A lifecycle command to an existing server."""

    name: QualifiedName
    event: Event
    force: bool = False
    """Kill the server first, then apply the event."""
    revised: ServerSpec | None = None
    """The spec from the next launch on."""
    origin: Origin = KEEPER
    seen: Snapshot | None = None
    """Precondition: if the server no longer has this snapshot, nothing is done."""


@dataclass(frozen=True, slots=True)
class Snooze:
    """Postpone culling. `until` is seconds since the epoch; None ends it."""

    name: QualifiedName
    until: float | None
    origin: Origin = KEEPER


@dataclass(frozen=True, slots=True)
class StopAll:
    """Stop every server; the keeper is about to end."""

    origin: Origin = Origin(reason="the keeper ends")


@dataclass(frozen=True, slots=True)
class Tick:
    """Fire the timers that are due."""


Message = Create | Order | Snooze | StopAll | Report | Tick


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply to a command."""

    snapshot: Snapshot
    created: bool = False
    """Whether the command caused a launch that was not in progress before."""


@dataclass(frozen=True, slots=True)
class Job:
    """One backend call; the jobs of one server run in order."""

    spec: ServerSpec
    generation: int
    action: Action
    keep_kernels: bool = False
    """Whether this end leaves its kernels on its gateway."""
    kernels: tuple[OwnKernel, ...] = ()
    """Kernels on its gateway that the launch takes over."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a server, for subscribers."""

    event: Event
    before: Snapshot | None
    after: Snapshot
    at: float
    """Seconds since the epoch."""
    origin: Origin = KEEPER
    """Who gave the command that it is or follows from; the keeper if there was none."""


class HistoryKind(StrEnum):
    """The kinds of history entries."""

    STATE = "state"
    """A server changed its state."""
    GOAL = "goal"
    """A server's goal changed, with no immediate effect."""
    GATEWAY = "gateway"
    """A server's gateway became usable or unusable."""
    CULL_WARNING = "cull-warning"
    """A server is about to be stopped as idle."""
    KERNEL_CULLED = "kernel-culled"
    """A kernel was ended as idle."""
    SNOOZED = "snoozed"
    """Culling of a server was postponed."""
    ORPHANS = "orphans"
    """Leftovers of an earlier keeper were found and ended."""
    TOKEN = "token"  # noqa: S105 - a kind
    """An API token was created or revoked."""
    SESSION = "session"
    """A browser session began, was revoked, or ended unused."""


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One entry of the history; the API calls it an event."""

    id: int
    """Increases across all servers and all keepers of one store."""
    at: float
    """Seconds since the epoch."""
    kind: HistoryKind
    server: ServerName | None
    message: str
    """A description for people."""
    origin: Origin = KEEPER
    generation: int | None = None
    details: Mapping[str, object] = field(default_factory=dict)
    """Plain data for programs, without secrets."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """The server's labels at the time; with `user`, they decide who may see the entry."""
    user: str | None = None
    """The user that it ran as, if not the keeper's own."""
    owner: Owner = LOCAL
    """The owner of the server, or of the token that the entry is about."""


@dataclass(frozen=True, slots=True)
class EdgeUse:
    """How the edge is used; counts are since the keeper's start, or that of an edge it found."""

    connections: int
    """Open connections of clients, without websockets."""
    websockets: int
    held: int
    """Requests that wait for a keeper."""
    handshakes: int
    """TLS handshakes that wait for their turn."""
    refused: int
    """Connections for which there was no room."""
    restarts: int
    """Edges that were started in place of one that had died."""
    answers: Mapping[tuple[str, str], int]
    """By who made them (`edge`, `keeper`, `lab`), and by the class of their status (`2xx`, ...)."""


@dataclass(frozen=True, slots=True)
class WebhookStatus:
    """The state of a webhook."""

    place: str
    """Its scheme and host; the rest of a URL is often a secret."""
    delivered: int
    dead: int
    """Entries dropped after failed deliveries."""
    pending: int
    error: str | None
    """Why the last POST failed; None if it succeeded."""
