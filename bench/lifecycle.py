"""Time the start, first cell and stop of one server at a time.

Contenders take turns in each round, in an order that is shuffled with a fixed seed. So other load
on the machine affects all of them equally, and none always follows the same one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from typing import Final, TypeVar

from contenders import Contender, Server
from processes import process_tree_of
from progress import BenchError, say

NAMES: Final = ("start", "stop", "first_cell", "stop_kernels")
TRIVIAL: Final = "1+1"
T = TypeVar("T")
Samples = dict[str, dict[str, list[float]]]
"""Seconds, by measurement and contender."""
_PAUSE: Final = 0.5
"""Seconds after a stop for a contender to clean up before the next one's turn."""


def rounds(contenders: Sequence[T], repeats: int, warmups: int) -> Iterator[tuple[int, T]]:
    """Yield the number of the round and the next contender; rounds below 0 are warm-ups."""
    for number in range(-warmups, repeats):
        order = list(contenders)
        random.Random(number).shuffle(order)
        for contender in order:
            yield number, contender


def measure(
    contenders: Sequence[Contender], wanted: Sequence[str], repeats: int, warmups: int
) -> Samples:
    """Start and stop servers, one without kernels and one with two; return the wanted times."""
    samples: Samples = {
        name: {contender.key: [] for contender in contenders} for name in NAMES if name in wanted
    }
    for contender in contenders:
        contender.prepare(["plain", "busy"])
    for number, contender in rounds(contenders, repeats, warmups):
        seen = once(contender, wanted)
        if number >= 0:
            for name in samples:
                samples[name][contender.key].append(seen[name])
        turn = "warm-up" if number < 0 else f"{number + 1} of {repeats}"
        times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in seen.items())
        say(f"{turn}: {contender.label}: {times}")
    return samples


def once(contender: Contender, wanted: Sequence[str] = NAMES) -> dict[str, float]:
    """Start and stop one server, or two, for the wanted measurements; return seconds by name."""
    seen: dict[str, float] = {}
    if {"start", "stop"} & set(wanted):
        seen |= _without_kernels(contender)
    if {"first_cell", "stop_kernels"} & set(wanted):
        seen |= _with_kernels(contender)
    return seen


def _without_kernels(contender: Contender) -> dict[str, float]:
    begin = time.perf_counter()
    server = contender.launch("plain")
    ready = time.perf_counter()
    return {"start": ready - begin, "stop": _stop(contender, server)}


def _with_kernels(contender: Contender) -> dict[str, float]:
    begin = time.perf_counter()
    server = contender.launch("busy")
    _, seen = first_cell(contender, server)
    # A cell in the second kernel too, so that both have fully started when they are stopped.
    first_cell(contender, server)
    return {"first_cell": seen - begin, "stop_kernels": _stop(contender, server, kernels=2)}


def first_cell(contender: Contender, server: Server, code: str = TRIVIAL) -> tuple[str, float]:
    """Run a cell in a new kernel; return the kernel's id, and the time of the result."""
    kernel = contender.start_kernel(server)
    with server.connect(kernel) as socket:
        result = socket.run(code)
        seen = time.perf_counter()
    if code == TRIVIAL and result != "2":
        raise BenchError(f"a cell returned {result}, not 2")
    return kernel, seen


def _stop(contender: Contender, server: Server, *, kernels: int = 0) -> float:
    """Stop a server; return the seconds until it and all its children have ended."""
    contender.identify(server)
    with process_tree_of(server.pid) as tree:
        if len(tree) <= kernels:
            raise BenchError("cannot find the kernels of a server among its children")
        asked = time.perf_counter()
        contender.stop(server)
        tree.wait_until_gone()
        gone = time.perf_counter()
    time.sleep(_PAUSE)
    return gone - asked
