"""What a server writes down: its server_info, and its kernels.

Source: jupyter_server 2.x (`serverapp.py`, `server_info`).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from labkeeper import addresses
from labkeeper.core.server import Endpoint, OwnKernel, Session
from labkeeper.files import read_foreign


class _Info(BaseModel):
    """`jpserver-PID.json` (jupyter_server's `server_info`)."""

    model_config = ConfigDict(extra="ignore")

    base_url: str
    hostname: str
    password: bool
    pid: int
    port: int
    root_dir: str
    secure: bool
    token: str
    version: str = Field("", max_length=64)


def info_path(runtime_dir: Path, pid: int) -> Path:
    """Return where the server of this pid writes its server_info; it removes the file when it ends in good order."""
    return runtime_dir / f"jpserver-{pid}.json"


def read_info(runtime_dir: Path, pid: int) -> Endpoint | None:
    """Read the server_info of a process; None as long as it has written none, or only half of it."""
    try:
        return endpoint_of(json.loads(read_foreign(info_path(runtime_dir, pid))), pid)
    except (OSError, ValueError, RecursionError):
        return None


def endpoint_of(server_info: Any, pid: int) -> Endpoint | None:
    """Read what a process says of itself, in the form of a server_info; None where that is none of its."""
    try:
        info = _Info.model_validate(server_info)
    except ValidationError:
        return None
    if info.pid != pid:
        return None
    return with_url(
        Endpoint(
            base_url=info.base_url,
            hostname=info.hostname,
            root_dir=info.root_dir,
            password=info.password,
            port=info.port,
            secure=info.secure,
            token=info.token,
            url="",
            version=info.version,
        )
    )


def with_url(endpoint: Endpoint, **told: Any) -> Endpoint:
    """Return an endpoint with what is told better, and the URL that follows from it all."""
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
    """`kernels.json`, as `standalone/kernels.py` writes it; the user of the server can write it, too."""

    model_config = ConfigDict(defer_build=True)

    kernels: list[_KernelId]
    starting: list[_KernelId]
    sessions: list[_SessionRecord]


_MOST_KERNELS: Final = 500
"""Kernels of one server that are believed: each may become an orphaned kernel, stored with its gateway's credentials."""


def read_kernels(path: Path) -> tuple[OwnKernel, ...]:
    """Read which kernels a server has written down to have, the first 500; none when it has written nothing that can be read."""
    try:
        found = _KernelsRecord.model_validate_json(read_foreign(path))
    except (OSError, ValidationError):
        return ()
    sessions = found.sessions[:_MOST_KERNELS]
    there = (
        OwnKernel(id_, tuple(Session(s.path, s.name, s.type) for s in sessions if s.kernel_id == id_))
        for id_ in dict.fromkeys(found.kernels[:_MOST_KERNELS])
    )
    return (*there, *(OwnKernel(id_, starting=True) for id_ in found.starting))[:_MOST_KERNELS]


def url_of(endpoint: Endpoint, host: str | None = None) -> str:
    """Return the root URL of a server: as seen from this machine, or with the name by which others know it."""
    host = host or addresses.from_here(endpoint.hostname)
    return addresses.url("https" if endpoint.secure else "http", host, endpoint.port, endpoint.base_url)
