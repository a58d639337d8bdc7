"""What the bench says while it works: on stderr, so that stdout has the results alone."""

from __future__ import annotations

import sys
import time
from typing import Final

_BEGIN: Final = time.monotonic()


class BenchError(Exception):
    """The bench cannot measure; the message says why."""


def say(text: str) -> None:
    """Tell where we are."""
    seconds = int(time.monotonic() - _BEGIN)
    print(f"[{seconds // 60:02d}:{seconds % 60:02d}] {text}", file=sys.stderr, flush=True)


def shout(text: str) -> None:
    """Tell what must not be overlooked."""
    print(f"\n!!! {text}\n", file=sys.stderr, flush=True)
