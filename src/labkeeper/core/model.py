"""The nouns: names, specs, endpoints, exits, snapshots, facts and commands. All frozen, all plain data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Final, NewType

from labkeeper.core.lifecycle import Action, Event, Goal, State

ServerName = NewType("ServerName", str)
"""The name of a server: a DNS label (RFC 1123), so that it can be a host, container and pod name on every backend."""

NAME_PATTERN: Final = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
NAME_RULE: Final = "must be 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit"
DEFAULT_NAME: Final = ServerName("default")
KERNEL_PREFIX: Final = "KERNEL_"
"""What the names of variables begin with that every gateway gives to its kernels; others only where it is configured to."""


def server_name(text: str) -> ServerName:
    """Check a name.

    Raises ValueError with the rule when `text` breaks it.
    """
    if re.fullmatch(NAME_PATTERN, text) is None:
        raise ValueError(NAME_RULE)
    return ServerName(text)


@dataclass(frozen=True, slots=True)
class Gateway:
    """A Jupyter kernel gateway and how to speak to it. Times in seconds; None leaves Jupyter's default."""

    url: str
    ws_url: str
    auth_token: str | None = field(default=None, repr=False)
    auth_scheme: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    ca_certs: str | None = None
    client_cert: str | None = None
    client_key: str | None = None
    validate_cert: bool = True
    connect_timeout: float | None = None
    request_timeout: float | None = None
    required: bool = True
    """Whether a server is not to start where this cannot be used."""
    user: str | None = None
    """The user of the machine that has to be able to read the client's certificate and key; None for the keeper's own."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server may use of its machine, all its kernels and terminals included; None leaves it unlimited."""

    memory: int | None = None
    """Bytes."""
    cpus: float | None = None
    """Processors; 1.5 is one and a half."""
    processes: int | None = None
    """Processes and threads."""


UNLIMITED: Final = Limits()


@dataclass(frozen=True, slots=True)
class HostMemory:
    """What there is to be had where the keeper runs; bytes."""

    total: int
    available: int
    """Without making anybody else wait: the lesser of what the machine has, and what the keeper's container may have."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """What is to stay free where the keeper runs; whichever is more."""

    amount: int = 0
    """Bytes."""
    share: float = 0.0
    """Of the total; 0.05 is a twentieth."""

    def of(self, total: int) -> int:
        """Give the bytes that are to stay free of a total."""
        return max(self.amount, int(total * self.share))


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """All that a caller can ask of a server. Two equal specs ask for the same server."""

    name: ServerName
    root_dir: str
    """The directory that the Lab shows; absolute."""
    base_url: str = "/"
    """The path prefix of the server; begins and ends with a slash."""
    default_url: str = "/lab"
    ip: str = "127.0.0.1"
    """The address that the server listens on."""
    port: int | None = None
    """The port that it listens on, and no other; None lets the backend choose a free one."""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    kernel_env: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Variables for its kernels, wherever they run; the server itself does not have them."""
    labels: Mapping[str, str] = field(default_factory=dict)
    gateway: Gateway | None = None
    limits: Limits = UNLIMITED
    user: str | None = None
    """The user of the machine that it runs as; None for the keeper's own."""
    idle_timeout: float | None = None
    """Seconds without use after which it is stopped; None never."""
    max_age: float | None = None
    """Seconds after which it is stopped in any case; None never."""
    jupyter_options: Mapping[str, bool | int | float] = field(default_factory=dict)
    """Options of Jupyter's own, by their names in its configuration: `ServerApp.terminals_enabled`."""

    def __post_init__(self) -> None:
        """Let its gateway be shown what the server's user can show, and no more."""
        if self.gateway is not None and self.gateway.user != self.user:
            object.__setattr__(self, "gateway", replace(self.gateway, user=self.user))

    def differs(self, other: ServerSpec) -> tuple[str, ...]:
        """Name the fields in which two specs differ; values may be secret and are not given."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How to reach a running server: Jupyter's server_info, `root_dir` under its older name `notebook_dir`."""

    base_url: str
    hostname: str
    notebook_dir: str
    password: bool
    pid: int
    port: int
    secure: bool
    token: str = field(repr=False)
    url: str
    version: str = ""
    """The version of jupyter_server."""
    launched_by: str = "exec"
    """`fork` from a process that had loaded Jupyter already, or `exec` of a new one."""
    exec_reason: str | None = None
    """Why it was not forked."""
    limited_by: Mapping[str, str] = field(default_factory=dict)
    """What holds each of the spec's limits, by its name: `cgroup2`, `cgroup1`, `rlimit`, `nothing`."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended: an exit code, or the name of a signal, or neither when nobody could see it."""

    code: int | None = None
    signal: str | None = None

    @property
    def clean(self) -> bool:
        """Whether it ended in good order."""
        return self.code == 0

    def __str__(self) -> str:
        if self.signal is not None:
            return f"killed by {self.signal}"
        if self.code is not None:
            return f"exit code {self.code}"
        return "ended, nobody saw how"


