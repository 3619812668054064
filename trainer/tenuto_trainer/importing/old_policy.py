"""Makes a published version of the policy in an old RLlib checkpoint of DiffNC or Frameconv, POPGym's or our modelv2's.

What sizes the model has, its tensors say; what they leave open, the plain values in the checkpoint's configuration or
the caller. Anything that would make the published policy play otherwise than the old one is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces as gym_spaces

from tenuto_envs import make
from tenuto_models import ConfigError, Policy, TrainingProgress, checkpoint, import_popgym, spaces
from tenuto_models.distributions import distribution_for
from tenuto_trainer.config import TrainConfig
from tenuto_trainer.errors import ImportedError
from tenuto_trainer.importing.embedding import embedding_of
from tenuto_trainer.importing.inert_pickle import Placeholder
from tenuto_trainer.importing.rllib_checkpoint import as_mapping, read
from tenuto_trainer.importing.tensors import INTERFACE, Tensors, require_finite, tensors_of
from tenuto_trainer.resume import require_same_policy

_MAX_DEPTH = 10


def published(
    path: Path, env_id: str, repository: Path, policy_name: str, given: Mapping[str, int | None]
) -> tuple[Path, list[str]]:
    """Publish the policy of the checkpoint at ``path`` and return the version's folder and notes for its user.

    ``given`` are POPGym's ``read_heads`` and ``cell_size`` where the caller knows them, else None; an empty
    ``policy_name`` stands for the environment's id. Raises ImportedError, TrainConfigError if the repository's policy
    of that name is another, or what the environment, the model and the repository raise.
    """
    name = TrainConfig(env_id, "dnc", repository, policy=policy_name).policy
    old = read(path)
    env = make(env_id)
    try:
        notes = _require_as_served(old.config, old.filters, env.action_space)
        tensors = tensors_of(old.weights)
        theirs, more = _imported(tensors, _custom(old.config), given)
        policy = _with_spaces_of(env_id, env, theirs)
    finally:
        env.close()
    require_finite(old.weights)
    require_same_policy(repository / name, policy.observation_space, policy.action_space, policy.config)
    return checkpoint.write(repository, name, policy, TrainingProgress(env_steps=old.env_steps)), notes + more


def _custom(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The model's own configuration; None where the checkpoint does not hold it."""
    custom: object = as_mapping(config.get("model")).get("custom_model_config")
    return as_mapping(custom) if isinstance(custom, Mapping) else None


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
    if distribution := as_mapping(config.get("model")).get("custom_action_dist"):
        raise ImportedError(f"custom_action_dist: got {distribution!r}, expected None: a server draws as RLlib does")
    custom = _custom(config)
    if custom is None:
        return ["the checkpoint does not say what the activations are; taken to be LeakyReLU, as in POPGym"]
    for key in ("preprocessor", "postprocessor", "actor", "critic"):
        layers = _layers(custom.get(key))
        if layers != ["Linear", "LeakyReLU"] * (len(layers) // 2):
            raise ImportedError(f"{key}: got layers {layers}, expected Linear and LeakyReLU in turn")
    return []


def _layers(module: object, depth: int = 0) -> list[str]:
    """The layers of a torch module as a checkpoint holds one, containers dissolved; an identity is none."""
    if depth > _MAX_DEPTH:  # Or one that holds itself, which no real module does.
        raise ImportedError(f"modules: got Sequentials nested more than {_MAX_DEPTH} deep")
    if module is None:
        return []
    if not isinstance(module, Placeholder):
        return [repr(module)]
    kind, attributes = type(module), as_mapping(module)
    name = kind.__name__ if kind.__module__.startswith("torch.nn.") else f"{kind.__module__}.{kind.__name__}"
    if name == "Sequential":
        return [layer for part in as_mapping(attributes.get("_modules")).values() for layer in _layers(part, depth + 1)]
    if name == "LeakyReLU" and (slope := attributes.get("negative_slope")) != 0.01:
        return [f"LeakyReLU({slope})"]
    return [] if name == "Identity" else [name]


def _imported(
    tensors: Tensors, custom: Mapping[str, Any] | None, given: Mapping[str, int | None]
) -> tuple[Policy, list[str]]:
    """Return the policy over flat spaces, and what was assumed about it."""
    features, observation = tensors.shape("feature_map.0.weight", 2)
    own: dict[str, Any] = {"preprocessor_input_size": features}
    if tensors.kind == "Frameconv":
        own["hidden_size"], _, own["stack_size"] = tensors.shape("core.weight", 3)
        if flags := _flags(given):
            raise ImportedError(f"{flags}: got a checkpoint of a Frameconv, which has neither read heads nor cells")
    else:
        own["hidden_size"] = tensors.shape("core.output.weight", 2)[0]
        own["read_heads"], own["cell_size"] = _heads_and_cell(tensors, own["hidden_size"], custom or {}, given)
    arrays = dict(tensors.arrays)
    try:
        embedding = embedding_of(tensors, features, custom)
        if embedding.period is not None and not tensors.is_popgym:
            # Stands for the table that POPGym saves: step 0, which is the same for every period.
            arrays["embedding.weight"] = np.arange(features, dtype=np.float32)[None] % 2
        config = {
            "cls": tensors.kind,
            "cfg": own | embedding.config,
            "obs_dim": observation,
            "n_act": tensors.shape("actor.1.weight", 2)[0],
            "max_seq_len": embedding.period,
        }
        return import_popgym(config, arrays), embedding.notes
    except ConfigError as error:
        raise ImportedError(tensors.in_own_names(str(error))) from error


def _heads_and_cell(
    tensors: Tensors, hidden: int, custom: Mapping[str, Any], given: Mapping[str, int | None]
) -> tuple[int, int]:
    """R and W from ``R W`` (columns of the output layer) and ``R W + 3 W + 5 R + 3`` (rows of the interface)."""
    reads = tensors.shape("core.output.weight", 2)[1] - hidden
    (interface,) = tensors.shape(f"{INTERFACE}.bias", 1)
    sizes = [(reads // w, w) for w in range(1, reads + 1) if reads % w == 0]
    fitting = [(r, w) for r, w in sizes if reads + 3 * w + 5 * r + 3 == interface]
    what = f"DiffNC with {reads} reads and an interface of {interface}"
    if not fitting:
        raise ImportedError(f"{what}: there are no read heads and cell size that make these")
    wanted = {key: value for key, value in given.items() if value is not None}
    # The configuration only decides what the tensors leave open; the caller's word must hold.
    if not wanted and len(fitting) > 1:
        wanted = {key: custom[key] for key in ("read_heads", "cell_size") if key in custom}
    found = [
        (r, w) for r, w in fitting if {"read_heads": r, "cell_size": w} | wanted == {"read_heads": r, "cell_size": w}
    ]
    if len(found) == 1:
        return found[0]
    if len(fitting) == 1:
        (r, w) = fitting[0]
        raise ImportedError(f"{_flags(given)}: the tensors only allow --read-heads {r} --cell-size {w}")
    raise ImportedError(
        f"{what}: got read heads and cell size {found or wanted}, expected one of {fitting}; say which with "
        "--read-heads and --cell-size"
    )


def _flags(given: Mapping[str, int | None]) -> str:
    """What the caller gave, as on the command line."""
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in given.items() if value is not None)


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
