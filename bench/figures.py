"""Medians and percentiles of measured values."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

_ENOUGH: Final = 10


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def slow_end(values: Sequence[float]) -> float:
    """Return the 95th percentile, or the largest of fewer than 10 values."""
    return percentile(values, 95) if len(values) >= _ENOUGH else max(values)


def slow_end_name(values: Sequence[float]) -> str:
    """Return the name of the statistic that `slow_end` returns."""
    return "95th percentile" if len(values) >= _ENOUGH else "slowest"


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return the 50th, 95th and 99th percentile."""
    return {f"p{share}": percentile(values, share) for share in (50, 95, 99)}


def percentile(values: Sequence[float], share: int) -> float:
    """Return a percentile, never outside the range of the values."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[share - 1]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the median, by its ranks (normal approximation)."""
    ordered = sorted(values)
    count = len(ordered)
    reach = 1.96 * count**0.5 / 2
    return ordered[max(0, int(count / 2 - reach))], ordered[min(count - 1, int(count / 2 + reach))]
