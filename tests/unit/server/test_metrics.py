"""Labels that come from versions stay bounded however long a server lives."""

from __future__ import annotations

import torch

from tenuto_server.metrics import MAX_VERSION_LABELS, Metrics


def versions_of(metrics: Metrics, name: str) -> list[int]:
    samples = [s for family in metrics.registry.collect() for s in family.samples if s.name == name]
    return sorted(int(s.labels["version"]) for s in samples if s.labels["version"] != "older")


def test_episodes_of_the_oldest_versions_leave() -> None:
    metrics, last = Metrics(torch.device("cpu")), 3 * MAX_VERSION_LABELS
    for version in range(1, last + 1):
        metrics.count_episodes("policy", version, 2)
        metrics.observe_returns("policy", [(version, 1.0)])
    metrics.observe_returns("policy", [(1, 1.0)])  # A late end of an episode of a version that has left.
    kept = list(range(last - MAX_VERSION_LABELS + 1, last + 1))
    assert versions_of(metrics, "tenuto_episodes_total") == kept
    for returns in ("tenuto_episode_return_count", "tenuto_episode_return_squares_total"):
        assert versions_of(metrics, returns) == kept


def test_returns_tell_their_mean_and_their_spread() -> None:
    metrics = Metrics(torch.device("cpu"))
    metrics.count_episodes("policy", 7, 3)
    metrics.observe_returns("policy", [(7, -2.0), (7, 3.0), (8, 1.0)])
    labels = {"policy": "policy", "version": "7"}
    names = ("return_sum", "return_count", "return_squares_total")
    assert [metrics.registry.get_sample_value(f"tenuto_episode_{name}", labels) for name in names] == [1.0, 2.0, 13.0]
    assert metrics.registry.get_sample_value("tenuto_version_number", labels) == 7


def test_an_episode_of_an_old_version_displaces_no_newer_one() -> None:
    metrics = Metrics(torch.device("cpu"))
    for version in [*range(1, MAX_VERSION_LABELS + 3), 1, 2]:
        metrics.count_episodes("policy", version, 1)
    assert versions_of(metrics, "tenuto_episodes_total") == list(range(3, MAX_VERSION_LABELS + 3))
    older = {"policy": "policy", "version": "older"}
    assert metrics.registry.get_sample_value("tenuto_episodes_total", older) == 2


def test_sessions_are_told_for_the_versions_held_and_no_others() -> None:
    metrics = Metrics(torch.device("cpu"))
    metrics.observe_sessions("policy", {"waiting": 3}, {1: 3, 2: 0})
    metrics.observe_sessions("policy", {"waiting": 1}, {2: 1})
    assert versions_of(metrics, "tenuto_version_sessions") == [2]
    assert metrics.registry.get_sample_value("tenuto_sessions", {"policy": "policy", "state": "waiting"}) == 1
