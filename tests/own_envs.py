"""Environments of a user's own, to be made as ``own_envs:name``."""

from typing import Any

import gymnasium
from gymnasium import spaces


class Stub(gymnasium.Env[Any, Any]):
    """Emits what it is told to, over a space that it is told."""

    action_space = spaces.Discrete(2)

    def __init__(self, space: spaces.Space[Any], observation: Any) -> None:
        self.observation_space, self._observation = space, observation

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self._observation, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._observation, 0.0, False, False, {}


def own() -> gymnasium.Env[Any, Any]:
    return Stub(spaces.Discrete(3), 1)


def not_an_env() -> int:
    return 3
