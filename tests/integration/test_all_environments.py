"""Every environment goes the whole way: an iteration of PPO, a published version, a server, an episode over the wire.

One Ray and one server for all; each environment has a policy of its own, which the server takes in while it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import popgym.envs
import pytest
import torch
from gymnasium import spaces
from ray.rllib.core import DEFAULT_MODULE_ID

import tenuto_envs
import tiny_training
from serving import ServerProcess, wait_until
from tenuto_client import RemoteVectorPolicy
from tenuto_client.player import Player
from tenuto_client.results import VectorStepResult
from tenuto_client.view import PlainView
from tenuto_models import Policy, checkpoint
from tenuto_models.sampling import uniforms
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_trainer.ppo import build_algorithm, local_ray, ppo_config
from tenuto_trainer.resume import Start

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Overriding environment rllib-single-agent-env-v0"),
    pytest.mark.filterwarnings("ignore:Maze environments have been shown:DeprecationWarning:popgym"),
]
POPGYM = [spec["id"] for spec in popgym.envs.ALL.values()]
OTHERS = [
    "CartPole-v1", "Pendulum-v1", "tiny_training:bits", "tiny_training:shifted", "tiny_training:half_bounded",
]  # fmt: skip
# A POPGym environment has three difficulties: the memories alternate, and every environment is tried with both.
MEMORY = dict(zip([*sorted(POPGYM), *OTHERS], cycle(["dnc", "frameconv"]), strict=False))
MAX_SEQ_LEN, SEED, NUM_ENVS, PADDED_ROWS = 16, 11, 2, 4


class Witness(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Keeps what passes: ``(observation, whether it begins an episode)``, and the actions."""

    def __init__(self, env: tenuto_envs.conform.Env) -> None:
        super().__init__(env)
        self.observed: list[tuple[Any, bool]] = []
        self.actions: list[Any] = []
        self.num_ended = 0

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**options)
        self.observed.append((observation, True))
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self.actions.append(action)
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.num_ended += terminated or truncated
        if not (terminated or truncated):
            self.observed.append((observation, False))
        return observation, reward, terminated, truncated, info


class Listener(RemoteVectorPolicy):
    """A RemoteVectorPolicy that keeps the logits of each row that was stepped."""

    def step(self, observations: Any, **options: Any) -> VectorStepResult:
        result = super().step(observations, **options)
        assert not result.errors and result.logits is not None
        for row in np.flatnonzero(result.versions):
            self.logits.setdefault(int(row), []).append(result.logits[row])
            self.versions.add(int(result.versions[row]))
        return result

    def listen(self) -> Listener:
        self.logits: dict[int, list[np.ndarray]] = {}
        self.versions: set[int] = set()
        return self


@dataclass
class Game:
    """One environment's way: what was published, what was played with it, and what should have been, by row."""

    untrained: Policy
    trained: Policy
    envs: list[Witness]
    logits: dict[int, list[np.ndarray]]

    @property
    def space(self) -> spaces.Space[Any]:
        return self.envs[0].action_space

    @property
    def actions(self) -> np.ndarray:
        """Of both episodes, one after the other."""
        return np.stack([action for env in self.envs for action in env.actions])

    def require_what_was_published(self) -> None:
        """Whole episodes, whose every action is the published policy's, which one iteration has changed."""
        expected = replay(self.trained, [env.observed for env in self.envs])
        for env, got, (logits, actions) in zip(self.envs, self.logits.values(), expected, strict=True):
            assert env.num_ended == 1 and len(env.actions) == len(env.observed) == len(got)
            np.testing.assert_allclose(np.stack(got), logits, atol=1e-5)
            if isinstance(self.space, spaces.Box):
                np.testing.assert_allclose(np.stack(env.actions), actions, atol=1e-5)
            else:
                np.testing.assert_array_equal(np.stack(env.actions), actions)
        start = [env.observed[:MAX_SEQ_LEN] for env in self.envs]
        for (before, _), (after, _) in zip(replay(self.untrained, start), expected, strict=True):
            assert np.abs(before - after[: len(before)]).max() > 0.01


