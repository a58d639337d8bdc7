"""What callers send as the body of a request, as pydantic models: the border where input is checked, once."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Self
from urllib.parse import urlsplit, urlunsplit

from pydantic import AliasChoices, AliasGenerator, BaseModel, ConfigDict, Field, model_validator

from labkeeper.core.access import Caller, Scope, TokenLimits
from labkeeper.core.errors import InvalidSpec
from labkeeper.core.spec import DEFAULT_NAME, UNLIMITED, Gateway, Limits, ServerName, ServerSpec, server_name
from labkeeper.schema.options import JupyterOptions
from labkeeper.schema.roots import holds, resolved
from labkeeper.schema.types import (
    ONE_LINE,
    BaseUrl,
    Duration,
    Environment,
    Headers,
    HttpUrl,
    KernelEnvironment,
    Labels,
    LandingPage,
    Line,
    Name,
    PathText,
    Pattern,
    Seconds,
    User,
    WebsocketUrl,
)
from labkeeper.schema.variables import check_sizes, loading


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a server gets that its request does not name."""

    notebook_dir: Path
    """The directory of servers that name none; `%u` in it stands for a server's user, as in `allowed_roots`."""
    lab_ip: str
    lab_port: int
    """The port of the server named `default`."""
    limits: Limits = UNLIMITED
    idle_timeout: float | None = None
    max_age: float | None = None
    allowed_roots: tuple[Path, ...] = ()
    """Where the directories of servers may be; below the notebook directory alone when there is none."""
    user: str | None = None
    """The user of the machine that servers run as; None for the keeper's own."""

    def notebooks_of(self, user: str | None) -> str:
        """Give the notebook directory of a user."""
        return resolved(self.notebook_dir, user)

    def roots_of(self, user: str | None) -> list[str]:
        """Give the directories within which a user's may be."""
        return [resolved(root, user) for root in self.allowed_roots or (self.notebook_dir,)]


# A field that is absent has its default; a field that is `null` breaks its type's rule. So the types below are not optional
# where the default is None (pydantic does not check defaults), and a `"gateway-url": null` is told apart from none at all.
_ABSENT: Final[Any] = None


def _such_as(*bodies: Any) -> dict[str, Any]:
    """Show callers how it may look."""
    return {"examples": list(bodies)}


class _Request(BaseModel):
    """Every field is taken in snake_case and in kebab-case; unknown ones are refused."""

    model_config = ConfigDict(
        defer_build=True,
        extra="forbid",
        strict=True,
        alias_generator=AliasGenerator(
            validation_alias=lambda name: AliasChoices(name, name.replace("_", "-")),
        ),
    )


