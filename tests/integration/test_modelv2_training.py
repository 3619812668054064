"""POPGym's classes, registered with ModelCatalog, under PPO of RLlib's old API stack: train, save, restore, act."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.policy.sample_batch import SampleBatch

import tenuto_envs
import tiny_training
from old_stack import MODELS, SMALL, ppo
from tenuto_trainer.modelv2 import BaseModel, DiffNC
from tenuto_trainer.ppo import local_ray

ENV = tiny_training.REPEAT


@pytest.fixture(scope="module", autouse=True)
def running_ray() -> Iterator[None]:
    with local_ray(tiny_training.config()):
        yield


def weights(algorithm: Any) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in algorithm.get_policy().get_weights().items()}


def play(algorithm: Any, steps: int) -> list[torch.Tensor]:
    """Logits of an episode's first steps, with the state handed from call to call."""
    env = tenuto_envs.make(ENV)
    observation, _ = env.reset(seed=3)
    state, logits = algorithm.get_policy().get_initial_state(), []
    for _ in range(steps):
        action, state, extra = algorithm.compute_single_action(observation, state=state, explore=False)
        logits.append(torch.as_tensor(extra[SampleBatch.ACTION_DIST_INPUTS]))
        observation, *_ = env.step(action)
    assert state[-1].tolist() == [steps]
    return logits


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_every_core_tensor_is_trained_and_the_model_is_saved_restored_and_played(
    cls: type[BaseModel], tmp_path: Path
) -> None:
    with ppo(cls, ENV, SMALL[cls]) as algorithm:
        before = weights(algorithm)
        policy = algorithm.get_policy()
        optimized = [id(p) for group in policy._optimizers[0].param_groups for p in group["params"]]
        assert optimized == [id(p) for p in policy.model.parameters()]
        algorithm.train()
        after = weights(algorithm)
        assert len([name for name in after if name.startswith("core.")]) == (6 if cls is DiffNC else 2)
        assert [name for name in after if np.array_equal(before[name], after[name])] == []
        played = play(algorithm, 12)
        algorithm.save(str(tmp_path / "saved"))
    with ppo(cls, ENV, SMALL[cls]) as restored:
        restored.restore(str(tmp_path / "saved"))
        assert all(np.array_equal(array, after[name]) for name, array in weights(restored).items())
        assert all(torch.equal(a, b) for a, b in zip(play(restored, 12), played, strict=True))
        restored.train()
        assert restored.iteration == 2
