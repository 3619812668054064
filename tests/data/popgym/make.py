"""Made the checkpoints beside this file: POPGym's own classes, trained for two iterations of PPO by Ray 2.60.

    python -m venv --system-site-packages other && other/bin/pip install --no-deps dnc==1.1.0
    other/bin/python tests/data/popgym/make.py

For each class: the policy as RLlib saved it, and ``episode.npz``, what it answered one step at a time over an episode.
"""

import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from popgym.baselines.ray_models.ray_diffnc import DiffNC
from popgym.baselines.ray_models.ray_frameconv import Frameconv
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.models import ModelCatalog
from ray.rllib.models.preprocessors import get_preprocessor
from ray.tune.registry import register_env
from torch import nn

import tenuto_envs

ENV = "popgym-RepeatPreviousEasy-v0"


def trunk() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.LeakyReLU())


def main(out: Path) -> None:
    register_env("env", lambda _: tenuto_envs.make(ENV))
    for cls, sizes in ((DiffNC, {"read_heads": 2, "cell_size": 4}), (Frameconv, {})):
        ModelCatalog.register_custom_model("model", cls)
        widths = [
            f"{part}_size" for part in ("hidden", "preprocessor_input", "preprocessor_output", "postprocessor_output")
        ]
        modules = {"preprocessor": trunk(), "actor": trunk(), "critic": trunk()}
        config = (
            PPOConfig()
            .api_stack(enable_rl_module_and_learner=False, enable_env_runner_and_connector_v2=False)
            .environment("env", disable_env_checking=True)
            .env_runners(num_env_runners=0, num_envs_per_env_runner=2, batch_mode="complete_episodes")
            .training(
                train_batch_size=208,
                minibatch_size=104,
                num_epochs=4,
                lr=1e-2,
                model={
                    "max_seq_len": 64,
                    "custom_model": "model",
                    "custom_model_config": {**dict.fromkeys(widths, 16), **modules, **sizes},
                },
            )
            .debugging(seed=0, log_level="ERROR")
        )
        algorithm = config.build_algo()
        for _ in range(2):
            algorithm.train()
        with tempfile.TemporaryDirectory() as folder:
            algorithm.save(folder)
            saved = Path(folder, "policies", "default_policy", "policy_state.pkl").read_bytes()
        target = out / cls.__name__ / "policies" / "default_policy"
        target.mkdir(parents=True, exist_ok=True)
        # The paths of this machine's Python, in the same length so that the pickle stays one.
        (target / "policy_state.pkl").write_bytes(saved.replace(sys.prefix.encode(), b"/" * len(sys.prefix)))
        np.savez_compressed(out / cls.__name__ / "episode.npz", **episode(algorithm.get_policy().model))
        algorithm.stop()


def episode(model: Any) -> dict[str, np.ndarray]:
    """Observations flattened by RLlib ``[T, O]``, POPGym's logits ``[T, K]`` and values ``[T]``."""
    env = tenuto_envs.make(ENV)
    env.action_space.seed(0)
    preprocessor = get_preprocessor(env.observation_space)(env.observation_space)
    state = [tensor.unsqueeze(0).float() for tensor in model.get_initial_state()]
    observation, done, rows = env.reset(seed=0)[0], False, []
    while not done:
        flat = preprocessor.transform(observation)
        with torch.no_grad():
            logits, state = model({"obs": torch.from_numpy(flat[None])}, state, torch.tensor([1]))
        rows.append((flat, logits[0].numpy(), model.value_function()[0].detach().numpy()))
        observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
        done = terminated or truncated
    return dict(zip(("observations", "logits", "values"), map(np.stack, zip(*rows, strict=True)), strict=True))


if __name__ == "__main__":
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    main(Path(__file__).parent)
