"""Small charts as SVG, which need no script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from markupsafe import Markup

_WIDTH: Final = 72
_HEIGHT: Final = 20
_SVG: Final = Markup(
    '<svg class="sparkline" viewBox="0 0 {} {}" aria-hidden="true"><path d="{}"/></svg>'
)
_FEWEST: Final = 2


def sparkline(values: Sequence[float | None], top: float) -> Markup:
    """Return a line through values from 0 to `top`, or to their maximum if that is more.

    Where values are missing (None), the line is interrupted. With fewer than two, there is none.
    """
    known = [value for value in values if value is not None]
    if len(known) < _FEWEST:
        return Markup()
    scale = (_HEIGHT - 2) / (max(top, *known) or 1)
    step = _WIDTH / (len(values) - 1)
    points, pen = [], "M"
    for at, value in enumerate(values):
        if value is None:
            pen = "M"
        else:
            points.append(f"{pen}{at * step:.0f},{_HEIGHT - 1 - value * scale:.1f}")
            pen = "L"
    return _SVG.format(_WIDTH, _HEIGHT, "".join(points))
