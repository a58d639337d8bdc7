"""How this machine runs servers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from labkeeper.core.spec import KernelsBy


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalOptions:
    """What all servers of a local backend have in common."""

    python: Path
    """The interpreter that has JupyterLab."""
    runtime_dir: Path
    """Holds the directory of each server."""
    log_dir: Path
    """Holds the log of each server."""
    launch_by: Literal["fork", "exec"] = "fork"
    kernels_by: KernelsBy = "fork"
    """With `exec`, no kernel is forked, even if a spec that is older than the option allows it."""
    preload: tuple[str, ...] = ()
    """Libraries that are loaded for forked kernels."""
    umask: int = 0o077
    """The umask of files that servers create."""
    log_max_bytes: int = 10 * 1024 * 1024
    """Size at which a server's log is rotated."""
    echo_logs: bool = False
    """Whether the logs of servers are repeated in the keeper's own."""
    base_path: str = ""
    """Path below which each server is launched, with its name, such as `/servers/`."""
    identity_secret: str = field(default="", repr=False)
    """Secret that the edge has, too: of it the key of each launch's identity header is made.

    Empty if the edge serves no Labs.
    """
    certificate: tuple[Path, Path] | None = None
    """Certificate and key with which servers use TLS."""
