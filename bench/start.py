#!/usr/bin/env python3
"""Compare how long a start by the API takes: without the edge, and through it.

    .venv/bin/python bench/start.py [--rounds 150]

Three keepers run at once and take turns: without an edge, with one and Labs at ports of their own,
and with one and Labs below a path. Time is from the request to the answer that the server is ready,
in milliseconds. The difference is that of each round, so what slows a whole round down does not
count. Medians are printed with their 95 % confidence interval. Linux only; needs what `make bench`
needs. Nothing is written.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar, Final

import environments
from figures import interval, median, percentile
from guard import guarded
from keepers import LabkeeperFork
from progress import BenchError, say
from web import OK, request_json

_WARMUP: Final = 5
"""Rounds before the first that counts."""
_REST: Final = 0.4
"""Seconds after each deletion, in which the fork server prepares its next child."""
_REPORT_EVERY: Final = 25


class WithoutEdge(LabkeeperFork):
    """The keeper alone on its port."""

    key = "off"
    label = "without an edge"
    settings: ClassVar[dict[str, str]] = {"LABKEEPER_EDGE": "off"}


class WithPorts(LabkeeperFork):
    """An edge, and Labs at ports of their own."""

    key = "port"
    label = "edge, Labs at ports"
    settings: ClassVar[dict[str, str]] = {"LABKEEPER_LAB_ADDRESS": "port"}


class WithPaths(LabkeeperFork):
    """An edge, and Labs below a path: the default."""

    key = "path"
    label = "edge, Labs below a path"


def _start(keeper: LabkeeperFork) -> float:
    """Start a server and delete it; return the milliseconds until it was ready."""
    url = f"{keeper.url}/api/servers"
    begun = time.perf_counter()
    answer = request_json("POST", url, keeper.authorization, {"name": "start"})
    took = (time.perf_counter() - begun) * 1e3
    if answer["state"] != "running":
        raise BenchError(f"a server is {answer['state']}, not running")
    request_json("DELETE", f"{url}/start", keeper.authorization, good=(OK,))
    time.sleep(_REST)
    return took


def _show(found: dict[str, list[float]]) -> None:
    base = found[WithoutEdge.label]
    print(f"{'milliseconds':26}{'median':>9}{'p95':>9}{'longer by':>12}{'95 % interval':>20}")
    for label, values in found.items():
        cells = f"{median(values):9.1f}{percentile(values, 95):9.1f}"
        if values is not base:
            longer = [one - other for one, other in zip(values, base, strict=True)]
            low, high = interval(longer)
            cells += f"{median(longer):+12.2f}{f'{low:+.2f} to {high:+.2f}':>20}"
        print(f"{label:26}{cells}")


def main(place: Path) -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=150)
    chosen = parser.parse_args()
    repository = Path(__file__).resolve().parent.parent
    known = environments.prepare(repository, place, with_hub=False)
    keepers = [kind(known, place) for kind in (WithoutEdge, WithPorts, WithPaths)]
    found: dict[str, list[float]] = {keeper.label: [] for keeper in keepers}
    with ExitStack() as stack:
        for keeper in keepers:
            keeper.open()
            stack.callback(keeper.close)
        for number in range(-_WARMUP, chosen.rounds):
            turn = number % len(keepers)
            for keeper in keepers[turn:] + keepers[:turn]:
                took = _start(keeper)
                if number >= 0:
                    found[keeper.label].append(took)
            if number > 0 and number % _REPORT_EVERY == 0:
                say(f"{number} of {chosen.rounds} rounds")
    _show(found)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
