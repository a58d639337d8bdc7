"""Files that only their owner may read, and files that somebody else may have put there."""

from __future__ import annotations

import os
import stat
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
