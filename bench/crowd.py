"""Twenty servers: how long they take when all are asked for at once, what they hold, and what it costs to keep them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Final, TypeVar

from contenders import POLL, Contender, Server
from lives import rounds
from processes import memory_of, processor_seconds
from progress import BenchError, say

CROWD: Final = 20
_SETTLE: Final = 5.0
"""Seconds until a server that has answered has done what it does after that."""
_IDLE: Final = 30.0
"""Seconds of idling: two of the keeper's `probe_period`, so that each server is looked at as often as it is."""

T = TypeVar("T")


def at_once(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Do all at the same time, each in a thread; give what they gave, or raise what the first one raised."""
    results: dict[int, T] = {}
    errors: list[Exception] = []
    preflight = threading.Barrier(len(tasks) + 1)

    def run(number: int, task: Callable[[], T]) -> None:
        preflight.wait()
        try:
            results[number] = task()
        except Exception as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    # Daemons: an interrupted bench must not wait for them.
    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(tasks)]
    for thread in threads:
        thread.start()
    preflight.wait()
    for thread in threads:
        thread.join()
    if errors:
        raise BenchError(
            f"{len(errors)} of {len(tasks)} failed; the first: {errors[0]}"
        ) from errors[0]
    return [results[number] for number in range(len(tasks))]


def launch_all(contender: Contender, names: Sequence[str]) -> list[Server]:
    """Ask for many at once. They are looked at less often each, so that looking takes no more of the machine than at one."""
    return at_once([lambda name=name: contender.launch(name, POLL * len(names)) for name in names])  # type: ignore[misc]


def stop_all(contender: Contender, servers: Sequence[Server]) -> None:
    """End many at once."""
    at_once([lambda server=server: contender.stop(server) for server in servers])  # type: ignore[misc]


def burst(contenders: Sequence[Contender], repeats: int, warmups: int) -> dict[str, list[float]]:
    """Time from the requests until the last of all is ready."""
    samples: dict[str, list[float]] = {contender.key: [] for contender in contenders}
    names = [f"crowd{number}" for number in range(CROWD)]
    for contender in contenders:
        contender.prepare(names)
    for number, contender in rounds(contenders, repeats, warmups):
        begin = time.perf_counter()
        servers = launch_all(contender, names)
        seconds = time.perf_counter() - begin
        if number >= 0:
            samples[contender.key].append(seconds)
        say(
            f"{'warm-up' if number < 0 else f'{number + 1} of {repeats}'}: {contender.label}: {CROWD} at once {seconds:.2f} s"
        )
        stop_all(contender, servers)
    return samples


def memory(contender: Contender) -> dict[str, Any]:
    """Read what one server holds alone, and what each of twenty holds; and what runs beside them. In bytes."""
    found: dict[str, Any] = {}
    for count in (1, CROWD):
        with crowd(contender, count) as servers:
            found[str(count)] = {
                "servers": [asdict(memory_of(server.pid)) for server in servers],
                "beside": {
                    name: asdict(memory_of(pid)) for name, pid in contender.beside().items()
                },
            }
    return found


def idle(contender: Contender) -> dict[str, Any]:
    """Read what keeping twenty idle servers costs those beside them: per cent of one core, and bytes."""
    with crowd(contender, CROWD):
        beside = contender.beside()
        before, begin = (
            {name: processor_seconds(pid) for name, pid in beside.items()},
            time.perf_counter(),
        )
        time.sleep(_IDLE)
        seconds = time.perf_counter() - begin
        used = {name: processor_seconds(pid) - before[name] for name, pid in beside.items()}
        return {
            name: {"cpu_percent": 100 * used[name] / seconds} | asdict(memory_of(pid))
            for name, pid in beside.items()
        }


@contextmanager
def crowd(contender: Contender, count: int, at_a_time: int = CROWD) -> Iterator[list[Server]]:
    """Have so many servers, settled. Where something fails they are left to the guard, which ends them faster."""
    names = [f"crowd{number}" for number in range(count)]
    contender.prepare(names)
    say(f"{contender.label}: starting {count}")
    servers: list[Server] = []
    for first in range(0, count, at_a_time):
        servers += launch_all(contender, names[first : first + at_a_time])
    for server in servers:
        contender.identify(server)
    time.sleep(_SETTLE)
    yield servers
    stop_all(contender, servers)
