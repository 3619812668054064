"""The tensors of an old checkpoint, POPGym's or our modelv2's, under POPGym's names; errors use the file's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenuto_trainer.errors import ImportedError

Weights = Mapping[str, NDArray[Any]]
_LSTM, INTERFACE = "core.lstm_layer_0", "core.rnn_layer_memory_shared.interface_weights"
_OURS = {
    f"{INTERFACE}.weight": "core.access.interface.weight",
    f"{INTERFACE}.bias": "core.access.interface.bias",
    "core.weight": "core.conv.weight",
    "core.bias": "core.conv.bias",
}
"""POPGym's name -> modelv2's, of the tensors that have another name there but are the same."""
_DIFFNC = (
    "core.gates.weight", "core.gates.bias", "core.access.interface.weight", "core.access.interface.bias",
    "core.output.weight",
)  # fmt: skip


@dataclass(frozen=True)
class Tensors:
    """All tensors of one model."""

    arrays: Weights
    """In POPGym's layouts, under POPGym's names."""
    kind: str
    """Its class: "DiffNC" or "Frameconv"."""
    is_popgym: bool
    """Whether the model is POPGym's; else it is our modelv2's."""

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        """Return the shape of a tensor. Raises ImportedError if it is missing or has another number of dimensions."""
        try:
            return _shape(self.arrays, name, ndim)
        except ImportedError as error:
            raise ImportedError(self.in_own_names(str(error))) from None

    def in_own_names(self, message: str) -> str:
        """Return an error's text with the names that the checkpoint itself uses."""
        if not self.is_popgym:
            for theirs, ours in _OURS.items():
                message = message.replace(theirs, ours)
            message = message.replace("POPGym tensor", "tensor").replace("max_seq_len", "embedding_period")
        return message


def tensors_of(weights: Weights) -> Tensors:
    """Name and arrange a model's tensors as POPGym does. Raises ImportedError for a core of another model."""
    if any(name.startswith(("core.gates.", "core.access.")) for name in weights):
        return Tensors(_from_our_diffnc(weights), "DiffNC", is_popgym=False)
    if any(name.startswith("core.conv.") for name in weights):
        return Tensors(_from_our_frameconv(weights), "Frameconv", is_popgym=False)
    if "core.weight" in weights:
        return Tensors(weights, "Frameconv", is_popgym=True)
    if "core.output.weight" in weights:
        return Tensors(weights, "DiffNC", is_popgym=True)
    core = sorted(name for name in weights if name.startswith("core."))
    raise ImportedError(f"core: got tensors {core}, expected those of POPGym's DiffNC or Frameconv")


def require_finite(weights: Weights) -> None:
    """Raise ImportedError naming the first tensor that is not finite in single precision, in which policies compute."""
    for name, array in weights.items():
        with np.errstate(over="ignore"):
            if not np.isfinite(array.astype(np.float32)).all():
                raise ImportedError(f"tensor {name}: got NaN or infinity, expected finite numbers")


def _from_our_diffnc(weights: Weights) -> Weights:
    """Cut the gates, of which POPGym's LSTM keeps those of its input and of its state apart."""
    _require(weights, _DIFFNC)
    theirs = dict(weights)
    hidden, columns = _shape(weights, "core.output.weight", 2)
    expected = {"core.gates.weight": (4 * hidden, _core_input(weights) + columns), "core.gates.bias": (4 * hidden,)}
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise ImportedError(f"tensor {name}: got shape {weights[name].shape}, expected {shape}")
    gates, bias = theirs.pop("core.gates.weight"), theirs.pop("core.gates.bias")
    return _renamed(theirs) | {
        f"{_LSTM}.weight_ih_l0": gates[:, :-hidden],
        f"{_LSTM}.weight_hh_l0": gates[:, -hidden:],
        f"{_LSTM}.bias_ih_l0": bias,
        f"{_LSTM}.bias_hh_l0": np.zeros_like(bias),
    }


def _from_our_frameconv(weights: Weights) -> Weights:
    """One product over all frames, oldest first, as Conv1d's ``[H, F, K]``."""
    _require(weights, ("core.conv.weight", "core.conv.bias"))
    (hidden, columns), features = _shape(weights, "core.conv.weight", 2), _core_input(weights)
    if not hidden or not columns or columns % features:
        raise ImportedError(
            f"tensor core.conv.weight: got shape {(hidden, columns)}, expected columns in multiples of {features}, "
            "the width before the core"
        )
    taps = weights["core.conv.weight"].reshape(hidden, -1, features).transpose(0, 2, 1)
    return _renamed(weights) | {"core.weight": taps}


def _renamed(weights: Weights) -> dict[str, NDArray[Any]]:
    theirs = {ours: name for name, ours in _OURS.items()}
    return {theirs.get(name, name): array for name, array in weights.items()}


def _core_input(weights: Weights) -> int:
    """Width of the last layer before the core."""
    layers = [name for name in weights if re.fullmatch(r"pre(\.\d+)+\.bias", name)]
    last = max(layers, key=lambda name: [int(i) for i in name.split(".")[1:-1]], default="feature_map.0.bias")
    return max(1, _shape(weights, last, 1)[0])


def _require(weights: Weights, names: tuple[str, ...]) -> None:
    if missing := sorted(set(names) - weights.keys()):
        raise ImportedError(f"tensors: missing {missing}, got {sorted(weights)}")


def _shape(weights: Weights, name: str, ndim: int) -> tuple[int, ...]:
    if name not in weights:
        raise ImportedError(f"tensors: missing {name!r}, got {sorted(weights)}")
    shape = weights[name].shape
    if len(shape) != ndim:
        raise ImportedError(f"tensor {name}: got shape {shape}, expected {ndim} dimensions")
    return shape
