import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID

import tenuto_envs
import tiny_training
from tenuto_models import CheckpointError, PolicyConfig, TrainingProgress, checkpoint
from tenuto_models.signing import Verifier, make_key_pair
from tenuto_trainer import DivergedError, TrainConfig, TrainConfigError
from tenuto_trainer.evaluation import evaluate
from tenuto_trainer.loop import StopSignal, _reason_to_stop
from tenuto_trainer.ppo import build_algorithm, local_ray, ppo_config
from tenuto_trainer.publish import CheckpointPublisher
from tenuto_trainer.resume import find_start

pytestmark = pytest.mark.filterwarnings("ignore:.*Overriding environment rllib-single-agent-env-v0")


@pytest.fixture(scope="module", autouse=True)
def ray_running() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # As in the trainer; threads that wait for each other take seconds.
    with local_ray(tiny_training.config(num_env_runners=1)):
        yield
    torch.set_num_threads(before)


@contextmanager
def _algorithm(settings: TrainConfig) -> Iterator[tuple[Algorithm, CheckpointPublisher]]:
    """What tenuto-train builds for a repository, be it new or not."""
    env = tenuto_envs.make(settings.env_id)
    where = settings.repository, settings.policy, env.observation_space, env.action_space
    start = find_start(*where, settings.policy_config())
    ppo = ppo_config(settings, env.observation_space, env.action_space, start)
    with build_algorithm(ppo, start.state) as built:
        yield built


def _config(repository: Path, **overrides: Any) -> TrainConfig:
    return tiny_training.config(repository=repository, policy="p", batch_size=512, **overrides)


def _weights(algorithm: Algorithm) -> dict[str, torch.Tensor]:
    assert algorithm.learner_group is not None
    arrays = algorithm.learner_group.get_weights()[DEFAULT_MODULE_ID]
    return {name.removeprefix("policy."): torch.tensor(array) for name, array in arrays.items()}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_untrained_policy_is_published_at_once_and_trained_ones_when_due(tmp_path: Path):
    with _algorithm(_config(tmp_path, publish_every=2, publish_gain=100.0)) as (algorithm, publisher):
        first = checkpoint.read(tmp_path / "p" / "1")
        assert _same(first.policy.state_dict(), _weights(algorithm))
        assert first.training == TrainingProgress()

        algorithm.train()  # Its return is that of the untrained policy.
        assert publisher.version == 1
        algorithm.train()  # Due.
        algorithm.train()  # Neither due nor better.
        assert checkpoint.versions(tmp_path / "p") == [1, 2]
        assert publisher.version == 2
        assert not _same(checkpoint.read(tmp_path / "p" / "2").policy.state_dict(), _weights(algorithm))

        publisher.publish(algorithm)
        publisher.publish(algorithm)  # Nothing was trained in between.
    assert checkpoint.versions(tmp_path / "p") == [1, 2, 3]
    last = checkpoint.read(tmp_path / "p" / "3")
    assert _same(last.policy.state_dict(), _weights(algorithm))
    assert last.training == publisher.progress
    assert (last.training.env_steps, last.training.iteration) == (1536, 3)
    assert last.training.best_return is not None
    assert last.training.best_return >= (last.training.return_mean or 0)


def test_with_a_key_every_version_is_signed(tmp_path: Path):
    make_key_pair(tmp_path / "secret.pem", tmp_path / "public.pem")
    with _algorithm(_config(tmp_path / "repository", signing_key=tmp_path / "secret.pem")) as (algorithm, publisher):
        algorithm.train()
        publisher.publish(algorithm)
    verifier = Verifier.from_file(tmp_path / "public.pem")
    found = checkpoint.versions(tmp_path / "repository" / "p")
    assert found == [1, 2]
    assert [checkpoint.read(tmp_path / "repository" / "p" / str(v), verifier).version for v in found] == found


def test_better_return_is_published_before_it_is_due(tmp_path: Path):
    with _algorithm(_config(tmp_path, publish_every=1000)) as (algorithm, publisher):
        _report(publisher, algorithm, 1, 0.2)  # Of the untrained policy.
        assert publisher.version == 1
        _report(publisher, algorithm, 2, 0.2)
        _report(publisher, algorithm, 3, float("nan"))  # No episode ended.
        assert (publisher.version, publisher.progress.return_mean) == (1, 0.2)
        _report(publisher, algorithm, 4, 0.5)
        assert publisher.version == 2
    assert checkpoint.best_return(tmp_path, "p") == 0.5


