"""Files that only their owner may read, and files that somebody else may have put there."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_LARGEST: Final = 4 * 1024 * 1024
"""Bytes that are read of a file of somebody else."""


def write_private(path: Path, text: str) -> Path:
    """Write a file with mode 0600, whole or not at all; give its path. Raises OSError."""
    spare = path.with_name(path.name + ".new")
    descriptor = os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
    return spare.replace(path)


def read_foreign(path: Path) -> bytes:
    """Read a file in a directory that somebody else can write to: no link, no pipe that would be waited at, and not without end.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no file")
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            return stream.read(_LARGEST)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Remove a directory with all that is in it, as far as that is possible; a link is left as it is. Idempotent.

    `shutil.rmtree` goes down and holds every level open: a thousand directories in each other would be there for ever. Here each
    is moved to the top before it is looked into. It is known by its descriptor, so nobody can put a link in its place.
    """
    with contextlib.suppress(OSError):
        with _directory(path) as top:
            left = _empty(top, into=top)
            while left:
                name = left.pop()
                with contextlib.suppress(OSError):
                    with _directory(name, top) as directory:
                        left += _empty(directory, into=top)
                    os.rmdir(name, dir_fd=top)
        path.rmdir()


def _empty(directory: int, *, into: int) -> list[str]:
    """Remove all files of a directory, and move its directories into another one, with names that nobody knows; give these."""
    moved = []
    for name in os.listdir(directory):
        try:
            os.unlink(name, dir_fd=directory)
        except (IsADirectoryError, PermissionError):  # The latter on macOS.
            with contextlib.suppress(OSError):
                _unlock(name, directory)
                os.rename(name, fresh := secrets.token_hex(16), src_dir_fd=directory, dst_dir_fd=into)
                moved.append(fresh)
    return moved


@contextlib.contextmanager
def _directory(path: Path | str, inside: int | None = None) -> Iterator[int]:
    _unlock(path, inside)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=inside)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _unlock(directory: Path | str, inside: int | None) -> None:
    """Open what its owner has closed to itself. Root needs no leave, and could be led elsewhere: this follows links."""
    if os.geteuid() != 0:
        with contextlib.suppress(OSError):
            os.chmod(directory, 0o700, dir_fd=inside)
