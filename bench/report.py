"""Format the results as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from bars import BARS, median_memory, verdicts
from crowd import CROWD, LARGE_CROWD
from figures import median, slow_end, slow_end_name
from results import Results, ours

_MIB: Final = 1024 * 1024
_SHORT: Final = 0.1
"""Seconds below which milliseconds are shown."""
_LABEL: Final = 40
_CELL: Final = 17
_VERDICT: Final = max(len(bar.text) for bar in BARS) + 2
TITLES: Final = {
    "start": "start: request to ready",
    "first_cell": "server: request to its first result",
    "kernel": "kernel: request to its first result",
    "libraries": "kernel: request to libraries imported",
    "cell_result": "1+1 in a running kernel: result",
    "cell": "1+1 in a running kernel: end",
    "death": "killed kernel: until it is noticed",
    "autorestart": "killed kernel: until the next result",
    "burst": f"{CROWD} servers at once: all ready",
    "burst_cpu": f"{CROWD} servers at once: CPU time",
    "burst_100": f"{LARGE_CROWD} servers at once: all ready",
    "burst_100_cpu": f"{LARGE_CROWD} servers at once: CPU time",
    "stop": "stop: request to gone",
    "stop_kernels": "stop with two kernels",
}


def text(results: Results) -> str:
    """Return the whole report."""
    parts = (
        _machine,
        _timings,
        _memory,
        _kernel_memory,
        _idle,
        _api,
        _strangers,
        _scrub,
        _cycles,
        _verdicts,
    )
    return "\n".join(line for part in parts for line in part(results))


def _machine(results: Results) -> Iterator[str]:
    machine, packages = results["machine"], results["packages"]
    size = f"{machine['cores']} cores, {machine['memory_gib']} GiB"
    yield f"{size}, {machine['kernel']}, Python {machine['python']}"
    versions = {name: version for each in packages.values() for name, version in each.items()}
    versions.pop("python", None)
    yield ", ".join(f"{name} {version}" for name, version in versions.items())
    for key, why in results["skipped"].items():
        yield f"NOT MEASURED: {key}: {why}"
    busy = machine["busy_percent_before"]
    if busy > 10:  # noqa: PLR2004
        yield f"THE MACHINE WAS BUSY before the run ({busy} %): the figures are noisy"
    for when in results.get("resumed", []):
        yield f"begun at {results['when']}, resumed at {when}"
    yield ""


def _timings(results: Results) -> Iterator[str]:
    timed = [name for name in TITLES if name in results["measurements"]]
    if not timed:
        return
    contenders = results["contenders"]
    yield _row("", list(contenders.values()))
    first = ours(results)
    for name in timed:
        samples = results["measurements"][name]
        some = next(iter(samples.values()))
        middle = {key: median(samples[key]) for key in contenders}
        yield _row(f"{TITLES[name]} ({len(some)})", [])
        yield _row("  median", [_seconds(middle[key]) for key in contenders])
        slow = [_seconds(slow_end(samples[key])) for key in contenders]
        yield _row(f"  {slow_end_name(some)}", slow)
        if first in contenders:
            ratios = [f"{middle[key] / middle[first]:.1f}" for key in contenders]
            yield _row(f"  as a multiple of {contenders[first]}'s", ratios)
    yield ""


def _memory(results: Results) -> Iterator[str]:
    found = results["measurements"].get("memory")
    if not found:
        return
    contenders = {key: label for key, label in results["contenders"].items() if key in found}
    yield _row("memory of an idle server", list(contenders.values()))
    for count in (1, CROWD):
        for kind, title in (("uss", "private (USS)"), ("pss", "proportional (PSS)")):
            values = [median_memory(results, key, count, kind) for key in contenders]
            yield _row(f"  {title}, {count} running", [_mib(value) for value in values])
    crowds = [found[key][str(CROWD)] for key in contenders]
    totals = [_total_pss(each["servers"], each["beside"]) / CROWD for each in crowds]
    yield _row(f"  all processes / {CROWD} (PSS)", [_mib(value) for value in totals])
    yield ""


def _kernel_memory(results: Results) -> Iterator[str]:
    found = results["measurements"].get("kernel_memory")
    if not found:
        return
    contenders = results["contenders"]
    for cells, title in (("bare", "after 1+1"), ("libraries", "with libraries")):
        seen = [found[cells][key] for key in contenders]
        yield _row(f"memory of a kernel, {title}", list(contenders.values()))
        for kind, name in (("uss", "private (USS)"), ("pss", "proportional (PSS)")):
            values = [median([kernel[kind] for kernel in each["kernels"]]) for each in seen]
            yield _row(f"  {name}", [_mib(value) for value in values])
        totals = [_total_pss(each["kernels"], each["beside"]) / CROWD for each in seen]
        yield _row(f"  all processes / {CROWD} (PSS)", [_mib(value) for value in totals])
    yield ""


def _total_pss(processes: Sequence[dict[str, int]], beside: dict[str, dict[str, int]]) -> int:
    return sum(each["pss"] for each in (*processes, *beside.values()))


def _idle(results: Results) -> Iterator[str]:
    found = results["measurements"].get("idle")
    if not found:
        return
    yield _row(f"services beside {CROWD} idle servers", ["of a core", "RSS", "USS", "PSS"])
    for key, processes in found.items():
        for name, seen in processes.items():
            sizes = [_mib(seen[kind]) for kind in ("rss", "uss", "pss")]
            label = f"  {results['contenders'][key]}: {name}"
            yield _row(label, [f"{seen['cpu_percent']:.2f} %", *sizes])
    yield ""


def _api(results: Results) -> Iterator[str]:
    for key, found in results["measurements"].get("api", {}).items():
        what = f"{found['servers']} servers, {found['followers']} followers"
        rate = f"latency at {found['rate']:.0f} requests per second"
        yield f"API of {results['contenders'][key]} with {what}; {rate}"
        yield _row("", ["p50", "p95", "p99", "requests/s", "caller's core"])
        for name, title in (("one", "GET one server"), ("list", "GET all servers")):
            seen = found[name]
            most = f"{seen['requests_per_second']:.0f}"
            share = f"{seen['caller_share_of_a_core']:.0%}"
            yield _row(f"  {title}", [*_latency(seen["latency"]), most, share])
        yield ""


def _strangers(results: Results) -> Iterator[str]:
    for key, found in results["measurements"].get("strangers", {}).items():
        label, rate = results["contenders"][key], f"{found['rate']:.0f} requests per second"
        yield f"GET all servers of {label}, when it has none, at {rate}"
        yield _row("", ["p50", "p95", "p99"])
        yield _row("  without other clients", _latency(found["quiet"]["latency"]))
        among = _latency(found["knocked"]["latency"])
        yield _row(f"  with {found['strangers']} sending wrong tokens", among)
        refused = f"{found['refused_per_second']:.0f} wrong tokens per second were refused"
        share = f"{found['strangers_share_of_a_core']:.0%} of a core"
        yield f"  {refused}; the clients that sent them used {share}"
        yield ""


def _latency(latency: dict[str, float]) -> list[str]:
    return [f"{1000 * latency[share]:.1f} ms" for share in ("p50", "p95", "p99")]


def _scrub(results: Results) -> Iterator[str]:
    found = results["measurements"].get("scrub")
    if not found:
        return
    hostile = found["hostile_milliseconds"]
    worst = max(hostile, key=hostile.__getitem__)
    yield _row("removing secrets from a log", ["CPU time"])
    yield _row("  a line without secrets", [f"{found['line_microseconds']:.1f} µs"])
    yield _row("  the pattern alone, on the same line", [f"{found['rule_microseconds']:.1f} µs"])
    row = _row("  the slowest hostile line of 64 KiB", [f"{hostile[worst]:.1f} ms"])
    yield f"{row}   ({worst!r}, repeated)"
    yield ""


def _cycles(results: Results) -> Iterator[str]:
    found = results["measurements"].get("cycles")
    if not found:
        return
    counts = found["counts"]
    yield _row(f"{found['cycles']} cycles, launched by {found['launched_by']}", list(counts))
    for name in counts["before"]:
        show = _mib if name.endswith("RSS") else str
        yield _row(f"  {name}", [show(each[name]) for each in counts.values()])
    yield f"  leaks: {'; '.join(found['leaks']) or 'none'}"
    yield ""


def _verdicts(results: Results) -> Iterator[str]:
    first = ours(results)
    yield f"bars, for {results['contenders'].get(first, first)}"
    for verdict in verdicts(results):
        said = {True: "met", False: "MISSED", None: "not measured"}[verdict.met]
        yield f"  {said:<14}{verdict.text:<{_VERDICT}}{verdict.value or ''}".rstrip()


def _row(label: str, cells: Sequence[str]) -> str:
    return f"{label:<{_LABEL}}" + "".join(f"{cell:>{_CELL}}" for cell in cells)


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= _SHORT else f"{1000 * value:.1f} ms"


def _mib(size: float) -> str:
    return f"{size / _MIB:.1f} MiB"
