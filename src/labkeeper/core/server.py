"""What is known of a server: its state, endpoint, kernels, usage and end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from labkeeper.core.lifecycle import Goal, State
from labkeeper.core.spec import Gateway, ServerName, ServerSpec


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How to reach a running server."""

    url: str
    token: str = field(repr=False)
    base_url: str
    hostname: str
    """The address that it listens on."""
    port: int
    secure: bool
    """Whether it speaks TLS."""
    password: bool
    """Whether it asks for a password."""
    root_dir: str
    """The directory that it shows."""
    version: str = ""
    """The version of jupyter_server."""


@dataclass(frozen=True, slots=True)
class Instance:
    """What a backend has launched: the same as long as it is the same process, container or pod."""

    id: str
    """Opaque to everyone but the backend."""
    pid: int | None = None
    """Its process, if it is one of the keeper's machine."""
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

    generation: int
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
class OrphanedKernel:
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
    generation: int = 0
    """Grows with each launch under this name, also after a deletion; facts of an earlier launch are dropped."""
    endpoint: Endpoint | None = None
    """Set exactly while it is running."""
    instance: Instance | None = None
    """Likewise."""
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
    """Return the servers that wait for a place to start in, the next one first: who came first is first."""
    return sorted((s for s in snapshots if s.state is State.QUEUED), key=lambda s: (s.since, s.name))
