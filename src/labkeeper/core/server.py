"""What is known about a server: state, endpoint, kernels, usage and end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Literal

from labkeeper.core.lifecycle import Goal, State
from labkeeper.core.spec import Gateway, QualifiedName, ServerName, ServerSpec


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
    """Its root directory."""
    version: str = ""
    """The version of jupyter_server."""
    behind_edge: bool = False
    """Whether it was launched to be reached through the edge: by any host name, and by the users
    that the edge signs."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One launched process, container or pod; equal as long as it is the same one."""

    id: str
    """Opaque except to the backend."""
    pid: int | None = None
    """Its process id, if it is on the keeper's machine."""
    launched_by: str = "exec"
    """`fork` from a process that had already loaded Jupyter, or `exec` of a new one."""
    exec_reason: str | None = None
    """Why it was not forked."""
    limited_by: Mapping[str, str] = field(default_factory=dict)
    """What enforces each limit of the spec, by name: `cgroup2`, `cgroup1`, `rlimit`, `nothing`."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended: an exit code, or the name of a signal, or neither if unknown."""

    code: int | None = None
    signal: str | None = None

    @property
    def clean(self) -> bool:
        """Whether the exit code is 0."""
        return self.code == 0

    def __str__(self) -> str:
        if self.signal is not None:
            return f"killed by {self.signal}"
        if self.code is not None:
            return f"exit code {self.code}"
        return "ended, cause unknown"


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


KNOWN_CAUSES: Final = frozenset(
    {
        FailureClass.START_TIMEOUT,
        FailureClass.HUNG,
        FailureClass.GATEWAY_UNREACHABLE,
        FailureClass.GATEWAY_TIMEOUT,
        FailureClass.GATEWAY_REFUSED,
        FailureClass.GATEWAY_TLS,
        FailureClass.NOT_A_GATEWAY,
    }
)
"""Failures for which the keeper ends a server, so that they are known before its end."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The cause of a failure, for people and programs."""

    kind: FailureClass
    message: str
    exit: Exit | None = None
    log_tail: tuple[str, ...] = ()


class StopMethod(StrEnum):
    """The last means that was used to end a server."""

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
class StopOrder:
    """The command that stopped a server, or is about to."""

    actor: str
    """Who gave it, as in events."""
    reason: str = ""
    """Why; that of the culler begins with the rule."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel of a server, as reported by Jupyter; `last_activity` is RFC 3339."""

    id: str
    name: str
    execution_state: str = "unknown"
    last_activity: str = ""
    connections: int = 0
    """Number of open websockets."""
    launched_by: Literal["fork", "exec"] | None = None
    """None if not reported, as for kernels on a gateway."""
    exec_reason: str | None = None
    """Why it was executed."""


@dataclass(frozen=True, slots=True)
class KernelUse:
    """The activity of a kernel."""

    id: str
    state: str
    """Jupyter's execution_state: `idle`, `busy`, `starting`, ..."""
    last_activity: float | None
    """None if not reported."""
    connections: int = 0
    """Number of open websockets."""


@dataclass(frozen=True, slots=True)
class TerminalUse:
    """The activity of a terminal."""

    name: str
    last_activity: float | None
    program: str | None = None
    """Its foreground program: "" for a shell at its prompt, None if unknown."""


@dataclass(frozen=True, slots=True)
class Activity:
    """A running server's activity, as reported by Jupyter. Times are seconds since the epoch."""

    last_activity: float | None
    """When its API, its local kernels or an open terminal were last used."""
    kernels: tuple[KernelUse, ...] = ()
    terminals: tuple[TerminalUse, ...] = ()


@dataclass(frozen=True, slots=True)
class Visits:
    """Who has a Lab open in a browser, as the edge sees it."""

    open: int
    """Open websockets, and requests in progress."""
    ago: float | None
    """Seconds since a browser last used the Lab; None: none has since the edge was started."""


