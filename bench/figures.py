"""Numbers made of measured numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

_ENOUGH: Final = 10


def median(values: Sequence[float]) -> float:
    """Give the middle."""
    return statistics.median(values)


def slow_end(values: Sequence[float]) -> float:
    """Give the 95th percentile, or the largest where there are too few to speak of percentiles; `slow_end_name` says which."""
    return percentile(values, 95) if len(values) >= _ENOUGH else max(values)


def slow_end_name(values: Sequence[float]) -> str:
    """Say what `slow_end` gives."""
    return "95th percentile" if len(values) >= _ENOUGH else "slowest"


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return the three that tell of a latency."""
    return {f"p{share}": percentile(values, share) for share in (50, 95, 99)}


def percentile(values: Sequence[float], share: int) -> float:
    """Give the value below which `share` % lie; never one outside what was measured."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[share - 1]
