"""Frameconv over windows that stay where they are: the frames are one kernel, the convolution one matrix product.

Legend: B rows of a batch, C capacity, F input features, H output features, K frames in the receptive field.
"""

from __future__ import annotations

from torch import Tensor, nn

from tenuto_models.frameconv import FrameconvCore
from tenuto_models.fused.rows import frames
from tenuto_models.memory import State


class FusedFrameconv(nn.Module):
    """A Frameconv core, stepped over ``windows [C + 1, (K-1) F]`` in place. Shares the layer of that core."""

    def __init__(self, core: FrameconvCore, windows: Tensor) -> None:
        super().__init__()
        self.conv, self._windows = core.conv, windows

    def step(self, z: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """Advance one step: ``z [B, F]`` and where the state is -> ``(y [B, H], {"rows": [B, (K-1) F] after it})``.

        Does not modify the windows in place: that is for who knows whether the results are finite.
        """
        x = frames(z, self._windows, state)
        return self.conv(x), {"rows": x[:, z.shape[1] :]}
