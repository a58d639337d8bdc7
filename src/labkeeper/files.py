"""Private files, and safe access to files that others control."""

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
"""Maximum bytes read from a file that others control."""


def write_private(path: Path, text: str) -> Path:
    """Write a file atomically with mode 0600; return its path. Raises OSError."""
    spare = path.with_name(path.name + ".new")
    descriptor = os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
    return spare.replace(path)


def read_foreign(path: Path) -> bytes:
    """Return the start of a file in a directory that others can write to. Raises OSError.

    Links and pipes are refused, and the size is limited.
    """
    with _regular(path) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as stream:
        return stream.read(_LARGEST)


def read_named(path: str, user: str | None = None) -> bytes:
    """Return the content of a file that a request named, by its resolved path.

    Refused if the path now resolves to another file. If `user` is given, the file's mode must allow
    that user to read it. Raises OSError.
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
    """Open a regular file for reading; refuse anything else. Raises OSError."""
    # On Linux it is checked before it is opened: some devices react to an open.
    looks = getattr(os, "O_PATH", os.O_RDONLY | os.O_NONBLOCK)
    with _closing(os.open(path, looks | os.O_NOFOLLOW)) as found:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if sys.platform != "linux":
            yield found
        else:
            # Without O_NONBLOCK, this would wait for the holder of a lease.
            again = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_NONBLOCK)
            with _closing(again) as descriptor:
                yield descriptor


def _place_of(descriptor: int, path: str) -> str:
    """Return the path of an open file; on other systems than Linux, where its path leads now."""
    return (
        str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if sys.platform == "linux"
        else os.path.realpath(path)
    )


def _may_read(user: str, file: os.stat_result) -> bool:
    """Whether the mode of a file allows a user of the machine to read it."""
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
    """Yield a path by which only this process can read `content`, for libraries that take a path.

    Raises OSError.
    """
    with tempfile.TemporaryFile() as copy:
        copy.write(content)
        copy.seek(0)
        yield f"/dev/fd/{copy.fileno()}"


def remove_tree(path: Path) -> None:
    """Remove a directory with its contents, as far as possible; a link is left alone. Idempotent.

    Raises OSError if the keeper itself lacks resources, such as descriptors, so that a retry may
    help.

    `shutil.rmtree` keeps every level open: it could never remove a thousand nested directories.
    Here each is moved to the top before it is read. It is held by its descriptor, so it cannot be
    replaced by a link.
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
    """Remove a directory's files; move its directories to `into`, and return their random names."""
    moved = []
    for name in os.listdir(directory):
        with contextlib.suppress(OSError):
            try:
                os.unlink(name, dir_fd=directory)
            except (IsADirectoryError, PermissionError):  # PermissionError on macOS.
                _unlock(name, directory)
                os.rename(
                    name, fresh := secrets.token_hex(16), src_dir_fd=directory, dst_dir_fd=into
                )
                moved.append(fresh)
    return moved


@contextlib.contextmanager
def _directory(path: Path | str, inside: int | None = None) -> Iterator[int]:
    _unlock(path, inside)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    with _closing(os.open(path, flags, dir_fd=inside)) as descriptor:
        yield descriptor


def _unlock(directory: Path | str, inside: int | None) -> None:
    """Restore the owner's access to a directory. Not as root: unneeded, and this follows links."""
    if os.geteuid() != 0:
        with contextlib.suppress(OSError):
            os.chmod(directory, 0o700, dir_fd=inside)


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)
