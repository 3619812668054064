"""Takes a learner's tensors out and puts them back: weights, Adam's moments and step counts, by parameter name.

``weights/<parameter>``, ``exp_avg/<parameter>``, ``exp_avg_sq/<parameter>``, ``step/<parameter>``. By name, not by
position as torch's optimizers have it, so that tensors can never change places. The functions run inside the learner,
be it local or in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from torch import Tensor

from tenuto_trainer.errors import StateError

_WEIGHTS, _STEP = "weights", "step"


def tensors_of(learner: Any) -> dict[str, Tensor]:
    """Copy everything of an RLlib learner that its next update depends on, but for random numbers, to the CPU."""
    policy, optimizer = _parts(learner)
    found = {f"{_WEIGHTS}/{name}": tensor for name, tensor in policy.state_dict().items()}
    for name, parameter in policy.named_parameters():
        # Nothing before the first update.
        found |= {f"{kind}/{name}": tensor for kind, tensor in optimizer.state.get(parameter, {}).items()}
    return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}


def load_tensors(learner: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put :func:`tensors_of` back; settings such as the learning rate stay those of the learner.

    Raises StateError, before anything is changed, if they do not fit.
    """
    policy, optimizer = _parts(learner)
    require_fit(policy, tensors)
    by_kind = _by_kind(tensors)
    policy.load_state_dict(by_kind.pop(_WEIGHTS))
    moments = {
        index: {kind: found[name] for kind, found in by_kind.items()}
        for index, (name, _) in enumerate(policy.named_parameters())
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments if by_kind else {}})


def require_fit(policy: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise StateError unless the tensors have exactly the names and shapes that this policy's learner has."""
    by_kind = _by_kind(tensors)
    own = {name: tensor.shape for name, tensor in policy.state_dict().items()}
    parameters = {name: tensor.shape for name, tensor in policy.named_parameters()}
    for kind in sorted({_WEIGHTS, *by_kind}):
        got, expected = by_kind.get(kind, {}), own if kind == _WEIGHTS else parameters
        if differing := sorted(got.keys() ^ expected.keys()):
            raise StateError(f"{kind}: got other tensors than the policy has, the first is {differing[0]}")
        for name, tensor in got.items():
            # Adam counts its steps in a tensor without dimensions.
            if tensor.shape != (torch.Size() if kind == _STEP else expected[name]):
                raise StateError(f"{kind}/{name}: got shape {tuple(tensor.shape)}, expected {tuple(expected[name])}")
            if not bool(torch.isfinite(tensor).all()):
                raise StateError(f"{kind}/{name}: got NaN or infinity, expected finite numbers")


def learner_tensors(algorithm: Algorithm) -> dict[str, Tensor]:
    """Return :func:`tensors_of` the algorithm's learner."""
    return _in_learner(algorithm, tensors_of)


def restore_learner(algorithm: Algorithm, tensors: Mapping[str, Tensor]) -> None:
    """Let the algorithm's learner go on from ``tensors`` and hand its weights to all env runners. Raises StateError."""
    _in_learner(algorithm, partial(load_tensors, tensors=tensors))
    learners, runners = algorithm.learner_group, algorithm.env_runner_group
    assert learners is not None and runners is not None, "the trainer samples with env runners"
    weights = learners.get_state(f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}", inference_only=True)[COMPONENT_LEARNER]
    # Not sync_weights: it drops what it is given while the weights from the start are still on their way.
    runners.foreach_env_runner(partial(_set_state, state={COMPONENT_RL_MODULE: weights[COMPONENT_RL_MODULE]}))


def _in_learner(algorithm: Algorithm, function: Callable[[Any], Any]) -> Any:
    learners = algorithm.learner_group
    assert learners is not None, "an algorithm of the new API stack has learners"
    (result,) = learners.foreach_learner(cast(Any, function))  # Annotated as if it took a second argument.
    return result.get()


def _set_state(runner: Any, state: dict[str, Any]) -> None:
    runner.set_state(state)


def _parts(learner: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return the policy, which owns all parameters of its module and in the optimizer's order, and the optimizer."""
    ((_, optimizer),) = learner.get_optimizers_for_module(DEFAULT_MODULE_ID)
    return learner.module[DEFAULT_MODULE_ID].policy, optimizer


def _by_kind(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        kind, _, name = full_name.partition("/")
        found.setdefault(kind, {})[name] = tensor
    return found
