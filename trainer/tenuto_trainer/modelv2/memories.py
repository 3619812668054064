"""``DiffNC`` and ``Frameconv``: :class:`BaseModel` around the cores of ``tenuto_models``.

Legend: B rows, H hidden size, L controller layers (1), R read heads, W cell size, N cells.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar

import gymnasium
from torch import Tensor

from tenuto_models import ConfigError, DNCConfig, FrameconvConfig, MemoryCore, ModelError
from tenuto_models.memory import initial_state
from tenuto_trainer.modelv2 import config as model_configs
from tenuto_trainer.modelv2.base import BaseModel, States


class _CoreModel(BaseModel):
    """A model around one of tenuto's cores; RLlib's list of states is in the order of the core's ``state_spec``."""

    core: MemoryCore

    def initial_state(self) -> States:
        """Return zeros."""
        return [tensor[0] for tensor in initial_state(self.core.state_spec, 1).values()]

    def forward_memory(self, z: Tensor, state: States, t_starts: Tensor, seq_lens: Tensor) -> tuple[Tensor, States]:
        """Unroll the core; it needs no ``t_starts``."""
        names = [t.name for t in self.core.state_spec]
        if len(state) != len(names):
            raise ModelError(f"state: got {len(state)} tensors, expected {names}")
        y, after = self.core.unroll(z, dict(zip(names, state, strict=True)), seq_lens)
        return y, [after[name] for name in names]


class DiffNC(_CoreModel):
    """The Differentiable Neural Computer."""

    MODEL_CONFIG: ClassVar[dict[str, Any]] = {
        # Layers of the controller, and controllers: the core has one of each.
        "num_hidden_layers": 1,
        "num_layers": 1,
        # R: read heads.
        "read_heads": 4,
        # W: floats in one cell; there are N = hidden_size // cell_size cells.
        "cell_size": 16,
        # Of the controller, which is an LSTM.
        "nonlinearity": "tanh",
    }
    MEMORY_KEYS: ClassVar[list[str]] = [
        "memory",
        "link_matrix",
        "precedence",
        "read_weights",
        "write_weights",
        "usage_vector",
    ]

    def __init__(
        self,
        obs_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        num_outputs: int,
        model_config: dict[str, Any],
        name: str,
        **custom_model_kwargs: Any,
    ) -> None:
        super().__init__(obs_space, action_space, num_outputs, model_config, name, **custom_model_kwargs)
        cfg = self.cfg
        model_configs.require_size("read_heads", cfg["read_heads"])
        for key in ("num_hidden_layers", "num_layers", "nonlinearity"):
            if cfg[key] != (only := self.MODEL_CONFIG[key]):
                raise ConfigError(f"{key}: got {cfg[key]!r}, expected {only!r}, the only one there is")
        hidden, cell = cfg["hidden_size"], cfg["cell_size"]
        if not isinstance(cell, int) or isinstance(cell, bool) or not 1 <= cell <= hidden:
            raise ConfigError(f"cell_size: got {cell!r}, expected an integer from 1 to hidden_size, which is {hidden}")
        cfg["nr_cells"] = hidden // cell
        memory = DNCConfig(hidden, cfg["nr_cells"], cell, cfg["read_heads"])
        self.core = memory.build(cfg["preprocessor_output_size"])

    def unpack_state(self, state: States) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor], Tensor]:
        """Name the nine tensors of a state: -> ``([(h [L, B, H], c [L, B, H])], memory, read_vecs [B, R W])``.

        ``memory`` holds one tensor ``[B, ...]`` for each of MEMORY_KEYS.
        """
        if len(state) != 3 + len(self.MEMORY_KEYS):
            raise ModelError(f"state: got {len(state)} tensors, expected h, c, read vectors and {self.MEMORY_KEYS}")
        h, c, read_vecs, *memory = state
        return (
            [(h.transpose(0, 1), c.transpose(0, 1))],
            OrderedDict(zip(self.MEMORY_KEYS, memory, strict=True)),
            read_vecs,
        )

    def pack_state(
        self, ctrl_hidden: list[tuple[Tensor, Tensor]], memory_dict: dict[str, Tensor], read_vecs: Tensor
    ) -> States:
        """Put together what :meth:`unpack_state` took apart."""
        [(h, c)] = ctrl_hidden
        return [h.transpose(0, 1), c.transpose(0, 1), read_vecs, *(memory_dict[key] for key in self.MEMORY_KEYS)]


class Frameconv(_CoreModel):
    """A convolution over the last frames of features, with a sine embedding unless the configuration says otherwise."""

    MODEL_CONFIG: ClassVar[dict[str, Any]] = {
        # K: frames in the receptive field, the current one included.
        "stack_size": 4,
        "embedding": "sine",
    }

    def __init__(
        self,
        obs_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        num_outputs: int,
        model_config: dict[str, Any],
        name: str,
        **custom_model_kwargs: Any,
    ) -> None:
        super().__init__(obs_space, action_space, num_outputs, model_config, name, **custom_model_kwargs)
        model_configs.require_size("stack_size", self.cfg["stack_size"], least=2)
        memory = FrameconvConfig(self.cfg["hidden_size"], self.cfg["stack_size"])
        self.core = memory.build(self.cfg["preprocessor_output_size"])
