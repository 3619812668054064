"""The environment as RLlib sees it: flat float32 observations in, raw actions out.

Raw actions are what the policy's distribution draws and what log-probabilities are taken of; they become actions of
the environment by ``ActionDistribution.to_space``, the same function that the server calls.

Legend: O flattened observation, A action dimensions.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation, TransformObservation
from numpy.typing import NDArray

from tenuto_models.distributions import distribution_for

Env = gymnasium.Env[Any, Any]


def for_rllib(env: Env) -> Env:
    """Wrap an environment for RLlib. Raises tenuto_models.ConfigError for an action space without a distribution."""
    flat = FlattenObservation(env)
    # Bounds are left out: RLlib reads only the shape, and casting bounds to float32 would move them.
    space = spaces.Box(-np.inf, np.inf, flat.observation_space.shape, np.float32)
    return RawAction(TransformObservation(flat, _to_float32, space))


def raw_action_space(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """Return the space that raw actions of ``space`` live in: classes counted from 0, Gaussians without bounds."""
    if isinstance(space, spaces.Discrete):
        return spaces.Discrete(int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        return spaces.MultiDiscrete(space.nvec.ravel())
    dimensions = distribution_for(space).num_uniforms
    if isinstance(space, spaces.MultiBinary):
        return spaces.MultiDiscrete(np.full(dimensions, 2))
    return spaces.Box(-np.inf, np.inf, (dimensions,), np.float32)


class RawAction(gymnasium.ActionWrapper[Any, Any, Any]):
    """Takes raw actions and hands the environment actions of its own space."""

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        self._distribution = distribution_for(env.action_space)
        self.action_space = raw_action_space(env.action_space)

    def action(self, action: int | np.integer[Any] | NDArray[Any]) -> Any:
        """Raw action, one class or ``[A]`` -> action of the environment's space, a numpy scalar for Discrete."""
        raw = torch.as_tensor(np.asarray(action)).reshape(1, -1)
        return self._distribution.to_space(raw)[0].numpy()[()]


def _to_float32(observation: NDArray[Any]) -> NDArray[np.float32]:
    return observation.astype(np.float32)
