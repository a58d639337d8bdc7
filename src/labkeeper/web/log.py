"""The log of a server as a page shows it: without control codes, and with each new line."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Final

from labkeeper.api.services import Services
from labkeeper.core.spec import QualifiedName
from labkeeper.web.live import event
from labkeeper.web.plain import plain

TAIL: Final = 300
"""Lines that are shown at first."""
_TOGETHER: Final = 500
"""Lines that are sent together, at most."""
_AGAIN: Final = 1.0
"""Seconds after which it looks for a log that is not there."""


def follow(services: Services, name: QualifiedName) -> Iterator[str]:
    """Yield events with new lines, or "" about four times a second; first with the last lines."""
    tail, again = TAIL, True
    while True:
        lines: list[str] = []
        for line in services.backend.follow(name, tail, lambda: True):
            if line:
                lines.append(plain(line))
            if lines and (not line or len(lines) == _TOGETHER):
                yield event(json.dumps({"again": again, "lines": lines}), "log")
                lines, again = [], False
            elif not line:
                yield ""
        # It is not there yet, or it is another one from now on.
        yield ""
        time.sleep(_AGAIN)
        again = True
