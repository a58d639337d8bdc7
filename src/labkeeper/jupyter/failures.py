"""Classifies failures of a Jupyter server by its exit and the last lines of its log."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from labkeeper.core.server import Exit, FailureClass

_CAUSES: Final = (
    (
        FailureClass.PORT_IN_USE,
        re.compile(
            r"port \d+ is (already in use|not available)|Address already in use", re.IGNORECASE
        ),
    ),
    (
        FailureClass.DISK_FULL,
        re.compile(r"No space left on device|Disk quota exceeded", re.IGNORECASE),
    ),
    (FailureClass.IMPORT_ERROR, re.compile(r"ModuleNotFoundError|ImportError|No module named")),
    (
        FailureClass.CONFIG_ERROR,
        re.compile(
            r"Bad config|bad configuration|TraitError|ConfigError"
            r"|Permission denied|Read-only file system|\[labkeeper\] cannot start the server"
        ),
    ),
)


_LEVEL: Final = re.compile(r"^\[([CEWID]) [^\]]*\]\s*")


def cause_of(end: Exit, tail: Sequence[str]) -> tuple[FailureClass, str]:
    """Return the class of a failure and the log line that explains it best, or "".

    Jupyter's prefix is removed from the line.
    """
    if end.signal is not None:
        return FailureClass.KILLED, ""
    grave = [line for line in reversed(tail) if _level(line) not in {"D", "I"}]
    for kind, pattern in _CAUSES:
        for line in grave:
            if pattern.search(line):
                return kind, _LEVEL.sub("", line).strip()
    # Jupyter logs some warning at each start, and an indented line continues the one above.
    last_words = (
        _LEVEL.sub("", line).strip()
        for line in grave
        if _level(line) != "W" and not line[:1].isspace()
    )
    return FailureClass.OTHER, next(filter(None, last_words), "")


def _level(line: str) -> str:
    """Return the level of a Jupyter log line; "" for other lines, such as of a traceback."""
    found = _LEVEL.match(line)
    return found[1] if found else ""
