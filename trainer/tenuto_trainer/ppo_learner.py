"""RLlib's PPO learner, which here trains on the steps that were played and on no others."""

from __future__ import annotations

import logging
from typing import Any

import torch
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core.columns import Columns
from ray.rllib.evaluation.postprocessing import Postprocessing
from torch import Tensor

from tenuto_trainer.rl_module import take_rows

log = logging.getLogger(__name__)


class PPOLearner(PPOTorchLearner):
    """PPO's learner with :class:`DropBootstrapSteps` at the end of its connectors.

    Its ``torch_skip_nan_gradients`` is to be set, so that RLlib leaves it to :meth:`apply_gradients` to look for NaN.
    """

    def build(self) -> None:
        """Build module, optimizer and connectors."""
        super().build()
        assert self._learner_connector is not None, "PPO has learner connectors"
        self._learner_connector.append(DropBootstrapSteps())

    def _create_iterator_if_necessary(self, *, minibatch_size: int | None = None, **kwargs: Any) -> Any:
        """Make RLlib's iterator over minibatches, whose rows it counts as ``int(rows * (minibatch_size / steps))``:
        rounded down, that is one too few now and then, and none where a minibatch is a row.
        """
        nudged: Any = minibatch_size and minibatch_size * (1 + 1e-9)
        return super()._create_iterator_if_necessary(minibatch_size=nudged, **kwargs)

    def apply_gradients(self, gradients_dict: dict[Any, Any]) -> None:
        """Update the weights, unless a gradient is not finite: one look at all, where RLlib takes two at each."""
        if bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients_dict.values()))):
            super().apply_gradients(gradients_dict)
        else:
            log.warning("a minibatch was left out: its gradients are not finite, or their norm is not")


class DropBootstrapSteps(ConnectorV2):
    """Shortens every row to the steps that count in the loss, once advantages are there.

    RLlib adds a step to every episode, for the value of its last observation. Left in, it is computed in every epoch,
    the minibatches are as many as if it had been played (nine instead of eight, say), and its advantage, which means
    nothing, has its part in the mean and the deviation that advantages are standardised with.
    """

    def __call__(self, *, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Columns ``[R, T, ...]`` and their ``seq_lens [R]`` -> those of the rows that are left."""
        return {module_id: _without_bootstrap_steps(columns) for module_id, columns in batch.items()}


def _without_bootstrap_steps(columns: dict[str, Any]) -> dict[str, Any]:
    played: Tensor = columns[Columns.LOSS_MASK].sum(dim=1)
    advantages: Tensor = columns[Postprocessing.ADVANTAGES]
    counted = advantages[columns[Columns.LOSS_MASK]]
    columns[Postprocessing.ADVANTAGES] = (advantages - counted.mean()) / counted.std(correction=0).clamp(min=1e-4)
    columns[Columns.SEQ_LENS] = played.to(columns[Columns.SEQ_LENS].dtype)
    # Of an episode as long as a row, the step was a row of its own.
    return take_rows(columns, played > 0)