class _Wanted(_Request):
    """What a server should be, but for its name. Everything has a default."""

    root_dir: PathText = Field(
        _ABSENT,
        validation_alias=AliasChoices("root_dir", "root-dir", "notebook_dir", "notebook-dir"),
        description="Directory that the Lab shows; it must exist, within the keeper's allowed roots. A relative one is taken "
        "from its notebook directory.",
    )
    base_url: BaseUrl = Field("/", description="Path prefix of the server.")
    default_url: LandingPage = Field("/lab", description="Page that the server opens with, below its base_url.")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(
        _ABSENT,
        description="Port of the server, and no other. Default: the keeper's Lab port for `default`, a free one for others.",
    )
    env: Environment = Field({}, description="Environment variables for the server and its local kernels.")
    labels: Labels = Field({}, description="For the caller's own use; the list can be filtered by them.")
    memory_limit: Annotated[int, Field(ge=2**26, le=2**50)] = Field(
        _ABSENT, description="Bytes of memory for the server with all its kernels and terminals; at least 64 MiB."
    )
    cpu_limit: Annotated[float, Field(ge=0.01, le=10_000, allow_inf_nan=False)] = Field(
        _ABSENT, description="Processors for all of them together; 1.5 is one and a half."
    )
    process_limit: Annotated[int, Field(ge=16, le=2**22)] = Field(
        _ABSENT, description="Processes and threads for all of them together."
    )
    user: User = Field(
        _ABSENT, description="User of the machine to run as; needs a keeper that runs as root. Default: `LABKEEPER_USER`."
    )
    idle_timeout: Duration | None = Field(
        _ABSENT,
        description="Time without use after which it is stopped: seconds, or a text as `90m`, `2h`, `1d12h`; 0 or null: never. "
        "Default: the keeper's.",
    )
    max_age: Duration | None = Field(_ABSENT, description="Time after which it is stopped, used or not, likewise.")
    gateway_url: HttpUrl = Field(
        _ABSENT, description="Jupyter kernel gateway that runs the kernels; without one they run beside the server."
    )
    gateway_ws_url: WebsocketUrl = Field(
        _ABSENT, description="The gateway's websocket URL; made from gateway_url when not given."
    )
    gateway_auth_token: Line = Field(_ABSENT, description="Token that the gateway asks for.")
    gateway_auth_scheme: Line = Field(_ABSENT, description="Authentication scheme of that token; `token` when not given.")
    gateway_headers: Headers = Field({}, description="HTTP headers of each request to the gateway.")
    gateway_ca_certs: PathText = Field(_ABSENT, description="File with certificates to trust beside the system's.")
    gateway_client_cert: PathText = Field(_ABSENT, description="File with the certificate to show to the gateway.")
    gateway_client_key: PathText = Field(_ABSENT, description="File with the key of that certificate.")
    gateway_validate_cert: bool = Field(True, description="Whether the gateway's certificate is checked.")
    gateway_connect_timeout: Seconds = Field(_ABSENT, description="Seconds to connect to the gateway.")
    gateway_request_timeout: Seconds = Field(_ABSENT, description="Seconds for a request to the gateway.")
    require_gateway: bool = Field(
        True, description="Whether the start fails when the gateway cannot be used; if not, `gateway` of the answer says so."
    )
    kernel_env: KernelEnvironment = Field(
        {},
        description="Environment variables for the kernels, also on a gateway, and not for the server itself. A gateway "
        "passes on names that begin with `KERNEL_`, and others only if its own configuration allows them.",
    )
    jupyter_options: JupyterOptions = Field(
        default_factory=JupyterOptions,
        description="Options of Jupyter's own, by their names in its configuration; see the schema `JupyterOptions`.",
    )

    _FILES: ClassVar = ("gateway_ca_certs", "gateway_client_cert", "gateway_client_key")

    @model_validator(mode="before")
    @classmethod
    def _no_body_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="after")
    def _variables_fit(self) -> Self:
        check_sizes(self.env, self.kernel_env)
        return self

    def settled(self, defaults: Defaults, caller: Caller) -> Self:
        """Give the same request as it comes to be on this machine, links resolved. Raises InvalidSpec, NotAllowed."""
        for field in ("env", "kernel_env"):
            for variable in loading(getattr(self, field)):
                what = f"set the variable '{variable}' in {field}, which changes what code is loaded"
                caller.needs(Scope.ADMIN, what, variable=variable)
        user = caller.user(self.user, defaults.user)
        roots = defaults.roots_of(user)
        root = os.path.realpath(Path(defaults.notebooks_of(user)) / (self.root_dir or ""))
        if not holds(roots, root):
            raise InvalidSpec.of("root_dir", f"must be within {' or '.join(roots)} (LABKEEPER_ALLOWED_ROOTS), links resolved")
        if re.fullmatch(ONE_LINE.pattern, root) is None:
            raise InvalidSpec.of("root_dir", f"{ONE_LINE.rule}, links resolved")
        if not os.path.isdir(root) or not os.access(root, os.R_OK | os.X_OK):  # noqa: PTH112
            raise InvalidSpec.of("root_dir", f"must be a directory that the keeper can read; {root} is none")
        files = {field: self._file(field, roots, caller) for field in self._FILES if getattr(self, field) is not None}
        return self.model_copy(update={"user": user, "root_dir": root, **files})

    def _file(self, field: str, roots: Sequence[str], caller: Caller) -> str:
        path: str = os.path.realpath(getattr(self, field))
        if not holds(roots, path):
            # Before it is looked at: whether there is such a file is for an admin alone to know.
            caller.needs(Scope.ADMIN, f"use a file outside of {' and '.join(roots)} as {field}")
        if not (os.path.isfile(path) and os.access(path, os.R_OK)):  # noqa: PTH113
            raise InvalidSpec.of(field, "must be a file that the keeper can read")
        return path

    def whole(self, name: ServerName, defaults: Defaults) -> ServerSpec:
        """Make the spec of a server of this name from a settled request."""
        return ServerSpec(
            name=name,
            root_dir=self.root_dir,
            base_url=self.base_url,
            default_url=self.default_url,
            ip=defaults.lab_ip,
            port=self.port if self.port is not None else defaults.lab_port if name == DEFAULT_NAME else None,
            env=self.env,
            kernel_env=self.kernel_env,
            labels=self.labels,
            gateway=None if self.gateway_url is None else self._gateway_at(self.gateway_url),
            limits=Limits(
                memory=self.memory_limit if self.memory_limit is not None else defaults.limits.memory,
                cpus=self.cpu_limit if self.cpu_limit is not None else defaults.limits.cpus,
                processes=self.process_limit if self.process_limit is not None else defaults.limits.processes,
            ),
            user=self.user,
            idle_timeout=self._rule("idle_timeout", defaults),
            max_age=self._rule("max_age", defaults),
            jupyter_options=self.jupyter_options.chosen(),
        )

    def _rule(self, field: str, defaults: Defaults) -> float | None:
        """Give what a rule allows; here null is not the same as nothing: it turns the rule off."""
        chosen: float | None = getattr(self if field in self.model_fields_set else defaults, field)
        return chosen or None

    def _gateway_at(self, url: str) -> Gateway:
        headers, scheme, token = dict(self.gateway_headers), self.gateway_auth_scheme, self.gateway_auth_token
        given = next((header for header in headers if header.lower() == "authorization"), None)
        if given is not None and token is None:
            # Jupyter puts its own Authorization header over a given one: it must get this one as scheme and token.
            scheme, _, token = headers.pop(given).partition(" ")
        return Gateway(
            url=url,
            ws_url=self.gateway_ws_url or ws_url_of(url),
            auth_token=token,
            auth_scheme=scheme,
            headers=headers,
            ca_certs=self.gateway_ca_certs,
            client_cert=self.gateway_client_cert,
            client_key=self.gateway_client_key,
            validate_cert=self.gateway_validate_cert,
            connect_timeout=self.gateway_connect_timeout,
            request_timeout=self.gateway_request_timeout,
            required=self.require_gateway,
        )


