"""The policy as an RLModule of RLlib's new API stack: the only file that knows RLlib's shape rules.

Legend: B environments, R rows (chunks of episodes), T = max_seq_len, O flattened observation, K logits.
The rules: sampling sees ``obs [B, 1, O]`` with a state of leaves ``[B, ...]``; training sees ``obs [R, T, O]``,
zero-padded on the right, with the state before each row's first step. RLlib's connectors take every leaf of every
environment apart at every step, so all float tensors of a state travel as one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import tree
from gymnasium import spaces as gym_spaces
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchMultiCategorical
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor
from torch.nn import functional as F

from tenuto_models import Policy, PolicyConfig, State, checkpoint, spaces
from tenuto_models.policy import STEP_COUNTER

_PREFIX = "policy."
_COUNTER = STEP_COUNTER.name
# Its get_partial_dist_cls is a class method that is annotated as one of an instance.
_MultiCategorical = cast(Any, TorchMultiCategorical)


def model_config_for(
    observation_space: gym_spaces.Space[Any],
    action_space: gym_spaces.Space[Any],
    config: PolicyConfig,
    max_seq_len: int,
    start_from: Path | None = None,
) -> dict[str, Any]:
    """Return the ``model_config`` of a :class:`PolicyModule`; the spaces are the environment's own, before flattening.

    ``start_from`` is the folder of a published version whose weights training begins with.
    """
    return {
        "observation_space": spaces.to_json(observation_space),
        "action_space": spaces.to_json(action_space),
        "policy": config.to_json(),
        "max_seq_len": max_seq_len,
        "start_from": str(start_from) if start_from else None,
    }


def policy_of(module_weights: Mapping[str, NDArray[Any]], model_config: Mapping[str, Any]) -> Policy:
    """Build the policy that a module's weights (name -> array, as a learner hands them out) stand for."""
    policy = _fresh_policy(model_config)
    policy.load_state_dict(
        {name.removeprefix(_PREFIX): torch.as_tensor(array) for name, array in module_weights.items()}
    )
    return policy


class PolicyModule(TorchRLModule, ValueFunctionAPI):
    """A :class:`tenuto_models.Policy` that RLlib samples with and trains. Adds no parameters of its own."""

    policy: Policy

    def setup(self) -> None:
        """Build everything that is trained; called once, by RLlib's constructor."""
        config: Mapping[str, Any] = self.model_config
        start_from = config["start_from"]
        self.policy = checkpoint.read(Path(start_from)).policy if start_from else _fresh_policy(config)
        self._packed = [spec for spec in self.policy.state_spec if spec.name != _COUNTER]
        # RLlib's own choice covers Discrete (TorchCategorical) and Box (TorchDiagGaussian).
        if isinstance(self.action_space, gym_spaces.MultiDiscrete):
            self.action_dist_cls = _MultiCategorical.get_partial_dist_cls(input_lens=self.action_space.nvec.tolist())

    def get_initial_state(self) -> dict[str, NDArray[Any]]:
        """Return the state of one fresh episode, without a batch dimension."""
        return {name: tensor[0].numpy() for name, tensor in self.pack_state(self.policy.initial_state(1)).items()}

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Sample one step: ``obs [B, 1, O]`` -> ``action_dist_inputs [B, 1, K]``, ``vf_preds [B, 1]``, the state."""
        output, state = self.policy.step(batch[Columns.OBS][:, 0], self.unpack_state(batch[Columns.STATE_IN]))
        return {
            Columns.ACTION_DIST_INPUTS: output.logits.unsqueeze(1),
            Columns.VF_PREDS: output.value.unsqueeze(1),
            Columns.STATE_OUT: self.pack_state(state),
        }

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Recompute whole rows: ``obs [R, T, O]`` -> ``action_dist_inputs [R, T, K]``, ``embeddings [R, T]``.

        The embeddings are the values themselves: the critic shares the memory core with the actor. Steps beyond the
        longest row are padding of all rows: they are not computed and come out as zeros. RLlib masks what padding is
        left in the loss, and the state after a row is not asked for.
        """
        observations, seq_lens = batch[Columns.OBS], batch[Columns.SEQ_LENS]
        longest = int(seq_lens.max())
        padding = observations.shape[1] - longest
        output, _ = self.policy.unroll(
            observations[:, :longest], self.unpack_state(batch[Columns.STATE_IN]), seq_lens
        )  # fmt: skip
        return {
            Columns.ACTION_DIST_INPUTS: F.pad(output.logits, (0, 0, 0, padding)),
            Columns.EMBEDDINGS: F.pad(output.value, (0, padding)),
        }

    def pack_state(self, state: State) -> dict[str, Tensor]:
        """Pack the float tensors of a state as ``[B, row]``; make the counter int32, as the connectors would."""
        parts = [state[spec.name].flatten(1) for spec in self._packed]
        return {"packed": torch.cat(parts, dim=1), _COUNTER: state[_COUNTER].to(torch.int32)}

    def unpack_state(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Undo :meth:`pack_state`."""
        parts = leaves["packed"].split([spec.num_elements for spec in self._packed], dim=1)
        state = {spec.name: part.unflatten(1, spec.shape) for spec, part in zip(self._packed, parts, strict=True)}
        return {**state, _COUNTER: leaves[_COUNTER].long()}

    def compute_values(self, batch: dict[str, Any], embeddings: Tensor | None = None) -> Tensor:
        """Values ``[R, T]``: those of the training forward, or, without them, those that advantages are made of.

        These were computed while sampling, by the same weights, for all but the last observation of an episode, whose
        step RLlib added: rows with such a step that did not end the episode are computed here, without gradients.
        """
        if embeddings is not None:
            return embeddings
        values: Tensor = batch[Columns.VF_PREDS].clone()
        added = batch[Columns.SEQ_LENS] > batch[Columns.LOSS_MASK].sum(dim=1)
        rows = torch.nonzero(added & ~batch[Columns.TERMINATEDS].any(dim=1)).squeeze(1)
        if len(rows):
            names = Columns.OBS, Columns.STATE_IN, Columns.SEQ_LENS
            columns: Any = take_rows({name: batch[name] for name in names}, rows)
            with torch.no_grad():
                values[rows] = self._forward_train(columns)[Columns.EMBEDDINGS]
        return values


def take_rows(columns: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """Index every leaf of a batch's columns along its first dimension."""

    def take(column: Tensor) -> Tensor:
        return column[rows]

    return cast(Any, tree.map_structure(take, columns))


def _fresh_policy(model_config: Mapping[str, Any]) -> Policy:
    return Policy(
        spaces.from_json(model_config["observation_space"]),
        spaces.from_json(model_config["action_space"]),
        PolicyConfig.from_json(model_config["policy"]),
    )
