"""Within which directories of this machine servers may work."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_USER: Final = "%u"
"""What stands for the user of a server in a directory of the settings."""


def resolved(directory: Path, user: str | None) -> str:
    """Return a directory as it is for a user of the machine, None being our own, with no link left in it."""
    name = user or _own_name()
    return os.path.realpath(str(directory).replace(_USER, name))


def holds(roots: Iterable[str], path: str) -> bool:
    """Whether a path lies within one of the roots; all have to be resolved."""
    return any(Path(path).is_relative_to(root) for root in roots)


def _own_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # As in a container that was given a number for its user.
        return str(os.geteuid())
