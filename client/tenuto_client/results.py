"""What a step returns. N is the number of environments of a vector policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenuto_client.errors import TenutoError
from tenuto_proto.v1 import policy_pb2 as pb


@dataclass(frozen=True)
class Timings:
    """Where the server spent the time of a step; of a vector step, the slowest part."""

    queue_us: int
    """From arrival until the device took the step."""
    compute_us: int
    """The forward pass with gather and scatter."""
    batch_size: int
    """Sessions that shared the forward pass."""

    @classmethod
    def from_wire(cls, timings: pb.Timings) -> Timings:
        """Read the message."""
        return cls(timings.queue_us, timings.compute_us, timings.batch_size)


@dataclass(frozen=True)
class StepResult:
    """One action and what came with it. What was not asked for (``outputs``) is None."""

    action: Any
    """An element of the action space: an int for Discrete, else an array that is the caller's own."""
    value: float | None
    """The critic's estimate of the return from this observation on."""
    log_prob: float | None
    """Natural logarithm of the action's probability; for Box the density of the unscaled, unclipped draw."""
    logits: NDArray[np.float32] | None
    """Inputs of the action distribution: one group per categorical, or means then log standard deviations."""
    version: int
    """The version of the policy that chose the action."""
    step_index: int
    timings: Timings
    durable_step: int | None = None
    """How many of the session's steps outlive the server process, as far as it is known; None where none does."""


@dataclass(frozen=True)
class VectorStepResult:
    """The actions of many environments. Rows that failed or were masked hold zeros, and NaN among the floats."""

    actions: NDArray[Any]
    """``[N, *action shape]``, in the action space's dtype; the array is the caller's own."""
    values: NDArray[np.float32] | None
    """``[N]``"""
    log_probs: NDArray[np.float32] | None
    """``[N]``"""
    logits: NDArray[np.float32] | None
    """``[N, number of logits]``"""
    versions: NDArray[np.uint64]
    """``[N]``; 0 where there is no action."""
    step_indices: NDArray[np.uint64]
    """``[N]``; 0 where there is no action."""
    errors: Mapping[int, TenutoError]
    """Row -> why it has no action, ascending; empty unless ``raise_errors=False`` was asked for."""
    timings: Timings
    durable_steps: NDArray[np.uint64] | None = None
    """``[N]``, as StepResult.durable_step, 0 where there is no action; None where no session outlives its server."""
