"""The state of a killed run is taken whole, by the run that it belongs to, or not at all."""

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import tiny_training
from tenuto_models import Policy, TrainingProgress, checkpoint
from tenuto_trainer import state as training_state
from tenuto_trainer.errors import StateError, TrainConfigError
from tenuto_trainer.resume import Start, find_start
from tenuto_trainer.state import TrainingState

pytestmark = pytest.mark.filterwarnings("ignore:.*Overriding environment rllib-single-agent-env-v0")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_training.Training(tiny_training.config()).module.policy


@pytest.fixture
def state(policy: Policy) -> TrainingState:
    """As a run leaves it before its first gradient step; 7 iterations after version 2."""
    tensors = {f"weights/{name}": tensor for name, tensor in policy.state_dict().items()}
    progress = TrainingProgress(700, 7, 0.25, 0.5, 12.5)
    return TrainingState(tensors, training_state.describe(policy), progress, 2, 0.375)


def _publish(repository: Path, policy: Policy, *iterations: int) -> Path:
    for iteration in iterations:
        checkpoint.write(repository, "p", policy, TrainingProgress(iteration=iteration))
    return repository / "p"


def _start(repository: Path, policy: Policy) -> Start:
    return find_start(repository, "p", policy.observation_space, policy.action_space, policy.config)


def test_what_is_read_is_what_was_written(state: TrainingState, tmp_path: Path):
    assert training_state.read(tmp_path) is None
    training_state.write(tmp_path, replace(state, version=1))
    training_state.write(tmp_path, state)
    found = training_state.read(tmp_path)
    assert found is not None
    assert replace(found, tensors={}) == replace(state, tensors={})
    assert found.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in state.tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == [training_state.FILE]


def test_state_is_no_version_and_no_policy(state: TrainingState, policy: Policy, tmp_path: Path):
    folder = _publish(tmp_path, policy, 0)
    training_state.write(folder, state)
    assert checkpoint.versions(folder) == [1]
    assert checkpoint.policies(tmp_path) == ["p"]


