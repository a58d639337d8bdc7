"""Files that only their owner may read, and files that somebody else may have put there."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from labkeeper import shortage

_LARGEST: Final = 4 * 1024 * 1024
"""Bytes that are read of a file of somebody else."""


def write_private(path: Path, text: str) -> Path:
    """Write a file with mode 0600, whole or not at all; return its path. Raises OSError."""
    spare = path.with_name(path.name + ".new")
    descriptor = os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
    return spare.replace(path)


def read_foreign(path: Path) -> bytes:
    """Read a file in a directory that somebody else can write to: no link, no pipe that would be waited at, and not without end.

    Raises OSError.
    """
    with _regular(path) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as stream:
        return stream.read(_LARGEST)


def read_named(path: str, user: str | None = None) -> bytes:
    """Read a file that a request named, links resolved; since then it may have become another, or a part of its path a link.

    Where it is read for another user of the machine, its mode has to let that user read it. Raises OSError.
    """
    with _regular(path) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as stream:
        if _place_of(descriptor, path) != path:
            raise OSError(errno.ELOOP, "a part of its path has become a link", path)
        if user is not None and not _may_read(user, os.fstat(descriptor)):
            raise PermissionError(errno.EACCES, f"user '{user}' may not read it", path)
        content = stream.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise OSError(errno.EFBIG, "it is too large", path)
        return content


@contextlib.contextmanager
def _regular(path: str | Path) -> Iterator[int]:
    """Open a file for reading, and nothing else that may be there. Raises OSError."""
    # On Linux it is looked at before it is opened: some devices do something at that.
    looks = getattr(os, "O_PATH", os.O_RDONLY | os.O_NONBLOCK)
    with _closing(os.open(path, looks | os.O_NOFOLLOW)) as found:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise OSError(errno.EINVAL, "it is no file", str(path))
        if sys.platform != "linux":
            yield found
        else:
            # Who holds a lease of the file would be waited for.
            with _closing(os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_NONBLOCK)) as descriptor:
                yield descriptor


def _place_of(descriptor: int, path: str) -> str:
    """Return where an open file is; where the system does not tell, where its path leads now."""
    return str(Path(f"/proc/self/fd/{descriptor}").readlink()) if sys.platform == "linux" else os.path.realpath(path)


def _may_read(user: str, file: os.stat_result) -> bool:
    """Whether the mode of a file lets a user of the machine read it."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        return False
    right = stat.S_IROTH
    if file.st_uid == entry.pw_uid:
        right = stat.S_IRUSR
    elif file.st_gid in os.getgrouplist(user, entry.pw_gid):
        right = stat.S_IRGRP
    return entry.pw_uid == 0 or bool(file.st_mode & right)


@contextlib.contextmanager
def private_copy(content: bytes) -> Iterator[str]:
    """Return a path by which only this process can read a content: for libraries that take a path. Raises OSError."""
    with tempfile.TemporaryFile() as copy:
        copy.write(content)
        copy.seek(0)
        yield f"/dev/fd/{copy.fileno()}"


def remove_tree(path: Path) -> None:
    """Remove a directory with all that is in it, as far as that is possible; a link is left as it is. Idempotent.

    Raises OSError where it is we who lack what it takes, such as a descriptor: later it is possible.

    `shutil.rmtree` goes down and holds every level open: a thousand directories in each other would be there for ever. Here each
    is moved to the top before it is looked into. It is known by its descriptor, so nobody can put a link in its place.
    """
    with shortage.suppress_others(OSError):
        with _directory(path) as top:
            left = _empty(top, into=top)
            while left:
                name = left.pop()
                with shortage.suppress_others(OSError):
                    with _directory(name, top) as directory:
                        left += _empty(directory, into=top)
                    os.rmdir(name, dir_fd=top)
        path.rmdir()


def _empty(directory: int, *, into: int) -> list[str]:
    """Remove all files of a directory, and move its directories into another one, with names that nobody knows; give these."""
    moved = []
    for name in os.listdir(directory):
        with contextlib.suppress(OSError):
            try:
                os.unlink(name, dir_fd=directory)
            except (IsADirectoryError, PermissionError):  # The latter on macOS.
                _unlock(name, directory)
                os.rename(name, fresh := secrets.token_hex(16), src_dir_fd=directory, dst_dir_fd=into)
                moved.append(fresh)
    return moved


@contextlib.contextmanager
def _directory(path: Path | str, inside: int | None = None) -> Iterator[int]:
    _unlock(path, inside)
    with _closing(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=inside)) as descriptor:
        yield descriptor


def _unlock(directory: Path | str, inside: int | None) -> None:
    """Open what its owner has closed to itself. Root needs no leave, and could be led elsewhere: this follows links."""
    if os.geteuid() != 0:
        with contextlib.suppress(OSError):
            os.chmod(directory, 0o700, dir_fd=inside)


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)
