"""POPGym's classes as tenuto offers them, small: built without Ray running, and trained by RLlib's old API stack."""

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.models import ModelCatalog
from ray.tune.registry import register_env

import tenuto_envs
from tenuto_trainer.modelv2 import BaseModel, DiffNC, Frameconv

MODELS: tuple[type[BaseModel], ...] = (DiffNC, Frameconv)
SMALL: dict[type[BaseModel], dict[str, Any]] = {
    DiffNC: {"hidden_size": 16, "preprocessor_input_size": 12, "cell_size": 4, "read_heads": 2},
    Frameconv: {"hidden_size": 16, "preprocessor_input_size": 12, "stack_size": 3},
}
OBSERVATION = spaces.Box(-np.inf, np.inf, (10,), np.float32)
ACTIONS = spaces.Discrete(4)


def build(cls: type[BaseModel], max_seq_len: int = 8, **config: Any) -> Any:
    """A small model of ten features and four actions, with livelier weights than a fresh one has."""
    model_config = {"max_seq_len": max_seq_len, "custom_model_config": {**SMALL.get(cls, {}), **config}}
    model = cls(OBSERVATION, ACTIONS, 4, model_config, "model")
    with torch.no_grad():
        for parameter in model.actor.parameters():
            parameter.mul_(20)
    return model


def batched(model: BaseModel, rows: int) -> list[torch.Tensor]:
    """The initial state of rows, as RLlib hands it in: everything as float."""
    return [tensor.float().expand(rows, *tensor.shape) for tensor in model.get_initial_state()]


def lively(model: BaseModel, rows: int) -> list[torch.Tensor]:
    """A state in the middle of an episode, four steps after its start."""
    observations = torch.randn(rows * 4, 10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model({"obs": observations}, batched(model, rows), torch.full((rows,), 4))[1]


class _PPO(PPO):
    """PPO without the folder that it makes for itself in ~/ray_results."""

    def _setup_logdir(self) -> None:
        self._logdir = tempfile.gettempdir()


@contextmanager
def ppo(cls: type[BaseModel], env_id: str, model: dict[str, Any], **training: Any) -> Generator[Algorithm]:
    """PPO of the old API stack with one local worker; needs a running Ray."""
    ModelCatalog.register_custom_model(cls.__name__, cls)
    register_env("old-stack", lambda _: tenuto_envs.make(env_id))
    settings = {"train_batch_size": 128, "minibatch_size": 64, "num_epochs": 1, "lr": 1e-3, **training}
    config = (
        PPOConfig(algo_class=_PPO)
        .api_stack(enable_rl_module_and_learner=False, enable_env_runner_and_connector_v2=False)
        .environment("old-stack", disable_env_checking=True)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=4)
        .training(model={"max_seq_len": 16, "custom_model": cls.__name__, "custom_model_config": model}, **settings)
        .debugging(seed=0, log_level="ERROR")
    )
    algorithm = config.build_algo()
    try:
        yield algorithm
    finally:
        algorithm.stop()
