"""What was trained is what is served: the server's actions are those of RLlib's own module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

import tenuto_envs
from serving import ServerProcess, publish
from tenuto_client import RemotePolicy
from tenuto_models import DNCConfig, FrameconvConfig, PolicyConfig
from tenuto_models.sampling import uniforms
from tenuto_trainer.envs import for_rllib
from tenuto_trainer.rl_module import PolicyModule, model_config_for, policy_of

STEPS, SEED = 70, 11
CONFIGS = {
    "dnc": PolicyConfig(DNCConfig(16, 4, 4, 2), feature_size=16),
    "frameconv": PolicyConfig(FrameconvConfig(16), feature_size=16, embedding_period=64),
}


class ModuleActor:
    """Acts with an RLModule, one step at a time, as RLlib's env runner does."""

    def __init__(self, module: PolicyModule) -> None:
        self.module = module

    def reset(self) -> None:
        initial = self.module.get_initial_state()
        self.state = {name: torch.from_numpy(np.asarray(array))[None] for name, array in initial.items()}

    def logits(self, flat: np.ndarray) -> torch.Tensor:
        batch = {Columns.OBS: torch.from_numpy(flat)[None, None], Columns.STATE_IN: self.state}
        with torch.inference_mode():
            output = self.module.forward_exploration(batch)
        self.state = output[Columns.STATE_OUT]
        return output[Columns.ACTION_DIST_INPUTS][:, 0]


@pytest.mark.parametrize("deterministic", [False, True], ids=["sampled", "deterministic"])
@pytest.mark.parametrize("memory", CONFIGS)
@pytest.mark.parametrize("env_id", ["popgym-RepeatPreviousEasy-v0", "popgym-BattleshipEasy-v0", "Pendulum-v1"])
def test_the_servers_actions_are_the_modules(tmp_path: Path, env_id: str, memory: str, deterministic: bool) -> None:
    env = tenuto_envs.make(env_id)
    flat_env = for_rllib(tenuto_envs.make(env_id))
    model_config = model_config_for(env.observation_space, env.action_space, CONFIGS[memory], max_seq_len=16)
    torch.manual_seed(0)
    module: Any = RLModuleSpec(
        PolicyModule, flat_env.observation_space, flat_env.action_space, model_config=model_config
    ).build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    weights = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    publish(tmp_path, policy_of(weights, model_config))

    actor, distribution = ModuleActor(module), module.policy.distribution
    with (
        ServerProcess(tmp_path) as server,
        RemotePolicy(server.address, seed=SEED, deterministic=deterministic, outputs=("logits",)) as policy,
    ):
        observation, done = env.reset(seed=3)[0], True
        for index in range(STEPS):
            if done:
                actor.reset()
            flat = np.asarray(spaces.flatten(env.observation_space, observation), np.float32)
            logits = actor.logits(flat)
            served = policy.step(observation, episode_start=done)
            np.testing.assert_allclose(served.logits, logits[0].numpy(), atol=1e-4)
            if deterministic:
                raw = distribution.greedy(logits)
            else:
                draws = uniforms(np.array([SEED], np.uint64), np.array([index], np.uint64), distribution.num_uniforms)
                raw = distribution.sample(logits, torch.from_numpy(draws))
            expected = distribution.to_space(raw)[0].numpy()
            if isinstance(env.action_space, spaces.Box):
                np.testing.assert_allclose(served.action, expected, atol=1e-3)
            else:
                assert np.array_equal(served.action, expected)
            assert env.action_space.contains(served.action)
            observation, _, terminated, truncated, _ = env.step(served.action)
            done = terminated or truncated
            if done:
                observation, _ = env.reset()
    env.close()
    flat_env.close()
