"""The self-test tells a device whose results depend on the batch from one whose do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from serving import small_policy
from tenuto_server.engine import Engine
from tenuto_server.self_test import SelfTest
from tenuto_server.step import StepResults, StepRows


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(torch.device("cpu"), (4, 8))
    yield engine
    engine.close()


class Disturbed:
    """A step whose results depend on something that they must not."""

    def __init__(self, sound: Any, how: str) -> None:
        self.sound, self.how, self.sizes = sound, how, (1,)

    def advance(self, rows: StepRows) -> StepResults:
        results = self.sound.advance(rows)
        wrong = results.logits.copy()
        if self.how == "size" and len(rows) == 5:
            wrong[:, 1] *= 1.0000001
        if self.how == "nan" and len(rows) == 5:
            wrong[:, 1] = np.nan
        if self.how == "place":
            wrong[2:3, 1] *= 1.0000001
        return replace(results, logits=wrong)


@pytest.mark.parametrize("memory", ["dnc", "frameconv"])
@pytest.mark.parametrize("max_batch", [1, 6, 64])
async def test_the_cpus_results_do_not_depend_on_the_batch(engine: Engine, memory: str, max_batch: int) -> None:
    assert await SelfTest(engine, small_policy(memory), max_batch).spread() == 0


@pytest.mark.parametrize("how", ["size", "place"])
async def test_one_bit_of_difference_is_found(engine: Engine, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_step = engine.make_step
    monkeypatch.setattr(engine, "make_step", lambda *arguments: Disturbed(make_step(*arguments), how))
    assert 0 < await SelfTest(engine, small_policy(), 64).spread() < 1e-5


async def test_a_number_that_is_none_is_a_difference(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    make_step = engine.make_step
    monkeypatch.setattr(engine, "make_step", lambda *arguments: Disturbed(make_step(*arguments), "nan"))
    assert await SelfTest(engine, small_policy(), 64).spread() == np.inf


async def test_a_memory_that_differs_is_found_though_the_output_is_the_same(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(policy: Any, arena: Any) -> Any:
        step = make_step(policy, arena)

        class Forgetful:
            sizes = step.sizes

            def advance(self, rows: StepRows) -> StepResults:
                results = step.advance(rows)
                if len(rows) == 3:
                    state, _ = arena.on_host()
                    state[rows.slots[0], 0] += 1e-6
                return results

        return Forgetful()

    make_step = engine.make_step
    monkeypatch.setattr(engine, "make_step", forgetful)
    assert await SelfTest(engine, small_policy(), 16).spread() > 0
