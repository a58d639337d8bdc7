"""What comes back from a keeper: typed answers, and its problems as the errors that they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from labkeeper.core.errors import BadAnswer, ClientError, LabkeeperError, RequestError, tree
from labkeeper.core.lifecycle import Goal, State

_M = TypeVar("_M", bound=BaseModel)


class _Answer(BaseModel):
    """What a newer keeper tells beyond the fields below is kept, not refused."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Exit(_Answer):
    """How a process ended; both are None when nobody could see it."""

    code: int | None = None
    signal: str | None = None


class Failure(_Answer):
    """Why a server failed."""

    failure_class: str
    message: str
    exit: Exit | None = None
    log_tail: tuple[str, ...] = ()


class StopReport(_Answer):
    """How a server was ended; `method` is `none`, `shutdown`, `sigterm` or `sigkill`, `seconds` how long it took."""

    method: str
    seconds: float
    kernels_stopped: tuple[str, ...] = ()
    kernels_left: tuple[str, ...] = ()


class Limit(_Answer):
    """What a server may use of one thing, and what holds it to that (None unless it is running)."""

    limit: int | float
    used: int | float | None = None
    limited_by: str | None = None


class Usage(_Answer):
    """What a server uses, by the last sample; memory in bytes. `kernels` and `connections` are None where it did not answer."""

    at: str
    memory: int
    memory_proportional: int | None = None
    cpu_seconds: float
    cpus: float | None = None
    processes: int
    threads: int
    kernels: int | None = None
    connections: int | None = None


class Gateway(_Answer):
    """A server's gateway. `reachable` is None while the server does not run, or the gateway has not been asked yet."""

    url: str
    required: bool
    reachable: bool | None
    since: str | None
    error: Failure | None
    kernelspecs: int | None
    kernel_env_passed: list[str]
    kernel_env_if_allowed: list[str]


class Server(_Answer):
    """A server. The fields from `base_url` to `exec_reason` are None unless it is running. Times are RFC 3339, UTC."""

    base_url: str | None = None
    hostname: str | None = None
    notebook_dir: str | None = None
    password: bool | None = None
    pid: int | None = None
    port: int | None = None
    secure: bool | None = None
    token: str | None = Field(None, repr=False)
    url: str | None = None
    lab_url: str | None = Field(None, repr=False)
    version: str | None = None
    launched_by: str | None = None
    exec_reason: str | None = None
    name: str
    # A newer keeper may know more states: those come as plain text.
    state: Annotated[State | str, Field(union_mode="left_to_right")]
    goal: Annotated[Goal | str, Field(union_mode="left_to_right")]
    since: str
    created_at: str
    started_at: str | None = None
    launch: int
    restarts: int
    root_dir: str
    default_url: str
    labels: dict[str, str] = {}
    limits: dict[str, Limit] = {}
    usage: Usage | None = None
    user: str | None = None
    idle_timeout: float | None = None
    max_age: float | None = None
    jupyter_options: dict[str, bool | int | float] = {}
    snoozed_until: str | None = None
    gateway_url: str | None = None
    gateway: Gateway | None = None
    kernels_kept: list[str] = []
    queue_position: int | None = None
    exit: Exit | None = None
    failure: Failure | None = None
    stop_report: StopReport | None = None


class Kernel(_Answer):
    """A kernel of a server; `last_activity` is RFC 3339."""

    id: str
    name: str
    execution_state: str
    last_activity: str


class Page(_Answer):
    """A page of the list of servers; `next` leads to the one after it."""

    servers: tuple[Server, ...]
    next: str | None = None


class BulkResult(_Answer):
    """What became of one of many: the server, or the problem (RFC 9457) that it met. `status` is as if asked for alone."""

    name: str
    status: int
    server: Server | None = None
    problem: dict[str, Any] | None = Field(None, repr=False)

    @property
    def error(self) -> LabkeeperError | None:
        """The problem, as the error that asking for it alone would have raised. Raises BadAnswer."""
        if self.problem is None:
            return None
        try:
            return _error_of(_Problem.model_validate(self.problem), self.status)
        except ValidationError as error:
            raise BadAnswer(f"cannot understand what the keeper says of server {self.name[:63]!r}") from error


class BulkResults(_Answer):
    """What became of each, in the order of the names."""

    results: tuple[BulkResult, ...]


class Holder(_Answer):
    """What keeps a server from being idle; `kind` is `kernel`, `connection` or `terminal`."""

    kind: str
    id: str
    reason: str


class IdleRule(_Answer):
    """What comes of one rule when nothing happens any more; `limit` is in seconds."""

    rule: str
    limit: float
    since: str | None = None
    warns_at: str | None = None
    stops_at: str | None = None


