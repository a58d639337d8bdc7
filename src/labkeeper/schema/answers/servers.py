"""A server: its fields, usage, gateway, kernels, and how it ended."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError

from labkeeper.core.errors import BadAnswer, LabkeeperError
from labkeeper.core.lifecycle import Goal, State
from labkeeper.core.server import FailureClass, Stage, StopMethod
from labkeeper.schema.answers.base import TOLERANT, Answer, known
from labkeeper.schema.answers.problems import Problem


class Exit(Answer):
    """How a process ended; both are null if that is unknown."""

    code: int | None
    signal: str | None


class Failure(Answer):
    """Why a server failed."""

    failure_class: Annotated[FailureClass, known(FailureClass)]
    message: str
    exit: Exit | None
    log_tail: list[str]


class Progress(Answer):
    """How far a start has come."""

    stage: Annotated[Stage, known(Stage)] = Field(
        description="`queued`, `pulling` or `scheduling` on an engine, or `starting`."
    )
    message: str = Field(description="What is being done, for people.")


class StopReport(Answer):
    """How a server was ended."""

    method: Annotated[StopMethod, known(StopMethod)] = Field(
        description="The last means that was needed: Jupyter's own shutdown, SIGTERM or SIGKILL."
    )
    seconds: float = Field(description="From the request until nothing was left.")
    kernels_stopped: list[str]
    kernels_left: list[str] = Field(
        description=(
            "Kernels that may still run on the gateway; they are ended as soon as it responds."
        )
    )


class StopOrder(Answer):
    """Who stopped a server, and why."""

    actor: str
    reason: str = Field(description="That of the culler begins with the rule; may be empty.")


class Limit(Answer):
    """A resource limit of a server with its kernels and terminals."""

    limit: int | float
    used: int | float | None = Field(description="Usage, from the last sample; null without one.")
    limited_by: str | None = Field(
        description=(
            "What enforces it: `cgroup2`, `cgroup1`, `rlimit` (for each process) or `nothing`; "
            "null unless it is running."
        )
    )


class Usage(Answer):
    """Resource usage of a server with its kernels and terminals, from the last sample."""

    at: str = Field(description="When the sample was taken.")
    memory: int = Field(
        description=(
            "Bytes: as counted by its control group, or else the resident memory of its processes."
        )
    )
    memory_proportional: int | None = Field(
        description=(
            "Bytes, with shared pages divided among the processes that share them (PSS); "
            "measured once a minute."
        )
    )
    cpu_seconds: float = Field(
        description="CPU seconds since its launch, including processes that have ended."
    )
    cpus: float | None = Field(
        description="Average number of busy processors since the previous sample."
    )
    processes: int
    threads: int = Field(
        description="Threads of all its processes; the process limit counts these."
    )
    kernels: int | None = Field(
        description="As reported by Jupyter; null if it has not responded recently."
    )
    connections: int | None = Field(
        description="Connections of browsers to kernels, as reported by Jupyter."
    )


class Gateway(Answer):
    """A server's kernel gateway and its state."""

    url: str
    required: bool = Field(description="Whether the server fails to start without it.")
    reachable: bool | None = Field(
        description="Null while the server is not running, or before the first check."
    )
    since: str | None = Field(description="Since when it has been reachable or not.")
    error: Failure | None = Field(description="Why it is not reachable.")
    kernelspecs: int | None = Field(description="Number of kernelspecs that it offers.")
    kernel_env_passed: list[str] = Field(
        description="Variables of `kernel_env` that every gateway passes to kernels."
    )
    kernel_env_if_allowed: list[str] = Field(
        description=(
            "Variables that it passes only if its configuration allows them; "
            "gateways do not report that."
        )
    )


