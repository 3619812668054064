"""Makes a published version of the policy in an old RLlib checkpoint of DiffNC or Frameconv, POPGym's or our modelv2's.

What the model is, its tensors say; what they leave open, the plain values in the checkpoint's configuration or the
caller. Anything that would make the published policy play otherwise than the old one is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces as gym_spaces
from numpy.typing import NDArray

from tenuto_envs import make
from tenuto_models import Policy, TrainingProgress, checkpoint, import_popgym, spaces
from tenuto_models.distributions import distribution_for
from tenuto_trainer.config import TrainConfig
from tenuto_trainer.errors import ImportedError
from tenuto_trainer.importing.inert_pickle import Placeholder
from tenuto_trainer.importing.rllib_checkpoint import as_mapping, read

Weights = Mapping[str, NDArray[Any]]
_INTERFACE = "core.rnn_layer_memory_shared.interface_weights"


def published(
    path: Path, env_id: str, repository: Path, policy_name: str, given: Mapping[str, int | None]
) -> tuple[Path, list[str]]:
    """Publish the policy of the checkpoint at ``path`` and return the version's folder and notes for its user.

    ``given`` are POPGym's ``read_heads`` and ``cell_size`` where the caller knows them, else None; an empty
    ``policy_name`` stands for the environment's id. Raises ImportedError, or what the environment, the model and the
    repository raise.
    """
    name = TrainConfig(env_id, "dnc", repository, policy=policy_name).policy
    old = read(path)
    env = make(env_id)
    try:
        notes = _require_as_served(old.config, old.filters, env.action_space)
        weights = _under_popgym_names(old.weights)
        theirs = import_popgym(_config_of(weights, old.config, given), weights)
        policy = _with_spaces_of(env_id, env, theirs)
    finally:
        env.close()
    return checkpoint.write(repository, name, policy, TrainingProgress(env_steps=old.env_steps)), notes


def _require_as_served(
    config: Mapping[str, Any], filters: frozenset[str], action_space: gym_spaces.Space[Any]
) -> list[str]:
    """Raise ImportedError for a setting under which the policy played otherwise than a server would let it play."""
    if "observation_filter" in config:
        filters |= {str(config["observation_filter"])}
    if others := sorted(filters - {"NoFilter"}):
        raise ImportedError(
            f"observation_filter: got {others}, expected NoFilter: a server hands observations on as is"
        )
    if isinstance(action_space, gym_spaces.Box) and not config.get("normalize_actions", True):
        raise ImportedError("normalize_actions: got False, expected True: a server scales actions to their bounds")
    model = as_mapping(config.get("model"))
    if not model:
        return ["the checkpoint does not say what the activations are; taken to be LeakyReLU, as in POPGym"]
    custom = as_mapping(model.get("custom_model_config"))
    for key in ("preprocessor", "postprocessor", "actor", "critic"):
        layers = _layers(custom.get(key))
        if layers != ["Linear", "LeakyReLU"] * (len(layers) // 2):
            raise ImportedError(f"{key}: got layers {layers}, expected Linear and LeakyReLU in turn")
    return []


def _layers(module: object) -> list[str]:
    """The layers of a torch module as a checkpoint holds one, containers dissolved; an identity is none."""
    if module is None:
        return []
    if not isinstance(module, Placeholder):
        return [repr(module)]
    kind, attributes = type(module), as_mapping(module)
    name = kind.__name__ if kind.__module__.startswith("torch.nn.") else f"{kind.__module__}.{kind.__name__}"
    if name == "Sequential":
        return [layer for part in as_mapping(attributes.get("_modules")).values() for layer in _layers(part)]
    if name == "LeakyReLU" and (slope := attributes.get("negative_slope")) != 0.01:
        return [f"LeakyReLU({slope})"]
    return [] if name == "Identity" else [name]


def _config_of(weights: Weights, config: Mapping[str, Any], given: Mapping[str, int | None]) -> dict[str, Any]:
    """What :func:`import_popgym` asks for, from the shapes of the tensors."""
    custom = as_mapping(as_mapping(config.get("model")).get("custom_model_config"))
    own: dict[str, Any] = {key: custom[key] for key in ("embedding_mode", "embedding_size") if key in custom}
    own["scale_embedding"] = custom.get("scale_embedding", True)
    embedded = "embedding.weight" in weights or ("core.weight" in weights and "embedding_strength" in weights)
    own["embedding"] = custom.get("embedding", "sine") if embedded else None
    features, observation = _shape(weights, "feature_map.0.weight", 2)
    own["preprocessor_input_size"] = features
    if "core.weight" in weights:
        kind = "Frameconv"
        own["hidden_size"], _, own["stack_size"] = _shape(weights, "core.weight", 3)
    elif "core.output.weight" in weights:
        kind = "DiffNC"
        own["hidden_size"] = _shape(weights, "core.output.weight", 2)[0]
        own["read_heads"], own["cell_size"] = _heads_and_cell(weights, own["hidden_size"], custom, given)
    else:
        core = sorted(name for name in weights if name.startswith("core."))
        raise ImportedError(f"core: got tensors {core}, expected those of POPGym's DiffNC or Frameconv")
    return {
        "cls": kind,
        "cfg": own,
        "obs_dim": observation,
        "n_act": _shape(weights, "actor.1.weight", 2)[0],
        "max_seq_len": _period(weights, custom) if embedded else None,
    }


def _period(weights: Weights, custom: Mapping[str, Any]) -> int:
    """POPGym's table has a row for each step; where there is no table, the model is ours."""
    if "embedding.weight" in weights:
        return _shape(weights, "embedding.weight", 2)[0]
    return custom.get("embedding_period", 1024)