def test_restarted_run_goes_on_and_does_not_republish_a_worse_best(tmp_path: Path):
    settings = _config(tmp_path, publish_every=1000)
    with _algorithm(settings) as (algorithm, publisher):
        _report(publisher, algorithm, 3, 0.1)
        _report(publisher, algorithm, 4, 0.5)
        trained = _weights(algorithm)
    with _algorithm(replace(settings, seed=1)) as (algorithm, publisher):
        assert publisher.version == 2
        assert _same(_weights(algorithm), trained)
        publisher.publish(algorithm)
        _report(publisher, algorithm, 1, 0.4)
        assert publisher.version == 2
        _report(publisher, algorithm, 2, 0.6)
        assert publisher.version == 3
    assert checkpoint.read(tmp_path / "p" / "3").training == replace(
        publisher.progress, env_steps=600, iteration=6, return_mean=0.6
    )


def test_best_published_return_outlives_a_run_that_published_nothing(tmp_path: Path):
    settings = _config(tmp_path, publish_every=1000, publish_gain=0.05)
    with _algorithm(settings) as (algorithm, publisher):
        _report(publisher, algorithm, 1, 0.2)  # Of the untrained policy, which is version 1.
        _report(publisher, algorithm, 2, 0.1)
    with _algorithm(settings) as (algorithm, publisher):
        assert (publisher.progress.iteration, publisher.progress.best_return) == (2, 0.2)
        _report(publisher, algorithm, 1, 0.24)
        assert publisher.version == 1
        _report(publisher, algorithm, 2, 0.28)
        assert publisher.version == 2


def test_publications_are_due_by_the_iterations_of_all_runs(tmp_path: Path):
    settings = _config(tmp_path, publish_every=3, publish_gain=100.0)
    with _algorithm(settings) as (algorithm, publisher):
        _report(publisher, algorithm, 2, 0.0)
        assert publisher.version == 1
    with _algorithm(settings) as (algorithm, publisher):
        _report(publisher, algorithm, 1, 0.0)
        assert publisher.version == 2


def test_seconds_add_up_over_iterations_and_runs_until_they_end_the_training(tmp_path: Path):
    settings = _config(tmp_path, publish_every=1000)
    before = 0.0
    for _ in range(2):
        building_s = time.monotonic()
        with _algorithm(settings) as (algorithm, publisher):
            built_s = time.monotonic()
            assert publisher.progress.seconds == before
            for iteration in (1, 2, 3):
                algorithm.train() if iteration == 2 else _report(publisher, algorithm, iteration, 0.0)
            last_s = time.monotonic()
            _report(publisher, algorithm, 4, 0.0)
            seconds = publisher.progress.seconds
        assert before + last_s - built_s <= seconds <= before + time.monotonic() - building_s
        before = seconds
    with _algorithm(settings) as (_, publisher):
        for limit, stops in [(before, True), (before + 1, False)]:
            reason = _reason_to_stop(replace(settings, stop_seconds=limit), StopSignal(), publisher.progress)
            assert reason == (f"trained for {before:.0f} s" if stops else None)


def test_every_version_is_evaluated_with_the_very_policy_that_is_written(tmp_path: Path):
    settings = _config(tmp_path, publish_every=3, evaluation_episodes=3, lr=0.1)
    with _algorithm(settings) as (algorithm, publisher):
        assert publisher.evaluation == publisher.progress.evaluation
        algorithm.train()
        publisher.publish(algorithm)
        assert publisher.evaluation == publisher.progress.evaluation
        _report(publisher, algorithm, 2, -1.0)
        assert publisher.progress.evaluation is None  # Nobody looked at these weights.
        last = publisher.evaluation
    found = [checkpoint.read(tmp_path / "p" / version) for version in ("1", "2")]
    for version in found:
        assert version.training.evaluation == evaluate(version.policy, settings.env_id, 3, 2048)
    assert found[0].training.evaluation != found[1].training.evaluation == last
    with _algorithm(settings) as (_, publisher):
        assert publisher.evaluation == last


