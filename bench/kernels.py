"""Kernels of servers that run already: their first cell, further cells, death and memory.

Except for memory, each contender has one server, and the contenders take turns as in `lifecycle`.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any, Final

from contenders import Contender, Server
from crowd import CROWD, SETTLE, crowd
from lifecycle import TRIVIAL, Samples, first_cell, rounds
from processes import below, memory_of, memory_of_all
from progress import say

LIBRARIES: Final = "numpy,pandas,matplotlib.pyplot"
IMPORT: Final = f"import {LIBRARIES}"
CELLS: Final = 40
_IN_A_ROW: Final = 10
"""Cells that a contender runs before the next one's turn."""
_PAUSE: Final = 0.5
"""Seconds after the end of a kernel before the next contender's turn."""
_JUPYTERS_POLL: Final = 3.0
"""Seconds between two looks of Jupyter's restarter (`KernelRestarter.time_to_dead`)."""
_STABLE: Final = 10.0 + 2 * _JUPYTERS_POLL
"""Seconds after which Jupyter takes a kernel for stable (`KernelRestarter.stable_start_time`).

It restarts one that dies sooner on other ports, and gives up after some deaths in a row.
"""
_PID: Final = "__import__('os').getpid()"


def first_cells(
    contenders: Sequence[Contender], code: str, repeats: int, warmups: int
) -> dict[str, list[float]]:
    """Return the seconds from the request for a kernel to the end of its first cell.

    `TRIVIAL` ends with its result. There is always a warm-up: with `IMPORT`, matplotlib searches
    for fonts, once for each home directory.
    """
    samples: dict[str, list[float]] = {contender.key: [] for contender in contenders}
    with _servers(contenders) as servers:
        for number, contender in rounds(contenders, repeats, max(1, warmups)):
            server = servers[contender.key]
            begin = time.perf_counter()
            kernel, seen = first_cell(contender, server, code)
            if number >= 0:
                samples[contender.key].append(seen - begin)
            contender.stop_kernel(server, kernel)
            say(f"{_turn(number, repeats)}: {contender.label}: {code}: {seen - begin:.3f} s")
            time.sleep(_PAUSE)
    return samples


def cells(contenders: Sequence[Contender]) -> Samples:
    """Run trivial cells in a running kernel; return the seconds until the result, and the end.

    They follow one another as in "Run All Cells", so caches have what a cell needs.
    """
    samples: Samples = {
        name: {contender.key: [] for contender in contenders} for name in ("cell_result", "cell")
    }
    with _servers(contenders) as servers, ExitStack() as stack:
        sockets = {}
        for contender in contenders:
            server = servers[contender.key]
            kernel, _ = first_cell(contender, server)
            sockets[contender.key] = stack.enter_context(server.connect(kernel))
        say(f"{CELLS} cells in a running kernel of each")
        for number, contender in rounds(contenders, CELLS // _IN_A_ROW, 1):
            for _ in range(_IN_A_ROW):
                result, end = sockets[contender.key].time(TRIVIAL)
                if number >= 0:
                    samples["cell_result"][contender.key].append(result)
                    samples["cell"][contender.key].append(end)
    return samples


def deaths(contenders: Sequence[Contender], repeats: int, warmups: int) -> Samples:
    """Kill idle kernels with SIGKILL; return the seconds until a client knows, and has a result.

    `death` ends when the kernel's websocket announces the restart, and `autorestart` with the
    result of a cell. Like JupyterLab, the client opens a new websocket for it when it is told.
    Each kernel is killed once, at a random moment between two looks of Jupyter's restarter.
    """
    samples: Samples = {
        name: {contender.key: [] for contender in contenders} for name in ("death", "autorestart")
    }
    with _servers(contenders) as servers:
        say(f"starting {warmups + repeats} kernels of each, to be killed")
        victims = {
            contender.key: [
                first_cell(contender, servers[contender.key])[0] for _ in range(warmups + repeats)
            ]
            for contender in contenders
        }
        time.sleep(_STABLE)
        for number, contender in rounds(contenders, repeats, warmups):
            server, kernel = servers[contender.key], victims[contender.key].pop()
            told, answered = _kill(server, kernel, random.Random(number).uniform(0, _JUPYTERS_POLL))
            contender.stop_kernel(server, kernel)
            if number >= 0:
                samples["death"][contender.key].append(told)
                samples["autorestart"][contender.key].append(answered)
            times = f"death noticed after {told:.3f} s, result after {answered:.3f} s"
            say(f"{_turn(number, repeats)}: {contender.label}: {times}")
            time.sleep(_PAUSE)
    return samples


def memory(contender: Contender, code: str) -> dict[str, Any]:
    """Return the memory of each of 20 idle kernels of a server that have run a cell, in bytes.

    `beside` has that of the services, and of the server without its kernels.
    """
    with crowd(contender, 1) as (server,):
        say(f"{contender.label}: starting {CROWD} kernels: {code}")
        pids = [_run_and_identify(contender, server, code) for _ in range(CROWD)]
        time.sleep(SETTLE)
        rest = {server.pid, *below(server.pid)}.difference(pids)
        beside = {name: memory_of(pid) for name, pid in contender.service_pids().items()}
        beside["server"] = memory_of_all(rest)
        return {
            "kernels": [asdict(memory_of(pid)) for pid in pids],
            "beside": {name: asdict(size) for name, size in beside.items()},
        }


def _kill(server: Server, kernel: str, delay: float) -> tuple[float, float]:
    """Kill a kernel after a delay; return the seconds until a client knows, and has a result."""
    with server.connect(kernel) as socket:
        pid = int(socket.run(_PID))
        time.sleep(delay)
        begin = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        socket.wait_for_status("restarting", "dead")
        told = time.perf_counter()
    with server.connect(kernel) as socket:
        socket.run(TRIVIAL)
        answered = time.perf_counter()
    return told - begin, answered - begin


def _run_and_identify(contender: Contender, server: Server, code: str) -> int:
    """Run a cell in a new kernel; return the kernel's PID."""
    kernel, _ = first_cell(contender, server, code)
    with server.connect(kernel) as socket:
        return int(socket.run(_PID))


@contextmanager
def _servers(contenders: Sequence[Contender]) -> Iterator[dict[str, Server]]:
    """Run an idle server of each contender."""
    with ExitStack() as stack:
        yield {
            contender.key: stack.enter_context(crowd(contender, 1))[0] for contender in contenders
        }


def _turn(number: int, repeats: int) -> str:
    return "warm-up" if number < 0 else f"{number + 1} of {repeats}"
