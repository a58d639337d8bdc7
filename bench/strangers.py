"""Measure the latency of a client while others send wrong tokens.

The client sends at a fixed rate, as in `load.py`; the others send as fast as they are refused. The
keeper has no servers, so its own work is small, and the others cause most of the latency.
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
from figures import percentiles
from keepers import Labkeeper
from progress import BenchError, say
from stranger import STRANGERS

_PATH: Final = "/api/servers"
_SECONDS: Final = 20.0
"""At `load.RATE`, this is 2000 requests: 20 are above the 99th percentile."""


def strangers(keeper: Labkeeper, seconds: float = _SECONDS) -> dict[str, Any]:
    """Measure requests for the list of servers, without and with wrong tokens."""
    say(f"{keeper.label}: GET {_PATH} without other clients")
    quiet = _latency(keeper, seconds)
    say(f"{keeper.label}: GET {_PATH} while {STRANGERS} clients send wrong tokens")
    with _strangers_running(keeper) as found:
        knocked = _latency(keeper, seconds)
    return {
        "strangers": STRANGERS,
        "rate": load.RATE,
        "quiet": {"latency": quiet},
        "knocked": {"latency": knocked},
        "refused_per_second": found["refused"] / found["seconds"],
        "strangers_share_of_a_core": found["own_share"],
    }


def _latency(keeper: Labkeeper, seconds: float) -> dict[str, float]:
    return percentiles(load.run_caller(keeper, _PATH, seconds, load.RATE)["seen"])


@contextmanager
def _strangers_running(keeper: Labkeeper) -> Iterator[dict[str, Any]]:
    """Run `stranger.py`; the yielded dict has its results after the block."""
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
        raise BenchError(f"stranger.py failed: {process.communicate()[1]}")
    found: dict[str, Any] = {}
    yield found
    answer, complaint = process.communicate()
    if process.returncode:
        raise BenchError(f"stranger.py failed: {complaint}")
    found |= json.loads(answer)
    if found["failed"]:
        raise BenchError(f"a wrong token was not refused as expected: {found['failed'][0]}")
