"""Checks of directories and disks: where the keeper and its servers keep what they have."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from labkeeper.core.errors import InvalidSpec, StoreError
from labkeeper.doctor.case import Case, default_spec
from labkeeper.doctor.findings import Finding, ok, problem, setting, warning
from labkeeper.serve.process import holder, is_usable
from labkeeper.store.database import examine

_OTHERS: Final = 0o022
"""Mode bits by which users other than the owner may replace files in a directory."""
_COMFORT: Final = 20
"""Free space below this multiple of the least is a warning."""
_LEAST_FILES: Final = 100
"""The number of files that must be creatable: about those of ten servers."""


def state_directory(case: Case) -> Iterator[Finding]:
    """Whether a keeper can use its state directory, with the store and the lock in it."""
    directory = case.settings.state_dir
    if not directory.exists():
        yield _creatable(directory)
        return
    if not directory.is_dir():
        why = f"cannot use the state directory {directory}: it is not a directory"
        yield problem("state directory", why, setting("state_dir", f"{directory}-new"))
        return
    if not is_usable(directory):
        why = f"cannot use the state directory {directory}: it is not writable by this user"
        yield problem("state directory", why, _own(directory))
        return
    yield from _owned(directory)
    if case.keeper is None:
        yield from _without_keeper(directory)


def _creatable(directory: Path) -> Finding:
    """Whether a state directory that does not exist can be created."""
    above = next(parent for parent in directory.parents if parent.exists())
    if above.is_dir() and is_usable(above):
        return ok("state directory", f"{directory} will be created")
    why = f"cannot create the state directory {directory}: this user cannot write to {above}"
    return problem(
        "state directory",
        why,
        f"sudo install -d -m 700 -o $(id -u) -g $(id -g) {_quoted(directory)}",
    )


def _owned(directory: Path) -> Iterator[Finding]:
    """Whether only the keeper's user can change what is in the state directory."""
    status = directory.stat()
    if status.st_uid not in {os.geteuid(), 0}:
        why = f"the state directory {directory} belongs to user {status.st_uid}, not to this one"
        yield warning("state directory", why, _own(directory))
    elif status.st_mode & _OTHERS:
        why = f"other users can write to the state directory {directory}"
        yield problem("state directory", why, f"chmod 700 {_quoted(directory)}")
    else:
        yield ok("state directory", f"{directory} is writable, and by no other user")


def _without_keeper(directory: Path) -> Iterator[Finding]:
    """Whether the lock is free, and the store can be opened."""
    try:
        pid = holder(directory)
        examine(directory / "labkeeper.sqlite")
    except StoreError as error:
        store = directory / "labkeeper.sqlite"
        mend = f"mv {_quoted(store)} {_quoted(store)}.damaged"
        yield problem("state directory", error.message.partition("; ")[0], mend)
    except OSError as error:
        why = f"cannot read a file in {directory}: {error.strerror}"
        yield problem("state directory", why, _own(directory))
    else:
        if pid is not None:
            why = f"a keeper (pid {pid}) has locked {directory}, but cannot be asked"
            yield problem("state directory", why, f"kill {pid}")


def _own(directory: Path) -> str:
    return f"sudo chown -R $(id -u):$(id -g) {_quoted(directory)}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def notebook_directory(case: Case) -> Iterator[Finding]:
    """Whether a server whose request names no root directory can be started."""
    try:
        spec = default_spec(case.settings)
    except InvalidSpec as error:
        rule = error.details["errors"][0]["rule"]
        why = f"a server whose request names no root directory cannot start: it {rule}"
        yield problem("notebook directory", why, setting("notebook_dir", Path.home()))
    else:
        yield ok("notebook directory", spec.root_dir)


def disk(case: Case) -> Iterator[Finding]:
    """Whether the disks of the state and the runtime directory have space for the log of a server.

    That is twice LABKEEPER_LOG_MAX_BYTES, as one older file is kept.
    """
    chosen, seen = case.settings, set()
    for directory in (chosen.state_dir, chosen.server_dirs):
        there = next(path for path in (directory, *directory.parents) if path.exists())
        device = there.stat().st_dev
        if device not in seen:
            seen.add(device)
            yield _space(there, 2 * chosen.log_max_bytes)


def _space(directory: Path, least: int) -> Finding:
    """Judge the free space of a directory's disk; `least` is in bytes."""
    free, files = shutil.disk_usage(directory).free, os.statvfs(directory)
    largest = f"du -xh --max-depth=2 {_quoted(directory)} | sort -h | tail"
    mend = f"delete what is not needed; the largest: {largest}"
    said = f"{free / 2**20:.0f} MiB are free at {directory}"
    needed = f"the log of one server may take {least / 2**20:.3g} MiB"
    # Some file systems have no limit of files, and say 0.
    if files.f_files and files.f_favail < _LEAST_FILES:
        why = f"only {files.f_favail} more files can be created at {directory}"
        return problem("disk", why, mend)
    if free < least:
        return problem("disk", f"only {said}, and {needed}", mend)
    if free < _COMFORT * least:
        return warning("disk", f"{said}, and {needed}", mend)
    return ok("disk", said)
