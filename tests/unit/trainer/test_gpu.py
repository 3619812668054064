"""Gradients on a GPU; what is published and kept is on the CPU, and a run may change places."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tenuto_envs
import tiny_training
from tenuto_models import checkpoint
from tenuto_trainer import TrainConfig, TrainConfigError
from tenuto_trainer import state as training_state
from tenuto_trainer.learner import learner_tensors
from tenuto_trainer.ppo import build_algorithm, local_ray, ppo_config, uses_gpu
from tenuto_trainer.resume import find_start

pytestmark = pytest.mark.filterwarnings("ignore:.*Overriding environment rllib-single-agent-env-v0")
has_gpu = torch.cuda.is_available()


@pytest.mark.skipif(has_gpu, reason="this machine has a GPU")
def test_learner_on_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(TrainConfigError, match=r"^learner_device: got 'cuda', expected 'cpu' or 'auto'"):
        uses_gpu(tiny_training.config(learner_device="cuda"))
    assert not uses_gpu(tiny_training.config(learner_device="auto"))


def test_learner_computes_on_the_cpu_unless_told_otherwise():
    assert not uses_gpu(tiny_training.config())
    with pytest.raises(TrainConfigError, match=r"^learner_device: got 'tpu', expected one of cpu, cuda, auto"):
        tiny_training.config(learner_device="tpu")


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu, reason="needs a CUDA device")
def test_training_on_a_gpu_publishes_for_the_cpu_and_goes_on_there(tmp_path: Path):
    settings = tiny_training.config(repository=tmp_path, policy="p", learner_device="cuda")
    with local_ray(settings):
        _train(settings, torch.device("cuda", 0))
        version = checkpoint.read(tmp_path / "p" / "2")
        assert version.training.iteration == 1
        state = training_state.read(tmp_path / "p")
        assert state is not None
        for name, tensor in version.policy.state_dict().items():
            assert torch.equal(state.tensors[f"weights/{name}"], tensor)
        for n, device in enumerate((torch.device("cuda", 0), torch.device("cpu")), start=2):
            _train(replace(settings, learner_device=device.type), device)
            assert checkpoint.read(tmp_path / "p" / str(n + 1)).training.iteration == n


def _train(settings: TrainConfig, device: torch.device) -> None:
    """One iteration; with the learner where it should be, all that it hands out on the CPU."""
    env = tenuto_envs.make(settings.env_id)
    where = settings.repository, settings.policy, env.observation_space, env.action_space
    start = find_start(*where, settings.policy_config())
    ppo = ppo_config(settings, env.observation_space, env.action_space, start)
    with build_algorithm(ppo, start.state) as (algorithm, publisher):
        assert algorithm.learner_group is not None
        (found,) = algorithm.learner_group.foreach_learner(lambda learner, *_: learner.device)
        assert torch.device(found.get()) == device
        algorithm.train()
        publisher.publish(algorithm)
        assert {tensor.device.type for tensor in learner_tensors(algorithm).values()} == {"cpu"}