@dataclass
class Arcade:
    """Takes each environment its whole way once, however many tests look at it."""

    repository: Path
    server: ServerProcess
    games: dict[str, Game] = field(default_factory=dict)

    def game(self, env_id: str) -> Game:
        if env_id not in self.games:
            name, learned = self.train(env_id, MEMORY[env_id])
            wait_until(lambda: self.newest(name) == 2, f"version 2 of {name} to be served")
            self.games[env_id] = game = self.play(env_id, name)
            for key, tensor in game.trained.state_dict().items():
                assert np.array_equal(tensor.numpy(), learned[f"policy.{key}"])
            game.require_what_was_published()
        return self.games[env_id]

    def train(self, env_id: str, memory: str) -> tuple[str, dict[str, np.ndarray]]:
        """Publish the untrained policy and that of one iteration, as tenuto-train does: name, the learner's weights."""
        settings = tiny_training.config(
            memory, env_id, repository=self.repository, batch_size=128, minibatch_size=64, num_epochs=2, lr=0.01
        )
        env = tenuto_envs.make(env_id)
        ppo = ppo_config(settings, env.observation_space, env.action_space, Start())
        env.close()
        with build_algorithm(ppo) as (algorithm, publisher):
            algorithm.train()
            publisher.publish(algorithm)
            assert (publisher.version, publisher.progress.iteration) == (2, 1)
            assert publisher.progress.env_steps >= 128
            return settings.policy, algorithm.learner_group.get_weights()[DEFAULT_MODULE_ID]

    def newest(self, name: str) -> int:
        versions = [line for line in self.server.log if f" of policy {name} " in line]
        if not versions:
            return 0
        return self.server.stub.GetPolicy(pb.GetPolicyRequest(policy_name=name)).version

    def play(self, env_id: str, name: str) -> Game:
        """Play an episode in each of two environments at once, to its end."""
        envs = [Witness(tenuto_envs.make(env_id)) for _ in range(NUM_ENVS)]
        with Listener(self.server.address, NUM_ENVS, name, seed=SEED, outputs=("logits",)).listen() as policy:
            Player(envs, policy, num_episodes=NUM_ENVS, seed=3).play(PlainView())
        assert policy.versions == {2}
        read = [checkpoint.read(self.repository / name / str(version)).policy for version in (1, 2)]
        return Game(*read, envs, policy.logits)


@pytest.fixture(scope="module")
def arcade(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arcade]:
    repository: Path = tmp_path_factory.mktemp("repository")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # As tenuto-train does.
    flags = "--capacity", "8", "--max-batch", str(PADDED_ROWS)
    with local_ray(tiny_training.config()), ServerProcess(repository, *flags, wait=False) as server:
        yield Arcade(repository, server)
    torch.set_num_threads(num_threads)


