"""The histogram tells /metrics what prometheus-client's own would."""

from __future__ import annotations

import prometheus_client
from prometheus_client import CollectorRegistry, generate_latest

from tenuto_server.histogram import Histogram

BOUNDS = (1e-5, 0.5, 1.0, 10.0)
VALUES = (0.0, 1e-5, 0.2, 0.5, 0.7, 1.0, 3.0, 10.0, 11.0)


def samples(registry: CollectorRegistry) -> list[str]:
    lines = generate_latest(registry).decode().splitlines()
    return sorted(line for line in lines if "_created" not in line)


def test_it_tells_what_that_of_the_library_tells() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    series = Histogram("seconds", "How long.", BOUNDS, ours, "rpc", ("Step", "Other")).series
    library = prometheus_client.Histogram("seconds", "How long.", ["rpc"], buckets=BOUNDS, registry=theirs)
    library.labels("Other")
    for value in VALUES:
        series["Step"].observe(value)
        library.labels("Step").observe(value)
    assert samples(ours) == samples(theirs)


def test_an_observation_of_several_counts_as_often() -> None:
    registry = CollectorRegistry()
    Histogram("rows", "How many.", BOUNDS, registry).observe(0.7, 3)
    count, total, below = (
        registry.get_sample_value(f"rows_{n}", labels)
        for n, labels in (("count", {}), ("sum", {}), ("bucket", {"le": "0.5"}))
    )
    assert (count, round(total or 0, 9), below) == (3, 2.1, 0)
