"""Evaluation plays whole episodes greedily, on seeds of its own, as anybody would who plays them one by one."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import tenuto_envs
import tiny_training
from tenuto_envs import EnvError
from tenuto_models import Policy, PolicyConfig
from tenuto_trainer.config import MAX_SEED
from tenuto_trainer.evaluation import FIRST_SEED, evaluate


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the trainer; threads that wait for each other make single steps slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Moody(gymnasium.Env[Any, Any]):
    """Pays what the action says, so that all of a policy's state shows; ends after 3 to 9 steps, by its seed."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)
    action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        assert seed is not None
        super().reset(seed=seed)
        self._left = 3 + seed % 7
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._left -= 1
        return self._observe(), float(action[0]), self._left == 0, False, {}

    def _observe(self) -> Any:
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)


def _policy(env: gymnasium.Env[Any, Any], memory: str = "dnc") -> Policy:
    """A policy with opinions: a fresh one is so close to uniform that its state would hardly matter."""
    torch.manual_seed(0)
    policy = Policy(env.observation_space, env.action_space, tiny_training.config(memory).policy_config())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(3)
    return policy


def _play_alone(policy: Policy, env: gymnasium.Env[Any, Any], seed: int) -> float:
    observation, _ = env.reset(seed=seed)
    state, total, done = policy.initial_state(1), 0.0, False
    with torch.no_grad():
        while not done:
            flat = spaces.flatten(env.observation_space, observation)
            output, state = policy.step(torch.as_tensor(flat[None], dtype=torch.float32), state)
            action = policy.distribution.to_space(policy.distribution.greedy(output.logits))[0].numpy()
            observation, reward, terminated, truncated, _ = env.step(action[()])
            total, done = total + float(reward), terminated or truncated
    return total


@pytest.mark.parametrize("memory", ["dnc", "frameconv"])
@pytest.mark.parametrize("make", [Moody, lambda: tenuto_envs.make(tiny_training.REPEAT)], ids=["moody", "repeat"])
def test_returns_are_those_of_episodes_that_are_played_one_by_one(
    make: Callable[[], Any], memory: str, monkeypatch: pytest.MonkeyPatch
):
    """Moody episodes end at different times, and each must keep its own state; 35 are more than play at once."""
    policy = _policy(make(), memory)
    monkeypatch.setattr("tenuto_trainer.evaluation.make", lambda _: make())
    found = evaluate(policy, "env", 35, 1000)
    returns = [_play_alone(policy, make(), FIRST_SEED + n) for n in range(35)]
    assert len(set(returns)) > 3
    assert (found.episodes, found.episodes_cut) == (35, 0)
    assert found.return_mean == pytest.approx(np.mean(returns), rel=1e-4)
    assert found.return_std == pytest.approx(np.std(returns), rel=1e-4)
    assert (found.return_min, found.return_max) == pytest.approx((min(returns), max(returns)), rel=1e-4)
    assert evaluate(policy, "env", 35, 1000) == found


class Endless(gymnasium.Env[Any, Any]):
    """Pays 1 a step; every fourth episode ends after 2 steps, the others never."""

    seeds: list[int] = []  # noqa: RUF012  # Of all environments of a test.
    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        assert seed is not None
        self.seeds.append(seed)
        self._left = 2 if seed % 4 == 0 else 10**9
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._left -= 1
        return np.zeros(2, np.float32), 1.0, self._left == 0, False, {}


def test_episode_that_does_not_end_is_cut_and_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Endless, "seeds", [])
    env = Endless()
    policy = Policy(env.observation_space, env.action_space, PolicyConfig.for_memory("dnc", feature_size=4))
    monkeypatch.setattr("tenuto_trainer.evaluation.make", lambda _: Endless())
    found = evaluate(policy, "endless", 8, 5)
    assert found.episodes_cut == 6
    assert (found.return_min, found.return_max, found.return_mean) == (2, 5, (2 * 2 + 6 * 5) / 8)
    assert sorted(Endless.seeds) == list(range(FIRST_SEED, FIRST_SEED + 8))
    assert (
        FIRST_SEED > MAX_SEED + 100_000_000
    )  # RLlib counts up from the seed of training, by workers and environments.


class Limited(Endless):
    """As Endless, but every odd episode is truncated after 3 steps, by a limit of the environment's own."""

    closed: list[int] = []  # noqa: RUF012  # How often each environment of a test was closed.

    def __init__(self, fails: bool = False) -> None:
        self._number = len(self.closed)
        self.closed.append(0)
        self._fails = fails

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._until_cut = 3 if seed is not None and seed % 2 else 10**9
        return super().reset(seed=seed)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self._fails:
            raise EnvError("step: fails")
        observation, reward, terminated, _, info = super().step(action)
        assert self._until_cut > 0
        self._until_cut -= 1
        return observation, reward, terminated, self._until_cut == 0, info

    def close(self) -> None:
        self.closed[self._number] += 1


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Policy:
    monkeypatch.setattr(Endless, "seeds", [])
    monkeypatch.setattr(Limited, "closed", [])
    monkeypatch.setattr("tenuto_trainer.evaluation.make", lambda _: Limited())
    config = PolicyConfig.for_memory("dnc", feature_size=4)
    return Policy(Limited.observation_space, Limited.action_space, config)


def test_episode_that_its_environment_truncates_is_over_and_was_not_cut(limited: Policy):
    """Of seeds 0 to 3 modulo 4: 2 steps and terminated, truncated after 3, cut after 5, truncated after 3."""
    found = evaluate(limited, "limited", 8, 5)
    assert found.episodes_cut == 2
    assert (found.return_min, found.return_max, found.return_mean) == (2, 5, (2 + 3 + 5 + 3) / 4)


def test_every_environment_is_closed_once(limited: Policy):
    evaluate(limited, "limited", 40, 5)
    assert Limited.closed == [1] * 32


def test_environments_are_closed_when_one_of_them_fails(limited: Policy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tenuto_trainer.evaluation.make", lambda _: Limited(fails=len(Limited.closed) == 2))
    with pytest.raises(EnvError, match="step: fails"):
        evaluate(limited, "limited", 4, 5)
    assert Limited.closed == [1] * 4


def test_environments_are_closed_when_another_cannot_be_built(limited: Policy, monkeypatch: pytest.MonkeyPatch):
    def make(env_id: str) -> Limited:
        if len(Limited.closed) == 2:
            raise EnvError(f"{env_id}: cannot be built")
        return Limited()

    monkeypatch.setattr("tenuto_trainer.evaluation.make", make)
    with pytest.raises(EnvError, match="cannot be built"):
        evaluate(limited, "limited", 4, 5)
    assert Limited.closed == [1] * 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning:popgym.core.maze")
def test_an_environment_that_seeds_the_whole_process_does_not_bring_old_training_episodes_back():
    maze = "popgym-LabyrinthExploreEasy-v0"
    policy = _policy(tenuto_envs.make(maze))
    np.random.seed(1)
    random.seed(1)
    expected = np.random.RandomState(1).random(), random.Random(1).random()
    evaluate(policy, maze, 1, 3)
    assert (np.random.random(), random.random()) == expected


def test_evaluation_leaves_policy_and_random_numbers_alone():
    policy = _policy(tenuto_envs.make(tiny_training.REPEAT))
    weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    before = torch.get_rng_state(), np.random.get_state()[1]
    evaluate(policy, tiny_training.REPEAT, 3, 100)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in policy.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.parameters())
