"""Reads the policy out of a checkpoint of RLlib's old API stack, without trusting it (see ``inert_pickle``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from numpy.typing import NDArray

from tenuto_trainer.errors import ImportedError
from tenuto_trainer.importing import inert_pickle

_POLICY = "default_policy"


@dataclass(frozen=True)
class OldCheckpoint:
    """The policy of a checkpoint, in memory."""

    weights: dict[str, NDArray[Any]]
    """Tensors under the names of the model's own parameters."""
    config: Mapping[str, Any]
    """RLlib's configuration as far as it is in the checkpoint; classes, functions and modules are placeholders."""
    filters: frozenset[str]
    """Class names of the observation filters that the checkpoint holds."""
    env_steps: int
    """Environment steps of the training so far; 0 where the checkpoint does not say."""


def read(path: Path) -> OldCheckpoint:
    """Read the default policy of a checkpoint.

    ``path`` is the folder of an algorithm or of one policy as Ray 2 writes them (``policy_state.pkl`` or
    ``.msgpck``), or Ray 1's file ``checkpoint-<number>`` or its folder. Raises ImportedError.
    """
    file = _state_file(path)
    try:
        payload = file.read_bytes()
    except OSError as error:
        raise ImportedError(f"{file}: cannot be read ({error.strerror})") from error
    state = _mapping(file, _from_msgpack(file, payload) if file.suffix == ".msgpck" else _unpickled(file, payload))
    if "worker" in state:  # Ray 1: a pickle within the pickle holds the policies.
        worker = _mapping(
            file, _unpickled(file, state["worker"]) if isinstance(state["worker"], bytes) else state["worker"]
        )
        filters = worker.get("filters", {})
        policy = _mapping(file, _mapping(file, worker.get("state")).get(_POLICY))
        config = _ray1_config(state, worker)
    else:
        filters, policy = {}, state
        config = as_mapping(as_mapping(policy.get("policy_spec")).get("config"))
    steps = policy.get("global_timestep")
    return OldCheckpoint(
        weights=_weights(file, _mapping(file, policy.get("weights"))),
        config=config,
        filters=frozenset(type(f).__name__ for f in as_mapping(filters).values()),
        env_steps=steps if isinstance(steps, int) and 0 <= steps < 2**63 else 0,
    )


def _weights(file: Path, weights: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    for name, value in weights.items():
        array = value.resolve() if isinstance(value, inert_pickle.Array) else None
        if not isinstance(name, str) or array is None:
            raise ImportedError(f"{file}: weights: got {name!r}, which is no array of numbers, expected name -> array")
        arrays[name] = array
    return arrays


def _unpickled(file: Path, payload: bytes) -> Any:
    try:
        return inert_pickle.loads(payload)
    except ImportedError as error:
        raise ImportedError(f"{file}: {error}") from error


def _from_msgpack(file: Path, payload: bytes) -> Any:
    import msgpack

    try:
        return msgpack.unpackb(payload, strict_map_key=False, object_hook=_from_msgpack_numpy)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise ImportedError(f"{file}: got msgpack that cannot be read ({error})") from error


def _from_msgpack_numpy(encoded: dict[Any, Any]) -> Any:
    """Take what the package msgpack_numpy makes of an array; all else stays as it is."""
    if not encoded.get(b"nd"):
        return encoded
    return inert_pickle.numbers_from(encoded.get(b"data"), encoded.get(b"type"), tuple(encoded.get(b"shape", ())))


def _state_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ImportedError(f"checkpoint: got {str(path)!r}, which does not exist")
    for folder in (path, path / "policies" / _POLICY):
        for name in ("policy_state.pkl", "policy_state.msgpck"):
            if (folder / name).is_file():
                return folder / name
    ray1 = sorted(p for p in path.iterdir() if p.name.startswith("checkpoint-") and p.name[11:].isdigit())
    if len(ray1) == 1:
        return ray1[0]
    if (path / "learner_group").is_dir():
        raise ImportedError(f"checkpoint: got {str(path)!r}, which is of RLlib's new API stack, expected the old")
    raise ImportedError(
        f"checkpoint: got {str(path)!r}, expected policies/{_POLICY}/policy_state.pkl, policy_state.pkl or one "
        f"checkpoint-<number> in it, found {_few(sorted(p.name for p in path.iterdir()))}"
    )


def _few(names: list[str], most: int = 8) -> str:
    return f"{names}" if len(names) <= most else f"{names[:most]} and {len(names) - most} more"


def _ray1_config(state: Mapping[Any, Any], worker: Mapping[Any, Any]) -> Mapping[str, Any]:
    spec = as_mapping(worker.get("policy_specs")).get(_POLICY)
    if isinstance(spec, tuple | list):
        spec = {"config": spec[-1]} if spec else {}
    for config in (as_mapping(spec).get("config"), state.get("config"), worker.get("policy_config")):
        if as_mapping(config).get("model"):
            return as_mapping(config)
    return {}


def as_mapping(value: object) -> Mapping[str, Any]:
    """What can be looked into by key: a dictionary, or the attributes of a placeholder; else nothing."""
    if isinstance(value, inert_pickle.Placeholder):
        value = value.attributes
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}


def _mapping(file: Path, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ImportedError(
            f"{file}: got {type(value).__name__}, expected a checkpoint of RLlib's old API stack with the policy "
            f"{_POLICY!r} and its weights"
        )
    return cast(Mapping[str, Any], value)
