"""Compare labkeeper with `jupyter lab` and JupyterHub on this machine.

Contenders take turns; warm-up rounds are thrown away. Medians, 95th percentiles and ratios go to stdout, raw results and a chart
into files. The first run installs what is compared into a cache ($XDG_CACHE_HOME/labkeeper-bench, which may be deleted at any
time); later runs need no network. Linux only. A full run takes about half an hour.
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
import contenders
import crowd
import cycles
import environments
import lives
import load
import logs
import report
import results
import strangers
from contenders import Contender, JupyterHub, Labkeeper, LabkeeperExec, LabkeeperFork
from guard import guarded
from progress import BenchError, say, shout

MEASUREMENTS: Final = {
    "start": "request to ready: it answers, and takes its token",
    "first_cell": "request to the result of 1+1",
    "stop": "request to gone, without a kernel",
    "stop_kernels": "the same with two kernels",
    "burst": f"{crowd.CROWD} servers at once until all are ready",
    "memory": f"USS and PSS of idle servers, with 1 and with {crowd.CROWD}",
    "idle": f"processor and memory of what runs beside {crowd.CROWD} idle servers",
    "api": f"requests to a keeper with {load.SERVERS} servers and {load.FOLLOWERS} callers that follow logs",
    "strangers": "requests to a keeper while others knock with wrong tokens",
    "scrub": "processor that taking secrets out of lines of a log costs",
}
_HERE: Final = Path(__file__).resolve().parent
_QUICK: Final = 3


def main() -> int:
    """Run the command line."""
    parser = _parser()
    chosen = parser.parse_args()
    if chosen.show:
        _tell(results.load(chosen.show), chosen.show.with_suffix(".svg"))
        return 0
    if sys.platform != "linux":
        parser.error(
            "the bench runs on Linux only: it reads /proc and waits on descriptors of processes"
        )
    if chosen.quick:
        chosen.repeats, chosen.burst_repeats, chosen.warmups = _QUICK, 1, 1
    if not chosen.only:
        chosen.only = [] if chosen.cycles else list(MEASUREMENTS)
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
    """One run."""

    def __init__(self, chosen: argparse.Namespace, server_dir: Path) -> None:
        self._chosen = chosen
        self._server_dir = server_dir
        self._classes = [each for each in contenders.ALL if each.key in chosen.contenders]
        self._environments = environments.prepare(
            chosen.source, server_dir, with_hub=JupyterHub in self._classes
        )
        told = ("repeats", "burst_repeats", "warmups", "cycles", "only")
        options = {name: getattr(chosen, name) for name in told}
        self._results = results.begin(self._environments.versions(), options)
        # A full run makes the results that are shown; any other is a trial, and does not overwrite them.
        full = (
            not chosen.quick
            and set(chosen.only) == set(MEASUREMENTS)
            and len(self._classes) == len(contenders.ALL)
        )
        self._path = chosen.output / ("bench.json" if full else "trial.json")

    def run(self) -> results.Results:
        """Measure what was chosen, telling and keeping each result as soon as it is there."""
        self._look_who_can()
        chosen, only = self._chosen, set(self._chosen.only)
        if only & set(lives.NAMES):
            with self._open(self._classes) as all_of_them:
                self._keep(lives.measure(all_of_them, chosen.only, chosen.repeats, chosen.warmups))
        if "burst" in only:
            with self._open(self._classes) as all_of_them:
                self._keep(
                    {
                        "burst": crowd.burst(
                            all_of_them, chosen.burst_repeats, min(1, chosen.warmups)
                        )
                    }
                )
        if "memory" in only:
            self._keep({"memory": self._each(crowd.memory, self._classes)})
        if "idle" in only:
            self._keep(
                {
                    "idle": self._each(
                        crowd.idle,
                        [each for each in self._classes if each is not contenders.JupyterLab],
                    )
                }
            )
        if "api" in only:
            self._keep({"api": self._each(load.api, self._keepers())})
        if "strangers" in only:
            self._keep({"strangers": self._each(strangers.strangers, self._keepers())})
        if "scrub" in only:
            self._keep({"scrub": logs.scrub(self._environments)})
        if chosen.cycles:
            for found in self._each(
                lambda keeper: cycles.cycles(keeper, chosen.cycles), self._keepers()
            ).values():
                self._keep({"cycles": found})
        _tell(self._results, self._path.with_suffix(".svg"))
        say(f"raw results: {self._path.name}")
        return self._results

    def _look_who_can(self) -> None:
        """Leave out who cannot take part, and say so."""
        for each in tuple(self._classes):
            contender = each(self._environments, self._server_dir)
            try:
                contender.open()
            except contenders.Skipped as why:
                shout(f"{each.label} IS NOT MEASURED: {why}")
                self._results["skipped"][each.key] = str(why)
                self._classes.remove(each)
            else:
                self._results["contenders"][each.key] = each.label
            contender.close()

    def _keepers(self) -> Sequence[type[Labkeeper]]:
        """Give labkeeper as it is by default; by exec where that is all there is."""
        return [each for each in (LabkeeperFork, LabkeeperExec) if each in self._classes][:1]

    def _each(
        self, measure: Callable[[Any], dict[str, Any]], classes: Sequence[type[Contender]]
    ) -> dict[str, Any]:
        """Measure one contender after another, nothing of the others running: they would share memory with it."""
        found = {}
        for each in classes:
            with self._open([each]) as (contender,):
                found[each.key] = measure(contender)
        return found

    @contextmanager
    def _open(self, classes: Sequence[type[Contender]]) -> Iterator[list[Contender]]:
        """Have contenders running. Where something fails they are left to the guard, which ends them faster."""
        opened = []
        for each in classes:
            say(f"opening {each.label}")
            contender = each(self._environments, self._server_dir)
            contender.open()
            opened.append(contender)
        yield opened
        for contender in opened:
            contender.close()

    def _keep(self, found: dict[str, Any]) -> None:
        self._results["measurements"] |= found
        results.save(self._results, self._path)


def _tell(found: results.Results, picture: Path) -> None:
    print(report.text(found))
    if chart.can_draw(found):
        picture.write_text(chart.svg(found))
        say(f"chart: {picture.name}")


def _parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {name:<14}{text}" for name, text in MEASUREMENTS.items())
    keys = "\n".join(
        f"  {each.key:<16}{(each.__doc__ or '').splitlines()[0]}" for each in contenders.ALL
    )
    parser = argparse.ArgumentParser(
        prog="bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"measurements:\n{names}\n\ncontenders:\n{keys}",
    )
    parser.add_argument(
        "--repeats", type=_count, default=15, help="rounds that count (default: %(default)s)"
    )
    parser.add_argument(
        "--burst-repeats", type=_count, default=3, help="the same for bursts (default: %(default)s)"
    )
    parser.add_argument(
        "--warmups",
        type=int,
        default=2,
        help="rounds that are thrown away (default: %(default)s; bursts: 1)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{_QUICK} repeats, 1 burst, 1 warm-up: a look, no result",
    )
    parser.add_argument(
        "--only", type=_among(MEASUREMENTS), metavar="NAME,...", help="only these measurements"
    )
    parser.add_argument(
        "--contenders",
        type=_among({each.key for each in contenders.ALL}),
        default=[each.key for each in contenders.ALL],
        metavar="NAME,...",
        help="only these contenders",
    )
    parser.add_argument(
        "--cycles",
        type=_count,
        default=0,
        metavar="N",
        help="start and stop N servers, and look for leaks",
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a bar is missed")
    parser.add_argument(
        "--output",
        type=Path,
        default=_HERE / "results",
        metavar="DIR",
        help="where results go (bench/results)",
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
        help="tell of an earlier run from its JSON, and draw it anew",
    )
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _among(names: Any) -> Callable[[str], list[str]]:
    def choose(text: str) -> list[str]:
        given = text.split(",")
        unknown = [name for name in given if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown)}; choose among {', '.join(sorted(names))}"
            )
        return given

    return choose


if __name__ == "__main__":
    sys.exit(main())
