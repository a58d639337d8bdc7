"""Response bodies: the API writes them, the client reads them.

The client reads in a second mode, `tolerant`, so that it understands a newer keeper: it also accepts values that an enumeration
does not have yet.
"""

from __future__ import annotations

from enum import StrEnum
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from labkeeper.core.access import Scope
from labkeeper.core.culling import CullState, Rule
from labkeeper.core.errors import BadAnswer, ClientError, LabkeeperError, RequestError, tree
from labkeeper.core.lifecycle import Goal, State
from labkeeper.core.messages import HistoryKind
from labkeeper.core.server import FailureClass, StopMethod

_TOLERANT: Final = object()


def _known(kind: type[StrEnum]) -> WrapValidator:
    """Return a validator of an enumeration: in tolerant mode a value that it does not have becomes a member without a name."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        try:
            return handler(value)
        except ValidationError:
            if info.context is not _TOLERANT or not isinstance(value, str):
                raise
            newer = str.__new__(kind, value)
            newer._name_ = newer._value_ = value
            return newer

    return WrapValidator(validate)


class Answer(BaseModel):
    """A response body."""

    # Built when it is first needed, and not at boot. A newer keeper may answer with more fields.
    model_config = ConfigDict(defer_build=True, frozen=True, extra="allow")

    @classmethod
    def tolerant(cls, content: str | bytes) -> Self:
        """Read JSON that a keeper of another version wrote. Raises ValidationError."""
        return cls.model_validate_json(content, context=_TOLERANT)


class Exit(Answer):
    """How a process ended; both are null when nobody could see it."""

    code: int | None
    signal: str | None


class Failure(Answer):
    """Why a server failed."""

    failure_class: Annotated[FailureClass, _known(FailureClass)]
    message: str
    exit: Exit | None
    log_tail: list[str]


class StopReport(Answer):
    """How a server was ended."""

    method: Annotated[StopMethod, _known(StopMethod)] = Field(
        description="What it took: Jupyter's own shutdown, SIGTERM or SIGKILL."
    )
    seconds: float = Field(description="From the request until nothing of it was left.")
    kernels_stopped: list[str]
    kernels_left: list[str] = Field(description="Kernels that may still run on the gateway; ended as soon as it answers.")


class Limit(Answer):
    """What a server, with its kernels and terminals, may use of one thing."""

    limit: int | float
    used: int | float | None = Field(description="How much of it is used, by the last sample of `usage`; null without one.")
    limited_by: str | None = Field(
        description="What holds it: `cgroup2`, `cgroup1`, `rlimit` (for each process by itself) or `nothing`; "
        "null unless it is running."
    )


class Usage(Answer):
    """What a server uses with its kernels and terminals, by the last sample."""

    at: str = Field(description="When the sample was taken.")
    memory: int = Field(description="Bytes: what its control group counts where one does, else what its processes have resident.")
    memory_proportional: int | None = Field(
        description="Bytes, with pages that it shares with others divided among them (PSS); looked at once a minute."
    )
    cpu_seconds: float = Field(description="Seconds of processors since its launch, also of processes that have ended.")
    cpus: float | None = Field(description="Processors that were busy with it since the sample before.")
    processes: int
    threads: int = Field(description="Of all its processes; what `process_limit` counts.")
    kernels: int | None = Field(description="As Jupyter tells it; null where it did not answer of late.")
    connections: int | None = Field(description="Of browsers to its kernels, likewise.")


class Gateway(Answer):
    """A server's gateway, and whether it can be used."""

    url: str
    required: bool = Field(description="Whether the server does not start without it.")
    reachable: bool | None = Field(description="Null while the server does not run, or the gateway has not been asked yet.")
    since: str | None = Field(description="Since when it has been so.")
    error: Failure | None = Field(description="Why it cannot be used.")
    kernelspecs: int | None = Field(description="How many kinds of kernels it offers.")
    kernel_env_passed: list[str] = Field(description="Names of `kernel_env` that every gateway passes on to kernels.")
    kernel_env_if_allowed: list[str] = Field(
        description="Names that it passes on only if its own configuration allows them; gateways do not tell whether it does."
    )