def test_write_that_fails_leaves_the_state_before_it(
    state: TrainingState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    training_state.write(tmp_path, state)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        training_state.write(tmp_path, replace(state, version=3))
    assert [path.name for path in tmp_path.iterdir()] == [training_state.FILE]
    assert (training_state.read(tmp_path) or state).version == 2


def _flip(path: Path) -> None:
    payload = bytearray(path.read_bytes())
    payload[-5] ^= 1
    path.write_bytes(payload)


def _rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Other tensors under the very header that was written."""
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(change(tensors), path, header)


def _describe(path: Path, **changes: Any) -> None:
    """Another description, with a sha256 that is right."""
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = json.dumps(json.loads(header["tenuto"]) | changes)
    save_file(tensors, path, {"tenuto": text, "sha256": training_state._sha256(text, tensors)})


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "one bit flipped": (_flip, "does not match its own sha256"),
    "other progress": (
        lambda path: path.write_bytes(path.read_bytes().replace(b"12.5", b"13.5")),
        "does not match its own sha256",
    ),
    "other tensors": (lambda path: save_file({"x": torch.ones(1)}, path), "cannot be read"),
    "other format": (lambda path: save_file({}, path, {"tenuto": '{"format_version": 2}'}), "not a training state of"),
    "deep": (lambda path: save_file({}, path, {"tenuto": "[" * 100_000}), "cannot be read"),
    "pickle": (lambda path: torch.save({}, path), "cannot be read"),
    "no file": (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
    "other names": (
        lambda path: _rewrite(path, lambda tensors: {f"{name}_": tensor for name, tensor in tensors.items()}),
        "does not match its own sha256",
    ),
    "names that changed places": (
        lambda path: _rewrite(path, lambda tensors: dict(zip(tensors, reversed(tensors.values()), strict=True))),
        "does not match its own sha256",
    ),
    "other shapes": (
        lambda path: _rewrite(path, lambda tensors: {name: x.flatten() for name, x in tensors.items()}),
        "does not match its own sha256",
    ),
    "no tensors": (lambda path: _rewrite(path, lambda _: {}), "does not match its own sha256"),
    **{
        f"other type {dtype}": (
            lambda path, dtype=dtype: _rewrite(path, lambda tensors: {n: x.to(dtype) for n, x in tensors.items()}),
            rf"weights/\S+: got {dtype}, expected torch.float32",
        )
        for dtype in (torch.bfloat16, torch.float64, torch.int32)
    },
    "another type of the same bytes": (
        lambda path: _rewrite(path, lambda tensors: {name: x.view(torch.int32) for name, x in tensors.items()}),
        r"weights/\S+: got torch.int32, expected torch.float32",
    ),
    **{
        f"{key} of {value!r}": (
            lambda path, key=key, value=value: _describe(path, **{key: value}),
            rf"{key}: got {re.escape(repr(value))}, expected ",
        )
        for key, value in [
            *[("version", value) for value in ("x", None, -1, True, 1.0, 2**63)],
            *[("best_published", value) for value in ("y", True, math.nan, math.inf, 10**400, [])],
        ]
    },
    "policy that is none": (lambda path: _describe(path, policy=[]), "policy: got list, expected an object"),
    "progress that is none": (lambda path: _describe(path, progress=None), "cannot be read"),
    "key too many": (lambda path: _describe(path, more=1), "not a training state of format 1"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_state_is_refused_and_the_version_beside_it_taken(
    case: str, state: TrainingState, policy: Policy, tmp_path: Path
):
    spoil, message = SPOILED[case]
    folder = _publish(tmp_path, policy, 0, 5)
    training_state.write(folder, state)
    spoil(folder / training_state.FILE)
    with pytest.raises(StateError, match=message):
        training_state.read(folder)
    start = _start(tmp_path, policy)
    assert (start.state, start.folder, start.progress) == (None, folder / "2", TrainingProgress(iteration=5))
    assert re.match(f"{re.escape(str(folder / training_state.FILE))}: {message}", start.refused)


@pytest.mark.parametrize("best", [None, 0, -0.5])
def test_best_return_may_be_none_or_any_number(best: float | None, state: TrainingState, tmp_path: Path):
    training_state.write(tmp_path, replace(state, best_published=best, version=0))
    found = training_state.read(tmp_path)
    assert found is not None
    assert (found.best_published, found.version) == (best, 0)


def test_folder_in_the_states_place_is_refused_before_anything_is_trained(policy: Policy, tmp_path: Path):
    """No state could ever be written there."""
    folder = _publish(tmp_path, policy, 0)
    (folder / training_state.FILE).mkdir()
    with pytest.raises(
        TrainConfigError, match=r"training_state\.safetensors: got a folder, expected a file or nothing"
    ):
        _start(tmp_path, policy)


@pytest.mark.parametrize(
    "iterations", [(0, 5), (0, 7), (0, 5, 7)], ids=["since the version", "as old", "killed before it was published"]
)
def test_state_that_is_as_new_as_the_newest_version_is_taken(
    iterations: tuple[int, ...], state: TrainingState, policy: Policy, tmp_path: Path
):
    folder = _publish(tmp_path, policy, *iterations)
    training_state.write(folder, state)
    start = _start(tmp_path, policy)
    assert start.refused == ""
    assert start.state is not None
    assert start.progress == state.progress
    assert str(start) == "goes on after iteration 7"
    assert start.without_tensors().state == replace(state, tensors={})


@pytest.mark.parametrize(
    ("iterations", "changes", "message"),
    [
        ((0, 8), {}, "the state is of iteration 7, version 2 of iteration 8"),
        ((0, 5, 0), {}, "version 3 was not published by the run that left the state"),
        ((0, 5), {"policy": {"config": "other"}}, "the state is of a policy with other spaces or sizes"),
        ((0, 5), {"tensors": {}}, "weights: got other tensors than the policy has"),
        ((), {}, "there is no version beside the state that can be read"),
    ],
)
def test_state_of_something_else_is_refused(
    iterations: tuple[int, ...],
    changes: dict[str, Any],
    message: str,
    state: TrainingState,
    policy: Policy,
    tmp_path: Path,
):
    (tmp_path / "p").mkdir()
    folder = _publish(tmp_path, policy, *iterations)
    training_state.write(folder, replace(state, **changes))
    start = _start(tmp_path, policy)
    assert start.state is None
    assert start.refused.startswith(message)
    assert start.folder == (folder / str(len(iterations)) if iterations else None)
