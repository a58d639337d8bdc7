"""Text of others as pages show it, such as of logs: without control codes."""

from __future__ import annotations

import re
from typing import Final

_LONGEST: Final = 4000
"""Characters of a line; the rest of it is left out."""
_CONTROL: Final = re.compile(r"\x1b\[[0-9;:?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control sequences (ECMA-48), and other control codes."""


def plain(line: str) -> str:
    """Return a line without control codes."""
    line = _CONTROL.sub("", line.rstrip("\n"))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"
