"""The specification of a server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Final, Literal, NewType

ServerName = NewType("ServerName", str)
"""A DNS label (RFC 1123), so that it can name a host, container or pod on every backend."""


NAME_PATTERN: Final = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"


NAME_RULE: Final = (
    "must be 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit"
)


DEFAULT_NAME: Final = ServerName("default")


Owner = NewType("Owner", str)
"""Whom a server, a token or an event belongs to; spelt as a server's name is."""


LOCAL: Final = Owner("local")
"""The only owner until people sign in."""


QualifiedName = NewType("QualifiedName", str)
"""A server's name that is unique among all owners: "NAME" of the owner `local`, "NAME.OWNER" of
another. It can name a directory, control group, container or pod."""


KERNEL_PREFIX: Final = "KERNEL_"
"""Prefix of the variables that every gateway passes to its kernels; others need configuration."""


KernelsBy = Literal["fork", "exec"]
"""How IPython kernels beside the server are launched: forked from a process that has loaded
ipykernel, where possible, or executed."""


def server_name(text: str) -> ServerName:
    """Return `text` as a name. Raises ValueError with the rule if `text` breaks it."""
    if re.fullmatch(NAME_PATTERN, text) is None:
        raise ValueError(NAME_RULE)
    return ServerName(text)


def qualified_name(name: ServerName, owner: Owner = LOCAL) -> QualifiedName:
    """Return the qualified name of an owner's server."""
    return QualifiedName(name if owner == LOCAL else f"{name}.{owner}")


def parse_qualified_name(text: str) -> tuple[ServerName, Owner]:
    """Return the name and the owner in a qualified name. Raises ValueError if `text` is not one."""
    name, dot, owner = text.partition(".")
    if dot and owner == LOCAL:
        raise ValueError(f"the owner '{LOCAL}' is not written")
    return server_name(name), Owner(server_name(owner)) if dot else LOCAL


@dataclass(frozen=True, slots=True)
class Gateway:
    """A Jupyter kernel gateway and its options. Times in seconds; None means Jupyter's default."""

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
    """Whether a server must not start without it."""
    user: str | None = None
    """The user of the machine who must be able to read the client's certificate and key; None for
    the keeper's own."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Resource limits of a server with its kernels and terminals; None means unlimited."""

    memory: int | None = None
    """Bytes."""
    cpus: float | None = None
    """Processors; 1.5 is one and a half."""
    processes: int | None = None
    """Processes and threads."""


UNLIMITED: Final = Limits()


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """Everything that a caller can specify. Two equal specs request the same server."""

    name: ServerName
    root_dir: str
    """The root directory of the Lab: absolute once a backend has validated the spec, and before
    that as it was requested, "" for the default."""
    owner: Owner = LOCAL
    base_url: str = "/"
    """The path prefix of the server; begins and ends with a slash."""
    default_url: str = "/lab"
    ip: str = "127.0.0.1"
    """The address that the server listens on."""
    port: int | None = None
    """The only port that it may listen on; None: the backend chooses a free one."""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    kernel_env: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Variables for its kernels, wherever they run; not for the server itself."""
    labels: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    """A line about the server, for people."""
    gateway: Gateway | None = None
    kernels_by: KernelsBy = "fork"
    limits: Limits = UNLIMITED
    user: str | None = None
    """The user of the machine that it runs as; None for the keeper's own."""
    idle_timeout: float | None = None
    """Seconds without use after which it is stopped; None: never."""
    max_age: float | None = None
    """Seconds after which it is stopped in any case; None: never."""
    sleep_after: float | None = None
    """Seconds without kernels, terminals and visitors after which it is stopped until the next
    visit; None: never."""
    jupyter_options: Mapping[str, bool | int | float] = field(default_factory=dict)
    """Jupyter's own options, by their configuration names: `ServerApp.terminals_enabled`."""

    def __post_init__(self) -> None:
        """Restrict the gateway's certificate files to those that the server's user can read."""
        if self.gateway is not None and self.gateway.user != self.user:
            object.__setattr__(self, "gateway", replace(self.gateway, user=self.user))

    @property
    def qualified_name(self) -> QualifiedName:
        """The name that is unique among all owners."""
        return qualified_name(self.name, self.owner)

    def differs(self, other: ServerSpec) -> tuple[str, ...]:
        """Return the fields in which two specs differ; omits values, which may be secret."""
        return tuple(
            f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)
        )
