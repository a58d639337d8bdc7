"""Files that a server writes: its server_info, and its kernels.

Source: jupyter_server 2.x (`serverapp.py`, `server_info`).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import structlog
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from labkeeper import addresses
from labkeeper.core.server import Endpoint, OwnKernel, Session
from labkeeper.files import read_foreign
from labkeeper.forkserver.kernels import RECORD_VERSION

_log = structlog.get_logger("labkeeper.jupyter.records")

_ENDPOINT: Final = TypeAdapter(Endpoint)
"""Reads an endpoint out of Jupyter's `server_info`, which has all its fields."""
_LONGEST_VERSION: Final = 64
"""Maximum characters of a version: the server's user can make it up."""


def info_path(runtime_dir: Path, pid: int) -> Path:
    """Return the path of a server's server_info file; the server removes it at a clean exit."""
    return runtime_dir / f"jpserver-{pid}.json"


def read_info(runtime_dir: Path, pid: int) -> Endpoint | None:
    """Return the endpoint in a process's server_info; None if the file is missing or incomplete."""
    try:
        return endpoint_of(json.loads(read_foreign(info_path(runtime_dir, pid))), pid)
    except (OSError, ValueError, RecursionError):
        return None


def endpoint_of(server_info: Any, pid: int) -> Endpoint | None:
    """Return the endpoint in a server_info that a process reports; None if it is not its own."""
    try:
        endpoint = _ENDPOINT.validate_python(server_info)
    except ValidationError:
        return None
    if server_info.get("pid") != pid:
        return None
    return with_url(endpoint, version=endpoint.version[:_LONGEST_VERSION])


def with_url(endpoint: Endpoint, **told: Any) -> Endpoint:
    """Return an endpoint with some fields replaced and its URL recomputed."""
    better = replace(endpoint, **told)
    return replace(better, url=url_of(better, better.hostname or "localhost"))


_KernelId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class _SessionRecord(BaseModel):
    model_config = ConfigDict(defer_build=True)

    path: str
    name: str
    type: str
    kernel_id: str


class _KernelsRecord(BaseModel):
    """`kernels.json`, as `forkserver/kernels.py` writes it; the server's user can write it, too."""

    model_config = ConfigDict(defer_build=True)

    version: int = 1
    kernels: list[_KernelId]
    starting: list[_KernelId]
    sessions: list[_SessionRecord]


_MOST_KERNELS: Final = 500
"""Maximum kernels of one server that are accepted.

Each may become an orphaned kernel, stored with its gateway's credentials.
"""


def read_kernels(path: Path) -> tuple[OwnKernel, ...]:
    """Return the recorded kernels of a server, at most 500; none without a readable record."""
    try:
        found = _KernelsRecord.model_validate_json(read_foreign(path))
    except (OSError, ValidationError):
        return ()
    if found.version != RECORD_VERSION:
        _log.warning("cannot read a record of kernels", path=str(path), version=found.version)
        return ()
    sessions = found.sessions[:_MOST_KERNELS]
    there = (
        OwnKernel(
            id_, tuple(Session(s.path, s.name, s.type) for s in sessions if s.kernel_id == id_)
        )
        for id_ in dict.fromkeys(found.kernels[:_MOST_KERNELS])
    )
    return (*there, *(OwnKernel(id_, starting=True) for id_ in found.starting))[:_MOST_KERNELS]


def url_of(endpoint: Endpoint, host: str | None = None) -> str:
    """Return the root URL of a server, as seen from this machine or with a given host name."""
    host = host or addresses.from_here(endpoint.hostname)
    return addresses.url(
        "https" if endpoint.secure else "http", host, endpoint.port, endpoint.base_url
    )
