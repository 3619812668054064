"""Publishes checkpoints while RLlib trains: the first at once, then every N iterations and on a better return.

Called by RLlib on the driver: on_algorithm_init once, on_train_result after each iteration. There it also leaves the
training state, before any version of the same iteration, so that a kill between the two costs nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core import DEFAULT_MODULE_ID

from tenuto_models import CheckpointError, Evaluation, Policy, TrainingProgress, checkpoint
from tenuto_models.signing import Signer
from tenuto_trainer import state as training_state
from tenuto_trainer.config import TrainConfig
from tenuto_trainer.errors import DivergedError
from tenuto_trainer.evaluation import evaluate
from tenuto_trainer.learner import learner_tensors
from tenuto_trainer.resume import Start
from tenuto_trainer.rl_module import policy_of
from tenuto_trainer.state import TrainingState


class CheckpointPublisher(RLlibCallback):
    """Owns the decision when to publish. The best return is kept in state and manifests, so it outlives the run.

    RLlib builds one in every process; only the algorithm's own writes anything, the constructor never does.
    """

    def __init__(self, config: TrainConfig, model_config: Mapping[str, Any], start: Start) -> None:
        """``start`` is what the run goes on from; its tensors are not looked at."""
        super().__init__()
        self._config, self._model_config, self._start = config, model_config, start
        self.progress = start.progress
        """Where training stands, as the next manifest would say it."""
        self.version: int | None = None
        """Newest version of the policy; None before there is one."""
        self.evaluation: Evaluation | None = None
        """How that version did on held-out seeds; None where nobody looked."""
        self.published_iteration = 0
        """Iteration that this version is of."""
        self._best_published = -math.inf
        self._clock_s = 0.0
        self._description: dict[str, Any] = {}

    def on_algorithm_init(self, *, algorithm: Algorithm, **kwargs: Any) -> None:
        """Publish the untrained policy, so that a server can start; not where the run goes on from a version."""
        self._clock_s = time.monotonic()
        self._description = training_state.describe(self._policy(algorithm))
        published, state = self._start.published, self._start.state
        if published is None:
            self.publish(algorithm)
            return
        repository, name = self._config.repository, self._config.policy
        self.version, self.evaluation = max(checkpoint.versions(repository / name), default=None), published.evaluation
        self.published_iteration = published.iteration
        best = checkpoint.best_return(repository, name)
        known = [r for r in (best, self.progress.best_return) if r is not None]
        self.progress = replace(self.progress, best_return=max(known, default=None))
        bars = (state.best_published, published.return_mean) if state else (best,)
        self._best_published = max((r for r in bars if r is not None), default=-math.inf)

    def on_train_result(self, *, algorithm: Algorithm, result: dict[str, Any], **kwargs: Any) -> None:
        """Keep the state; publish if due or better. Raises DivergedError if a weight or the loss is not finite."""
        before, origin, now_s = self.progress, self._start.progress, time.monotonic()
        measured = float(result["env_runners"].get("episode_return_mean", math.nan))
        # Where no episode ended in this iteration, the last known mean stands.
        return_mean = before.return_mean if math.isnan(measured) else measured
        known = [r for r in (before.best_return, return_mean) if r is not None]
        self.progress = TrainingProgress(
            env_steps=origin.env_steps + int(result["num_env_steps_sampled_lifetime"]),
            iteration=origin.iteration + int(result["training_iteration"]),
            return_mean=return_mean,
            best_return=max(known, default=None),
            seconds=before.seconds + now_s - self._clock_s,
        )
        self._clock_s = now_s
        self._require_finite(algorithm, result)
        if self._best_published == -math.inf and not math.isnan(measured):
            # The first return was measured with the weights of the version that is published already.
            self._best_published = measured
        self._keep_state(algorithm)
        is_better = measured > self._best_published + self._config.publish_gain
        if is_better or self.progress.iteration % self._config.publish_every == 0:
            self.publish(algorithm)

    def publish(self, algorithm: Algorithm) -> None:
        """Evaluate the policy and write it as a version now, unless nothing was trained since the last one."""
        if self.version is not None and self.published_iteration == self.progress.iteration:
            return
        config, policy = self._config, self._policy(algorithm)
        if config.evaluation_episodes:
            found = evaluate(policy, config.env_id, config.evaluation_episodes, config.evaluation_max_steps)
            self.progress = replace(self.progress, evaluation=found)
        try:
            signer = None if config.signing_key is None else Signer.from_file(config.signing_key)
            folder = checkpoint.write(config.repository, config.policy, policy, self.progress, signer=signer)
        except OSError as error:
            raise CheckpointError(f"{config.repository}: cannot publish to this repository ({error})") from error
        self.published_iteration, self.version = self.progress.iteration, int(folder.name)
        self.evaluation = self.progress.evaluation
        if self.progress.return_mean is not None:
            self._best_published = max(self._best_published, self.progress.return_mean)

    def _keep_state(self, algorithm: Algorithm) -> None:
        state = TrainingState(
            tensors=learner_tensors(algorithm),
            policy=self._description,
            progress=self.progress,
            version=self.version or 0,
            best_published=None if self._best_published == -math.inf else self._best_published,
        )
        folder = self._config.repository / self._config.policy
        try:
            training_state.write(folder, state)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot keep the training state here ({error})") from error

    def _require_finite(self, algorithm: Algorithm, result: Mapping[str, Any]) -> None:
        """RLlib turns NaN gradients to zero, so that a lost policy may show in its loss only."""
        loss = result.get("learners", {}).get(DEFAULT_MODULE_ID, {}).get("total_loss", 0.0)
        for name, figure in [*self._weights(algorithm).items(), ("the loss", loss)]:
            if not np.isfinite(figure).all():
                raise DivergedError(
                    f"training diverged in iteration {self.progress.iteration}: {name} is NaN or infinite; "
                    f"the last good version is {self.version}; try a smaller lr"
                )

    def _policy(self, algorithm: Algorithm) -> Policy:
        return policy_of(self._weights(algorithm), self._model_config)

    def _weights(self, algorithm: Algorithm) -> dict[str, Any]:
        learners = algorithm.learner_group
        assert learners is not None, "an algorithm of the new API stack has learners"
        return learners.get_weights()[DEFAULT_MODULE_ID]
