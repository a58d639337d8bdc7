"""Requests about servers. Checks that depend on where servers run are the backend's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Final, Self

from pydantic import (
    AliasChoices,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from labkeeper.core.access import Caller, Scope
from labkeeper.core.errors import InvalidSpec, NotAllowed
from labkeeper.core.spec import (
    DEFAULT_NAME,
    LOCAL,
    UNLIMITED,
    Gateway,
    KernelsBy,
    Limits,
    ServerName,
    ServerSpec,
    server_name,
)
from labkeeper.schema.options import JupyterOptions
from labkeeper.schema.requests.base import ABSENT, Request, such_as
from labkeeper.schema.requests.flat import FLAT_NAMES, as_sent, nested
from labkeeper.schema.requests.gateway import GatewayFields
from labkeeper.schema.requests.limits import LimitFields
from labkeeper.schema.types import (
    ONE_LINE,
    BaseUrl,
    Duration,
    Environment,
    KernelEnvironment,
    Labels,
    LandingPage,
    Name,
    PathText,
    User,
)
from labkeeper.schema.variables import check_sizes, loading

Validate = Callable[[ServerSpec, Caller], ServerSpec]
"""See `core.ports.Backend.validate`."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """Defaults for fields missing in a request."""

    lab_ip: str
    lab_port: int
    """The port of the server named `default`."""
    limits: Limits = UNLIMITED
    idle_timeout: float | None = None
    max_age: float | None = None
    sleep_after: float | None = None
    sleeps: bool = False
    """Whether servers can sleep: only the edge sees visitors, and wakes a Lab for them."""
    user: str | None = None
    """The user of the machine that servers run as; None for the keeper's own."""
    kernels_by: KernelsBy = "fork"
    """With `exec`, requests cannot choose `fork`."""


