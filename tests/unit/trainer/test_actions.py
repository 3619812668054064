"""The action that training takes is the action that the server would take: one law for every kind of space."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from ray.rllib.utils.spaces.space_utils import unsquash_action

import tiny_training
from tenuto_models import ConfigError, PolicyConfig
from tenuto_models.distributions import distribution_for
from tenuto_trainer.envs import for_rllib, raw_action_space
from tenuto_trainer.rl_module import PolicyModule, model_config_for

SPACES = {
    "discrete": spaces.Discrete(4),
    "discrete from 5": spaces.Discrete(3, start=5),
    "multi-discrete": spaces.MultiDiscrete([3, 5]),
    "multi-discrete 2-D": spaces.MultiDiscrete([[2, 3], [4, 2]]),
    "multi-binary": spaces.MultiBinary((2, 3)),
    "box": spaces.Box(-2, 4, (3,), np.float32),
    "box, one side": spaces.Box(np.array([-2, 0]), np.array([4, np.inf]), (2,), np.float64),
    "box, unbounded": spaces.Box(-np.inf, np.inf, (2, 2), np.float32),
}
every_kind = pytest.mark.parametrize("space", SPACES.values(), ids=list(SPACES))


def _distribution_class(space: spaces.Space[Any]) -> Any:
    observation = spaces.Box(-1, 1, (2,), np.float32)
    module = PolicyModule(
        observation_space=observation,
        action_space=raw_action_space(space),
        model_config=model_config_for(observation, space, PolicyConfig.for_memory("frameconv"), 16),
    )
    return module.get_inference_action_dist_cls()


def _as_rows(actions: torch.Tensor) -> torch.Tensor:
    return actions.reshape(len(actions), -1)


@every_kind
def test_rllib_agrees_on_the_greedy_action(space: spaces.Space[Any]):
    ours = distribution_for(space)
    logits = torch.randn(64, ours.num_logits, generator=torch.Generator().manual_seed(0))
    greedy = _distribution_class(space).from_logits(logits).to_deterministic().sample()
    torch.testing.assert_close(_as_rows(greedy), ours.greedy(logits), rtol=0, atol=0)


@every_kind
def test_rllib_agrees_on_the_log_probability(space: spaces.Space[Any]):
    ours = distribution_for(space)
    logits = torch.randn(64, ours.num_logits, generator=torch.Generator().manual_seed(1))
    rllib = _distribution_class(space).from_logits(logits)
    sampled = rllib.sample()
    torch.testing.assert_close(rllib.logp(sampled), ours.log_prob(logits, _as_rows(sampled)), rtol=1e-5, atol=1e-5)


@every_kind
def test_environment_is_given_the_action_that_the_server_would_send(space: spaces.Space[Any]):
    ours, env = distribution_for(space), tiny_training.Recorder(space)
    wrapped = for_rllib(env)
    logits = 3 * torch.randn(64, ours.num_logits, generator=torch.Generator().manual_seed(2))
    raw = _distribution_class(space).from_logits(logits).sample()
    wrapped.reset()
    for row in raw.numpy():
        wrapped.step(row)
    served = ours.to_space(_as_rows(raw)).numpy()
    np.testing.assert_array_equal(np.stack(env.actions), served)


def test_scaling_to_bounds_is_that_of_rllib():
    space = spaces.Box(-2, 4, (3,), np.float32)
    raw = torch.linspace(-1.5, 1.5, 12).view(4, 3)
    theirs = np.stack([unsquash_action(row, space) for row in raw.numpy()])
    np.testing.assert_allclose(distribution_for(space).to_space(raw).numpy(), theirs, rtol=1e-6)


def test_observation_is_gymnasiums_flattening_in_float32():
    env = for_rllib(tiny_training.Recorder(spaces.Discrete(2)))
    observation, _ = env.reset()
    assert observation.dtype == np.float32
    assert env.observation_space.shape == (3,)
    assert env.observation_space.contains(observation)


def test_space_without_a_distribution_is_refused():
    with pytest.raises(ConfigError, match="action space: got Dict"):
        for_rllib(tiny_training.Recorder(spaces.Dict({"a": spaces.Discrete(2)})))
