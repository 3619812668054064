"""The training state: all that a killed run needs to go on, in one file beside the versions of its policy.

``<repository>/<policy>/training_state.safetensors`` holds the learner's tensors and, in the header that safetensors has
for such things, a JSON description. One file, so that one rename replaces it whole; no pickle. Servers do not see it.
It lies in the repository and not with the logs because it belongs to these versions: both are moved or deleted as one.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

from tenuto_models import ConfigError, Policy, TrainingProgress, spaces
from tenuto_trainer.errors import StateError, TrainConfigError

FILE = "training_state.safetensors"
FORMAT_VERSION = 1
TEMPORARY_PREFIX = ".training_state-"
_KEYS = {"format_version", "policy", "progress", "version", "best_published"}


@dataclass(frozen=True)
class TrainingState:
    """A learner between two iterations, and what its run knows."""

    tensors: dict[str, Tensor]
    """The learner's, on the CPU, by the names of :mod:`tenuto_trainer.learner`."""
    policy: dict[str, Any]
    """What must be equal for the tensors to be of use; see :func:`describe`."""
    progress: TrainingProgress
    """Where training stood."""
    version: int
    """Newest version of the policy at that time."""
    best_published: float | None
    """Return that the next version published out of turn must exceed; None before there is one."""


def describe(policy: Policy) -> dict[str, Any]:
    """Say with plain JSON values what kind of policy a state is of."""
    parts = {
        "observation_space": spaces.to_json(policy.observation_space),
        "action_space": spaces.to_json(policy.action_space),
        "config": policy.config.to_json(),
    }
    return json.loads(json.dumps(parts))  # Tuples become lists, as they are when they are read back.


def write(folder: Path, state: TrainingState) -> None:
    """Replace the state in the policy's folder: whole and on disk when this returns, or untouched. Raises OSError."""
    about = {
        "format_version": FORMAT_VERSION,
        "policy": state.policy,
        "progress": state.progress.to_json(),
        "version": state.version,
        "best_published": state.best_published,
    }
    text = json.dumps(about)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    payload = save_safetensors(tensors, {"tenuto": text, "sha256": _sha256(text, tensors)})
    temporary = folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}"
    try:
        with temporary.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / FILE)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_replaceable(folder: Path) -> None:
    """Raise TrainConfigError if no state could be written, so that a run need not train to find out."""
    path = folder / FILE
    if path.is_dir() and not path.is_symlink():
        raise TrainConfigError(f"{path}: got a folder, expected a file or nothing: the training state is kept there")


def read(folder: Path) -> TrainingState | None:
    """Read the state in a policy's folder; None where there is none.

    Raises StateError for anything but a whole one.
    """
    path = folder / FILE
    if not os.path.lexists(path):
        return None
    if not path.is_file():
        raise StateError(f"{path}: not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # No mapping.
        text = header.get("tenuto", "")
        about = json.loads(text)
        if not isinstance(about, dict) or about.get("format_version") != FORMAT_VERSION or set(about) != _KEYS:
            raise StateError(f"{path}: not a training state of format {FORMAT_VERSION}")
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32:
                raise StateError(f"{path}: {name}: got {tensor.dtype}, expected {torch.float32}")
        if header.get("sha256") != _sha256(text, tensors):
            raise StateError(f"{path}: does not match its own sha256 (damaged)")
        _require_plain(path, about)
        progress = TrainingProgress.from_json(about["progress"])
    except (OSError, SafetensorError, ValueError, RecursionError, ConfigError) as error:
        raise StateError(f"{path}: cannot be read ({error})") from error
    return TrainingState(tensors, about["policy"], progress, about["version"], about["best_published"])


def _require_plain(path: Path, about: Mapping[str, Any]) -> None:
    """Raise StateError for what is whole, but nothing that :func:`write` was ever given."""
    version, best = about["version"], about["best_published"]
    # bool is an int to Python. JSON as Python reads it knows NaN, infinity and whole numbers of any size.
    if type(version) is not int or not 0 <= version < 2**63:
        raise StateError(f"{path}: version: got {version!r}, expected a whole number")
    if best is not None and (type(best) not in (int, float) or not abs(best) <= sys.float_info.max):
        raise StateError(f"{path}: best_published: got {best!r}, expected a finite number or null")
    if not isinstance(about["policy"], dict):
        raise StateError(f"{path}: policy: got {type(about['policy']).__name__}, expected an object")


def _sha256(text: str, tensors: dict[str, Tensor]) -> str:
    """Cover the description and every tensor's name, type and bytes; safetensors itself only checks sizes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