class _New(_Wanted):
    """What servers should be that are to be made: nothing of them is there yet."""

    @model_validator(mode="after")
    def _gateway_options_need_a_gateway(self) -> Self:
        options = sorted((self.model_fields_set & _GATEWAY_FIELDS.keys()) - {"gateway_url"})
        if options and self.gateway_url is None:
            raise ValueError(f"{', '.join(options)}: only together with gateway_url")
        if self.gateway_client_key is not None and self.gateway_client_cert is None:
            raise ValueError("gateway_client_key: only together with gateway_client_cert")
        return self

    def specs_of(self, names: Sequence[str], defaults: Defaults, caller: Caller) -> list[ServerSpec]:
        """Make a spec for each name, paths checked against the disk. Raises InvalidSpec, NotAllowed."""
        settled = self.settled(defaults, caller)
        specs = [settled.whole(server_name(name), defaults) for name in names]
        for spec in specs:
            caller.needs_spec(spec)
        return specs


class _Named(_Request):
    """Whose field comes before all others."""

    name: Name = DEFAULT_NAME


class ServerRequest(_New, _Named):
    """What a server should be. Everything has a default."""

    model_config = ConfigDict(
        json_schema_extra=_such_as({}, {"name": "analysis", "labels": {"team": "physics"}, "idle_timeout": "2h"})
    )

    def spec(self, defaults: Defaults, caller: Caller) -> ServerSpec:
        """Make the spec, its paths checked against the disk. Raises InvalidSpec, NotAllowed."""
        (spec,) = self.specs_of([self.name], defaults, caller)
        return spec


class BulkRequest(_New):
    """Many servers of one kind."""

    model_config = ConfigDict(json_schema_extra=_such_as({"names": ["alice", "bob"], "idle_timeout": "2h"}))

    names: Annotated[list[Name], Field(min_length=1, max_length=200, description="Names of the servers, each once.")]

    @model_validator(mode="after")
    def _each_name_once(self) -> BulkRequest:
        if len(set(self.names)) < len(self.names):
            raise ValueError("names: each must be given once")
        if self.port is not None and len(self.names) > 1:
            raise ValueError("port: only one server can have it; leave it out, and each takes a free one")
        return self

    def specs(self, defaults: Defaults, caller: Caller) -> list[ServerSpec]:
        """Make the specs, in the order of the names. Raises InvalidSpec, NotAllowed."""
        return self.specs_of(self.names, defaults, caller)


