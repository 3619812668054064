"""The algorithms that are compared: one RLlib PPO each, all with the settings of one TrainConfig.

dnc, frameconv              tenuto's, on RLlib's new API stack
seed-dnc, seed-frameconv    the classes of popgym.baselines.ray_models, as they are, on the old API stack
lstm, lstm-old              RLlib's own LSTM, on either stack
mlp                         RLlib's own feed-forward network, on the new API stack
"""

from __future__ import annotations

from typing import Any

from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.tune.registry import register_env
from torch import nn

import tenuto_envs
from tenuto_trainer import TrainConfig
from tenuto_trainer.ppo import ppo_config
from tenuto_trainer.resume import Start

ALGORITHMS = ("dnc", "frameconv", "seed-dnc", "seed-frameconv", "lstm", "lstm-old", "mlp")
_OLD = ("seed-dnc", "seed-frameconv", "lstm-old")


def memory_of(algorithm: str) -> str:
    """Return the memory that the TrainConfig of an algorithm names; those of RLlib have none and take any."""
    return "frameconv" if algorithm.endswith("frameconv") else "dnc"


def algorithm_config(algorithm: str, settings: TrainConfig) -> PPOConfig:
    """Return PPO with this algorithm's network, ready to be built; nothing of it is published."""
    env = tenuto_envs.make(settings.env_id)
    new = ppo_config(settings, env.observation_space, env.action_space, Start()).callbacks(RLlibCallback)
    env.close()
    if algorithm in _OLD:
        return _on_old_stack(algorithm, settings)
    if algorithm in ("lstm", "mlp"):
        model = DefaultModelConfig(
            fcnet_hiddens=[settings.hidden_size],
            use_lstm=algorithm == "lstm",
            lstm_cell_size=settings.hidden_size,
            max_seq_len=settings.max_seq_len,
            vf_share_layers=True,
        )
        return new.rl_module(rl_module_spec=RLModuleSpec(), model_config=model)
    return new


def _on_old_stack(algorithm: str, settings: TrainConfig) -> PPOConfig:
    register_env("compared", lambda _: tenuto_envs.make(settings.env_id))
    model: dict[str, Any] = {"max_seq_len": settings.max_seq_len}
    if algorithm == "lstm-old":
        width = settings.hidden_size
        model |= {"use_lstm": True, "fcnet_hiddens": [width], "lstm_cell_size": width, "vf_share_layers": True}
    else:
        model |= {
            "custom_model": _seed_class(algorithm),
            "custom_model_config": _seed_model_config(algorithm, settings),
        }
    return (
        PPOConfig()
        .api_stack(enable_rl_module_and_learner=False, enable_env_runner_and_connector_v2=False)
        .environment("compared", disable_env_checking=True)
        .env_runners(
            num_env_runners=0,
            num_envs_per_env_runner=settings.num_envs,
            # POPGym's Frameconv fails beyond step max_seq_len, padding included: its rows must be whole episodes.
            batch_mode="complete_episodes" if algorithm == "seed-frameconv" else "truncate_episodes",
        )
        .training(
            lr=settings.lr,
            gamma=settings.gamma,
            lambda_=settings.gae_lambda,
            clip_param=settings.clip,
            entropy_coeff=settings.entropy,
            grad_clip=settings.grad_clip,
            use_kl_loss=False,
            kl_coeff=0.0,
            vf_clip_param=float("inf"),
            vf_loss_coeff=0.5,
            train_batch_size=settings.batch_size,
            minibatch_size=settings.minibatch_size,
            num_epochs=settings.num_epochs,
            model=model,
        )
        .debugging(seed=settings.seed, log_level="ERROR", log_sys_usage=False)
    )


def _seed_class(algorithm: str) -> Any:
    # Needs the package `dnc`, which only this comparison uses.
    from popgym.baselines.ray_models.ray_diffnc import DiffNC
    from popgym.baselines.ray_models.ray_frameconv import Frameconv

    return DiffNC if algorithm == "seed-dnc" else Frameconv


def _seed_model_config(algorithm: str, settings: TrainConfig) -> dict[str, Any]:
    """The same widths as ours; popgym's DNC has hidden_size / cell_size cells."""
    width = settings.hidden_size

    def head() -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(inplace=True))

    config: dict[str, Any] = {
        "hidden_size": width,
        "preprocessor": nn.Identity(),
        "postprocessor": nn.Identity(),
        "actor": head(),
        "critic": head(),
        "preprocessor_input_size": width,
        "preprocessor_output_size": width,
        "postprocessor_output_size": width,
    }
    if algorithm == "seed-dnc":
        return config | {"read_heads": settings.num_read_heads, "cell_size": settings.cell_size}
    return config | {"stack_size": settings.stack_size}
