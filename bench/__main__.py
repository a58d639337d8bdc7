"""Compare labkeeper with `jupyter lab` and JupyterHub on this machine.

Contenders take turns, and warm-up rounds are discarded. Medians, 95th percentiles and ratios go to
stdout, raw results and a chart to files. The first run installs the contenders into a cache
($XDG_CACHE_HOME/labkeeper-bench, which may be deleted at any time); later runs need no network.
Linux only. A full run takes about an hour.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import bars
import chart
import crowd
import cycles
import environments
import kernels
import lifecycle
import load
import logs
import report
import results
import strangers
from contenders import Contender, Skipped
from guard import guarded
from keepers import Labkeeper, LabkeeperExec, LabkeeperFork
from lifecycle import TRIVIAL
from peers import JupyterHub, JupyterLab
from progress import BenchError, say, warn

_LONGEST: Final = "burst_100"
"""Takes minutes for each contender that executes servers; a quick run leaves it out."""
MEASUREMENTS: Final = {
    "start": "from the request until the server responds and accepts its token",
    "first_cell": "from the request of a server to the result of 1+1",
    "kernel": "from the request for a kernel, of an idle server, to the result of 1+1",
    "libraries": f"the same, with the cell `{kernels.IMPORT}`",
    "cell": f"1+1 in a running kernel, to its result and to its end ({kernels.CELLS} cells)",
    "death": "from SIGKILL of a kernel until its client is told",
    "autorestart": "from the same SIGKILL to the result of 1+1 in the restarted kernel",
    "kernel_memory": (
        f"USS and PSS of {crowd.CROWD} idle kernels, after 1+1 and with the libraries"
    ),
    "stop": "from the request until the server is gone, without kernels",
    "stop_kernels": "the same with two kernels",
    "burst": f"{crowd.CROWD} servers requested at once, until all are ready, and their CPU time",
    _LONGEST: f"the same with {crowd.LARGE_CROWD} servers, once",
    "memory": f"USS and PSS of an idle server, with 1 and with {crowd.CROWD} running",
    "idle": f"CPU and memory of the services beside {crowd.CROWD} idle servers",
    "api": (
        f"requests to a keeper with {load.SERVERS} servers, "
        f"while {load.FOLLOWERS} clients follow logs"
    ),
    "strangers": "requests to a keeper while other clients send wrong tokens",
    "scrub": "CPU time for removing secrets from log lines",
}
CONTENDERS: Final[tuple[type[Contender], ...]] = (
    LabkeeperFork,
    LabkeeperExec,
    JupyterLab,
    JupyterHub,
)
_HERE: Final = Path(__file__).resolve().parent
_QUICK: Final = 3
_Measure = Callable[[Any], dict[str, Any]]
"""Measures a contender that runs alone."""


def main() -> int:
    """Run the command line."""
    parser = _parser()
    chosen = parser.parse_args()
    if chosen.show:
        _report(results.load(chosen.show), chosen.show.with_suffix(".svg"))
        return 0
    if sys.platform != "linux":
        parser.error("the bench runs on Linux only, because it needs /proc and pidfds")
    if chosen.quick:
        chosen.repeats, chosen.burst_repeats, chosen.warmups = _QUICK, 1, 1
    if not chosen.only:
        left_out = {_LONGEST} if chosen.quick else set()
        chosen.only = (
            [] if chosen.cycles else [each for each in MEASUREMENTS if each not in left_out]
        )
    return guarded(lambda server_dir: _run(chosen, server_dir))


def _run(chosen: argparse.Namespace, server_dir: Path) -> int:
    try:
        found = Bench(chosen, server_dir).run()
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    missed = [verdict for verdict in bars.verdicts(found) if verdict.met is False]
    return 1 if missed and chosen.strict else 0


class Bench:
    """One run of the benchmarks."""

    def __init__(self, chosen: argparse.Namespace, server_dir: Path) -> None:
        self._chosen = chosen
        self._server_dir = server_dir
        self._classes = [each for each in CONTENDERS if each.key in chosen.contenders]
        self._environments = environments.prepare(
            chosen.source, server_dir, with_hub=JupyterHub in self._classes
        )
        recorded = ("repeats", "burst_repeats", "warmups", "cycles", "only")
        options = {name: getattr(chosen, name) for name in recorded}
        self._results = results.begin(self._environments.versions(), options)
        # Only a full run replaces the published results.
        full = (
            not chosen.quick
            and set(chosen.only) == set(MEASUREMENTS)
            and len(self._classes) == len(CONTENDERS)
        )
        self._path = chosen.output / ("bench.json" if full else "trial.json")
        if chosen.resume:
            self._results = results.resume(self._path, self._results)
        self._missing = set(chosen.only).difference(self._results["measurements"])

    def run(self) -> results.Results:
        """Run the chosen measurements, and save each result as soon as it is known."""
        self._skip_unavailable()
        chosen, only = self._chosen, self._missing
        if only & set(lifecycle.NAMES):
            with self._running(self._classes) as running:
                self._record(lifecycle.measure(running, [*only], chosen.repeats, chosen.warmups))
        self._measure_kernels(only)
        if "burst" in only:
            repeats = chosen.burst_repeats, min(1, chosen.warmups)
            self._measure_burst("burst", crowd.CROWD, *repeats)
        self._measure_alone(only)
        if "scrub" in only:
            self._record({"scrub": logs.scrub(self._environments)})
        if _LONGEST in only:
            # Last, because a contender may fail in it, as JupyterHub has.
            self._measure_burst(_LONGEST, crowd.LARGE_CROWD, 1, 0)
        if chosen.cycles:
            leaks = self._measure_each(
                lambda keeper: cycles.cycles(keeper, chosen.cycles), self._keepers()
            )
            for found in leaks.values():
                self._record({"cycles": found})
        _report(self._results, self._path.with_suffix(".svg"))
        say(f"raw results: {self._path.name}")
        return self._results

    def _measure_kernels(self, only: set[str]) -> None:
        chosen = self._chosen
        rounds = chosen.repeats, chosen.warmups
        if only & {"kernel", "cell", "death", "autorestart"}:
            with self._running(self._classes) as running:
                if "kernel" in only:
                    self._record({"kernel": kernels.first_cells(running, TRIVIAL, *rounds)})
                if "cell" in only:
                    self._record(kernels.cells(running))
                if only & {"death", "autorestart"}:
                    deaths = kernels.deaths(running, *rounds)
                    self._record({name: deaths[name] for name in deaths if name in only})
        if "libraries" in only:
            with self._running(self._classes, kernels.LIBRARIES) as running:
                self._record({"libraries": kernels.first_cells(running, kernels.IMPORT, *rounds)})
        if "kernel_memory" in only:
            bare = self._measure_each(
                lambda contender: kernels.memory(contender, TRIVIAL), self._classes
            )
            loaded = self._measure_each(
                lambda contender: kernels.memory(contender, kernels.IMPORT),
                self._classes,
                kernels.LIBRARIES,
            )
            self._record({"kernel_memory": {"bare": bare, "libraries": loaded}})

    def _measure_burst(self, name: str, count: int, repeats: int, warmups: int) -> None:
        with self._running(self._classes) as running:
            seconds, processor = crowd.burst(running, count, repeats, warmups)
        self._record({name: seconds, f"{name}_cpu": processor})

    def _measure_alone(self, only: set[str]) -> None:
        with_services = [each for each in self._classes if each is not JupyterLab]
        measures: tuple[tuple[str, _Measure, Sequence[type[Contender]]], ...] = (
            ("memory", crowd.memory, self._classes),
            ("idle", crowd.idle, with_services),
            ("api", load.api, self._keepers()),
            ("strangers", strangers.strangers, self._keepers()),
        )
        for name, measure, classes in measures:
            if name in only:
                self._record({name: self._measure_each(measure, classes)})

    def _skip_unavailable(self) -> None:
        """Start each contender once; record and drop those that cannot take part."""
        for each in tuple(self._classes):
            contender = each(self._environments, self._server_dir)
            try:
                contender.open()
            except Skipped as why:
                warn(f"{each.label} IS NOT MEASURED: {why}")
                self._results["skipped"][each.key] = str(why)
                self._classes.remove(each)
            else:
                self._results["contenders"][each.key] = each.label
            contender.close()

    def _keepers(self) -> Sequence[type[Labkeeper]]:
        """Return labkeeper in its default mode, or in exec mode if only that was chosen."""
        return [each for each in (LabkeeperFork, LabkeeperExec) if each in self._classes][:1]

    def _measure_each(
        self,
        measure: _Measure,
        classes: Sequence[type[Contender]],
        preload: str = "",
    ) -> dict[str, Any]:
        """Measure contenders one at a time, because running together they would share memory."""
        found = {}
        for each in classes:
            with self._running([each], preload) as (contender,):
                found[each.key] = measure(contender)
        return found

    @contextmanager
    def _running(
        self, classes: Sequence[type[Contender]], preload: str = ""
    ) -> Iterator[list[Contender]]:
        """Run contenders. After an error, the guard ends them, which is faster."""
        opened = []
        for each in classes:
            say(f"starting {each.label}")
            contender = each(self._environments, self._server_dir, preload)
            contender.open()
            opened.append(contender)
        yield opened
        for contender in opened:
            contender.close()

    def _record(self, found: dict[str, Any]) -> None:
        self._results["measurements"] |= found
        results.save(self._results, self._path)


def _report(found: results.Results, picture: Path) -> None:
    print(report.text(found))
    if chart.can_draw(found):
        picture.write_text(chart.svg(found))
        say(f"chart: {picture.name}")


def _parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {name:<14}{text}" for name, text in MEASUREMENTS.items())
    keys = "\n".join(
        f"  {each.key:<16}{(each.__doc__ or '').splitlines()[0]}" for each in CONTENDERS
    )
    parser = argparse.ArgumentParser(
        prog="bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"measurements:\n{names}\n\ncontenders:\n{keys}",
    )
    parser.add_argument(
        "--repeats", type=_positive, default=15, help="measured rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--burst-repeats",
        type=_positive,
        default=3,
        help="measured rounds of bursts (default: %(default)s)",
    )
    parser.add_argument(
        "--warmups",
        type=int,
        default=2,
        help="rounds to discard first (default: %(default)s; bursts: at most 1)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{_QUICK} repeats, 1 burst of {crowd.CROWD}, 1 warm-up: a quick look, not results",
    )
    parser.add_argument(
        "--only",
        type=_subset_of(MEASUREMENTS),
        metavar="NAME,...",
        help="run only these measurements",
    )
    parser.add_argument(
        "--contenders",
        type=_subset_of({each.key for each in CONTENDERS}),
        default=[each.key for each in CONTENDERS],
        metavar="NAME,...",
        help="measure only these contenders",
    )
    parser.add_argument(
        "--cycles",
        type=_positive,
        default=0,
        metavar="N",
        help="start and stop N servers, and check for leaks",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue a run that failed: keep its results, and measure what it has not",
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument(
        "--output",
        type=Path,
        default=_HERE / "results",
        metavar="DIR",
        help="directory for results (default: bench/results)",
    )
    parser.add_argument(
        "--source",
        type=Path,
        default=_HERE.parent,
        metavar="DIR",
        help="checkout to measure (default: this one)",
    )
    parser.add_argument(
        "--show",
        type=Path,
        metavar="FILE",
        help="print the results of an earlier run from its JSON file, and redraw the chart",
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _subset_of(names: Any) -> Callable[[str], list[str]]:
    def choose(text: str) -> list[str]:
        given = text.split(",")
        unknown = [name for name in given if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown)}; choose from {', '.join(sorted(names))}"
            )
        return given

    return choose


if __name__ == "__main__":
    sys.exit(main())
