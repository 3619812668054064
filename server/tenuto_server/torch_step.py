"""A version's step by torch, operation by operation: for devices that have no code of their own here.

Legend: B rows of a batch, padded to a bucket; n of them are real.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tenuto_models import Policy
from tenuto_models.sampling import uniforms
from tenuto_server.arena import StateArena
from tenuto_server.step import StepResults, StepRows


class TorchStep:
    """An engine's Step on the arena's device."""

    def __init__(self, policy: Policy, arena: StateArena, buckets: Sequence[int]) -> None:
        """Moves ``policy`` to the device. ``buckets``: the batch sizes that rows are padded to, ascending."""
        self._policy = policy.to(arena.device).eval().requires_grad_(False)
        self._arena, self.sizes = arena, tuple(buckets)

    @torch.inference_mode()
    def advance(self, rows: StepRows) -> StepResults:
        """See Step."""
        began = time.perf_counter()
        policy, arena, n = self._policy, self._arena, len(rows)
        padding = next(size for size in self.sizes if size >= n) - n
        slots = self._to_device(rows.slots, padding, fill=arena.spare)
        starts = self._to_device(rows.episode_starts, padding)
        observations = self._to_device(rows.observations, padding)
        draws = uniforms(rows.seeds, rows.step_indices, policy.distribution.num_uniforms)
        draws = self._to_device(draws, padding, fill=0.5)
        deterministic = self._to_device(rows.deterministic, padding)
        state = arena.gather(slots, starts)

        gathered = time.perf_counter()
        output, after = policy.step(observations, state)
        distribution = policy.distribution
        greedy = deterministic.view(-1, 1)
        raw = torch.where(greedy, distribution.greedy(output.logits), distribution.sample(output.logits, draws))
        actions, log_probs = distribution.to_space(raw), distribution.log_prob(output.logits, raw)
        finite = torch.isfinite(output.logits).all(dim=1) & torch.isfinite(output.value + log_probs)

        ran = time.perf_counter()
        arena.scatter(slots, after, keep=finite)
        host = [t[:n].cpu().numpy() for t in (actions, output.value, log_probs, output.logits, finite)]
        scattered = time.perf_counter()
        return StepResults(
            rows, *host, station_s={"gather": gathered - began, "run": ran - gathered, "scatter": scattered - ran}
        )

    def _to_device(self, column: NDArray[Any], padding: int, fill: float = 0) -> torch.Tensor:
        """Copy a host column ``[n, ...]`` to the device, padded to the bucket."""
        if padding:
            column = np.concatenate([column, np.full((padding, *column.shape[1:]), fill, column.dtype)])
        return torch.from_numpy(column).to(self._arena.device)