class Idle(_Answer):
    """How a server stands to the rules by which it would be stopped. Times are RFC 3339, UTC; None where it would not."""

    name: str
    standing: str
    reason: str
    rule: str | None = None
    warns_at: str | None = None
    stops_at: str | None = None
    rules: tuple[IdleRule, ...] = ()
    held_by: tuple[Holder, ...] = ()
    last_used_at: str | None = None
    last_used: str | None = None
    snoozed_until: str | None = None
    looked_at: str | None = None


class IdleList(_Answer):
    """All servers, those first that would be stopped first."""

    servers: tuple[Idle, ...]


class OrphanedKernel(_Answer):
    """A kernel of a server that ended, which its gateway still has to end."""

    kernel_id: str
    gateway_url: str
    server: str
    since: str


class OrphanedKernelList(_Answer):
    """All of them, the oldest first."""

    orphaned_kernels: list[OrphanedKernel]


class Event(_Answer):
    """One thing that happened; `at` is RFC 3339, `details` what a program wants to know."""

    id: int
    at: str
    kind: str
    server: str | None
    launch: int | None
    message: str
    actor: str
    reason: str
    request_id: str | None
    details: dict[str, Any]


class EventList(_Answer):
    """Some of them, the oldest first."""

    events: list[Event]
    next: int | None


class Webhook(_Answer):
    """How a webhook fares; `dead` events were given up."""

    place: str
    delivered: int
    dead: int
    pending: int
    error: str | None


class WebhookList(_Answer):
    """All of them."""

    webhooks: list[Webhook]


class Allowed(_Answer):
    """What somebody may do; without patterns and labels with all servers."""

    scope: str
    servers: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    users: tuple[str, ...] = ()


class Caller(Allowed):
    """Who asks, as events name them, and what they may."""

    actor: str


class Token(Allowed):
    """A token of the API, without what it is shown as."""

    name: str
    created_at: str
    created_by: str
    expires_at: str | None
    expired: bool
    last_used_at: str | None


class NewToken(Token):
    """One that was just made; `token` is told this once."""

    token: str = Field(repr=False)


class TokenList(_Answer):
    """All but the owner's."""

    tokens: tuple[Token, ...]


class Link(_Answer):
    """A link that opens a Lab once."""

    url: str = Field(repr=False)
    expires_at: str


class KernelList(_Answer):
    """The kernels of a server."""

    kernels: tuple[Kernel, ...]


class Version(_Answer):
    """What answers, and its version."""

    name: str = Field(pattern="^labkeeper$")
    version: str


class Health(_Answer):
    """How a keeper is."""

    status: str


class _Problem(_Answer):
    """RFC 9457, with our `code`; the members that are not named here are the error's details."""

    type: str = ""
    title: str = ""
    status: int = 0
    detail: str
    code: str
    request_id: str = ""


def checked(answer: httpx.Response) -> httpx.Response:
    """Give a good answer back, and raise what a bad one says."""
    # As every keeper writes; what an answer names may be no encoding of text at all ("hex").
    answer.encoding = "utf-8"
    if answer.is_success:
        return answer
    try:
        problem = _Problem.model_validate_json(answer.content)
    except ValidationError as error:
        raise _bad(answer) from error
    raise _error_of(problem, answer.status_code)


def _error_of(problem: _Problem, status: int) -> LabkeeperError:
    known = tree().get(problem.code)
    details = dict(problem.model_extra or {})
    if known is None or issubclass(known, ClientError):
        # The framework's own refusals (405, 413, 415, ...) and bugs (500): what they say is all there is to know.
        known = RequestError if 400 <= status < 500 else LabkeeperError  # noqa: PLR2004 - HTTP's own
        details |= {"code": problem.code, "status": status, "request_id": problem.request_id}
    error = known(problem.detail)
    error.details = details
    return error


def parse(model: type[_M], answer: httpx.Response) -> _M:
    """Make of a good answer what it tells. Raises BadAnswer."""
    try:
        return model.model_validate_json(answer.content)
    except ValidationError as error:
        raise _bad(answer) from error


def parse_text(model: type[_M], text: str) -> _M:
    """Make of a piece of an answer that goes on what it tells. Raises BadAnswer."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise BadAnswer(f"cannot understand what the keeper sends: {text[:80]!r}") from error


def _bad(answer: httpx.Response) -> BadAnswer:
    url = answer.request.url.copy_with(query=None)
    kind = answer.headers.get("Content-Type", "no content type")
    return BadAnswer(
        f"cannot understand what answers at {url}: status {answer.status_code}, {kind}; is it a keeper?",
        status=answer.status_code,
    )


def lines_of(pieces: Iterator[str]) -> Iterator[str]:
    """Cut at line feeds alone: `str.splitlines` would also cut at form feeds and carriage returns, which logs contain."""
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    if rest:
        yield rest
