"""Checkpoints as RLlib's old stack wrote them, the recorded ones and made ones, and their import."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tenuto_models import checkpoint
from tenuto_trainer import train
from tenuto_trainer.errors import ImportedError
from tenuto_trainer.importing import rllib_checkpoint

DATA = Path(__file__).parent / "data" / "popgym"
ENV = "popgym-RepeatPreviousEasy-v0"


def import_from(path: Path, tmp_path: Path, *flags: str, env: str = ENV) -> int:
    arguments = ["--checkpoint", str(path), "--env", env, "--repository", str(tmp_path / "r"), "--policy", "p", *flags]
    return train.main(["import-popgym", *arguments])


def imported(tmp_path: Path) -> checkpoint.Checkpoint:
    return checkpoint.read(tmp_path / "r" / "p" / "1")


def weights(cls: str) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in rllib_checkpoint.read(DATA / cls).weights.items()}


def dnc_of(read_heads: int, cell_size: int) -> dict[str, np.ndarray]:
    """The tensors of a DNC of 16 units that say how many reads there are."""
    reads = read_heads * cell_size
    rows = reads + 3 * cell_size + 5 * read_heads + 3
    interface = "core.rnn_layer_memory_shared.interface_weights"
    shapes = {
        "core.output.weight": (16, 16 + reads), "core.lstm_layer_0.weight_ih_l0": (64, 16 + reads),
        f"{interface}.weight": (rows, 16), f"{interface}.bias": (rows,),
    }  # fmt: skip
    return {name: np.full(shape, 0.01, np.float32) for name, shape in shapes.items()}


def write(tmp_path: Path, cls: str = "DiffNC", config: Any = None, **changes: Any) -> Path:
    """A policy's folder as Ray 2 writes it, with its weights changed; None takes one away."""
    given = {**weights(cls), **changes}
    default = {"observation_filter": "NoFilter", "model": {"max_seq_len": 64, "custom_model_config": {}}}
    state = {
        "weights": {name: array for name, array in given.items() if array is not None},
        "policy_spec": {"config": default | (config or {})},
    }
    (tmp_path / "policy_state.pkl").write_bytes(pickle.dumps(state))
    return tmp_path


def assert_refused(message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One line says why, and there is no version."""
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith("tenuto-train: ")
    with pytest.raises(ImportedError, match=message):
        raise ImportedError(error)
    assert checkpoint.versions(tmp_path / "r" / "p") == []


def write_model(folder: Path, model: nn.Module, custom: dict[str, Any] | None, **changes: Any) -> Path:
    """The same of a live model; ``custom`` is its configuration, None leaves it out, and changes are to its tensors."""
    given = {**{name: tensor.numpy() for name, tensor in model.state_dict().items()}, **changes}
    config = {} if custom is None else {"custom_model_config": custom}
    state = {
        "weights": {name: array for name, array in given.items() if array is not None},
        "policy_spec": {"config": {"observation_filter": "NoFilter", "model": {"max_seq_len": 64, **config}}},
    }
    (folder / "policy_state.pkl").write_bytes(pickle.dumps(state))
    return folder


def assert_plays_as(model: Any, tmp_path: Path) -> None:
    """The imported version answers as the live model does, over the first six steps of an episode."""
    policy, observations = imported(tmp_path).policy, torch.randn(6, 10)
    state = [tensor.float()[None] for tensor in model.get_initial_state()]
    with torch.no_grad():
        logits, _ = model({"obs": observations, "obs_flat": observations}, state, torch.tensor([6]))
        output, _ = policy.unroll(observations[None], policy.initial_state(1))
    torch.testing.assert_close(output.logits[0], logits, rtol=0, atol=1e-5)