def _under_popgym_names(weights: Weights) -> Weights:
    """Return the tensors of our modelv2 classes under POPGym's names, in its layouts; all others as they are."""
    theirs = dict(weights)
    try:
        if "core.gates.weight" in theirs:
            gates, bias = theirs.pop("core.gates.weight"), theirs.pop("core.gates.bias")
            hidden = theirs["core.output.weight"].shape[0]
            theirs |= {
                "core.lstm_layer_0.weight_ih_l0": gates[:, :-hidden],
                "core.lstm_layer_0.weight_hh_l0": gates[:, -hidden:],
                "core.lstm_layer_0.bias_ih_l0": bias,
                "core.lstm_layer_0.bias_hh_l0": np.zeros_like(bias),
                f"{_INTERFACE}.weight": theirs.pop("core.access.interface.weight"),
                f"{_INTERFACE}.bias": theirs.pop("core.access.interface.bias"),
            }
        elif "core.conv.weight" in theirs:
            taps, layers = (
                theirs.pop("core.conv.weight"),
                [int(n.split(".")[1]) for n in theirs if n.startswith("pre.")],
            )
            features = theirs[f"pre.{max(layers)}.bias" if layers else "feature_map.0.bias"].shape[0]
            theirs["core.weight"] = taps.reshape(taps.shape[0], -1, features).transpose(0, 2, 1)
            theirs["core.bias"] = theirs.pop("core.conv.bias")
    except (KeyError, IndexError, ValueError) as error:
        raise ImportedError(
            f"core: got {sorted(weights)}, expected all tensors of a DiffNC or Frameconv ({error})"
        ) from error
    return theirs


def _heads_and_cell(
    weights: Weights, hidden: int, custom: Mapping[str, Any], given: Mapping[str, int | None]
) -> tuple[int, int]:
    """R and W from ``R W`` (columns of the output layer) and ``R W + 3 W + 5 R + 3`` (rows of the interface)."""
    reads = _shape(weights, "core.output.weight", 2)[1] - hidden
    (interface,) = _shape(weights, f"{_INTERFACE}.bias", 1)
    sizes = [(reads // w, w) for w in range(1, reads + 1) if reads % w == 0]
    fitting = [(r, w) for r, w in sizes if reads + 3 * w + 5 * r + 3 == interface]
    wanted = {key: value for key, value in given.items() if value is not None}
    # The configuration only decides what the tensors leave open; the caller's word must hold.
    if not wanted and len(fitting) > 1:
        wanted = {key: custom[key] for key in ("read_heads", "cell_size") if key in custom}
    found = [
        (r, w) for r, w in fitting if {"read_heads": r, "cell_size": w} | wanted == {"read_heads": r, "cell_size": w}
    ]
    if len(found) == 1:
        return found[0]
    raise ImportedError(
        f"DiffNC with {reads} reads and an interface of {interface}: got read heads and cell size {found or wanted}, "
        f"expected one of {fitting}; say which with --read-heads and --cell-size"
    )


def _shape(weights: Weights, name: str, ndim: int) -> tuple[int, ...]:
    if name not in weights:
        raise ImportedError(f"POPGym tensors: missing {name!r}, got {sorted(weights)}")
    shape = weights[name].shape
    if len(shape) != ndim:
        raise ImportedError(f"POPGym tensor {name}: got shape {shape}, expected {ndim} dimensions")
    return shape


def _with_spaces_of(env_id: str, env: gymnasium.Env[Any, Any], theirs: Policy) -> Policy:
    """Return the policy over the environment's own spaces, whose flat widths must be those of the tensors."""
    logits = theirs.distribution.num_logits
    for what, got, expected in [
        ("observation", theirs.observation_size, spaces.flat_size(env.observation_space)),
        ("action", logits, distribution_for(env.action_space).num_logits),
    ]:
        if got != expected:
            raise ImportedError(
                f"{what}: the checkpoint is made for {got} numbers, {env_id} has {expected}; is it another environment?"
            )
    policy = Policy(env.observation_space, env.action_space, theirs.config)
    policy.load_state_dict(theirs.state_dict())
    return policy
