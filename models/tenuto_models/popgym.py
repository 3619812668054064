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
_KEYS = ("cls", "obs_dim", "n_act", "max_seq_len", "cfg")
_SERVED = {"embedding": ("sine", None), "embedding_mode": ("add",), "scale_embedding": (True,)}
"""Key -> values of the embeddings that :class:`Policy` computes."""
_LSTM, _INTERFACE = "core.lstm_layer_0", "core.rnn_layer_memory_shared.interface_weights"


def import_popgym(config: Mapping[str, Any], parameters: Parameters) -> Policy:
    """Build the policy that computes what POPGym's model computes.

    ``config`` holds ``cls`` ("DiffNC" or "Frameconv"), ``obs_dim``, ``n_act``, ``max_seq_len`` and ``cfg``, the model's
    own configuration, POPGym's defaults for what is not in it; ``parameters`` its tensors under POPGym's names. The
    spaces become a flat Box and a Discrete. Raises ConfigError naming every missing or extra tensor, the first one of
    a wrong shape, or the key of an embedding other than none or an added, scaled sine over all features.
    """
    if "cls" in config and config["cls"] not in _CONFIG:
        raise ConfigError(f"cls: got {config['cls']!r}, expected 'DiffNC' or 'Frameconv'")
    if absent := [key for key in _KEYS if key not in config]:
        hint = "; RLlib's config['model'] holds cfg as custom_model_config" if "custom_model_config" in config else ""
        raise ConfigError(f"POPGym config: missing {absent}, expected the keys {', '.join(_KEYS)}{hint}")
    kind: str = config["cls"]
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
    sizes = {"obs_dim": config["obs_dim"], "n_act": config["n_act"]}
    if own["embedding"] is not None:
        require_served_embedding(own, own["preprocessor_input_size"])
        sizes["max_seq_len"] = config["max_seq_len"]  # The period of the embedding.
    for key, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"{key}: got {size!r}, expected an integer >= 1")

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
            embedding_period=None if own["embedding"] is None else config["max_seq_len"],
        ),
    )
    expected = _expected_shapes(policy)
    if policy.embedding is not None:
        # A formula here, so the table only has to be there and to be right.
        table = parameters.get("embedding.weight")
        _check(parameters, expected | {"embedding.weight": (0,) if table is None else tuple(table.shape)}, set())
        _check_table(policy.embedding, parameters["embedding.weight"])
    else:
        _check(parameters, expected, {"embedding_strength"})  # POPGym has one also without an embedding.
    policy.load_state_dict(_arrange(policy, {name: torch.from_numpy(np.array(a)) for name, a in parameters.items()}))
    return policy


def require_served_embedding(own: Mapping[str, Any], features: int) -> None:
    """Raise ConfigError naming the key of an embedding that :class:`Policy` does not compute."""
    served = {**_SERVED, "embedding_size": (None, features)}
    for key, values in served.items():
        if own[key] not in values:
            expected = " or ".join(repr(value) for value in values)
            raise ConfigError(f"{key}: got {own[key]!r}, expected {expected}, which is what policies compute")


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
    steps = torch.arange(len(np.atleast_1d(table)))
    ours = embedding(steps).numpy()
    # POPGym's phases are of single precision, so its error grows with the step.
    tolerance = 1e-4 + 2e-7 * steps.numpy()[:, None]
    if ours.shape != table.shape or not (np.abs(ours - table) <= tolerance).all():
        raise ConfigError(
            f"POPGym tensor embedding.weight: got a table of shape {table.shape} that is not the sine embedding of "
            f"period {embedding.period}; was max_seq_len another one in training?"
        )
