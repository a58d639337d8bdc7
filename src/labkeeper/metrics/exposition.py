"""Our metrics in the text formats of Prometheus, written by prometheus_client.

Imported at the first scrape: prometheus_client would take 10 ms of the keeper's start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    Metric,
    PlatformCollector,
    ProcessCollector,
    core,
)
from prometheus_client.exposition import choose_encoder

from labkeeper.metrics.families import FAMILIES, Family, Kind, Labels, Value


class Exposition:
    """A collector of prometheus_client for our families, beside those of Python and the process."""

    def __init__(
        self, values: Callable[[], Mapping[Family, Mapping[Labels, Value]]], version: str
    ) -> None:
        """`values` returns the present values of all families but that of the version."""
        self._values = values
        self._version = version
        self._registry = CollectorRegistry()
        self._registry.register(self)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)

    def text(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics in the best format for an `Accept` header, and its media type."""
        try:
            encode, media_type = choose_encoder(accept)
        except (TypeError, ValueError):  # The requested version is not a number.
            encode, media_type = choose_encoder("")
        return encode(self._registry), media_type

    def collect(self) -> Iterator[Metric]:
        """Yield all our metrics; prometheus_client calls this."""
        values: Mapping[Family, Mapping[Labels, Any]] = self._values()
        for family in FAMILIES:
            match family.kind:
                case Kind.INFO:
                    name = family.name.removesuffix("_info")
                    yield core.InfoMetricFamily(name, family.about, {"version": self._version})
                case Kind.HISTOGRAM:
                    histogram = core.HistogramMetricFamily(
                        family.name, family.about, labels=family.labels
                    )
                    for labels, (buckets, sum_) in values[family].items():
                        histogram.add_metric(labels, buckets, sum_)
                    yield histogram
                case Kind.COUNTER | Kind.GAUGE:  # pragma: no branch - the last kinds
                    counts = family.kind is Kind.COUNTER
                    cls = core.CounterMetricFamily if counts else core.GaugeMetricFamily
                    simple = cls(family.name, family.about, labels=family.labels)
                    for labels, value in values[family].items():
                        simple.add_metric(labels, value)
                    yield simple