class Server(Answer):
    """A server. The first nine fields are Jupyter's server_info; they are null unless it is running."""

    base_url: str | None = Field(description="Path prefix of the server (server_info).")
    hostname: str | None = Field(description="Address that it listens on (server_info).")
    notebook_dir: str | None = Field(description="Directory that it shows (server_info; the older name of `root_dir`).")
    password: bool | None = Field(description="Whether it asks for a password (server_info).")
    pid: int | None = Field(description="Its process (server_info).")
    port: int | None = Field(description="Its port (server_info).")
    secure: bool | None = Field(description="Whether it speaks TLS (server_info).")
    token: str | None = Field(repr=False, description="Jupyter's token of this launch; null for who may not open it.")
    url: str | None = Field(description="Its root URL, as Jupyter says it (server_info).")
    lab_url: str | None = Field(
        repr=False, description="A link that works from where the caller asked; null for who may not open it."
    )
    version: str | None = Field(description="Version of jupyter_server.")
    launched_by: str | None = Field(description="`fork` from a process that has loaded JupyterLab already, or `exec`.")
    exec_reason: str | None = Field(description="Why it was not forked; null when it was.")
    name: str = Field(description="Its name.")
    state: Annotated[State, _known(State)] = Field(description="What is so; see the lifecycle.")
    goal: Annotated[Goal, _known(Goal)] = Field(description="What its owner wants; see the lifecycle.")
    since: str = Field(description="When it came to this state (RFC 3339, UTC).")
    created_at: str = Field(description="When it was first asked for.")
    started_at: str | None = Field(description="When it last became ready.")
    generation: int = Field(description="Counts its launches.")
    restarts: int = Field(description="Launches after a crash since the last start command.")
    root_dir: str = Field(description="Directory that was asked for.")
    default_url: str = Field(description="Page that it opens with.")
    labels: dict[str, str] = Field(description="Labels that were given.")
    description: str = Field(description="A line about it, for people; may be empty.")
    limits: dict[str, Limit] = Field(description="By name: `memory` in bytes, `cpus`, `processes`.")
    usage: Usage | None = Field(description="What it uses; null unless it is running, and until it was first measured.")
    user: str | None = Field(description="User of the machine that it runs as; null for the keeper's own.")
    idle_timeout: float | None = Field(description="Seconds without use after which it is stopped; null: never.")
    max_age: float | None = Field(description="Seconds after which it is stopped, used or not; null: never.")
    jupyter_options: dict[str, bool | int | float] = Field(description="Options of Jupyter's own that were asked for.")
    snoozed_until: str | None = Field(description="Until when neither stops it; null when nobody has put that off.")
    gateway: Gateway | None = Field(description="Its kernel gateway, and what is known of it; null when kernels run beside it.")
    kernels_kept: list[str] = Field(description="Ids of kernels on its gateway that its next launch is to have.")
    queue_position: int | None = Field(
        description="Its place among those that wait to start; 1 is the next. Null unless it is queued."
    )
    exit: Exit | None = Field(description="How it last ended: `code`, or `signal`, or neither when nobody could see it.")
    failure: Failure | None = Field(description="Why it failed: `failure_class`, `message`, `exit`, `log_tail`.")
    stop_report: StopReport | None = Field(
        description="How it was ended: `method`, `seconds`, `kernels_stopped`, `kernels_left`."
    )


class ServerList(Answer):
    """One page of servers, by name."""

    servers: list[Server]
    next: str | None = Field(description="Cursor of the next page; null on the last one.")


class BulkResult(Answer):
    """What became of one of many."""

    name: str
    status: int = Field(description="As if it had been asked for alone: 201, 200, 202, or that of its problem.")
    server: Server | None = Field(description="Null where there is a problem.")
    problem: dict[str, Any] | None = Field(repr=False, description="Why it could not be started (RFC 9457).")

    @property
    def error(self) -> LabkeeperError | None:
        """The problem, as the error that asking for this server alone would have raised. Raises BadAnswer."""
        if self.problem is None:
            return None
        try:
            return Problem.model_validate(self.problem, context=_TOLERANT).error(self.status)
        except ValidationError as error:
            raise BadAnswer(f"cannot understand what the keeper says of server {self.name[:63]!r}") from error


class BulkResults(Answer):
    """What became of each, in the order of the names."""

    results: list[BulkResult]


class Kernel(Answer):
    """A kernel, as Jupyter tells it."""

    id: str
    name: str
    execution_state: str
    last_activity: str


class KernelList(Answer):
    """The kernels of a server."""

    kernels: list[Kernel]


class Holder(Answer):
    """What keeps a server from being idle, as long as it is so."""

    kind: str = Field(description="`kernel`, `connection` or `terminal`.")
    id: str
    reason: str


class IdleRule(Answer):
    """What comes of one rule when nothing happens any more."""

    rule: Annotated[Rule, _known(Rule)]
    limit: float = Field(description="Seconds that it allows.")
    since: str | None = Field(description="From when it counts; null as long as something holds the server.")
    warns_at: str | None
    stops_at: str | None


