"""The simulator in short: no seed breaks a law, every fault happens, a seed is its run, and planted bugs are found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from simulation import laws
from simulation.mutations import MUTATIONS, Mutation, hunt
from simulation.world import FAILPOINTS, FAULTS, STORES, Result, simulate

HERE = Path(__file__).parent
SEEDS = [line.split()[:2] for line in (HERE / "seeds.txt").read_text().splitlines() if not line.startswith("#")]
SHORT = 36
"""Seeds of the short form."""
QUICK = ("a repeated step is computed again", "a slot is given back twice", "the owner of a session is not looked at",
         "a new version is used within an episode", "durable_step is told before the commit")  # fmt: skip


def kept_every_law(result: Result) -> bool:
    if result.error is not None:
        print(*result.events[-40:], sep="\n")
        print(f"again: python tests/simulation/run.py --seed {result.seed} --trace")
        raise result.error
    return True


def test_no_seed_breaks_a_law_and_everything_that_can_go_wrong_does() -> None:
    counts, stores = Counter[str](), Counter[str]()
    for seed in range(SHORT):
        result = simulate(seed, 600)
        assert kept_every_law(result)
        counts += result.counts
        stores[result.store] += 1
    assert not {*FAULTS, *FAILPOINTS} - counts.keys()
    assert stores.keys() == STORES.keys()


@pytest.mark.parametrize(("seed", "num_steps"), [(int(seed), int(steps)) for seed, steps in SEEDS])
def test_what_once_broke_a_law_keeps_it(seed: int, num_steps: int) -> None:
    assert kept_every_law(simulate(seed, num_steps))


def test_a_seed_is_the_same_run_in_every_process() -> None:
    digests: set[str] = set()
    code = "from simulation.world import simulate\nprint([simulate(s, 200).digest for s in (1, 5, 9)])"
    for hash_seed in ("1", "2"):
        path = os.pathsep.join([str(HERE.parent), *filter(None, sys.path)])
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        digests.add(run.stdout.strip())
    digests.add(str([simulate(seed, 200).digest for seed in (1, 5, 9)]))
    assert len(digests) == 1


def test_another_seed_is_another_run() -> None:
    assert simulate(1, 100).digest != simulate(2, 100).digest


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if m.name in QUICK], ids=lambda m: m.name)
def test_a_planted_bug_is_found(mutation: Mutation) -> None:
    assert hunt(mutation, max_steps=30_000).law == mutation.expected


def test_every_law_is_broken_by_some_planted_bug() -> None:
    known = {value for name, value in vars(laws).items() if name.isupper() and isinstance(value, str)}
    assert known == {m.expected for m in MUTATIONS}
    assert set(QUICK) <= {m.name for m in MUTATIONS}
