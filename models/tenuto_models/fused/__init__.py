"""The policy's step for a GPU: memory cores as a few fused Triton kernels over the sessions' state in place.

Importing this package needs Triton, which torch's CUDA builds bring along; nothing imports it but who runs on a GPU, or
under Triton's interpreter (``TRITON_INTERPRET=1``) on a CPU, which is slow and for tests.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch

from tenuto_models.dnc import DNCConfig, DNCCore
from tenuto_models.frameconv import FrameconvCore
from tenuto_models.fused.dnc import FusedDNC
from tenuto_models.fused.draw import FusedDraw, can_draw
from tenuto_models.fused.frameconv import FusedFrameconv
from tenuto_models.fused.launch import obstacle_on
from tenuto_models.fused.linear import FixedTileLinear, Precision, fix_tiles
from tenuto_models.fused.rows import StateRows
from tenuto_models.policy import Policy

__all__ = ["FixedTileLinear", "FusedDraw", "Precision", "StateRows", "can_draw", "fix_tiles", "fuse", "obstacle_on"]


def fuse(policy: Policy, rows: StateRows) -> Policy:
    """Return a copy of a policy whose ``step`` works on ``rows`` in place; inference only.

    Its state is what ``rows.gather`` says of a batch, and what ``rows.scatter`` takes. Does not modify the policy.
    """
    expected = sum(t.num_elements for t in policy.state_spec if t.dtype == torch.float32)
    assert rows.rows.shape[1] == expected, f"got state rows of {rows.rows.shape[1]} values, expected {expected}"
    fused = copy.deepcopy(policy)
    core, config = policy.core, policy.config.memory
    if isinstance(core, DNCCore) and isinstance(config, DNCConfig):
        fused_core = FusedDNC(core, config, rows.rows)
    else:
        assert isinstance(core, FrameconvCore)
        fused_core = FusedFrameconv(core, rows.rows)
    fused.core = cast(Any, fused_core)
    return fused
