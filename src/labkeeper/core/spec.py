"""What a caller can ask of a server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Final, NewType

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
    description: str = ""
    """A line about the server, for people."""
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
