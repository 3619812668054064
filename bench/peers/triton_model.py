"""The Frameconv step for Triton's Python backend and its sequence batcher (oldest); the states in a dict."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

from tenuto_models import checkpoint
from tenuto_models.sampling import uniforms


class TritonPythonModel:
    """One instance; Triton hands it the requests of different sequences together."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the policy once."""
        torch.set_num_threads(1)
        repository = Path(os.environ["TENUTO_BENCH_REPOSITORY"])
        self._policy = checkpoint.read(repository / "frameconv" / "1").policy.eval().requires_grad_(False)
        self._states: dict[int, tuple[dict[str, torch.Tensor], int]] = {}

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer a batch: one row per request."""

        def column(name: str) -> np.ndarray:
            return np.concatenate(
                [pb_utils.get_input_tensor_by_name(r, name).as_numpy().reshape(1, -1) for r in requests]
            )

        policy, distribution = self._policy, self._policy.distribution
        ids, starts = column("CORRID")[:, 0].tolist(), column("START")[:, 0]
        fresh = policy.initial_state(1)
        rows = [({k: v[0] for k, v in fresh.items()}, 0) if s or i not in self._states else self._states[i]
                for i, s in zip(ids, starts, strict=True)]  # fmt: skip
        state = {name: torch.stack([row[name] for row, _ in rows]) for name in fresh}
        steps = np.array([step for _, step in rows], np.uint64)
        with torch.inference_mode():
            output, after = policy.step(torch.from_numpy(column("observation")), state)
            draws = torch.from_numpy(uniforms(np.array(ids, np.uint64), steps, distribution.num_uniforms))
            actions = distribution.to_space(distribution.sample(output.logits, draws)).numpy()
        for row, i in enumerate(ids):
            self._states[i] = ({name: tensor[row] for name, tensor in after.items()}, int(steps[row]) + 1)
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("action", actions[row : row + 1].reshape(1, 1))])
            for row in range(len(ids))
        ]