class FailureClass(StrEnum):
    """Why a server failed, in classes that a program can act on."""

    PORT_IN_USE = "port-in-use"
    GATEWAY_UNREACHABLE = "gateway-unreachable"
    GATEWAY_TIMEOUT = "gateway-timeout"
    GATEWAY_REFUSED = "gateway-refused"
    GATEWAY_TLS = "gateway-tls"
    NOT_A_GATEWAY = "not-a-gateway"
    IMPORT_ERROR = "import-error"
    DISK_FULL = "disk-full"
    CONFIG_ERROR = "config-error"
    KILLED = "killed"
    OUT_OF_MEMORY = "out-of-memory"
    START_TIMEOUT = "start-timeout"
    HUNG = "hung"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Failure:
    """The cause of a failure, for a person and for a program."""

    kind: FailureClass
    message: str
    exit: Exit | None = None
    log_tail: tuple[str, ...] = ()


class StopMethod(StrEnum):
    """What it took to end a server; the last one that was used."""

    NONE = "none"
    """It ended without being asked."""
    SHUTDOWN = "shutdown"
    SIGTERM = "sigterm"
    SIGKILL = "sigkill"


@dataclass(frozen=True, slots=True)
class StopReport:
    """How a server was ended."""

    method: StopMethod
    seconds: float
    """From the request to the proof that nothing is left."""
    kernels_stopped: tuple[str, ...] = ()
    """Ids of the kernels that ended with it."""
    kernels_left: tuple[str, ...] = ()
    """Ids of the kernels that may still run on its gateway."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel of a server, as Jupyter tells it; `last_activity` is RFC 3339."""

    id: str
    name: str
    execution_state: str
    last_activity: str


@dataclass(frozen=True, slots=True)
class KernelUse:
    """How a kernel is used."""

    id: str
    state: str
    """Jupyter's execution_state: `idle`, `busy`, `starting`, ..."""
    last_activity: float | None
    """None where it is not told."""
    connections: int = 0
    """Websockets that are open to it."""


@dataclass(frozen=True, slots=True)
class TerminalUse:
    """How a terminal is used."""

    name: str
    last_activity: float | None
    program: str | None = None
    """What runs in its foreground: "" when its shell waits for input, None when that cannot be known."""


@dataclass(frozen=True, slots=True)
class Activity:
    """How a running server is used. Times are seconds since the epoch, as Jupyter tells them."""

    last_activity: float | None
    """When its API, its kernels beside it, or an open terminal were last used."""
    kernels: tuple[KernelUse, ...] = ()
    terminals: tuple[TerminalUse, ...] = ()


@dataclass(frozen=True, slots=True)
class Session:
    """What a kernel is open in: a notebook or a console, in Jupyter's words."""

    path: str
    name: str
    type: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What a server uses at one moment, all its processes together."""

    memory: int
    """Bytes: what its control group counts where one does, else the sum of what each process has resident."""
    cpu_seconds: float
    """Since its launch, also of processes that have ended; never less than before."""
    processes: int
    threads: int
    """Threads of all of them; what a limit of processes counts."""
    proportional: int | None = None
    """Bytes, with shared pages divided among those that share them (PSS); None where it is not known. Looked at seldom."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a server itself tells of its use."""

    kernels: int
    connections: int


