"""The smallest training runs: RLlib's own env runner and learner on a POPGym environment, without Ray running."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

import tenuto_envs
from tenuto_trainer import TrainConfig
from tenuto_trainer.ppo import ppo_config
from tenuto_trainer.resume import Start
from tenuto_trainer.rl_module import PolicyModule

REPEAT = "popgym-RepeatPreviousEasy-v0"


def config(memory: str = "dnc", env_id: str = REPEAT, **overrides: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "repository": Path("not-written-to"), "seed": 0, "num_envs": 4, "batch_size": 256, "minibatch_size": 128,
        "num_epochs": 1, "evaluation_episodes": 0, "max_seq_len": 16, "hidden_size": 16, "num_cells": 4, "cell_size": 4,
    }  # fmt: skip
    return TrainConfig(env_id, memory, **{**settings, **overrides})


class Training:
    """An env runner and a learner over the same weights."""

    module_id = DEFAULT_MODULE_ID

    def __init__(self, settings: TrainConfig) -> None:
        env = tenuto_envs.make(settings.env_id)
        self.settings = settings
        self.config = ppo_config(settings, env.observation_space, env.action_space, Start())
        self.runner = SingleAgentEnvRunner(config=self.config)
        self.learner: PPOTorchLearner = self.config.build_learner(env=self.runner.env)
        self.module: PolicyModule = self.learner.module[DEFAULT_MODULE_ID]
        self.runner.module.load_state_dict(self.module.state_dict())

    def sample(self) -> list[Any]:
        """Episodes and fragments of ``batch_size`` environment steps."""
        return self.runner.sample(num_timesteps=self.settings.batch_size)

    def update(self, episodes: list[Any]) -> None:
        self.learner.update(
            episodes=episodes, num_epochs=self.settings.num_epochs, minibatch_size=self.settings.minibatch_size
        )

    def weights(self) -> dict[str, np.ndarray]:
        return {name: tensor.detach().numpy().copy() for name, tensor in self.module.state_dict().items()}

    def learner_batch(self, episodes: list[Any]) -> dict[str, Any]:
        """The train batch that the learner makes of episodes, as the PPO loss sees it before minibatches."""
        connector = self.learner._learner_connector
        return connector(rl_module=self.learner.module, batch={}, episodes=episodes, shared_data={})[DEFAULT_MODULE_ID]


class Recorder(gymnasium.Env[Any, Any]):
    """Ten steps an episode, or as many as asked, over a given action space; keeps the actions that it was given."""

    def __init__(self, action_space: spaces.Space[Any], num_steps: int = 10) -> None:
        self.num_steps = num_steps
        self.observation_space, self.action_space = spaces.MultiBinary(3), action_space
        self.actions: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._steps = 0
        return np.zeros(3, np.int8), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self.actions.append(action)
        self._steps += 1
        return np.ones(3, np.int8), 1.0, self._steps == self.num_steps, False, {}


def bits() -> Recorder:
    return Recorder(spaces.MultiBinary((2, 2)))


def endless() -> Recorder:
    return Recorder(spaces.Discrete(2), num_steps=10**9)


def shifted() -> Recorder:
    return Recorder(spaces.Discrete(3, start=5))


def half_bounded() -> Recorder:
    return Recorder(spaces.Box(np.array([-2, 0]), np.array([4, np.inf]), (2,), np.float64))


def dict_actions() -> Recorder:
    return Recorder(spaces.Dict({"a": spaces.Discrete(2)}))


def text_observations() -> Recorder:
    env = Recorder(spaces.Discrete(2))
    env.observation_space = spaces.Text(3)
    return env
