"""Time the removal of secrets from lines of a log.

This is a program of its own, for the interpreter of the measured labkeeper. It writes its
results as JSON to stdout. It measures the thread's CPU time in the fastest of several rounds,
because other load on the machine can only add to it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from labkeeper import scrub

_ROUNDS: Final = 5
_SECRET: Final = "kE7f-abcdefghijklmnopqrstuvwxyz0123456789"
_LINE: Final = (
    "[I 2026-11-23 22:19:20.559 ServerApp] 101 GET "
    "/api/kernels/5f1c92c4-443a/channels?session_id=abc (127.0.0.1) 3.5ms"
)
"""A typical line, without a secret."""
_LINES: Final = 2000
_HOSTILE: Final = (
    "token",
    "a-",
    "://a:",
    "authorization:",
    "bearer ",
    "0a",
    'token"',
    "://",
    'secret\\"',
    ":",
)
"""Prefixes of secrets: repeated, they make a careless pattern backtrack."""
_SIZE: Final = 2**16


def fastest(work: Callable[[str], Any], lines: Sequence[str]) -> float:
    """Return the seconds for all lines, in the fastest round."""
    return min(_round(work, lines) for _ in range(_ROUNDS))


def _round(work: Callable[[str], Any], lines: Sequence[str]) -> float:
    begin = time.thread_time()
    for line in lines:
        work(line)
    return time.thread_time() - begin


def main() -> None:
    """Time plain lines, the pattern alone on the same lines, and hostile lines."""
    known = scrub.Secrets(_SECRET)
    lines = [_LINE] * _LINES

    def hide(text: str) -> str:
        return scrub.scrub(text, known)

    line, rule = fastest(hide, lines), fastest(scrub._LOOKS.search, lines)  # noqa: SLF001
    hostile = {piece: fastest(hide, [piece * (_SIZE // len(piece))]) for piece in _HOSTILE}
    json.dump(
        {
            "line_microseconds": 1e6 * line / _LINES,
            "rule_microseconds": 1e6 * rule / _LINES,
            "hostile_milliseconds": {piece: 1e3 * seconds for piece, seconds in hostile.items()},
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
