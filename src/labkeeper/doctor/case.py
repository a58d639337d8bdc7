"""What the checks are given: the settings, and what a running keeper has said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from labkeeper.client import Kernel, Library, Server
from labkeeper.core.access import Caller, Scope
from labkeeper.core.spec import Gateway, ServerSpec
from labkeeper.schema.requests.servers import ServerRequest
from labkeeper.serve.policies import defaults, paths
from labkeeper.settings.model import Settings

_OWNER: Final = Caller("doctor", Scope.ADMIN)


@dataclass(frozen=True, slots=True)
class Running:
    """A server that runs, and its kernels."""

    server: Server
    kernels: Sequence[Kernel] = ()
    error: str = ""
    """Why its kernels cannot be listed."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What a running keeper has said."""

    url: str
    version: str
    servers: Sequence[Server]
    running: Sequence[Running]
    """Those that run; of many, only the first."""
    libraries: Sequence[Library]
    failing: str
    """Which watchers fail, and why; empty if all of them work."""


@dataclass(frozen=True, slots=True)
class Case:
    """The keeper that is examined: the running one, or the one that these settings would start."""

    settings: Settings
    version: str
    """Our own version."""
    is_here: bool = True
    """Whether its machine is this one."""
    keeper: Answers | None = None
    why_none: str = ""
    """Why there are no answers of a keeper."""
    mend_none: str = ""
    """What changes that, if there should be one; empty if it is no fault that none runs."""
    gateway: Gateway | None = None
    """A gateway that is to be used."""


def default_spec(chosen: Settings) -> ServerSpec:
    """Return what a request without any field starts. Raises InvalidSpec."""
    return ServerRequest().spec(defaults(chosen), _OWNER, paths(chosen).validate)
