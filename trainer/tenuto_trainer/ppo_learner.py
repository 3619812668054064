"""RLlib's PPO learner, which here trains on the steps that were played and on no others."""

from __future__ import annotations

from typing import Any, cast

import tree
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core.columns import Columns
from torch import Tensor


class PPOLearner(PPOTorchLearner):
    """PPO's learner with :class:`DropBootstrapSteps` at the end of its connectors."""

    def build(self) -> None:
        """Build module, optimizer and connectors."""
        super().build()
        assert self._learner_connector is not None, "PPO has learner connectors"
        self._learner_connector.append(DropBootstrapSteps())


class DropBootstrapSteps(ConnectorV2):
    """Shortens every row to the steps that count in the loss, once advantages are there.

    RLlib adds a step to every episode, for the value of its last observation. Left in, it is computed in every epoch,
    and the minibatches are as many as if it had been played: nine instead of eight, say.
    """

    def __call__(self, *, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Columns ``[R, T, ...]`` and their ``seq_lens [R]`` -> those of the rows that are left."""
        return {module_id: _without_bootstrap_steps(columns) for module_id, columns in batch.items()}


def _without_bootstrap_steps(columns: dict[str, Any]) -> dict[str, Any]:
    played: Tensor = columns[Columns.LOSS_MASK].sum(dim=1)
    columns[Columns.SEQ_LENS] = played.to(columns[Columns.SEQ_LENS].dtype)
    # Of an episode as long as a row, the step was a row of its own.
    left = played > 0

    def keep(column: Tensor) -> Tensor:
        return column[left]

    return cast(Any, tree.map_structure(keep, columns))