class RestartRequest(_Wanted):
    """What is to be otherwise from the next launch on. What is absent stays as it is."""

    model_config = ConfigDict(json_schema_extra=_such_as({}, {"labels": {"team": "chemistry"}}))

    keep_kernels: bool = Field(
        default=False,
        description="Whether the kernels on the server's gateway live on, and are the next launch's with their sessions.",
    )

    def revise(self, spec: ServerSpec, defaults: Defaults, caller: Caller) -> ServerSpec | None:
        """Make the spec that is to follow another; None where nothing is given. Raises InvalidSpec, NotAllowed."""
        given = self.model_fields_set - {"keep_kernels"}
        if not given:
            return None
        # What stays decides, too, whether it may be so: a server of another user, or in a directory that is allowed no more.
        stays = {name: getattr(spec, name) for name in {"user", "root_dir"} - given}
        request = self.model_copy(update=stays).settled(defaults, caller)
        whole = request.whole(spec.name, defaults)
        limits = {name: getattr(whole.limits, name) for field, name in _LIMIT_FIELDS.items() if field in given}
        plain = {name: getattr(whole, name) for name in _PLAIN_FIELDS & given}
        gateway = request.revised_gateway(spec.gateway, whole.gateway)
        revised = replace(spec, **plain, limits=replace(spec.limits, **limits), gateway=gateway)
        caller.needs_spec(revised)
        return revised

    def revised_gateway(self, old: Gateway | None, new: Gateway | None) -> Gateway | None:
        """Give the gateway from the next launch on: the old one as far as this says nothing of it. Raises InvalidSpec."""
        options = self.model_fields_set & _GATEWAY_FIELDS.keys()
        if not options:
            return old
        if new is not None and (old is None or old.url != new.url):
            # Nothing is carried over: the token of one gateway is none of another's business.
            return new
        if old is None:
            raise InvalidSpec.of(", ".join(sorted(options)), "only together with gateway_url: the server has no gateway")
        given = self._gateway_at(old.url)
        touched = {_GATEWAY_FIELDS[option] for option in options}
        if "auth_token" not in touched and given.auth_token is not None:
            # It came as a header.
            touched |= {"auth_token", "auth_scheme"}
        merged = replace(old, **{name: getattr(given, name) for name in touched})
        if merged.client_key is not None and merged.client_cert is None:
            raise InvalidSpec.of("gateway_client_key", "only together with gateway_client_cert")
        return merged


_PLAIN_FIELDS: Final = frozenset(
    {
        "root_dir",
        "base_url",
        "default_url",
        "port",
        "env",
        "kernel_env",
        "labels",
        "user",
        "idle_timeout",
        "max_age",
        "jupyter_options",
    }
)
_LIMIT_FIELDS: Final = {"memory_limit": "memory", "cpu_limit": "cpus", "process_limit": "processes"}
_GATEWAY_FIELDS: Final = {
    "gateway_url": "url",
    "gateway_ws_url": "ws_url",
    "gateway_auth_token": "auth_token",
    "gateway_auth_scheme": "auth_scheme",
    "gateway_headers": "headers",
    "gateway_ca_certs": "ca_certs",
    "gateway_client_cert": "client_cert",
    "gateway_client_key": "client_key",
    "gateway_validate_cert": "validate_cert",
    "gateway_connect_timeout": "connect_timeout",
    "gateway_request_timeout": "request_timeout",
    "require_gateway": "required",
}
"""What each field of a request sets in a `Gateway`."""


class TokenRequest(_Request):
    """A new token."""

    name: Name
    scope: Scope = Field(
        strict=False,
        description="What it allows, each with those before: `read`: to see servers, not to open them; `manage`: to make, "
        "stop and open them; `admin`: everything.",
    )
    servers: Annotated[list[Pattern], Field(max_length=100)] = Field(
        [], description="Patterns of names, as `team-*`: only for servers of which one fits. Default: all."
    )
    labels: Labels = Field({}, description="Only for servers with all of these labels.")
    users: Annotated[list[User], Field(max_length=100)] = Field(
        [], description="Users of the machine that its servers run as; the first one where their request names none."
    )
    expires_in: Annotated[Duration, Field(gt=0)] = Field(
        _ABSENT, description="Time from now until it is good no more, as `30d`. Default: never."
    )

    @model_validator(mode="after")
    def _admins_are_not_limited(self) -> TokenRequest:
        if self.scope is Scope.ADMIN and not self.limits.unlimited:
            raise ValueError("scope: an admin's token cannot be limited to some servers; choose `manage`")
        return self

    @property
    def limits(self) -> TokenLimits:
        """The servers that it is for."""
        return TokenLimits(tuple(self.servers), self.labels, tuple(self.users))


class LinkRequest(_Request):
    """A link that opens a Lab."""

    expires_in: Annotated[Duration, Field(gt=0, le=3600)] = Field(
        60.0, description="Time from now until it is good no more, used or not; at most `1h`."
    )
    page: LandingPage = Field(
        _ABSENT, description="Page to open, below the server's base_url, as `/lab/tree/a.ipynb`. Default: its default_url."
    )

    @model_validator(mode="before")
    @classmethod
    def _no_body_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value


class SnoozeRequest(_Request):
    """For how long a server is not to be culled."""

    model_config = ConfigDict(json_schema_extra=_such_as({"for": "2h"}, {"for": 0}))

    time: Duration = Field(
        validation_alias="for", description="Time from now, as `2h`; 0 ends it. At most what the keeper allows."
    )


def ws_url_of(url: str) -> str:
    """Give the websocket URL of a gateway: the scheme changed, and nothing else (Jupyter would change every "http" in it)."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(scheme={"http": "ws", "https": "wss"}[parts.scheme]))
