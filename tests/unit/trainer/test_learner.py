"""A learner that was restored makes the very update that the undisturbed one makes."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_training
from tenuto_models import TrainingProgress
from tenuto_trainer import state as training_state
from tenuto_trainer.errors import StateError
from tenuto_trainer.learner import load_tensors, require_fit, tensors_of
from tenuto_trainer.state import TrainingState

pytestmark = pytest.mark.filterwarnings("ignore:.*Overriding environment rllib-single-agent-env-v0")
MEMORIES = ("dnc", "frameconv")


def _update(training: tiny_training.Training, episodes: list[Any]) -> dict[str, torch.Tensor]:
    """One update with the same order of minibatches, whatever was drawn before."""
    np.random.seed(5)
    torch.manual_seed(5)
    training.update(copy.deepcopy(episodes))
    return tensors_of(training.learner)


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("memory", MEMORIES)
def test_update_after_a_restart_is_bit_for_bit_that_of_the_undisturbed_learner(memory: str, tmp_path: Path):
    undisturbed = tiny_training.Training(tiny_training.config(memory))
    for _ in range(2):
        undisturbed.update(undisturbed.sample())
    tensors = tensors_of(undisturbed.learner)
    training_state.write(tmp_path, TrainingState(tensors, {}, TrainingProgress(), 1, None))
    episodes = undisturbed.sample()

    restarted = tiny_training.Training(tiny_training.config(memory, seed=1))
    assert not _same(tensors_of(restarted.learner), tensors)
    found = training_state.read(tmp_path)
    assert found is not None
    load_tensors(restarted.learner, found.tensors)
    assert _same(tensors_of(restarted.learner), tensors)
    expected = _update(undisturbed, episodes)
    assert _same(_update(restarted, episodes), expected)

    forgetful = tiny_training.Training(tiny_training.config(memory, seed=1))
    load_tensors(forgetful.learner, {name: x for name, x in found.tensors.items() if name.startswith("weights/")})
    weights = _update(forgetful, episodes)
    assert not torch.equal(weights["weights/actor.0.weight"], expected["weights/actor.0.weight"])


def test_adams_steps_are_counted_and_its_moments_kept_by_the_names_of_the_parameters():
    training = tiny_training.Training(tiny_training.config())
    policy, steps = training.module.policy, []
    training.learner.apply_gradients = _counting(training.learner.apply_gradients, steps)
    training.update(training.sample())
    training.update(training.sample())
    tensors = tensors_of(training.learner)
    assert len(steps) >= 4
    for name, parameter in policy.named_parameters():
        assert int(tensors[f"step/{name}"]) == len(steps)
        assert tensors[f"exp_avg_sq/{name}"].shape == parameter.shape
    assert {name for name in tensors if name.startswith("weights/")} == {f"weights/{n}" for n in policy.state_dict()}


def _counting(function: Any, calls: list[int]) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return function(*args, **kwargs)

    return counted


def test_learning_rate_of_the_new_run_is_kept():
    before, after = (tiny_training.Training(tiny_training.config(lr=lr)) for lr in (1e-3, 1e-4))
    before.update(before.sample())
    load_tensors(after.learner, tensors_of(before.learner))
    after.update(after.sample())
    ((_, optimizer),) = after.learner.get_optimizers_for_module(after.module_id)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [pytest.approx(1e-4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("weights/actor.0.bias"), r"weights: got other tensors .* actor\.0\.bias"),
        (lambda t: t.pop("exp_avg/actor.0.bias"), r"exp_avg: got other tensors .* actor\.0\.bias"),
        (lambda t: t.update({"exp_avg/x": torch.ones(1)}), "exp_avg: got other tensors .* x"),
        (lambda t: t.update({"exp_avg/actor.0.bias": torch.ones(3)}), r"exp_avg/actor\.0\.bias: got shape \(3,\)"),
        (lambda t: t.update({"weights/actor.0.bias": torch.ones(3)}), r"weights/actor\.0\.bias: got shape \(3,\)"),
        (lambda t: t["exp_avg_sq/actor.0.bias"].fill_(torch.nan), r"exp_avg_sq/actor\.0\.bias: got NaN"),
        (lambda t: t.clear(), "weights: got other tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_change_nothing(change: Any, message: str):
    training = tiny_training.Training(tiny_training.config())
    training.update(training.sample())
    before = tensors_of(training.learner)
    spoiled = {name: tensor.clone() for name, tensor in before.items()}
    require_fit(training.module.policy, spoiled)
    change(spoiled)
    with pytest.raises(StateError, match=message):
        load_tensors(training.learner, spoiled)
    assert _same(tensors_of(training.learner), before)
