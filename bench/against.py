#!/usr/bin/env python3
"""Compare this checkout with an earlier commit: is labkeeper slower or larger now?

    .venv/bin/python bench/against.py COMMIT [--repeats 31] [--only start,memory]

Both versions take turns in one run. Each figure is printed with both medians, their ratio, and the
95 % confidence interval of the ratio, from resampled rounds. Lower is better for all figures. A
figure is marked SLOWER if the whole interval lies above 1.05; with --strict, the exit code is then
1. Linux only.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, TypeVar

import psutil

import crowd
import environments
import lifecycle
import load
from contenders import Contender
from figures import median, percentile
from guard import guarded
from keepers import LabkeeperFork
from processes import memory_of
from progress import BenchError, say

_CHECKOUT: Final = Path(__file__).resolve().parent.parent
_WARM_UPS: Final = 1
_TOLERANCE: Final = 1.05
_RESAMPLES: Final = 5000
_IDLE: Final = 15.0
"""Seconds of idling per round: the keeper's probe period, so that each server is probed once."""
_LOAD: Final = 1.0
"""Seconds of requests per round and path, first at a fixed rate, then as fast as possible."""
_PAIRS: Final = 5
"""Pairs of keepers that take turns in `api`: one process can be 10 % faster than the next."""

Side = TypeVar("Side", LabkeeperFork, type[LabkeeperFork])
Figures = dict[str, float]
Samples = dict[str, dict[str, list[float]]]
"""Values by figure and side, one per round."""


class Before(LabkeeperFork):
    """The commit to compare with."""

    key = "before"
    label = "before"


class Now(LabkeeperFork):
    """This checkout."""

    key = "now"
    label = "now"


class Comparison:
    """Two installed versions of labkeeper, and the measurements of both."""

    def __init__(self, commit: str, place: Path, repeats: int) -> None:
        self._place, self._repeats = place, repeats
        self._installed = {
            Before: _install(_extract(commit, place), place, "before"),
            Now: _install(_CHECKOUT, place, "now"),
        }

    def boot(self) -> Samples:
        """Time `labkeeper serve` until its API answers."""

        def one(kind: type[LabkeeperFork]) -> Figures:
            side = self._new(kind)
            begun = time.perf_counter()
            side.boot()
            seconds = time.perf_counter() - begun
            side.close()
            return {"boot, s": seconds}

        return self._take_turns(list(self._installed), one)

    def servers(self) -> Samples:
        """Measure starts, first cells and stops, and the CPU time that they use."""
        with self._running() as sides:
            return self._take_turns(sides, _lifecycle)

    def burst(self) -> Samples:
        """Time 20 starts at once."""

        def one(side: LabkeeperFork) -> Figures:
            begun = _processor_seconds(side)
            seconds, servers = crowd.start_at_once(side, crowd.CROWD)
            crowd.stop_all(side, servers)
            spent = _processor_seconds(side) - begun
            return {"burst, s": seconds, "burst and its stops, CPU s": spent}

        with self._running() as sides:
            return self._take_turns(sides, one)

    def memory(self) -> Samples:
        """Measure the memory of servers and services, with 1 and with 20 servers.

        `server alone` is the server without its zygote, which forks its kernels.
        """

        def one(kind: type[LabkeeperFork]) -> Figures:
            side = self._new(kind)
            side.open()
            found = crowd.memory(side)
            side.close()
            return {
                f"memory with {count}, {what} {size}, MiB": value / 2**20
                for count, each in found.items()
                for size in ("uss", "pss")
                for what, value in (
                    ("server", median([server[size] for server in each["servers"]])),
                    ("server alone", median([server[size] for server in each["alone"]])),
                    *((name, beside[size]) for name, beside in each["beside"].items()),
                )
            }

        return self._take_turns(list(self._installed), one)

    def idle(self) -> Samples:
        """Measure what 20 idle servers cost; both sides idle at the same time."""
        samples: Samples = {}
        with self._running() as sides, ExitStack() as stack:
            for side in sides:
                stack.enter_context(crowd.crowd(side, crowd.CROWD))
            for number in range(self._repeats):
                begun = [_service_seconds(side) for side in sides]
                time.sleep(_IDLE)
                for side, before in zip(sides, begun, strict=True):
                    for name, seconds in _service_seconds(side).items():
                        share = 100 * (seconds - before[name]) / _IDLE
                        _add(samples, f"idle, {name}, % of a core", side, share)
                        rss = memory_of(side.service_pids()[name]).rss / 2**20
                        _add(samples, f"idle, {name} rss, MiB", side, rss)
                say(f"idle: {number + 1} of {self._repeats}")
        return samples

    def api(self) -> Samples:
        """Time requests to keepers with 50 servers and 100 clients that follow logs."""
        samples: Samples = {}
        for number in range(_PAIRS):
            repeats = len(range(number, self._repeats, _PAIRS))
            with self._running() as sides, ExitStack() as stack:
                for side in sides:
                    servers = stack.enter_context(crowd.crowd(side, load.SERVERS, load.AT_A_TIME))
                    stack.enter_context(load.followers(side, servers))
                for name, found in self._take_turns(sides, _requests, repeats).items():
                    for key, values in found.items():
                        samples.setdefault(name, {}).setdefault(key, []).extend(values)
        return samples

    def _new(self, kind: type[LabkeeperFork]) -> LabkeeperFork:
        return kind(self._installed[kind], self._place)

    @contextmanager
    def _running(self) -> Iterator[list[LabkeeperFork]]:
        """Run both sides. After an error, the guard ends them."""
        sides = [self._new(kind) for kind in self._installed]
        for side in sides:
            side.open()
        yield sides
        for side in sides:
            side.close()

    def _take_turns(
        self, sides: Sequence[Side], one: Callable[[Side], Figures], repeats: int | None = None
    ) -> Samples:
        samples: Samples = {}
        repeats = self._repeats if repeats is None else repeats
        for number, side in lifecycle.rounds(sides, repeats, _WARM_UPS):
            figures = one(side)
            if number >= 0:
                for name, value in figures.items():
                    _add(samples, name, side, value)
            shown = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
            say(f"{number + 1} of {repeats}: {side.key}: {shown}")
        return samples


