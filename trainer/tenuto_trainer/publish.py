"""Publishes checkpoints while RLlib trains: the first at once, then every N iterations and on a better return.

Called by RLlib on the driver: on_algorithm_init once, on_train_result after each iteration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core import DEFAULT_MODULE_ID

from tenuto_models import CheckpointError, TrainingProgress, checkpoint
from tenuto_trainer.errors import DivergedError
from tenuto_trainer.rl_module import policy_of


class CheckpointPublisher(RLlibCallback):
    """Owns the decision when to publish. The best return is kept in the published manifests, so it outlives the run.

    RLlib builds one in every process; only the algorithm's own writes anything, the constructor never does.
    """

    def __init__(
        self,
        repository: Path,
        policy_name: str,
        model_config: Mapping[str, Any],
        publish_every: int,
        publish_gain: float = 0.0,
        start: TrainingProgress | None = None,
    ) -> None:
        """``start`` is where the published version stood that this run goes on from; None: a fresh policy.

        ``publish_every`` in iterations, ``publish_gain`` in units of return.
        """
        super().__init__()
        self._repository, self._policy_name, self._model_config = repository, policy_name, model_config
        self._publish_every, self._publish_gain = publish_every, publish_gain
        self._start = start or TrainingProgress()
        self.progress = self._start
        """Where training stands, as the next manifest would say it."""
        self._published = start
        self._best_published = -math.inf
        self.version: int | None = None
        """Newest version of the policy; None before there is one."""

    def on_algorithm_init(self, *, algorithm: Algorithm, **kwargs: Any) -> None:
        """Publish the untrained policy, so that a server can start; not where the run goes on from a version."""
        if self._published is None:
            self.publish(algorithm)
            return
        self.version = max(checkpoint.versions(self._repository / self._policy_name), default=None)
        best = checkpoint.best_return(self._repository, self._policy_name)
        self.progress = self._published = replace(self._start, best_return=best)
        self._best_published = -math.inf if best is None else best

    def on_train_result(self, *, algorithm: Algorithm, result: dict[str, Any], **kwargs: Any) -> None:
        """Publish if it is due or the return is better. Raises DivergedError if a weight or the loss is not finite."""
        before, iteration = self.progress, int(result["training_iteration"])
        measured = float(result["env_runners"].get("episode_return_mean", math.nan))
        # Where no episode ended in this iteration, the last known mean stands.
        return_mean = before.return_mean if math.isnan(measured) else measured
        known = [r for r in (before.best_return, return_mean) if r is not None]
        self.progress = TrainingProgress(
            env_steps=self._start.env_steps + int(result["num_env_steps_sampled_lifetime"]),
            iteration=self._start.iteration + iteration,
            return_mean=return_mean,
            best_return=max(known, default=None),
        )
        self._require_finite(algorithm, result)
        if self._best_published == -math.inf and not math.isnan(measured):
            # The first return was measured with the weights of the version that is published already.
            self._best_published = measured
        if measured > self._best_published + self._publish_gain or iteration % self._publish_every == 0:
            self.publish(algorithm)

    def publish(self, algorithm: Algorithm) -> None:
        """Write a version now, unless nothing was trained since the last one."""
        if self._published == self.progress:
            return
        policy = policy_of(self._weights(algorithm), self._model_config)
        try:
            folder = checkpoint.write(self._repository, self._policy_name, policy, self.progress)
        except OSError as error:
            raise CheckpointError(f"{self._repository}: cannot publish to this repository ({error})") from error
        self._published, self.version = self.progress, int(folder.name)
        if self.progress.return_mean is not None:
            self._best_published = max(self._best_published, self.progress.return_mean)

    def _require_finite(self, algorithm: Algorithm, result: Mapping[str, Any]) -> None:
        """RLlib turns NaN gradients to zero, so that a lost policy may show in its loss only."""
        loss = result.get("learners", {}).get(DEFAULT_MODULE_ID, {}).get("total_loss", 0.0)
        for name, figure in [*self._weights(algorithm).items(), ("the loss", loss)]:
            if not np.isfinite(figure).all():
                raise DivergedError(
                    f"training diverged in iteration {self.progress.iteration}: {name} is NaN or infinite; "
                    f"the last good version is {self.version}; try a smaller lr"
                )

    def _weights(self, algorithm: Algorithm) -> dict[str, Any]:
        learners = algorithm.learner_group
        assert learners is not None, "an algorithm of the new API stack has learners"
        return learners.get_weights()[DEFAULT_MODULE_ID]
