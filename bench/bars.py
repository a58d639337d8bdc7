"""labkeeper's performance targets ("bars"), and whether the results meet them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from crowd import CROWD
from figures import median, percentile
from results import EXEC, FORK, HUB, LAB, Results, ours

_MIB: Final = 1024 * 1024
Figure = Callable[[Results], float]


@dataclass(frozen=True, slots=True)
class Bar:
    """A target. `figure` raises KeyError if its measurement is missing."""

    text: str
    figure: Figure
    limit: float
    unit: str
    more_is_better: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of one target. `value` and `met` are None if it was not measured."""

    text: str
    value: str | None
    met: bool | None


def _speedup(name: str, other: str, own: str = "") -> Figure:
    def ratio(results: Results) -> float:
        mine = median(_samples(results, name, own or ours(results)))
        return median(_samples(results, name, other)) / mine

    return ratio


def _milliseconds(name: str) -> Figure:
    return lambda results: 1000 * median(_samples(results, name, ours(results)))


def _seconds(name: str) -> Figure:
    return lambda results: median(_samples(results, name, ours(results)))


def _kernel_memory_share(results: Results) -> float:
    """Return labkeeper's share of the PSS that an executed kernel has, with the libraries."""
    found = results["measurements"]["kernel_memory"]["libraries"]
    own, other = (median([each["pss"] for each in found[key]["kernels"]]) for key in (FORK, EXEC))
    return own / other


def _spread(results: Results) -> float:
    own = _samples(results, "start", ours(results))
    return percentile(own, 95) / median(own)


def _memory_share(other: str) -> Figure:
    def share(results: Results) -> float:
        own = median_memory(results, ours(results), CROWD)
        return own / median_memory(results, other, CROWD)

    return share


def _stop_share(results: Results) -> float:
    return median(_samples(results, "stop", ours(results))) / median(_samples(results, "stop", LAB))


def _api_latency(what: str) -> Figure:
    return lambda results: _p99(results["measurements"]["api"][ours(results)][what])


def _latency_with_strangers(results: Results) -> float:
    return _p99(results["measurements"]["strangers"][ours(results)]["knocked"])


def _p99(found: dict[str, Any]) -> float:
    return 1000 * float(found["latency"]["p99"])


def _scrub_share(results: Results) -> float:
    found = results["measurements"]["scrub"]
    return float(found["line_microseconds"]) / float(found["rule_microseconds"])


def _hostile_line(results: Results) -> float:
    return float(max(results["measurements"]["scrub"]["hostile_milliseconds"].values())) / 1000


def _keeper_idle(results: Results) -> float:
    return float(results["measurements"]["idle"][ours(results)]["keeper"]["cpu_percent"])


def _keeper_rss(results: Results) -> float:
    return float(results["measurements"]["idle"][ours(results)]["keeper"]["rss"]) / _MIB


def _leaks(results: Results) -> float:
    return float(len(results["measurements"]["cycles"]["leaks"]))


def _samples(results: Results, name: str, contender: str) -> list[float]:
    return list(results["measurements"][name][contender])


def median_memory(results: Results, contender: str, count: int, kind: str = "uss") -> float:
    """Return the median memory of a contender's servers, in bytes, with `count` running."""
    servers = results["measurements"]["memory"][contender][str(count)]["servers"]
    return median([server[kind] for server in servers])


BARS: Final = (
    Bar(
        "start at least 25 times faster than jupyter lab",
        _speedup("start", LAB),
        25,
        "times",
        more_is_better=True,
    ),
    Bar(
        "start at least 50 times faster than JupyterHub",
        _speedup("start", HUB),
        50,
        "times",
        more_is_better=True,
    ),
    Bar("start: 95th percentile at most twice the median", _spread, 2, "times"),
    Bar(
        "request of a server to its first result at most 200 ms",
        _milliseconds("first_cell"),
        200,
        "ms",
    ),
    Bar(
        "request of a server to its first result at least 10 times faster than jupyter lab",
        _speedup("first_cell", LAB),
        10,
        "times",
        more_is_better=True,
    ),
    Bar("kernel to its first result at most 120 ms", _milliseconds("kernel"), 120, "ms"),
    Bar(
        "kernel with the libraries at least 8 times faster than executed",
        _speedup("libraries", EXEC, FORK),
        8,
        "times",
        more_is_better=True,
    ),
    Bar("1+1 in a running kernel at most 6 ms", _milliseconds("cell"), 6, "ms"),
    Bar("20 starts at once in at most 1 s", _seconds("burst"), 1, "s"),
    Bar(
        "20 starts at once at least 18 times faster than jupyter lab",
        _speedup("burst", LAB),
        18,
        "times",
        more_is_better=True,
    ),
    Bar(
        "20 starts at once at least 15 times faster than JupyterHub",
        _speedup("burst", HUB),
        15,
        "times",
        more_is_better=True,
    ),
    Bar("private memory at most 1/3 of jupyter lab's", _memory_share(LAB), 1 / 3, "(ratio)"),
    Bar("private memory at most 1/4 of JupyterHub's", _memory_share(HUB), 1 / 4, "(ratio)"),
    Bar(
        "memory (PSS) of a kernel with the libraries at most 40 % of an executed one's",
        _kernel_memory_share,
        0.4,
        "(ratio)",
    ),
    Bar("stop in at most half the time of jupyter lab", _stop_share, 1 / 2, "(ratio)"),
    Bar("GET one server: 99th percentile at most 20 ms", _api_latency("one"), 20, "ms"),
    Bar("GET all servers: 99th percentile at most 20 ms", _api_latency("list"), 20, "ms"),
    Bar(
        "GET all servers amid wrong tokens: 99th percentile at most 50 ms",
        _latency_with_strangers,
        50,
        "ms",
    ),
    Bar("keeper with 20 idle servers at most 1 % of a core", _keeper_idle, 1, "%"),
    Bar("keeper with 20 idle servers at most 80 MiB", _keeper_rss, 80, "MiB"),
    Bar(
        "log line without secrets: at most half the cost of the pattern itself",
        _scrub_share,
        1 / 2,
        "(ratio)",
    ),
    Bar("hostile log line of 64 KiB: at most 1 s", _hostile_line, 1, "s"),
    Bar("no leaks in start and stop cycles", _leaks, 0, "leaks"),
)


def verdicts(results: Results) -> list[Verdict]:
    """Compare the results with every target."""
    return [_verdict(bar, results) for bar in BARS]


def _verdict(bar: Bar, results: Results) -> Verdict:
    try:
        value = bar.figure(results)
    except KeyError:
        return Verdict(bar.text, None, None)
    met = value >= bar.limit if bar.more_is_better else value <= bar.limit
    number = f"{value:.2f}" if value % 1 else f"{value:.0f}"
    return Verdict(bar.text, f"{number} {bar.unit}", met)