_MEASUREMENTS: Final[dict[str, Callable[[Comparison], Samples]]] = {
    "boot": Comparison.boot,
    "servers": Comparison.servers,
    "burst": Comparison.burst,
    "memory": Comparison.memory,
    "idle": Comparison.idle,
    "api": Comparison.api,
}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", metavar="COMMIT", help="commit, tag or branch to compare with")
    parser.add_argument(
        "--repeats", type=int, default=31, help="measured rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--only",
        metavar="NAME,...",
        default=",".join(_MEASUREMENTS),
        help="some of %(default)s (default: all, which takes about 40 minutes)",
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a figure is SLOWER")
    chosen = parser.parse_args()
    unknown = set(chosen.only.split(",")) - _MEASUREMENTS.keys()
    if unknown:
        parser.error(f"unknown measurements: {', '.join(sorted(unknown))}")
    return guarded(lambda place: _run(chosen, place))


def _run(chosen: argparse.Namespace, place: Path) -> int:
    try:
        comparison = Comparison(chosen.commit, place, chosen.repeats)
        slower = [
            _report(name, sides.get(Before.key, ()), sides.get(Now.key, ()))
            for measure in chosen.only.split(",")
            for name, sides in _MEASUREMENTS[measure](comparison).items()
        ]
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return int(chosen.strict and any(slower))


def _report(name: str, before: Sequence[float], now: Sequence[float]) -> bool:
    """Print a figure; return whether it is slower now. One side may lack it."""
    if not (before and now):
        print(f"{name:<44}{_median(before):>9}{_median(now):>9}", flush=True)
        return False
    ratio, low, high = _ratio(before, now)
    verdict = "SLOWER" if low > _TOLERANCE else ""
    print(
        f"{name:<44}{median(before):>9.4g}{median(now):>9.4g}"
        f"{ratio:>7.3f}  [{low:.3f}, {high:.3f}]  {verdict}".rstrip(),
        flush=True,
    )
    return bool(verdict)


def _median(values: Sequence[float]) -> str:
    return f"{median(values):.4g}" if values else "-"


def _ratio(before: Sequence[float], now: Sequence[float]) -> tuple[float, float, float]:
    """Return the ratio of the medians and the ends of its 95 % interval, by bootstrap."""
    rng, size = random.Random(0), len(now)
    ratios = []
    for _ in range(_RESAMPLES):
        rounds = rng.choices(range(size), k=size)
        ratios.append(median([now[i] for i in rounds]) / median([before[i] for i in rounds]))
    ratios.sort()
    return (
        median(now) / median(before),
        ratios[_RESAMPLES * 25 // 1000],
        ratios[_RESAMPLES * 975 // 1000],
    )


def _lifecycle(side: LabkeeperFork) -> Figures:
    begun = _processor_seconds(side)
    seconds = lifecycle.once(side)
    spent = _processor_seconds(side) - begun
    return {f"{name}, s": value for name, value in seconds.items()} | {
        "all of the above, CPU s": spent
    }


def _requests(side: LabkeeperFork) -> Figures:
    found = {}
    for name, path in (("one", "/api/servers/crowd0"), ("all", "/api/servers")):
        paced = load.run_caller(side, path, _LOAD, load.RATE)["seen"]
        flooded = load.run_caller(side, path, _LOAD, None)
        found[f"GET {name}, median, ms"] = 1000 * median(paced)
        found[f"GET {name}, 95th percentile, ms"] = 1000 * percentile(paced, 95)
        found[f"GET {name}, flooded, ms per request"] = (
            1000 * flooded["seconds"] / len(flooded["seen"])
        )
    return found


def _processor_seconds(side: LabkeeperFork) -> float:
    """Return the CPU time of the services and of their ended children."""
    every = [psutil.Process(pid).cpu_times() for pid in side.service_pids().values()]
    return sum(
        each.user + each.system + each.children_user + each.children_system for each in every
    )


def _service_seconds(side: LabkeeperFork) -> Figures:
    return {
        name: sum(psutil.Process(pid).cpu_times()[:2]) for name, pid in side.service_pids().items()
    }


def _add(samples: Samples, name: str, side: Contender | type[Contender], value: float) -> None:
    samples.setdefault(name, {}).setdefault(side.key, []).append(value)


def _extract(commit: str, place: Path) -> Path:
    """Return a directory with the files of a commit. Raises BenchError."""
    archive, target = place / "before.tar", place / "before"
    done = subprocess.run(
        ["git", "-C", str(_CHECKOUT), "archive", f"--output={archive}", commit],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchError(f"cannot read {commit}: {done.stderr.strip()}")
    with tarfile.open(archive) as files:
        files.extractall(target, filter="data")
    return target


def _install(source: Path, place: Path, kind: str) -> environments.Environments:
    own = place / f"{kind}-build"
    own.mkdir()
    return environments.prepare(source, own, with_hub=False, kind=kind)


if __name__ == "__main__":
    sys.exit(main())
