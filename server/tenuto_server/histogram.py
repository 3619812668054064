"""A histogram whose observations cost a fraction of a microsecond, several to one observation if need be.

Written by one thread, the event loop's; a scrape reads it from another and may see an observation by half.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Series:
    """The observations of one value of the label."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Record a value as often as it occurred."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """What /metrics tells: (upper bound, observations up to it) of each bucket, and the sum of all values."""
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self._counts)), strict=True)), self._sum


class Histogram(Collector):
    """Series by the values of one label, all of which are known from the start; without a label a single one."""

    def __init__(
        self,
        name: str,
        documentation: str,
        bounds: Sequence[float],
        registry: CollectorRegistry,
        label: str | None = None,
        values: Sequence[str] = (),
    ) -> None:
        self.name, self.documentation = name, documentation
        self.labels = () if label is None else (label,)
        self.series = {value: Series(bounds) for value in (values if label is not None else ("",))}
        registry.register(self)

    def observe(self, value: float, times: int = 1) -> None:
        """Record a value of the histogram that has no label."""
        self.series[""].observe(value, times)

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Called by the registry at a scrape."""
        family = HistogramMetricFamily(self.name, self.documentation, labels=self.labels)
        for value, series in self.series.items():
            buckets, total = series.buckets()
            family.add_metric([value] if self.labels else [], buckets, total)
        yield family
