"""One training run: a plain ``algorithm.train()`` loop that stops cleanly, and publishes before it does."""

from __future__ import annotations

import secrets
import shlex
import signal
import time
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from gymnasium import spaces
from ray.rllib.core import DEFAULT_MODULE_ID

from tenuto_envs import make
from tenuto_models import Policy, TrainingProgress
from tenuto_models.signing import Signer
from tenuto_trainer import config_file
from tenuto_trainer.config import MAX_SEED, TrainConfig
from tenuto_trainer.folders import sweep
from tenuto_trainer.lock import only_training
from tenuto_trainer.ppo import build_algorithm, local_ray, ppo_config, uses_gpu
from tenuto_trainer.progress import IterationReport, Progress, scalars_of
from tenuto_trainer.resume import Start, find_start
from tenuto_trainer.served import ServerWatch, credentials_of, token_of


class StopSignal:
    """Remembers the first SIGINT or SIGTERM; a second SIGINT interrupts at once. For the main thread."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def listen(self) -> None:
        """Install the handlers. Called again after ray.init, which takes SIGTERM for itself."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def train(config: TrainConfig, progress: Progress) -> TrainingProgress:
    """Train until a limit of the config or a signal, publish the last policy, and return where training stands.

    Leaves the effective configuration, with the seed that was drawn, in the log folder.
    Sets torch's threads and the handlers of SIGINT and SIGTERM for the whole process.
    Raises EnvError, ConfigError or TrainConfigError before Ray starts; CheckpointError or DivergedError while training,
    RefusedError at its end.
    """
    env = make(config.env_id)
    observation_space, action_space = env.observation_space, env.action_space
    env.close()
    policy_config = config.policy_config()
    policy = Policy(observation_space, action_space, policy_config)  # Refuses what no policy can be built for.
    uses_gpu(config)  # Refuses a GPU that is not there.
    if config.signing_key is not None:
        Signer.from_file(config.signing_key)  # Refuses a key that is none.
    if config.seed is None:
        config = replace(config, seed=secrets.randbelow(MAX_SEED))
    _compile(policy, progress)
    with only_training(config):
        start = find_start(config.repository, config.policy, observation_space, action_space, policy_config)
        return _train(config, observation_space, action_space, start, progress)


def _compile(policy: Policy, progress: Progress) -> None:
    """Take a step and a gradient, so that what compiles at the first of them does not do so while training."""
    began = time.monotonic()
    output, _ = policy.unroll(torch.zeros(1, 1, policy.observation_size), policy.initial_state(1))
    (output.logits.sum() + output.value.sum()).backward()
    if (seconds := time.monotonic() - began) > 2:
        progress.note(f"compiled the memory's code for this machine in {seconds:.0f} s; the next run finds it")


def _train(
    config: TrainConfig,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    start: Start,
    progress: Progress,
) -> TrainingProgress:
    torch.set_num_threads(config.torch_threads)
    stop = StopSignal()
    stop.listen()
    progress.note("starting Ray, which takes some seconds")
    watching = ServerWatch(config.server, config.policy, credentials=credentials_of(config), token=token_of(config))
    with local_ray(config), watching as watch:
        stop.listen()
        ppo = ppo_config(config, observation_space, action_space, start)
        with build_algorithm(ppo, start.state) as (algorithm, publisher):
            sweep(config.repository / config.policy)
            config_file.write(config.log_dir / config.policy / config_file.FILE, config)
            if start.refused:
                progress.note(f"the training state is not used: {start.refused}")
            progress.note(f"{config.policy} {start}; newest version is {publisher.version}")
            progress.begin(publisher.progress)
            reason = _reason_to_stop(config, stop, publisher.progress)
            while reason is None:
                watch.published(publisher.version, publisher.published_iteration)
                began, steps_before = time.monotonic(), publisher.progress.env_steps
                result = algorithm.train()
                duration = time.monotonic() - began
                reason = _reason_to_stop(config, stop, publisher.progress)
                if reason is not None:  # Before the last line, which is to name the version that stays.
                    publisher.publish(algorithm)
                for news in watch.news():
                    progress.note(news)
                progress.iteration(
                    IterationReport(
                        progress=publisher.progress,
                        version=publisher.version,
                        evaluation=publisher.evaluation,
                        steps_per_second=(publisher.progress.env_steps - steps_before) / duration,
                        scalars=scalars_of(result, DEFAULT_MODULE_ID) | watch.scalars(),
                    )
                )
            publisher.publish(algorithm)  # What a run that was killed had not published.
            progress.end(f"stopped: {reason}; newest version is {publisher.version}")
            watch.published(publisher.version, publisher.published_iteration)
            advice = f"serve it: tenuto-serve --repository {shlex.quote(str(config.repository))}"
            progress.end(watch.conclude() or advice)
            return publisher.progress


def _reason_to_stop(config: TrainConfig, stop: StopSignal, now: TrainingProgress) -> str | None:
    """Say why the training is over, or None. Its limits count what was done before a restart, too."""
    if stop.received is not None:
        return f"received {stop.received.name}"
    if config.iterations is not None and now.iteration >= config.iterations:
        return f"{now.iteration} iterations done"
    if config.stop_seconds is not None and now.seconds >= config.stop_seconds:
        return f"trained for {now.seconds:.0f} s"
    wanted, got = config.stop_return, now.return_mean
    if wanted is not None and got is not None and got >= wanted:
        return f"return {got:.3f} reached {wanted}"
    return None
