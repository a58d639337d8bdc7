"""Report progress on stderr, so that stdout has only the results."""

from __future__ import annotations

import sys
import time
from typing import Final

_BEGIN: Final = time.monotonic()


class BenchError(Exception):
    """The bench cannot measure; the message says why."""


def say(text: str) -> None:
    """Print a line, with the time since the start."""
    seconds = int(time.monotonic() - _BEGIN)
    print(f"[{seconds // 60:02d}:{seconds % 60:02d}] {text}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a line that stands out."""
    print(f"\n!!! {text}\n", file=sys.stderr, flush=True)
