"""The short form of ``make chaos``: few environments, few kills, both stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.monkey import run


@pytest.mark.timeout(300)
@pytest.mark.parametrize("store", ["sqlite", "redis"])
def test_episodes_go_on_as_if_nothing_had_happened_while_their_servers_are_killed(tmp_path: Path, store: str) -> None:
    report = run(tmp_path, store, num_environments=12, num_steps=30, num_kills=2, seed=1)
    assert report.num_different == 0 and report.num_miscounted == 0, report
    assert report.num_steps == 12 * 30
    assert report.faults["servers killed"] >= 2
