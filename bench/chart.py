"""Draw the results as an SVG for the README.

The bars have linear scales that begin at zero, and colors for light and for dark pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from crowd import CROWD
from figures import median, slow_end
from kernels import LIBRARIES
from results import Results, ours

_MIB: Final = 1024 * 1024
_WIDTH: Final = 860
_MARGIN: Final = 20
_GAP: Final = 40
_PANEL: Final = (_WIDTH - 2 * _MARGIN - _GAP) / 2
_LABEL: Final = 118
_VALUE: Final = 72
_BAR: Final = 16
_STEP: Final = 25
_TITLE: Final = 30
_TOP: Final = 62
_FOOT: Final = 18
_LINE: Final = 17
_TIMED: Final = {
    "start": "Start one server",
    "burst": f"Start {CROWD} servers at once",
    "first_cell": "Start a server and run a first cell",
    "libraries": "Import numpy, pandas, matplotlib in a new kernel",
    "stop": "Stop one server",
}

_STYLE: Final = """\
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
text { fill: #1f2328 }
.head { font-size: 17px; font-weight: 600 } .title { font-size: 14px; font-weight: 600 }
.note { font-size: 12px; fill: #59636e }
.value { font-variant-numeric: tabular-nums } .ours { font-weight: 600 }
rect { fill: #afb8c1 } rect.ours { fill: #0969da }
.reach { stroke: #59636e; stroke-width: 1.5 } .zero { stroke: #d1d9e0 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .note { fill: #9198a1 }
  rect { fill: #59636e } rect.ours { fill: #4493f8 }
  .reach { stroke: #9198a1 } .zero { stroke: #3d444d }
}"""


@dataclass(frozen=True, slots=True)
class _Bar:
    label: str
    value: float
    reach: float
    ours: bool


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    unit: str
    bars: Sequence[_Bar]


def can_draw(results: Results) -> bool:
    """Return whether the results have anything to show in the chart."""
    return not results["measurements"].keys().isdisjoint((*_TIMED, "memory"))


def svg(results: Results) -> str:
    """Return the chart as SVG."""
    panels = list(_panels(results))
    rows = (len(panels) + 1) // 2
    height_of_row = _TITLE + _STEP * len(results["contenders"]) + 16
    notes = _notes(results)
    height = _TOP + rows * height_of_row + _FOOT + _LINE * len(notes)
    size = f'width="{_WIDTH}" height="{height}" role="img"'
    title = "labkeeper, jupyter lab and JupyterHub on one machine"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" {size}>',
        f"<title>{escape(title)}</title>",
        f"<desc>{escape(_in_words(panels))}</desc>",
        f"<style>{_STYLE}</style>",
        _text(_MARGIN, 26, title, "head"),
        _text(_MARGIN, 45, "Shorter is better. Each scale is linear and begins at zero.", "note"),
    ]
    for number, panel in enumerate(panels):
        x, y = _MARGIN + (number % 2) * (_PANEL + _GAP), _TOP + (number // 2) * height_of_row
        parts += _draw(panel, x, y)
    for number, line in enumerate(notes):
        parts.append(_text(_MARGIN, height + 4 - _LINE * (len(notes) - number), line, "note"))
    return "\n".join([*parts, "</svg>", ""])


def _panels(results: Results) -> Iterator[_Panel]:
    measured = results["measurements"]
    for name, title in _TIMED.items():
        if name in measured:
            yield _panel(results, title, "s", measured[name])
    if "memory" in measured:
        sizes = {
            key: [server["uss"] / _MIB for server in seen[str(CROWD)]["servers"]]
            for key, seen in measured["memory"].items()
        }
        yield _panel(results, f"Private memory of each of {CROWD} idle servers", "MiB", sizes)


def _panel(results: Results, title: str, unit: str, samples: dict[str, list[float]]) -> _Panel:
    first = ours(results)
    bars = [
        _Bar(label, median(samples[key]), slow_end(samples[key]), key == first)
        for key, label in results["contenders"].items()
        if key in samples
    ]
    return _Panel(title, unit, bars)


def _draw(panel: _Panel, x: float, y: float) -> Iterator[str]:
    yield _text(x, y + 18, panel.title, "title")
    left, scale = x + _LABEL, (_PANEL - _LABEL - _VALUE) / max(bar.reach for bar in panel.bars)
    top = y + _TITLE
    for number, bar in enumerate(panel.bars):
        line, mark = top + number * _STEP, ' class="ours"' if bar.ours else ""
        middle, base, reach = line + _BAR / 2, line + _BAR - 4, left + bar.reach * scale
        width, label = bar.value * scale, escape(bar.label)
        yield f'<text x="{left - 8:g}" y="{base:g}" text-anchor="end"{mark}>{label}</text>'
        yield f'<rect x="{left:g}" y="{line:g}" width="{width:.1f}" height="{_BAR}" rx="2"{mark}/>'
        yield f'<path class="reach" d="M{left + width:.1f} {middle:g}H{reach:.1f}m0 -4v8"/>'
        kind, value = "value ours" if bar.ours else "value", f"{_number(bar.value)} {panel.unit}"
        yield f'<text x="{reach + 7:.1f}" y="{base:g}" class="{kind}">{value}</text>'
    yield f'<path class="zero" d="M{left:g} {top - 4:g}v{_STEP * len(panel.bars):g}"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(text)}</text>'


def _notes(results: Results) -> list[str]:
    machine, packages = results["machine"], results["packages"]
    repeats = len(next(iter(results["measurements"].get("start", {"": [0]}).values())))
    lab, hub = packages["lab"], packages.get("hub", {})
    versions = [
        f"JupyterLab {lab['jupyterlab']}",
        *([f"JupyterHub {hub['jupyterhub']}"] if hub else []),
    ]
    cores, kernel = f"{machine['cores']} cores", machine["kernel"].split("-")[0]
    legend = (
        f"Bars: medians ({repeats} repeats, in turns). "
        "Thin lines: up to the 95th percentile, or the slowest of fewer than 10."
    )
    environment = ", ".join([cores, kernel, f"Python {machine['python']}", *versions])
    preload = f"Import: labkeeper has LABKEEPER_PRELOAD={LIBRARIES}, and its defaults elsewhere."
    return [legend, *([preload] if "libraries" in results["measurements"] else []), environment]


def _in_words(panels: Sequence[_Panel]) -> str:
    sentences = []
    for panel in panels:
        values = [f"{bar.label} {_number(bar.value)} {panel.unit}" for bar in panel.bars]
        sentences.append(f"{panel.title}: {', '.join(values)}.")
    return " ".join(sentences)


def _number(value: float) -> str:
    """Return a number with three significant digits."""
    return f"{value:#.3g}" if value < 100 else f"{value:.0f}"  # noqa: PLR2004
