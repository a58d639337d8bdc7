"""The processes and files of a keeper, as the machine shows them."""

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
    """forkserver, loader, spare, rehearsal; or of a server: server, zygote, kernel or any other."""
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
        kind, name = "rehearsal", server_dir.split(b"/")[-2].decode()
    elif server_dir.startswith(server_dirs + b"/"):
        kind, name = _kind_of_marked(command), server_dir.split(b"/")[-1].decode()
    else:
        here = str((root / "cwd").readlink()).removesuffix(" (deleted)")
        if server_dir.strip() or not here.startswith(place):
            return None
        kind, name = _kind_of_unmarked(command), here.removeprefix(place).split("/")[0]
    return ProcessInfo(pid, int(parent), kind, name, state == "Z")


def _kind_of_marked(command):
    if command.startswith(b"jupyter-lab") or b" exec " in command:
        return "server"
    # One that a server loads itself is shown as a loader until it is loaded.
    zygote = command.startswith((b"kernel-zygote", b"kernel-loader")) or b" zygote " in command
    return "zygote" if zygote else "kernel"


def _kind_of_unmarked(command):
    if command.startswith(b"jupyter-lab"):
        return "spare"
    # A zygote is shown as its loader until its server has introduced itself.
    if command.startswith(b"kernel-loader") or b" kernels " in command:
        return "loader"
    return "rehearsal" if b"ipykernel_launcher" in command else "forkserver"


def is_zombie(process):
    with contextlib.suppress(psutil.Error):
        return process.status() == psutil.STATUS_ZOMBIE
    return False


def resource_counts(pid):
    try:
        return tuple(len(list(Path(f"/proc/{pid}/{what}").iterdir())) for what in ("fd", "task"))
    except OSError:
        return 0, 0


def unknown_files_in(directory, known):
    if directory.is_dir():
        for path in directory.iterdir():
            if path.name not in known:
                yield f"unexpected file: {path}"