def replay(policy: Policy, sessions: list[list[tuple[Any, bool]]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Logits and actions of each session, computed by the policy alone, in a batch padded as the server pads its own.

    Session i has row i and the seed SEED + i. One that is shorter than the others goes on with zeros.
    """
    distribution, rows = policy.distribution, range(len(sessions))
    state, fresh = policy.initial_state(PADDED_ROWS), policy.initial_state(PADDED_ROWS)
    seeds = np.array([SEED + row for row in rows], np.uint64)
    logits: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    for index in range(max(map(len, sessions))):
        flat = torch.zeros(PADDED_ROWS, policy.observation_size)
        for row in rows:
            if index < len(sessions[row]):
                observation, start = sessions[row][index]
                flat[row] = torch.from_numpy(
                    np.asarray(spaces.flatten(policy.observation_space, observation), np.float32)
                )
                for name in state if start else ():
                    state[name][row] = fresh[name][row]
        with torch.inference_mode():
            output, state = policy.step(flat, {name: tensor.clone() for name, tensor in state.items()})
            state = {name: tensor.clone() for name, tensor in state.items()}
            draws = uniforms(seeds, np.full_like(seeds, index), distribution.num_uniforms)
            raw = distribution.sample(output.logits[: len(sessions)], torch.from_numpy(draws))
        logits.append(output.logits.numpy())
        actions.append(distribution.to_space(raw).numpy())
    return [
        (
            np.stack([o[row] for o in logits[: len(sessions[row])]]),
            np.stack([a[row] for a in actions[: len(sessions[row])]]),
        )
        for row in rows
    ]


@pytest.mark.parametrize("env_id", POPGYM)
def test_popgym_environment_is_trained_published_served_and_played(arcade: Arcade, env_id: str) -> None:
    arcade.game(env_id)


@pytest.mark.parametrize("env_id", OTHERS)
def test_gymnasiums_and_users_own_environments_go_the_same_way(arcade: Arcade, env_id: str) -> None:
    arcade.game(env_id)


def test_none_of_popgyms_environments_is_left_out() -> None:
    registered = {env_id for env_id in gymnasium.registry if env_id.startswith("popgym-")}
    assert set(POPGYM) == registered and len(POPGYM) == 48
    for difficulty in (popgym.envs.ALL_EASY, popgym.envs.ALL_MEDIUM, popgym.envs.ALL_HARD):
        assert len(difficulty) == 16 and {spec["id"] for spec in difficulty.values()} <= registered


def test_every_popgym_environment_is_tried_with_both_memories() -> None:
    tried: dict[str, set[str]] = {}
    for env_id in POPGYM:
        for difficulty in ("Easy", "Medium", "Hard"):
            if env_id.endswith(f"{difficulty}-v0"):
                tried.setdefault(env_id.removesuffix(f"{difficulty}-v0"), set()).add(MEMORY[env_id])
    assert len(tried) == 16 and all(memories == {"dnc", "frameconv"} for memories in tried.values())


@pytest.mark.parametrize("env_id", ["popgym-LabyrinthExploreEasy-v0", "popgym-LabyrinthExploreMedium-v0"])
def test_episodes_much_longer_than_max_seq_len_are_played_to_their_end(arcade: Arcade, env_id: str) -> None:
    assert all(len(env.actions) == 1023 > 60 * MAX_SEQ_LEN for env in arcade.game(env_id).envs)


def test_a_longer_episode_is_learned_in_rows_that_go_on_with_the_state_before_them() -> None:
    env_id = "popgym-RepeatFirstHard-v0"
    training = tiny_training.Training(tiny_training.config("dnc", env_id, num_envs=1, batch_size=200))
    [episode] = training.sample()
    assert len(episode) == 200
    batch = training.learner_batch([episode])
    # 200 steps and the one that advantages are estimated with make 13 rows; only the first begins without a memory.
    assert batch["obs"].shape[:2] == (13, MAX_SEQ_LEN)
    state = training.module.unpack_state(batch["state_in"])
    assert state["t"].flatten().tolist() == [MAX_SEQ_LEN * row for row in range(13)]
    memory = state["memory"].flatten(1)
    assert not memory[0].any() and memory[1:].any(dim=1).all()


@pytest.mark.parametrize(
    "env_id", ["popgym-CountRecallEasy-v0", "popgym-CountRecallHard-v0", "popgym-ConcentrationMedium-v0"]
)
def test_tuple_observations_with_multi_discrete_in_them_are_learned_and_played(arcade: Arcade, env_id: str) -> None:
    game = arcade.game(env_id)
    observation = game.trained.observation_space
    assert isinstance(observation, spaces.Tuple) and isinstance(observation[0], spaces.MultiDiscrete)
    assert game.trained.observation_size == spaces.flatdim(observation)
    assert len({bytes(np.asarray(o[0])) for o, _ in game.envs[0].observed}) > 1


@pytest.mark.parametrize(
    "env_id", ["popgym-BattleshipEasy-v0", "popgym-BattleshipMedium-v0", "popgym-MineSweeperHard-v0"]
)
def test_multi_discrete_actions_are_learned_and_played(arcade: Arcade, env_id: str) -> None:
    game = arcade.game(env_id)
    assert isinstance(game.space, spaces.MultiDiscrete)
    assert game.trained.distribution.num_logits == game.space.nvec.sum()
    actions = game.actions
    assert actions.shape[1:] == (2,) and (np.ptp(actions, axis=0) > 0).all()


@pytest.mark.parametrize(
    "env_id", ["Pendulum-v1", "popgym-PositionOnlyPendulumEasy-v0", "popgym-NoisyPositionOnlyPendulumEasy-v0"]
)
def test_continuous_actions_are_learned_and_played_within_their_bounds(arcade: Arcade, env_id: str) -> None:
    game = arcade.game(env_id)
    assert isinstance(game.space, spaces.Box) and game.space.high == 2
    actions = game.actions
    assert actions.shape[1:] == (1,) and actions.dtype == np.float32
    assert -2 <= actions.min() < -1 and 1 < actions.max() <= 2


def test_observations_without_bounds_are_served(arcade: Arcade) -> None:
    game = arcade.game("popgym-VelocityOnlyCartpoleEasy-v0")
    observation = game.trained.observation_space
    assert isinstance(observation, spaces.Tuple) and isinstance(observation[0], spaces.Box)
    assert not observation[0].is_bounded("both")


def test_episodes_of_undeclared_length_are_played_to_their_end(arcade: Arcade) -> None:
    game = arcade.game("popgym-HigherLowerEasy-v0")
    assert game.envs[0].get_wrapper_attr("spec").max_episode_steps is None
    assert len(game.envs[0].actions) == 51
