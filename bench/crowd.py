"""Many servers: the time to start them at once, their memory, and the cost of idle ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, Final, TypeVar

from contenders import POLL, Contender, Server
from lifecycle import rounds
from processes import below, memory_of, memory_of_all, processor_seconds
from processor import ProcessorTime
from progress import BenchError, say

CROWD: Final = 20
LARGE_CROWD: Final = 100
SETTLE: Final = 5.0
"""Seconds for a ready server to finish its startup work."""
_BACKGROUND: Final = 5.0
"""Seconds before a burst in which the CPU time of idle contenders is measured."""
_AFTERWARDS: Final = 3.0
"""Seconds for servers that are ready to finish what they do in the background, for CPU time."""
_IDLE: Final = 30.0
"""Seconds of idling: two of the keeper's probe periods, so that each server is probed twice."""

T = TypeVar("T")


def in_parallel(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Run tasks at the same time, each in a thread, and return their results in order.

    Raises BenchError if any fails.
    """
    results: dict[int, T] = {}
    errors: list[Exception] = []
    barrier = threading.Barrier(len(tasks) + 1)

    def run(number: int, task: Callable[[], T]) -> None:
        barrier.wait()
        try:
            results[number] = task()
        except Exception as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    # Daemons: an interrupted bench must not wait for them.
    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(tasks)]
    for thread in threads:
        thread.start()
    barrier.wait()
    for thread in threads:
        thread.join()
    if errors:
        first = errors[0]
        raise BenchError(f"{len(errors)} of {len(tasks)} tasks failed; first: {first}") from first
    return [results[number] for number in range(len(tasks))]


def launch_all(contender: Contender, names: Sequence[str]) -> list[Server]:
    """Launch servers at the same time.

    Each is polled less often than a single one, so that the total rate of polling is the same.
    """
    poll = POLL * len(names)
    return in_parallel([partial(contender.launch, name, poll) for name in names])


def stop_all(contender: Contender, servers: Sequence[Server]) -> None:
    """Stop servers at the same time."""
    in_parallel([partial(contender.stop, server) for server in servers])


def start_at_once(contender: Contender, count: int) -> tuple[float, list[Server]]:
    """Start servers; return the seconds from the requests until the last is ready, and them."""
    names = [f"crowd{number}" for number in range(count)]
    begin = time.perf_counter()
    servers = launch_all(contender, names)
    return time.perf_counter() - begin, servers


def burst(
    contenders: Sequence[Contender], count: int, repeats: int, warmups: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Start servers at once; return the seconds until all are ready, and the CPU time used.

    The CPU time includes what servers do just after they are ready; see `ProcessorTime`.
    """
    seconds: dict[str, list[float]] = {contender.key: [] for contender in contenders}
    processor: dict[str, list[float]] = {contender.key: [] for contender in contenders}
    for contender in contenders:
        contender.prepare([f"crowd{number}" for number in range(count)])
    for number, contender in rounds(contenders, repeats, warmups):
        meter = ProcessorTime(_BACKGROUND)
        lasted, servers = start_at_once(contender, count)
        time.sleep(_AFTERWARDS)
        used = meter.seconds()
        if number >= 0:
            seconds[contender.key].append(lasted)
            processor[contender.key].append(used)
        turn = "warm-up" if number < 0 else f"{number + 1} of {repeats}"
        times = f"{lasted:.2f} s, {used:.2f} s of CPU time"
        say(f"{turn}: {contender.label}: {count} servers at once: {times}")
        stop_all(contender, servers)
    return seconds, processor


def memory(contender: Contender) -> dict[str, Any]:
    """Return the memory of servers and services, in bytes, with 1 and with 20 servers running.

    A server's is that of all its processes, which include the zygote that forks its kernels;
    `alone` has that of its main process only.
    """
    found: dict[str, Any] = {}
    for count in (1, CROWD):
        with crowd(contender, count) as servers:
            services = contender.service_pids()
            found[str(count)] = {
                "servers": [
                    asdict(memory_of_all([server.pid, *below(server.pid)])) for server in servers
                ],
                "alone": [asdict(memory_of(server.pid)) for server in servers],
                "beside": {name: asdict(memory_of(pid)) for name, pid in services.items()},
            }
    return found


def idle(contender: Contender) -> dict[str, Any]:
    """Return what the services use beside 20 idle servers: percent of a core, and bytes."""
    with crowd(contender, CROWD):
        services = contender.service_pids()
        before = {name: processor_seconds(pid) for name, pid in services.items()}
        begin = time.perf_counter()
        time.sleep(_IDLE)
        seconds = time.perf_counter() - begin
        used = {name: processor_seconds(pid) - before[name] for name, pid in services.items()}
        return {
            name: {"cpu_percent": 100 * used[name] / seconds} | asdict(memory_of(pid))
            for name, pid in services.items()
        }


@contextmanager
def crowd(contender: Contender, count: int, at_a_time: int = CROWD) -> Iterator[list[Server]]:
    """Run `count` idle servers.

    After an error, the guard ends them, which is faster.
    """
    names = [f"crowd{number}" for number in range(count)]
    contender.prepare(names)
    say(f"{contender.label}: starting {count} servers")
    servers: list[Server] = []
    for first in range(0, count, at_a_time):
        servers += launch_all(contender, names[first : first + at_a_time])
    for server in servers:
        contender.identify(server)
    time.sleep(SETTLE)
    yield servers
    stop_all(contender, servers)