@dataclass(frozen=True, slots=True)
class Sample:
    """What was found out about one launch of a server."""

    launch: int
    at: float
    """Seconds since the epoch."""
    usage: Usage
    cpus: float | None = None
    """Processors that were busy with it since the sample before."""
    load: Load | None = None


@dataclass(frozen=True, slots=True)
class OwnKernel:
    """A kernel that a server started, as it has written down."""

    id: str
    sessions: tuple[Session, ...] = ()
    starting: bool = False
    """Whether its gateway had not answered yet: it may be there, or come later, or never."""


@dataclass(frozen=True, slots=True)
class KernelDebt:
    """A kernel of ours that is still to be ended on its gateway. `since` is seconds since the epoch."""

    kernel_id: str
    gateway: Gateway
    server: ServerName
    since: float
    starting: bool = False
    """As in `OwnKernel`."""


@dataclass(frozen=True, slots=True)
class GatewayHealth:
    """Whether a gateway can be used."""

    since: float
    """When it came to be so; seconds since the epoch."""
    error: Failure | None = None
    """Why it cannot."""
    kernelspecs: int | None = None
    """How many kinds of kernels it offers."""

    @property
    def reachable(self) -> bool:
        """Whether it can be used."""
        return self.error is None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that is known of a server at one moment. Times are seconds since the epoch."""

    spec: ServerSpec
    state: State
    goal: Goal
    since: float
    """When it came to this state."""
    created_at: float
    launch: int = 0
    """Grows with each launch under this name, also after a deletion; facts of an earlier launch are dropped."""
    endpoint: Endpoint | None = None
    """Set exactly while it is running."""
    started_at: float | None = None
    """When it last became ready since the last start command."""
    exit: Exit | None = None
    """How it last ended."""
    failure: Failure | None = None
    stop_report: StopReport | None = None
    restarts: int = 0
    """Launches after a crash since the last start command."""
    revised: ServerSpec | None = None
    """The spec of its next launch, where that is to be another."""
    gateway: GatewayHealth | None = None
    """What is known of its gateway while it is running."""
    kernels_kept: tuple[OwnKernel, ...] = ()
    """Kernels on its gateway that its next launch is to have."""
    up_since: float | None = None
    """When it first became ready since the last start command; neither a crash nor another keeper changes it."""
    snoozed_until: float | None = None
    """Until when it is not culled, where somebody has put that off."""

    @property
    def name(self) -> ServerName:
        """The name of the server."""
        return self.spec.name

    @property
    def forgotten(self) -> bool:
        """Whether this is the last word on a deleted server."""
        return self.state is State.STOPPED and self.goal is Goal.ABSENT


def queue_of(snapshots: Iterable[Snapshot]) -> list[Snapshot]:
    """Give the servers that wait for a place to start in, the next one first: who came first is first."""
    return sorted((s for s in snapshots if s.state is State.QUEUED), key=lambda s: (s.since, s.name))


# Facts: what a backend reports of one launch of one server.


@dataclass(frozen=True, slots=True)
class Ready:
    """It answers as itself."""

    endpoint: Endpoint
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
    launch: int
    fact: Fact


# Commands: what a caller asks of the fleet.


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
    """What a server's lane is asked to do."""

    spec: ServerSpec
    launch: int
    action: Action
    keep_kernels: bool = False
    """Whether the end that is asked for leaves its kernels on its gateway."""
    kernels: tuple[OwnKernel, ...] = ()
    """Kernels on its gateway that the launch is to have."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a server, for listeners."""

    event: Event
    before: Snapshot | None
    after: Snapshot
    at: float
    """Seconds since the epoch."""
    origin: Origin = KEEPER
    """Who gave the command that it is or follows from; the keeper where nobody did."""


# What is remembered.


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
    launch: int | None = None
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
