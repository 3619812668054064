"""Frameconv: one temporal convolution over the last K frames of features.

Legend: B rows, T time steps, F input features, H output features, K frames in the receptive field.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto_models.errors import ConfigError
from tenuto_models.memory import State, StateSpec, TensorSpec


@dataclass(frozen=True)
class FrameconvConfig:
    """Sizes of a Frameconv; the defaults are those of POPGym's ``Frameconv``."""

    hidden_size: int = 256
    """H: width of the core's output."""
    stack_size: int = 4
    """K: frames in the receptive field, the current one included."""

    def __post_init__(self) -> None:
        for name, least in (("hidden_size", 1), ("stack_size", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"FrameconvConfig.{name}: got {value!r}, expected an integer >= {least}")

    def build(self, input_size: int) -> FrameconvCore:
        """Return a freshly initialised core for inputs of ``input_size`` features."""
        return FrameconvCore(input_size, self)


class FrameconvCore(nn.Module):
    """``y_t = b + Σ_k W[:, :, k] z_{t-(K-1)+k}`` as one matrix product over the K frames, oldest first.

    ``weight [H, K F]`` is Conv1d's ``[H, F, K]`` with the taps moved in front of the features.
    """

    def __init__(self, input_size: int, config: FrameconvConfig) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, config.hidden_size
        self.stack_size = config.stack_size
        # Linear draws U(±1/√(K F)) for both tensors, which is also Conv1d's default.
        self.conv = nn.Linear(config.stack_size * input_size, config.hidden_size)
        self.state_spec: StateSpec = (TensorSpec("window", (config.stack_size - 1, input_size)),)

    def step(self, z: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """Advance one step: ``z [B, F]`` -> ``(y [B, H], state)``."""
        frames = torch.cat([state["window"], z.unsqueeze(1)], dim=1)
        return self.conv(frames.flatten(1)), {"window": frames[:, 1:]}

    def unroll(self, z: Tensor, state: State, seq_lens: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Advance a padded sequence: ``z [B, T, F]`` -> ``(y [B, T, H], state after seq_lens)``."""
        kept, length = self.stack_size - 1, z.shape[1]
        frames = torch.cat([state["window"], z], dim=1)
        kernel = self.conv.weight.view(self.output_size, self.stack_size, self.input_size).transpose(1, 2)
        y = F.conv1d(frames.transpose(1, 2), kernel, self.conv.bias).transpose(1, 2)
        if seq_lens is None:
            return y, {"window": frames[:, length:]}
        # The K-1 frames that end at step seq_lens[b] start at row seq_lens[b] of [window, z].
        last = seq_lens.long().unsqueeze(1) + torch.arange(kept, device=z.device)
        return y, {"window": frames.gather(1, last.unsqueeze(2).expand(-1, -1, self.input_size))}