class _Wanted(Request):
    """The fields of a server except its name. Each has a default."""

    root_dir: PathText = Field(
        ABSENT,
        validation_alias=AliasChoices("root_dir", "root-dir", "notebook_dir", "notebook-dir"),
        description=(
            "Directory that the Lab shows; it must exist, within the keeper's allowed roots. "
            "A relative one is taken from its notebook directory."
        ),
    )
    base_url: BaseUrl = Field("/", description="Path prefix of the server.")
    default_url: LandingPage = Field(
        "/lab", description="Page that the server opens with, below its base_url."
    )
    port: Annotated[int, Field(ge=1, le=65535)] = Field(
        ABSENT,
        description=(
            "Port of the server, and no other. "
            "Default: the keeper's Lab port for `default`, a free one for others."
        ),
    )
    env: Environment = Field(
        {}, description="Environment variables for the server and its local kernels."
    )
    labels: Labels = Field({}, description="Labels for the caller's own use, to filter lists by.")
    description: Annotated[str, Field(max_length=256), ONE_LINE] = Field(
        "", description="A line about it, for people."
    )
    limits: LimitFields = Field(ABSENT, description="What it may use. Default: the keeper's.")
    user: User = Field(
        ABSENT,
        description=(
            "User of the machine to run as; needs a keeper that runs as root. "
            "Default: `LABKEEPER_USER`."
        ),
    )
    idle_timeout: Duration | None = Field(
        ABSENT,
        description=(
            "Time without use after which it is stopped: seconds, or a text as `90m`, `2h`, "
            "`1d12h`; 0 or null: never. Default: the keeper's."
        ),
    )
    max_age: Duration | None = Field(
        ABSENT, description="Time after which it is stopped, used or not; 0 or null: never."
    )
    sleep_after: Duration | None = Field(
        ABSENT,
        description=(
            "Time without kernels, terminals and visitors after which it is stopped, until "
            "a browser visits its Lab; 0 or null: never. Needs the edge. Default: the keeper's."
        ),
    )
    gateway: GatewayFields = Field(
        ABSENT,
        description=(
            "Jupyter kernel gateway that runs the kernels; without one they run beside the server."
        ),
    )
    kernel_env: KernelEnvironment = Field(
        {},
        description=(
            "Environment variables for the kernels, also on a gateway, "
            "and not for the server itself. A gateway passes on names that begin with `KERNEL_`, "
            "and others only if its own configuration allows them."
        ),
    )
    kernels_by: KernelsBy | None = Field(
        ABSENT,
        description=(
            "`fork`: fork local IPython kernels from a process that has loaded ipykernel, where "
            "possible; `exec`: load ipykernel in each. Default, also for null: "
            "`LABKEEPER_KERNELS_BY`; if that is `exec`, `fork` is refused."
        ),
    )
    jupyter_options: JupyterOptions = Field(
        default_factory=JupyterOptions,
        description=(
            "Options of Jupyter's own, by their names in its configuration; "
            "see the schema `JupyterOptions`."
        ),
    )

    _sent_as: dict[tuple[str, str], str] = PrivateAttr(default_factory=dict)
    """The flat names of nested fields that were sent flat."""

    @model_validator(mode="wrap")
    @classmethod
    def _nest(cls, sent: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        body, sent_as = nested({} if sent is None else sent)
        try:
            made = handler(body)
        except ValidationError as error:
            raise as_sent(error, sent_as) from None
        made._sent_as = sent_as
        made._check()
        return made

    def _check(self) -> None:
        """Check rules across fields, using the names as sent. Raises ValueError."""
        check_sizes(self.env, self.kernel_env)

    def _name(self, group: str, field: str) -> str:
        """Return a nested field's name for errors: flat if a field of its group was sent flat."""
        siblings_are_flat = any(place[0] == group for place in self._sent_as)
        return FLAT_NAMES[group, field] if siblings_are_flat else f"{group}.{field}"

    def _names(self, group: str, names: Iterable[str]) -> str:
        return ", ".join(sorted(self._name(group, name) for name in names))

    def _check_variables(self, caller: Caller) -> None:
        """Raise NotAllowed if the caller may not set one of the variables."""
        for field in ("env", "kernel_env"):
            for variable in loading(getattr(self, field)):
                what = (
                    f"set the variable '{variable}' in {field}, which changes what code is loaded"
                )
                caller.needs(Scope.ADMIN, what, variable=variable)

    def _validated(self, spec: ServerSpec, caller: Caller, validate: Validate) -> ServerSpec:
        """Return the spec as the backend resolves it. Raises InvalidSpec, NotAllowed."""
        try:
            return validate(spec, caller)
        except (InvalidSpec, NotAllowed) as error:
            names = {f"{group}.{name}": self._name(group, name) for group, name in FLAT_NAMES}
            raise error.renamed(names) from None

    def _whole(
        self, name: ServerName, defaults: Defaults, caller: Caller, old: Gateway | None = None
    ) -> ServerSpec:
        """Return the spec of a server of this name. Raises InvalidSpec, NotAllowed.

        Gateway options without a URL are for the `old` gateway, if there is one.
        """
        limits = self.limits.model_dump(exclude_unset=True) if self.limits else {}
        is_default = (name, caller.owner) == (DEFAULT_NAME, LOCAL)
        default_port = defaults.lab_port if is_default else None
        gateway = None
        if self.gateway is not None:
            url = self.gateway.url or (old.url if old is not None else None)
            gateway = self.gateway.at(url) if url is not None else None
        return ServerSpec(
            name=name,
            owner=caller.owner,
            root_dir=self.root_dir or "",
            user=caller.user(self.user, defaults.user),
            ip=defaults.lab_ip,
            port=self.port if self.port is not None else default_port,
            limits=replace(defaults.limits, **limits),
            gateway=gateway,
            idle_timeout=self._rule("idle_timeout", defaults),
            max_age=self._rule("max_age", defaults),
            sleep_after=self._sleep_after(defaults),
            kernels_by=self._kernels_by(defaults),
            jupyter_options=self.jupyter_options.chosen(),
            **{field: getattr(self, field) for field in _PLAIN},
        )

    def _rule(self, field: str, defaults: Defaults) -> float | None:
        """Return a rule's limit; null, unlike a missing field, turns the rule off."""
        chosen: float | None = getattr(self if field in self.model_fields_set else defaults, field)
        return chosen or None

    def _sleep_after(self, defaults: Defaults) -> float | None:
        """Return when it sleeps. Raises InvalidSpec if the keeper could not wake it."""
        chosen = self._rule("sleep_after", defaults)
        if chosen and not defaults.sleeps:
            rule = "needs Labs behind the edge, which sees visitors (see LABKEEPER_LAB_ADDRESS)"
            raise InvalidSpec.of("sleep_after", rule)
        return chosen

    def _kernels_by(self, defaults: Defaults) -> KernelsBy:
        """Return how its kernels are launched. Raises InvalidSpec if the keeper forks none."""
        if self.kernels_by == "fork" and defaults.kernels_by == "exec":
            rule = "must be exec: this keeper forks no kernels (LABKEEPER_KERNELS_BY=exec)"
            raise InvalidSpec.of("kernels_by", rule)
        return self.kernels_by or defaults.kernels_by


_DERIVED: Final = frozenset(
    {
        "root_dir",
        "user",
        "port",
        "limits",
        "gateway",
        "idle_timeout",
        "max_age",
        "sleep_after",
        "kernels_by",
        "jupyter_options",
    }
)
_PLAIN: Final = ({one.name for one in fields(ServerSpec)} & _Wanted.model_fields.keys()) - _DERIVED
"""Request fields that a spec copies unchanged."""


class _New(_Wanted):
    """The fields of new servers."""

    def specs_of(
        self, names: Sequence[str], defaults: Defaults, caller: Caller, validate: Validate
    ) -> list[ServerSpec]:
        """Return a valid spec per name. Raises InvalidSpec, NotAllowed."""
        self._check_variables(caller)
        specs = [self._whole(server_name(name), defaults, caller) for name in names]
        # They differ in name and port only: one look at the disk is enough.
        valid = self._validated(specs[0], caller, validate)
        specs = [replace(valid, name=spec.name, port=spec.port) for spec in specs]
        for spec in specs:
            caller.needs_spec(spec)
        return specs

    def _check(self) -> None:
        super()._check()
        gateway = self.gateway
        if gateway is not None and gateway.url is None:
            options = self._names("gateway", gateway.model_fields_set)
            raise ValueError(
                f"{options or 'gateway'}: only together with {self._name('gateway', 'url')}"
            )
        if gateway is not None and gateway.client_key is not None and gateway.client_cert is None:
            raise ValueError(
                f"{self._name('gateway', 'client_key')}: "
                f"only together with {self._name('gateway', 'client_cert')}"
            )


class _Named(Request):
    """A base class that puts the name first."""

    name: Name = DEFAULT_NAME


class ServerRequest(_New, _Named):
    """A server to create. Every field has a default."""

    model_config = ConfigDict(
        json_schema_extra=such_as(
            {}, {"name": "analysis", "labels": {"team": "physics"}, "idle_timeout": "2h"}
        )
    )

    def spec(self, defaults: Defaults, caller: Caller, validate: Validate) -> ServerSpec:
        """Return the valid spec. Raises InvalidSpec, NotAllowed."""
        (spec,) = self.specs_of([self.name], defaults, caller, validate)
        return spec


class BulkRequest(_New):
    """Several servers with equal fields."""

    model_config = ConfigDict(
        json_schema_extra=such_as({"names": ["alice", "bob"], "idle_timeout": "2h"})
    )

    names: Annotated[
        list[Name],
        Field(min_length=1, max_length=200, description="Names of the servers, each once."),
    ]

    def _check(self) -> None:
        super()._check()
        if len(set(self.names)) < len(self.names):
            raise ValueError("names: each must be given once")
        if self.port is not None and len(self.names) > 1:
            raise ValueError(
                "port: only one server can have it; leave it out, and each takes a free one"
            )

    def specs(self, defaults: Defaults, caller: Caller, validate: Validate) -> list[ServerSpec]:
        """Return the valid specs in the order of the names. Raises InvalidSpec, NotAllowed."""
        return self.specs_of(self.names, defaults, caller, validate)


class RestartRequest(_Wanted):
    """Changes for the next launch. Missing fields stay as they are."""

    model_config = ConfigDict(json_schema_extra=such_as({}, {"labels": {"team": "chemistry"}}))

    keep_kernels: bool = Field(
        default=False,
        description=(
            "Whether the kernels on the server's gateway live on, "
            "and are the next launch's with their sessions."
        ),
    )

    def revise(
        self, spec: ServerSpec, defaults: Defaults, caller: Caller, validate: Validate
    ) -> ServerSpec | None:
        """Return the revised spec; None if no field is given. Raises InvalidSpec, NotAllowed."""
        given = self.model_fields_set - {"keep_kernels"}
        if not given:
            return None
        # Unchanged values are checked again: another user's server, or a root no longer allowed.
        stays = {name: getattr(spec, name) for name in {"user", "root_dir"} - given}
        request = self.model_copy(update=stays)
        request._check_variables(caller)
        whole = request._whole(spec.name, defaults, caller, spec.gateway)
        whole = request._validated(whole, caller, validate)
        limits = {
            name: getattr(whole.limits, name)
            for name in (self.limits.model_fields_set if self.limits else ())
        }
        plain = {name: getattr(whole, name) for name in given - {"limits", "gateway"}}
        gateway = self._revised_gateway(spec.gateway, whole.gateway)
        revised = replace(spec, **plain, limits=replace(spec.limits, **limits), gateway=gateway)
        caller.needs_spec(revised)
        return revised

    def _revised_gateway(self, old: Gateway | None, given: Gateway | None) -> Gateway | None:
        """Return the gateway for the next launch, merged with the old one. Raises InvalidSpec."""
        touched = set(self.gateway.model_fields_set) if self.gateway is not None else set()
        if not touched:
            return old
        if given is None:
            names, url = self._names("gateway", touched), self._name("gateway", "url")
            raise InvalidSpec.of(names, f"only together with {url}: the server has no gateway")
        if old is None or old.url != given.url:
            # Nothing is carried over: one gateway must not receive another's token.
            return given
        if "auth_token" not in touched and given.auth_token is not None:
            # The token was sent as a header.
            touched |= {"auth_token", "auth_scheme"}
        merged = replace(old, **{name: getattr(given, name) for name in touched})
        if merged.client_key is not None and merged.client_cert is None:
            name, other = self._name("gateway", "client_key"), self._name("gateway", "client_cert")
            raise InvalidSpec.of(name, f"only together with {other}")
        return merged
