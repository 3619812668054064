"""RLlib's PPO for a policy with memory: one TrainConfig in, one algorithm out, and Ray as quiet as it goes.

Ray leaves nothing behind: its session and sockets live in a temporary folder that is removed at the end, its token in
the environment instead of ``~/.ray/auth_token``, and ``~/ray_results`` is not made.
"""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import gymnasium
import numpy as np
import ray
import torch
from gymnasium import spaces
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.tune.registry import register_env

from tenuto_envs import make
from tenuto_trainer.allocator import keep_freed_memory
from tenuto_trainer.config import MAX_SEED, TrainConfig
from tenuto_trainer.envs import for_rllib
from tenuto_trainer.errors import TrainConfigError
from tenuto_trainer.learner import restore_learner
from tenuto_trainer.ppo_learner import PPOLearner
from tenuto_trainer.publish import CheckpointPublisher
from tenuto_trainer.resume import Start
from tenuto_trainer.rl_module import PolicyModule, model_config_for
from tenuto_trainer.state import TrainingState

_ENV_NAME = "tenuto"
_OBJECT_STORE_BYTES = 128 * 2**20
_START_ATTEMPTS = 3


@contextmanager
def local_ray(config: TrainConfig, num_cpus: int | None = None) -> Generator[None]:
    """Run a Ray of our own on this machine, without dashboard, usage statistics or chatter; shut it down at the end.

    ``num_cpus`` is what Ray shares out among its processes; None: enough for one run.

    Does not touch RAY_AUTH_MODE: Ray's default keeps other users of the machine out of its ports. Sets RAY_AUTH_TOKEN
    for this process and its children if nobody did: without it Ray writes a token to the home folder.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    for name in ("ray", "ray.rllib", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Paths of sockets must be short, hence the prefix; Ray's processes may still write while they end.
    with tempfile.TemporaryDirectory(prefix="tenuto-", ignore_cleanup_errors=True) as folder:
        try:
            _start_ray(
                address="local",
                num_cpus=num_cpus or 1 + config.num_env_runners,
                num_gpus=int(uses_gpu(config)),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=folder,
            )
            yield
        finally:
            ray.shutdown()


def _start_ray(**options: Any) -> None:
    """Start Ray; again where the machine was too busy for the half minute that Ray gives its processes."""
    for attempts_left in reversed(range(_START_ATTEMPTS)):
        try:
            ray.init(**options)
            return
        except Exception as error:
            ray.shutdown()
            if not attempts_left or "timed out during startup" not in str(error):
                raise


def uses_gpu(config: TrainConfig) -> bool:
    """Say whether the learner computes on a GPU. Raises TrainConfigError if it is to and there is none."""
    found = config.learner_device != "cpu" and torch.cuda.is_available()
    if config.learner_device == "cuda" and not found:
        raise TrainConfigError(
            f"learner_device: got 'cuda', expected 'cpu' or 'auto', for torch {torch.__version__} finds no GPU here"
        )
    return found


def ppo_config(
    config: TrainConfig, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], start: Start
) -> PPOConfig:
    """Say to RLlib what the run's configuration says. Registers the environment with Ray's registry."""
    register_env(_ENV_NAME, partial(_make_for_rllib, config.env_id))
    model_config = model_config_for(
        observation_space, action_space, config.policy_config(), config.max_seq_len, start.folder
    )
    publisher = partial(CheckpointPublisher, config, model_config, start.without_tensors())
    return (
        PPOConfig(algo_class=_PPO)
        # Actions are scaled and clipped by our own wrapper, as the server does it.
        .framework(torch_skip_nan_gradients=True)  # PPOLearner looks for them.
        .environment(_ENV_NAME, disable_env_checking=True, normalize_actions=False, clip_actions=False)
        .env_runners(num_env_runners=config.num_env_runners, num_envs_per_env_runner=config.num_envs)
        .training(
            lr=config.lr,
            gamma=config.gamma,
            lambda_=config.gae_lambda,
            clip_param=config.clip,
            entropy_coeff=config.entropy,
            grad_clip=config.grad_clip,
            use_kl_loss=False,
            vf_clip_param=float("inf"),
            vf_loss_coeff=0.5,
            train_batch_size_per_learner=config.batch_size,
            minibatch_size=config.minibatch_size,
            num_epochs=config.num_epochs,
        )
        .rl_module(rl_module_spec=RLModuleSpec(PolicyModule, model_config=model_config))
        .learners(learner_class=PPOLearner, num_learners=0, num_gpus_per_learner=int(uses_gpu(config)))
        .callbacks(cast(Any, publisher))  # Any callable will do, the annotation asks for a class.
        # Its monitor holds up the end of every run for up to 0.7 s.
        .debugging(seed=_seed_of_run(config.seed, start.progress.iteration), log_level="ERROR", log_sys_usage=False)
    )


class _PPO(PPO):
    """PPO without the folder in ~/ray_results that every algorithm makes for itself; nothing is ever written to it.

    The learner lives in its process, so it keeps freed memory.
    """

    def setup(self, config: Any) -> None:
        keep_freed_memory()
        super().setup(config)

    def _setup_logdir(self) -> None:
        self._logdir = tempfile.gettempdir()


@contextmanager
def build_algorithm(
    config: PPOConfig, state: TrainingState | None = None
) -> Generator[tuple[Algorithm, CheckpointPublisher]]:
    """Build the algorithm and its publisher, which has published a version by then; stop the algorithm at the end.

    The learner goes on from ``state``, that of the :class:`Start` which the config was made with.
    """
    algorithm = config.build_algo()
    callbacks: Any = algorithm.callbacks  # A list in the new API stack, annotated as one callback.
    try:
        if state is not None:
            restore_learner(algorithm, state.tensors)
        yield algorithm, next(c for c in callbacks if isinstance(c, CheckpointPublisher))
    finally:
        algorithm.stop()


def _seed_of_run(seed: int | None, iteration: int) -> int | None:
    """Return the seed to go on with after so many iterations; with the first one old episodes would come again."""
    if seed is None or iteration == 0:
        return seed
    return int(np.random.SeedSequence([seed, iteration]).generate_state(1)[0]) % MAX_SEED


def _make_for_rllib(env_id: str, _: Any) -> gymnasium.Env[Any, Any]:
    return for_rllib(make(env_id))
