"""The configuration of the models: one dictionary of checked values, its widths derived from the modules in it.

The widths: observation -> ``preprocessor_input_size`` -> preprocessor -> ``preprocessor_output_size`` -> memory ->
``hidden_size`` -> postprocessor -> actor and critic, each -> ``postprocessor_output_size`` -> final layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tenuto_models import ConfigError
from tenuto_trainer.modelv2.embeddings import EMBEDDINGS

BASE_CONFIG: dict[str, Any] = {
    # Width that leaves the memory.
    "hidden_size": 256,
    # Modules, each copied and drawn anew for every model. None: no layer before and after the memory, and one
    # Linear + LeakyReLU for actor and critic.
    "preprocessor": None,
    "postprocessor": None,
    "actor": None,
    "critic": None,
    # Width of the feature map, which is what the preprocessor receives.
    "preprocessor_input_size": 256,
    # Width that leaves the preprocessor. None: what the preprocessor makes.
    "preprocessor_output_size": None,
    # Width that leaves actor and critic, before their final layers. None: what they make.
    "postprocessor_output_size": None,
    # Embedding of the step counter, a key of EMBEDDINGS; None: none.
    "embedding": None,
    # First features that the embedding touches. None: all.
    "embedding_size": None,
    # "add" the embedding to these features, or let it take their place ("cat").
    "embedding_mode": "add",
    # Whether features and embedding are weighted (1 - s) and s, with s learned and held between 0 and 1.
    "scale_embedding": True,
    # Steps that the embedding tells apart: rows of a table, longest wave of a sine in steps / 2π.
    "embedding_period": 1024,
}
_MODULES = ("preprocessor", "postprocessor", "actor", "critic")


def checked(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults overridden by what is given. Raises ConfigError naming the first key that is wrong."""
    if unknown := sorted(given.keys() - defaults.keys()):
        raise ConfigError(f"custom_model_config: got unknown keys {unknown}, expected some of {sorted(defaults)}")
    config = {**defaults, **given}
    for key in ("hidden_size", "preprocessor_input_size", "embedding_period"):
        require_size(key, config[key])
    for key in ("preprocessor_output_size", "postprocessor_output_size", "embedding_size"):
        if config[key] is not None:
            require_size(key, config[key])
    for key in _MODULES:
        if not isinstance(config[key], nn.Module | None):
            raise ConfigError(f"{key}: got {config[key]!r}, expected a torch.nn.Module or None")
    _require_one_of("embedding", config["embedding"], [None, *EMBEDDINGS])
    _require_one_of("embedding_mode", config["embedding_mode"], ["add", "cat"])
    _require_one_of("scale_embedding", config["scale_embedding"], [True, False])
    width, size = config["preprocessor_input_size"], config["embedding_size"]
    if size is not None and size > width:
        raise ConfigError(f"embedding_size: got {size}, expected at most preprocessor_input_size, which is {width}")
    if config["embedding"] is not None and config["embedding_mode"] == "cat" and size is None:
        raise ConfigError("embedding_size: got None, expected a number of features: embedding_mode is 'cat'")
    return config


def fresh(module: nn.Module | None) -> nn.Module:
    """Return a copy of the module, its Linear weights drawn anew (orthogonal); without one, the identity."""
    mine = nn.Identity() if module is None else copy.deepcopy(module)
    for layer in mine.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)
    return mine


def width_after(key: str, module: nn.Module, width: int, expected: tuple[str, int | None]) -> int:
    """Return the width that leaves a module. Raises ConfigError if it does not take ``width`` features.

    ``expected`` is the configuration's key for that width and the value that it was given, None for any.
    """
    try:
        with torch.no_grad():
            after: Tensor = copy.deepcopy(module).eval()(torch.zeros(1, 1, width))
        if not isinstance(after, Tensor):
            raise TypeError(f"it makes a {type(after).__name__} of them")
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"{key}: got {module}, expected a module that takes {width} features ({error})") from error
    got, (size_key, size) = after.shape[-1], expected
    if after.shape[:-1] != (1, 1) or (size is not None and size != got):
        raise ConfigError(f"{size_key}: got {size}, but {key} makes {list(after.shape)} of [1, 1, {width}]")
    return got


def require_size(key: str, value: object, least: int = 1) -> None:
    """Raise ConfigError unless the value is a size of at least that much."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{key}: got {value!r}, expected an integer >= {least}")


def _require_one_of(key: str, value: object, expected: list[Any]) -> None:
    if value not in expected:
        raise ConfigError(f"{key}: got {value!r}, expected one of {expected}")
