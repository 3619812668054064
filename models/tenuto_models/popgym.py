"""Weights from POPGym: builds a policy from the configuration and parameters of its ``DiffNC`` and ``Frameconv``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from tenuto_models.dnc import DNCConfig, DNCCore
from tenuto_models.embedding import SineEmbedding
from tenuto_models.errors import ConfigError
from tenuto_models.frameconv import FrameconvConfig, FrameconvCore
from tenuto_models.policy import Policy, PolicyConfig

Parameters = Mapping[str, NDArray[Any]]
_BASE_CONFIG = {
    "hidden_size": 256,
    "preprocessor_input_size": 256,
    "embedding_mode": "add",
    "embedding_size": None,
    "scale_embedding": True,
}
_CONFIG: dict[str, dict[str, Any]] = {
    "DiffNC": {"read_heads": 4, "cell_size": 16, "embedding": None},
    "Frameconv": {"stack_size": 4, "embedding": "sine"},
}
"""POPGym's class -> what its configuration says where nothing is given, so far as it shapes the tensors."""
_LSTM, _INTERFACE = "core.lstm_layer_0", "core.rnn_layer_memory_shared.interface_weights"


def import_popgym(config: Mapping[str, Any], parameters: Parameters) -> Policy:
    """Build the policy that computes what POPGym's model computes.

    ``config`` holds ``cls`` ("DiffNC" or "Frameconv"), ``obs_dim``, ``n_act``, ``max_seq_len`` and ``cfg``, the model's
    own configuration, POPGym's defaults for what is not in it; ``parameters`` its tensors under POPGym's names. The
    spaces become a flat Box and a Discrete. Raises ConfigError naming every missing or extra tensor, or the first one
    of a wrong shape.
    """
    if (kind := config.get("cls")) not in _CONFIG:
        raise ConfigError(f"cls: got {kind!r}, expected 'DiffNC' or 'Frameconv'")
    if absent := sorted({"obs_dim", "n_act", "max_seq_len", "cfg"} - config.keys()):
        raise ConfigError(f"POPGym config: missing {absent}")
    own: dict[str, Any] = {**_BASE_CONFIG, **_CONFIG[kind], **config["cfg"]}
    hidden = own["hidden_size"]
    if kind == "DiffNC":
        cell = own["cell_size"]
        if not isinstance(cell, int) or not isinstance(hidden, int) or not 1 <= cell <= hidden:
            raise ConfigError(
                f"cell_size: got {cell!r}, expected an integer from 1 to hidden_size, which is {hidden!r}"
            )
        memory = DNCConfig(hidden, own.get("nr_cells", hidden // cell), cell, own["read_heads"])
    else:
        memory = FrameconvConfig(hidden, own["stack_size"])
    if own["embedding"] is not None:
        got = tuple(own[key] for key in ("embedding", "embedding_mode", "embedding_size", "scale_embedding"))
        if got != (expected := ("sine", "add", None, True)):
            raise ConfigError(f"embedding, its mode, size and scale: got {got}, expected {expected} or no embedding")

    widths = {prefix: _widths(parameters, prefix) for prefix in ("pre", "post", "actor.0", "critic.0")}
    policy = Policy(
        spaces.Box(-np.inf, np.inf, (config["obs_dim"],), np.float32),
        spaces.Discrete(config["n_act"]),
        PolicyConfig(
            memory=memory,
            feature_size=own["preprocessor_input_size"],
            preprocessor_widths=widths["pre"],
            postprocessor_widths=widths["post"],
            actor_widths=widths["actor.0"],
            critic_widths=widths["critic.0"],
            embedding_period=config["max_seq_len"] if own["embedding"] else None,
        ),
    )
    # Parts without a counterpart: the frozen sine table is a formula here, and DiffNC never uses its strength.
    ignored = {"embedding.weight", "embedding_strength"} - policy.state_dict().keys()
    _check(parameters, _expected_shapes(policy), ignored)
    if policy.embedding is not None and "embedding.weight" in parameters:
        _check_table(policy.embedding, parameters["embedding.weight"])
    policy.load_state_dict(_arrange(policy, {name: torch.from_numpy(np.array(a)) for name, a in parameters.items()}))
    return policy


def _expected_shapes(policy: Policy) -> dict[str, tuple[int, ...]]:
    """POPGym's name -> shape of every tensor that this policy needs."""
    shapes = {name: tuple(t.shape) for name, t in policy.state_dict().items() if not name.startswith("core.")}
    shapes = {_popgym_name(policy, name): shape for name, shape in shapes.items()}
    core = policy.core
    if isinstance(core, FrameconvCore):
        shapes["core.weight"] = (core.output_size, core.input_size, core.stack_size)
        shapes["core.bias"] = (core.output_size,)
    elif isinstance(core, DNCCore):
        hidden, interface = core.output_size, core.access.interface
        read = core.output.in_features - hidden
        shapes |= {
            f"{_LSTM}.weight_ih_l0": (4 * hidden, core.input_size + read),
            f"{_LSTM}.weight_hh_l0": (4 * hidden, hidden),
            f"{_LSTM}.bias_ih_l0": (4 * hidden,),
            f"{_LSTM}.bias_hh_l0": (4 * hidden,),
            f"{_INTERFACE}.weight": tuple(interface.weight.shape),
            f"{_INTERFACE}.bias": tuple(interface.bias.shape),
            "core.output.weight": tuple(core.output.weight.shape),
            "core.output.bias": tuple(core.output.bias.shape),
        }
    return shapes


def _arrange(policy: Policy, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our name -> tensor, from POPGym's tensors."""
    weights = {n: given[_popgym_name(policy, n)] for n in policy.state_dict() if not n.startswith("core.")}
    if isinstance(policy.core, FrameconvCore):
        # Conv1d's [H, F, K] as one product over the frames, oldest first.
        weights["core.conv.weight"] = given["core.weight"].permute(0, 2, 1).flatten(1)
        weights["core.conv.bias"] = given["core.bias"]
        return weights
    lstm = [given[f"{_LSTM}.{kind}_l0"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    return weights | {
        "core.gates.weight": torch.cat(lstm[:2], dim=1),
        "core.gates.bias": lstm[2] + lstm[3],
        "core.access.interface.weight": given[f"{_INTERFACE}.weight"],
        "core.access.interface.bias": given[f"{_INTERFACE}.bias"],
        "core.output.weight": given["core.output.weight"],
        "core.output.bias": given["core.output.bias"],
    }


def _popgym_name(policy: Policy, name: str) -> str:
    """POPGym's name of a tensor outside the core: heads are nested one deeper there, the feature map is layer 0."""
    part, _, rest = name.partition(".")
    if part == "feature_map":
        return f"feature_map.0.{rest}"
    if part in ("actor", "critic"):
        layer, kind = rest.split(".")
        final = len(getattr(policy, part)) - 1
        return f"{part}.1.{kind}" if int(layer) == final else f"{part}.0.{layer}.{kind}"
    return name


def _widths(parameters: Parameters, prefix: str) -> tuple[int, ...]:
    """Widths of the Linear layers below a prefix, in order: POPGym keeps them as ``<prefix>.<even number>.weight``."""
    layers = {
        int(match[1]): array.shape[0]
        for name, array in parameters.items()
        if (match := re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.weight", name)) and array.ndim == 2
    }
    return tuple(layers[i] for i in sorted(layers))


def _check(parameters: Parameters, expected: dict[str, tuple[int, ...]], ignored: set[str]) -> None:
    missing = sorted(expected.keys() - parameters.keys())
    extra = sorted(parameters.keys() - expected.keys() - ignored)
    if missing or extra:
        raise ConfigError(f"POPGym tensors: missing {missing}, not expected {extra}")
    for name, shape in expected.items():
        if parameters[name].shape != shape:
            raise ConfigError(f"POPGym tensor {name}: got shape {parameters[name].shape}, expected {shape}")


def _check_table(embedding: SineEmbedding, table: NDArray[Any]) -> None:
    """The frozen sine table is a formula here; refuse one that the formula does not reproduce."""
    ours = embedding(torch.arange(len(np.atleast_1d(table)))).numpy()
    if ours.shape != table.shape or not np.allclose(ours, table, atol=1e-4):
        raise ConfigError(
            f"POPGym tensor embedding.weight: got a table of shape {table.shape} that is not the sine embedding of "
            f"period {embedding.period}; was max_seq_len another one in training?"
        )