class Server(Answer):
    """A server.

    The first nine fields are Jupyter's server_info; they are null unless it is running.
    """

    base_url: str | None = Field(description="Path prefix of the server (server_info).")
    hostname: str | None = Field(description="Address that it listens on (server_info).")
    notebook_dir: str | None = Field(
        description="Root directory (server_info's name for `root_dir`)."
    )
    password: bool | None = Field(description="Whether it asks for a password (server_info).")
    pid: int | None = Field(description="Process id (server_info).")
    port: int | None = Field(description="Its port (server_info).")
    secure: bool | None = Field(description="Whether it speaks TLS (server_info).")
    token: str | None = Field(
        repr=False,
        description="Jupyter's token of this launch; null for callers who may not open it.",
    )
    url: str | None = Field(description="Root URL, as reported by Jupyter (server_info).")
    lab_url: str | None = Field(
        repr=False,
        description=(
            "Address of the Lab for browsers, as the caller reaches it; with its token if it has a "
            "port of its own. Null for callers who may not open it."
        ),
    )
    version: str | None = Field(description="Version of jupyter_server.")
    launched_by: str | None = Field(
        description="`fork` (from a process that had loaded JupyterLab) or `exec`."
    )
    exec_reason: str | None = Field(description="Why it was not forked; null if it was.")
    name: str = Field(description="Name; unique for each owner.")
    owner: str = Field(description="Whom it belongs to; `local` until people sign in.")
    state: Annotated[State, known(State)] = Field(description="Current state; see the lifecycle.")
    goal: Annotated[Goal, known(Goal)] = Field(description="Requested state; see the lifecycle.")
    since: str = Field(description="When it entered this state (RFC 3339, UTC).")
    created_at: str = Field(description="When it was created.")
    started_at: str | None = Field(description="When it last became ready.")
    generation: int = Field(description="Number of its last launch.")
    restarts: int = Field(description="Restarts after a crash since the last start command.")
    root_dir: str = Field(description="Root directory.")
    default_url: str = Field(description="Page that it opens.")
    labels: dict[str, str] = Field(description="Labels.")
    description: str = Field(description="One line of text for people; may be empty.")
    limits: dict[str, Limit] = Field(
        description="Limits by name: `memory` in bytes, `cpus`, `processes`."
    )
    usage: Usage | None = Field(
        description="Resource usage; null unless it is running and has been measured."
    )
    user: str | None = Field(description="User that it runs as; null for the keeper's own.")
    idle_timeout: float | None = Field(
        description="Idle time, in seconds, after which it is stopped; null: never."
    )
    max_age: float | None = Field(
        description="Age, in seconds, at which it is stopped; null: never."
    )
    sleep_after: float | None = Field(
        description=(
            "Time without kernels, terminals and visitors, in seconds, after which it is stopped "
            "until the next visit; null: never."
        )
    )
    kernels_by: str = Field(
        description=(
            "How local IPython kernels are launched: `fork` (where possible, from a process that "
            "has loaded ipykernel) or `exec`."
        )
    )
    jupyter_options: dict[str, bool | int | float] = Field(description="Jupyter options.")
    snoozed_until: str | None = Field(
        description="Until when culling is postponed; null if it is not."
    )
    gateway: Gateway | None = Field(
        description="Kernel gateway and its state; null if kernels run locally."
    )
    kernels_kept: list[str] = Field(
        description="Ids of kernels on its gateway that its next launch will take over."
    )
    queue_position: int | None = Field(
        description="Position in the start queue, from 1; null unless it is queued."
    )
    progress: Progress | None = Field(
        description="How far its start has come; null unless it is starting and takes longer."
    )
    exit: Exit | None = Field(
        description="How it last ended: `code` or `signal`; neither if that is unknown."
    )
    failure: Failure | None = Field(
        description="Why it failed: `failure_class`, `message`, `exit`, `log_tail`."
    )
    stop_report: StopReport | None = Field(
        description="How it was ended: `method`, `seconds`, `kernels_stopped`, `kernels_left`."
    )
    stopped_by: StopOrder | None = Field(
        description=(
            "Who stopped it: `actor` and `reason`, as in events; "
            "null if it runs, or ended in another way."
        )
    )


class ServerList(Answer):
    """One page of servers, by name."""

    servers: list[Server]
    next: str | None = Field(description="Cursor of the next page; null on the last page.")


class BulkResult(Answer):
    """The outcome for one of many servers."""

    name: str
    status: int = Field(
        description=(
            "The status that it would have had as a single request: 201, 200, "
            "202, or that of its problem."
        )
    )
    server: Server | None = Field(description="Null if there is a problem.")
    problem: dict[str, Any] | None = Field(
        repr=False, description="Why it could not be started (RFC 9457)."
    )

    @property
    def error(self) -> LabkeeperError | None:
        """The problem, as the error that a single request would have raised. Raises BadAnswer."""
        if self.problem is None:
            return None
        try:
            return Problem.model_validate(self.problem, context=TOLERANT).error(self.status)
        except ValidationError as error:
            raise BadAnswer(
                f"cannot understand the keeper's answer about server {self.name[:63]!r}"
            ) from error


class BulkResults(Answer):
    """The outcome for each server, in the order of the names."""

    results: list[BulkResult]


class Kernel(Answer):
    """A kernel, as reported by Jupyter."""

    id: str
    name: str
    execution_state: str
    last_activity: str
    launched_by: str | None = Field(
        description=(
            "`fork` (from a process that had loaded ipykernel) or `exec`; null if it is unknown, "
            "as for kernels on a gateway."
        )
    )
    exec_reason: str | None = Field(
        description="Why it was not forked; null if it was, or if that is unknown."
    )


class KernelList(Answer):
    """The kernels of a server."""

    kernels: list[Kernel]
