"""What goes into the fleet and comes out of it: facts, commands, changes, and the events that are kept of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from labkeeper.core.lifecycle import Action, Event
from labkeeper.core.server import Endpoint, Exit, Failure, GatewayHealth, Instance, OwnKernel, Snapshot, StopMethod
from labkeeper.core.spec import ServerName, ServerSpec


@dataclass(frozen=True, slots=True)
class Ready:
    """It answers as itself."""

    endpoint: Endpoint
    instance: Instance
    gateway: GatewayHealth | None = None
    """What was found out about its gateway before, if it was asked."""
    not_taken_over: tuple[str, ...] = ()
    """Ids of kernels that it was to have, and that may live without it."""


@dataclass(frozen=True, slots=True)
class Ended:
    """Its process and all that it started are proven gone."""

    exit: Exit
    method: StopMethod = StopMethod.NONE
    kernels_stopped: tuple[str, ...] = ()
    kernels_left: tuple[OwnKernel, ...] = ()
    """Those that may still run on its gateway, whether they were meant to or not."""
    failure: Failure | None = None
    """The cause, with the last log lines, unless it ended in good order."""


@dataclass(frozen=True, slots=True)
class Refused:
    """It was not launched; nothing of it exists."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Vetoed:
    """It must not start: what it depends on cannot be used."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class GatewaySeen:
    """Its gateway can be reached, or cannot any more."""

    health: GatewayHealth


@dataclass(frozen=True, slots=True)
class Unreachable:
    """The backend cannot say what became of it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Seen:
    """A process of it exists. `answers` is false where the server in it is silent, None where nobody could find that out."""

    answers: bool | None


@dataclass(frozen=True, slots=True)
class Gone:
    """No process of it exists, and nobody saw how it ended."""


Fact = Ready | Ended | Refused | Vetoed | GatewaySeen | Unreachable | Seen | Gone


@dataclass(frozen=True, slots=True)
class Report:
    """A fact with its address."""

    name: ServerName
    generation: int
    fact: Fact
    observation: bool = False
    """Whether it is the result of an observation that was asked for."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Who set something off, and why."""

    actor: str = "keeper"
    """`keeper`, `culler`, or a caller: `token:NAME`, `user:NAME` of the machine, `anybody` where access control is off."""
    request_id: str | None = None
    """The request by which they did, where it was one."""
    reason: str = ""
    """Why, where that does not go without saying."""


KEEPER: Final = Origin()


CULLER: Final = "culler"
"""The actor of what is stopped for want of use; its reason begins with the rule, as `core.culling` has it."""


@dataclass(frozen=True, slots=True)
class Create:
    """Make a server of this spec and start it; idempotent for an equal spec."""

    spec: ServerSpec
    origin: Origin = KEEPER


@dataclass(frozen=True, slots=True)
class Order:
    """One of the lifecycle's commands to an existing server."""

    name: ServerName
    event: Event
    force: bool = False
    """Kill it first: to be ended at once, and then what the event says."""
    revised: ServerSpec | None = None
    """The spec that it is to have from the next launch on."""
    origin: Origin = KEEPER
    seen: Snapshot | None = None
    """What is so of it, as far as who gives the order knows; where it is not so any more, nothing is done."""


@dataclass(frozen=True, slots=True)
class Snooze:
    """Put off the culling of a server. `until` is seconds since the epoch; None ends it."""

    name: ServerName
    until: float | None
    origin: Origin = KEEPER


@dataclass(frozen=True, slots=True)
class StopAll:
    """Stop every server; the keeper is about to end."""

    origin: Origin = Origin(reason="the keeper ends")


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; timers that are due fire."""


Message = Create | Order | Snooze | StopAll | Report | Tick


@dataclass(frozen=True, slots=True)
class Reply:
    """What the fleet answers to a command."""

    snapshot: Snapshot
    created: bool = False
    """Whether the command made a launch that was not under way before."""


@dataclass(frozen=True, slots=True)
class Job:
    """One call of the backend; those for one server run in order."""

    spec: ServerSpec
    generation: int
    action: Action
    keep_kernels: bool = False
    """Whether the end that is asked for leaves its kernels on its gateway."""
    kernels: tuple[OwnKernel, ...] = ()
    """Kernels on its gateway that the launch is to have."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a server, for subscribers."""

    event: Event
    before: Snapshot | None
    after: Snapshot
    at: float
    """Seconds since the epoch."""
    origin: Origin = KEEPER
    """Who gave the command that it is or follows from; the keeper where nobody did."""


class HistoryKind(StrEnum):
    """What an entry of the history tells of."""

    STATE = "state"
    """A server came to another state."""
    GOAL = "goal"
    """A server is to be something else, which changes nothing at once."""
    GATEWAY = "gateway"
    """A server's gateway can be used again, or cannot any more."""
    CULL_WARNING = "cull-warning"
    """A server is about to be stopped because nobody uses it."""
    KERNEL_CULLED = "kernel-culled"
    """A kernel was ended because nobody uses it."""
    SNOOZED = "snoozed"
    """The culling of a server was put off."""
    ORPHANS = "orphans"
    """What an earlier keeper had left was found and ended."""
    TOKEN = "token"  # noqa: S105 - a kind
    """A token of the API was made or revoked."""


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One thing that happened, as it is remembered and told; callers know it as an event."""

    id: int
    """Grows, over all servers and all keepers of one store."""
    at: float
    """Seconds since the epoch."""
    kind: HistoryKind
    server: ServerName | None
    message: str
    """What happened, for people."""
    origin: Origin = KEEPER
    generation: int | None = None
    details: Mapping[str, object] = field(default_factory=dict)
    """What a program wants to know of it: plain data, without secrets."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of the server, as they were then: by them, and by the next, it is decided whose business this is."""
    user: str | None = None
    """Whom it ran as, where that was not the keeper's own user."""


@dataclass(frozen=True, slots=True)
class WebhookStatus:
    """How a webhook fares."""

    place: str
    """Its scheme and host; the rest of a URL is often a secret."""
    delivered: int
    dead: int
    """Entries that were given up."""
    pending: int
    error: str | None
    """Why the last POST failed; None where it did not."""