@pytest.mark.parametrize("num_env_runners", [0, 1])
def test_restored_weights_reach_the_processes_that_step_environments(num_env_runners: int, tmp_path: Path):
    settings = _config(tmp_path, publish_every=1000, num_env_runners=num_env_runners)
    with _algorithm(settings) as (algorithm, _):
        algorithm.train()
        trained = _weights(algorithm)
    assert checkpoint.versions(tmp_path / "p") == [1]
    with _algorithm(replace(settings, seed=1)) as (algorithm, publisher):
        assert _same(_weights(algorithm), trained)
        assert algorithm.env_runner_group is not None
        (runner,) = algorithm.env_runner_group.foreach_env_runner(
            lambda runner: runner.get_state(), local_env_runner=num_env_runners == 0
        )
        sampling = runner[COMPONENT_RL_MODULE]
        assert all(np.array_equal(sampling[f"policy.{name}"], tensor.numpy()) for name, tensor in trained.items())
        algorithm.train()
        assert (publisher.progress.iteration, publisher.progress.env_steps) == (2, 1024)


def _report(publisher: CheckpointPublisher, algorithm: Algorithm, iteration: int, return_mean: float) -> None:
    """Hand over a result as RLlib does, with a chosen return; 100 environment steps an iteration."""
    publisher.on_train_result(
        algorithm=algorithm,
        result={
            "env_runners": {"episode_return_mean": return_mean},
            "training_iteration": iteration,
            "num_env_steps_sampled_lifetime": 100.0 * iteration,
        },
    )


def test_diverged_training_ends_the_run_and_is_never_published(tmp_path: Path):
    refused = pytest.raises(DivergedError, match="is NaN or infinite; the last good version is 1")
    with _algorithm(_config(tmp_path, lr=1e30, num_epochs=4)) as (algorithm, _), refused:
        algorithm.train()
    assert checkpoint.versions(tmp_path / "p") == [1]


def test_repository_that_cannot_be_written_is_a_checkpoint_error(tmp_path: Path):
    (tmp_path / "file").touch()
    refused = pytest.raises(CheckpointError, match="cannot publish to this repository")
    with refused, _algorithm(_config(tmp_path / "file")):
        pass


def test_run_starts_from_the_newest_version_that_can_be_read(tmp_path: Path):
    policy = tiny_training.Training(tiny_training.config()).module.policy
    where = tmp_path, "p", policy.observation_space, policy.action_space, policy.config
    assert find_start(*where).folder is None
    good = checkpoint.write(tmp_path, "p", policy, TrainingProgress(iteration=7))
    bad = checkpoint.write(tmp_path, "p", policy, TrainingProgress(iteration=8))
    (bad / "weights.safetensors").write_bytes(b"")
    start = find_start(*where)
    assert (start.folder, start.progress) == (good, TrainingProgress(iteration=7))


def test_versions_of_another_kind_of_policy_are_refused(tmp_path: Path):
    policy = tiny_training.Training(tiny_training.config()).module.policy
    checkpoint.write(tmp_path, "p", policy, TrainingProgress())
    other = PolicyConfig.for_memory("frameconv")
    with pytest.raises(TrainConfigError, match=r"^memory: got frameconv, but version 1 has dnc "):
        find_start(tmp_path, "p", policy.observation_space, policy.action_space, other)
    other = replace(policy.config, memory=replace(policy.config.memory, num_cells=5), feature_size=17)
    differ = "^memory.num_cells: got 5, but version 1 has 4; feature_size: got 17, but version 1 has 16 "
    with pytest.raises(TrainConfigError, match=differ):
        find_start(tmp_path, "p", policy.observation_space, policy.action_space, other)
    with pytest.raises(TrainConfigError, match=r"^observation space: got Discrete\(4\), but version 1 has Tuple\("):
        find_start(tmp_path, "p", policy.action_space, policy.action_space, policy.config)


def test_environments_may_be_stepped_by_a_process_of_their_own(tmp_path: Path):
    with _algorithm(_config(tmp_path, num_env_runners=1)) as (algorithm, publisher):
        algorithm.train()
        publisher.publish(algorithm)
    assert publisher.progress.env_steps == 512
    assert checkpoint.versions(tmp_path / "p") == [1, 2]
