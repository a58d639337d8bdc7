"""What labkeeper sets itself: each bar with its limit, the measured figure, and whether it is met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from crowd import CROWD
from figures import median, percentile
from results import HUB, LAB, Results, ours

_MIB: Final = 1024 * 1024
Figure = Callable[[Results], float]


@dataclass(frozen=True, slots=True)
class Bar:
    """`figure` raises KeyError where it was not measured."""

    text: str
    figure: Figure
    limit: float
    unit: str
    more_is_better: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """`value` and `met` are None where it was not measured."""

    text: str
    value: str | None
    met: bool | None


def _faster(name: str, other: str) -> Figure:
    return lambda results: (
        median(_samples(results, name, other)) / median(_samples(results, name, ours(results)))
    )


def _spread(results: Results) -> float:
    own = _samples(results, "start", ours(results))
    return percentile(own, 95) / median(own)


def _memory_share(other: str) -> Figure:
    return lambda results: (
        own_memory(results, ours(results), CROWD) / own_memory(results, other, CROWD)
    )


def _stop_share(results: Results) -> float:
    return median(_samples(results, "stop", ours(results))) / median(_samples(results, "stop", LAB))


def _api(what: str) -> Figure:
    return lambda results: (
        1000 * float(results["measurements"]["api"][ours(results)][what]["latency"]["p99"])
    )


def _among_strangers(results: Results) -> float:
    return 1000 * float(
        results["measurements"]["strangers"][ours(results)]["knocked"]["latency"]["p99"]
    )


def _scrub_share(results: Results) -> float:
    found = results["measurements"]["scrub"]
    return float(found["line_microseconds"]) / float(found["rule_microseconds"])


def _hostile_line(results: Results) -> float:
    return max(results["measurements"]["scrub"]["hostile_milliseconds"].values()) / 1000


def _keeper_idle(results: Results) -> float:
    return float(results["measurements"]["idle"][ours(results)]["keeper"]["cpu_percent"])


def _keeper_rss(results: Results) -> float:
    return float(results["measurements"]["idle"][ours(results)]["keeper"]["rss"]) / _MIB


def _leaks(results: Results) -> float:
    return float(len(results["measurements"]["cycles"]["leaks"]))


def _samples(results: Results, name: str, contender: str) -> list[float]:
    return list(results["measurements"][name][contender])


def own_memory(results: Results, contender: str, count: int, kind: str = "uss") -> float:
    """Give the median over the servers of one contender, in bytes."""
    return median(
        [
            server[kind]
            for server in results["measurements"]["memory"][contender][str(count)]["servers"]
        ]
    )


BARS: Final = (
    Bar(
        "start at least 25 times faster than jupyter lab",
        _faster("start", LAB),
        25,
        "times",
        more_is_better=True,
    ),
    Bar(
        "start at least 50 times faster than JupyterHub",
        _faster("start", HUB),
        50,
        "times",
        more_is_better=True,
    ),
    Bar("start: 95th percentile at most twice the median", _spread, 2, "times"),
    Bar(
        "20 at once at least 15 times faster than JupyterHub",
        _faster("burst", HUB),
        15,
        "times",
        more_is_better=True,
    ),
    Bar("memory of its own at most 1/3 of jupyter lab's", _memory_share(LAB), 1 / 3, "of it"),
    Bar("memory of its own at most 1/4 of JupyterHub's server", _memory_share(HUB), 1 / 4, "of it"),
    Bar("stop in at most half the time of jupyter lab", _stop_share, 1 / 2, "of it"),
    Bar("GET one server: 99th percentile at most 20 ms", _api("one"), 20, "ms"),
    Bar("GET all servers: 99th percentile at most 20 ms", _api("list"), 20, "ms"),
    Bar(
        "GET all servers among wrong tokens: 99th percentile at most 50 ms",
        _among_strangers,
        50,
        "ms",
    ),
    Bar("keeper with 20 idle servers at most 1 % of a core", _keeper_idle, 1, "%"),
    Bar("keeper with 20 idle servers at most 80 MiB", _keeper_rss, 80, "MiB"),
    Bar(
        "a log line without secrets costs at most half of what the rule itself does",
        _scrub_share,
        1 / 2,
        "of it",
    ),
    Bar("a hostile line of 64 KiB is read in at most 1 s", _hostile_line, 1, "s"),
    Bar("start and stop cycles leak nothing", _leaks, 0, "leaks"),
)


def verdicts(results: Results) -> list[Verdict]:
    """Hold the results against every bar."""
    return [_verdict(bar, results) for bar in BARS]


def _verdict(bar: Bar, results: Results) -> Verdict:
    try:
        value = bar.figure(results)
    except KeyError:
        return Verdict(bar.text, None, None)
    met = value >= bar.limit if bar.more_is_better else value <= bar.limit
    return Verdict(
        bar.text, f"{value:.2f} {bar.unit}" if value % 1 else f"{value:.0f} {bar.unit}", met
    )