@dataclass(frozen=True, slots=True)
class Session:
    """A notebook or console that has a kernel open, in Jupyter's terms."""

    path: str
    name: str
    type: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Resource usage of a server at one time, all its processes together."""

    memory: int
    """Bytes: as counted by its control group if it has one, else the sum of resident memory."""
    cpu_seconds: float
    """Since its launch, including ended processes; never decreases."""
    processes: int
    threads: int
    """Threads of all its processes, which a process limit counts."""
    proportional: int | None = None
    """Bytes, with shared pages divided among their processes (PSS); None if unknown. Measured
    rarely."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a server itself reports about its use."""

    kernels: int
    connections: int


@dataclass(frozen=True, slots=True)
class Sample:
    """A measurement of one launch of a server."""

    generation: int
    at: float
    """Seconds since the epoch."""
    usage: Usage
    cpus: float | None = None
    """Average number of busy processors since the previous sample."""
    load: Load | None = None


@dataclass(frozen=True, slots=True)
class OwnKernel:
    """A kernel that a server started, from the server's own record."""

    id: str
    sessions: tuple[Session, ...] = ()
    starting: bool = False
    """Whether its gateway had not answered yet: it may exist, appear later, or never."""


@dataclass(frozen=True, slots=True)
class OrphanedKernel:
    """A kernel of ours still to be ended on its gateway. `since` is seconds since the epoch."""

    kernel_id: str
    gateway: Gateway
    server: QualifiedName
    since: float
    starting: bool = False
    """As in `OwnKernel`."""


@dataclass(frozen=True, slots=True)
class GatewayHealth:
    """Whether a gateway can be used."""

    since: float
    """Start of this condition; seconds since the epoch."""
    error: Failure | None = None
    """Why it cannot be used."""
    kernelspecs: int | None = None
    """Number of kernelspecs that it offers."""

    @property
    def reachable(self) -> bool:
        """Whether it can be used."""
        return self.error is None


class Stage(StrEnum):
    """The stages of a start."""

    QUEUED = "queued"
    """The backend has no room yet."""
    PULLING = "pulling"
    """An image is pulled."""
    SCHEDULING = "scheduling"
    """A machine is chosen."""
    STARTING = "starting"
    """The server is loaded."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a start has come. Only starts that take longer than a fork report it."""

    stage: Stage
    message: str
    """For people: what is being done, and why that takes longer."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything known about a server at one time. Times are seconds since the epoch."""

    spec: ServerSpec
    state: State
    goal: Goal
    since: float
    """When it entered this state."""
    created_at: float
    generation: int = 0
    """Increases with each launch under this name, even after a deletion; facts of earlier launches
    are dropped."""
    endpoint: Endpoint | None = None
    """Set exactly while it is running."""
    instance: Instance | None = None
    """Likewise."""
    progress: Progress | None = None
    """The last progress reported while it is starting."""
    started_at: float | None = None
    """When it last became ready since the last start command."""
    exit: Exit | None = None
    """How it last ended."""
    failure: Failure | None = None
    stop_report: StopReport | None = None
    stopped_by: StopOrder | None = None
    """The last stop command, until the next start; None if it ended in another way."""
    restarts: int = 0
    """Launches after a crash since the last start command."""
    revised: ServerSpec | None = None
    """The spec of its next launch, if different."""
    gateway: GatewayHealth | None = None
    """The health of its gateway while it is running."""
    kernels_kept: tuple[OwnKernel, ...] = ()
    """Kernels on its gateway that its next launch takes over."""
    up_since: float | None = None
    """When it first became ready since the last start command; not reset by crashes or keepers."""
    snoozed_until: float | None = None
    """Until when culling is postponed, if it is."""

    @property
    def name(self) -> ServerName:
        """The name of the server."""
        return self.spec.name

    @property
    def qualified_name(self) -> QualifiedName:
        """The name that is unique among all owners."""
        return self.spec.qualified_name

    @property
    def forgotten(self) -> bool:
        """Whether this is the final snapshot of a deleted server."""
        return self.state is State.STOPPED and self.goal is Goal.ABSENT


def queue_of(snapshots: Iterable[Snapshot]) -> list[Snapshot]:
    """Return the servers that wait for a start slot, first in, first out."""
    return sorted(
        (s for s in snapshots if s.state is State.QUEUED), key=lambda s: (s.since, s.qualified_name)
    )