class Idle(Answer):
    """How a server stands to the rules by which it would be stopped, and why."""

    name: str
    standing: Annotated[CullState, _known(CullState)]
    reason: str = Field(description="Why, in a sentence.")
    rule: Annotated[Rule, _known(Rule)] | None = Field(description="The rule that would be the first to stop it.")
    warns_at: str | None = Field(description="When that is told beforehand.")
    stops_at: str | None = Field(description="When it would be stopped, if nothing happens; null when it would not.")
    rules: list[IdleRule]
    held_by: list[Holder]
    last_used_at: str | None
    last_used: str | None = Field(description="What was used last.")
    snoozed_until: str | None
    looked_at: str | None = Field(description="When it last answered how it is used; null when it was not asked.")


class IdleList(Answer):
    """All servers, those first that would be stopped first."""

    servers: list[Idle]


class OrphanedKernel(Answer):
    """A kernel of a server that ended, which its gateway still has to end."""

    kernel_id: str
    gateway_url: str
    server: str = Field(description="The server that started it; it need not exist any more.")
    since: str


class OrphanedKernelList(Answer):
    """All of them, the oldest first."""

    orphaned_kernels: list[OrphanedKernel]


class Event(Answer):
    """One thing that happened."""

    id: int = Field(description="Grows; `after` and `Last-Event-ID` take it.")
    at: str
    kind: Annotated[HistoryKind, _known(HistoryKind)]
    server: str | None
    generation: int | None
    message: str = Field(description="What happened, for people.")
    actor: str = Field(
        description="Who set it off: `token:NAME`, `user:NAME` of the keeper's machine, `anybody` where access control is off, "
        "`culler`, or `keeper` where nobody did."
    )
    reason: str = Field(description="Why they did, where that does not go without saying.")
    request_id: str | None = Field(description="The request by which they did.")
    details: dict[str, Any] = Field(description="What a program wants to know of it.")


class EventList(Answer):
    """Some events, the oldest first."""

    events: list[Event]
    next: int | None = Field(description="`after` of the page that follows, if there is one by now.")


class Webhook(Answer):
    """How a webhook fares."""

    place: str = Field(description="Its scheme and host.")
    delivered: int
    dead: int = Field(description="Events that it did not take, and that were given up.")
    pending: int
    error: str | None = Field(description="Why the last POST failed; null where it did not.")


class WebhookList(Answer):
    """All of them."""

    webhooks: list[Webhook]


class Token(Answer):
    """A token, without what it is shown as."""

    name: str
    scope: Annotated[Scope, _known(Scope)]
    servers: list[str] = Field(description="Patterns of names; one must fit. Empty: all servers.")
    labels: dict[str, str] = Field(description="Labels that a server must have, all of them.")
    users: list[str] = Field(description="Users that its servers run as; empty: the keeper's choice.")
    created_at: str
    created_by: str
    expires_at: str | None = Field(description="Null: never.")
    expired: bool
    last_used_at: str | None = Field(description="To the minute; null: never.")


class NewToken(Token):
    """A token that was just made."""

    token: str = Field(
        repr=False, description="What is to be shown as `Authorization: Bearer`. It is told here, and never again."
    )


class TokenList(Answer):
    """All tokens but the owner's, by name."""

    tokens: list[Token]


class Caller(Answer):
    """Who asks, and what they may."""

    actor: str = Field(description="As events name them.")
    scope: Annotated[Scope, _known(Scope)]
    servers: list[str] = Field(description="Patterns of names; empty: all servers.")
    labels: dict[str, str] = Field(description="Labels that a server must have.")
    users: list[str] = Field(description="Users that their servers run as; empty: the keeper's choice.")


class Link(Answer):
    """A link that opens a Lab once."""

    url: str = Field(repr=False, description="To be opened in a browser; good for one time. Whoever has it has the Lab.")
    expires_at: str


class Version(Answer):
    """What answers."""

    name: Literal["labkeeper"]
    version: str


class Health(Answer):
    """Whether the keeper works."""

    status: Literal["ok"]


class Problem(Answer):
    """What went wrong (RFC 9457).

    More members may follow: `errors`, `differs`, `scope`, `variable`, `retry_after`, `available`, `reserve`, `name`,
    `failure_class`, `exit`, `log_tail`.
    """

    # A proxy may leave out what RFC 9457 makes optional; the keeper does not.
    model_config = ConfigDict(json_schema_serialization_defaults_required=True)

    type: str = "about:blank"
    title: str = ""
    status: int = 0
    detail: str
    code: str = Field(description="Stable name of the error.")
    request_id: str = Field("", description="The keeper's log has more under it.")

    def error(self, status: int) -> LabkeeperError:
        """Return the error that became this answer; `status` is that of the answer."""
        known = tree().get(self.code)
        details = dict(self.model_extra or {})
        if known is None or issubclass(known, ClientError):
            # The framework's own refusals (405, 413, 415, ...) and bugs (500): what they say is all there is to know.
            known = RequestError if HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR else LabkeeperError
            details |= {"code": self.code, "status": status, "request_id": self.request_id}
        error = known(self.detail)
        error.details = details
        return error
