"""One server at a time, from the request to the end: start, first cell, stop.

Contenders take turns within each repeat, in an order that is shuffled anew each time (with a fixed seed), so that whatever else
the machine does falls on all alike, and nobody always comes after the same one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from typing import Final

from contenders import Contender, Server
from processes import family_of
from progress import BenchError, say
from web import run_cell, start_kernel

NAMES: Final = ("start", "stop", "first_cell", "stop_kernels")
Samples = dict[str, dict[str, list[float]]]
"""Seconds, by measurement and contender."""
_PAUSE: Final = 0.5
"""Seconds after a stop in which a contender may tidy up at its own cost, not at the next one's."""


def rounds(
    contenders: Sequence[Contender], repeats: int, warmups: int
) -> Iterator[tuple[int, Contender]]:
    """Give who is next, and in which round; those below 0 are to be thrown away."""
    for number in range(-warmups, repeats):
        order = list(contenders)
        random.Random(number).shuffle(order)
        for contender in order:
            yield number, contender


def measure(
    contenders: Sequence[Contender], wanted: Sequence[str], repeats: int, warmups: int
) -> Samples:
    """Let servers live: one without a kernel, one with two."""
    samples: Samples = {
        name: {contender.key: [] for contender in contenders} for name in NAMES if name in wanted
    }
    for contender in contenders:
        contender.prepare(["plain", "busy"])
    for number, contender in rounds(contenders, repeats, warmups):
        seen: dict[str, float] = {}
        if {"start", "stop"} & samples.keys():
            seen |= _plain_life(contender)
        if {"first_cell", "stop_kernels"} & samples.keys():
            seen |= _busy_life(contender)
        if number >= 0:
            for name in samples:
                samples[name][contender.key].append(seen[name])
        told = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in seen.items())
        say(
            f"{'warm-up' if number < 0 else f'{number + 1} of {repeats}'}: {contender.label}: {told}"
        )
    return samples


def _plain_life(contender: Contender) -> dict[str, float]:
    begin = time.perf_counter()
    server = contender.launch("plain")
    ready = time.perf_counter()
    return {"start": ready - begin, "stop": _stop(contender, server)}


def _busy_life(contender: Contender) -> dict[str, float]:
    begin = time.perf_counter()
    server = contender.launch("busy")
    result = run_cell(
        server.url, server.authorization, start_kernel(server.url, server.authorization), "1+1"
    )
    seen = time.perf_counter()
    if result != "2":
        raise BenchError(f"a cell gave {result}, not 2")
    # The second kernel has run a cell, too, so that no stop meets one that is only half there.
    run_cell(
        server.url, server.authorization, start_kernel(server.url, server.authorization), "1+1"
    )
    return {"first_cell": seen - begin, "stop_kernels": _stop(contender, server, kernels=2)}


def _stop(contender: Contender, server: Server, *, kernels: int = 0) -> float:
    """Stop a server; give the seconds until all that it had started was gone."""
    contender.identify(server)
    with family_of(server.pid) as family:
        if len(family) <= kernels:
            raise BenchError("cannot find the kernels of a server among its children")
        asked = time.perf_counter()
        contender.stop(server)
        family.wait_until_gone()
        gone = time.perf_counter()
    time.sleep(_PAUSE)
    return gone - asked
