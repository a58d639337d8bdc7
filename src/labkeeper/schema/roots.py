"""The allowed root directories of servers on this machine."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_USER: Final = "%u"
"""Placeholder for the server's user in directories of the settings."""


def resolved(directory: Path, user: str | None) -> str:
    """Return a directory for a user of the machine, None being our own, with all links resolved."""
    name = user or _own_name()
    return os.path.realpath(str(directory).replace(_USER, name))


def holds(roots: Iterable[str], path: str) -> bool:
    """Whether a path lies within one of the roots; all must be resolved."""
    return any(Path(path).is_relative_to(root) for root in roots)


def _own_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # In a container with a numeric user.
        return str(os.geteuid())
