"""The processes of a keeper as /proc shows them."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class ProcessInfo:
    """A process that belongs to the keeper's runtime directory, as /proc shows it."""

    pid: int
    parent: int
    kind: str
    """server, kernel (or any other child of a server), forkserver, spare or rehearsal."""
    name: str
    """Name of its server, or of the directory of its fork server."""
    zombie: bool


def process_info(pid, server_dirs, place):
    """Return information about a process that belongs to the runtime directory `server_dirs`."""
    root = Path(f"/proc/{pid}")
    state, parent = (root / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
    command = (root / "cmdline").read_bytes().replace(b"\0", b" ")
    mark = re.search(rb"(?:^|\0)LABKEEPER_SERVER=([^\0]*)", (root / "environ").read_bytes())
    server_dir = mark[1] if mark else b""
    if server_dir.startswith(server_dirs + b"/.forkservers/"):
        return ProcessInfo(
            pid, int(parent), "rehearsal", server_dir.split(b"/")[-2].decode(), state == "Z"
        )
    if server_dir.startswith(server_dirs + b"/"):
        server = command.startswith(b"jupyter-lab") or b" exec " in command
        return ProcessInfo(
            pid,
            int(parent),
            "server" if server else "kernel",
            server_dir.split(b"/")[-1].decode(),
            state == "Z",
        )
    here = str((root / "cwd").readlink()).removesuffix(" (deleted)")
    if server_dir.strip() or not here.startswith(place):
        return None
    spare = command.startswith(b"jupyter-lab")
    return ProcessInfo(
        pid,
        int(parent),
        "spare" if spare else "forkserver",
        here.removeprefix(place).split("/")[0],
        state == "Z",
    )


def is_zombie(process):
    with contextlib.suppress(psutil.Error):
        return process.status() == psutil.STATUS_ZOMBIE
    return False


def resource_counts(pid):
    try:
        return tuple(len(list(Path(f"/proc/{pid}/{what}").iterdir())) for what in ("fd", "task"))
    except OSError:
        return 0, 0
