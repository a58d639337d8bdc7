"""How long a caller with a token waits while strangers knock with wrong ones.

The caller comes on a schedule, as in `load.py`; the strangers come again as soon as they are refused. The keeper has no server:
what it does for the caller is little, and what the caller waits for is the strangers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import load
from contenders import Labkeeper
from figures import percentiles
from progress import BenchError, say
from stranger import STRANGERS

_PATH: Final = "/api/servers"
_SECONDS: Final = 20.0
"""With `load.RATE` requests a second, twenty lie above the 99th percentile."""


def strangers(keeper: Labkeeper, seconds: float = _SECONDS) -> dict[str, Any]:
    """Measure requests for the list of servers, first without strangers, then with them."""
    say(f"{keeper.label}: GET {_PATH} while it is quiet")
    quiet = _latency(keeper, seconds)
    say(f"{keeper.label}: GET {_PATH} while {STRANGERS} strangers knock")
    with _knocking(keeper) as told:
        knocked = _latency(keeper, seconds)
    return {
        "strangers": STRANGERS,
        "rate": load.RATE,
        "quiet": {"latency": quiet},
        "knocked": {"latency": knocked},
        "refused_per_second": told["refused"] / told["seconds"],
        "strangers_share_of_a_core": told["own_share"],
    }


def _latency(keeper: Labkeeper, seconds: float) -> dict[str, float]:
    return percentiles(load.call(keeper, _PATH, seconds, load.RATE)["seen"])


@contextmanager
def _knocking(keeper: Labkeeper) -> Iterator[dict[str, Any]]:
    """Have strangers knock; what they saw is there when they have stopped."""
    program = Path(__file__).with_name("stranger.py")
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, program], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"port": urlsplit(keeper.url).port, "path": _PATH}) + "\n")
    process.stdin.flush()
    if process.stdout.readline() != "ready\n":
        raise BenchError(f"the strangers broke: {process.communicate()[1]}")
    told: dict[str, Any] = {}
    yield told
    answer, complaint = process.communicate()
    if process.returncode:
        raise BenchError(f"the strangers broke: {complaint}")
    told |= json.loads(answer)
    if told["failed"]:
        raise BenchError(f"a stranger was not refused as it should be: {told['failed'][0]}")
