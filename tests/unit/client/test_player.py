"""The player sends each observation once, credits each reward to its episode, and outlasts a server that is away."""

from __future__ import annotations

import io
from typing import Any

import grpc
import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from rich.console import Console
from rich.live import Live

from scripted import draining, refusal, unavailable
from tenuto_client import (
    DrainingError,
    ObservationError,
    ServerUnavailableError,
    SessionLostError,
    SpaceMismatchError,
    TenutoError,
    Timings,
    VectorStepResult,
)
from tenuto_client.player import Player
from tenuto_client.statistics import PlayStatistics
from tenuto_client.view import LiveView
from tenuto_proto.v1 import policy_pb2 as pb

LENGTH = 3


class CountingEnv(gymnasium.Env[Any, Any]):
    """Episodes of three steps. The observation counts all observations of its life; step t of an episode earns t."""

    observation_space = spaces.Box(0, 1000, (1,), np.float32)
    action_space = spaces.Discrete(4)

    def __init__(self) -> None:
        self.count = self.t = 0
        self.actions: list[Any] = []
        self.seeds: list[int | None] = []

    def _observe(self) -> Any:
        self.count += 1
        return np.array([self.count - 1], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.seeds.append(seed)
        self.t = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.actions.append(action)
        self.t += 1
        return self._observe(), float(self.t), self.t == LENGTH, False, {}


class FakePolicy:
    """Stands in for RemoteVectorPolicy: notes what it is sent; ``script`` holds the errors of the next steps."""

    observation_space = CountingEnv.observation_space
    action_space = CountingEnv.action_space

    def __init__(self, n: int) -> None:
        self.n, self.version = n, 1
        self.script: list[dict[int, TenutoError]] = []
        self.sent: list[list[tuple[float, bool, float | None]]] = [[] for _ in range(n)]
        self.masks: list[list[bool]] = []

    def step(self, observations: Any, *, episode_starts: Any, rewards: Any, mask: Any, raise_errors: bool) -> Any:
        assert not raise_errors
        errors = {row: e for row, e in (self.script.pop(0) if self.script else {}).items() if mask[row]}
        versions = np.zeros(self.n, np.uint64)
        self.masks.append(list(mask))
        for row in np.flatnonzero(mask):
            if row not in errors:
                reward = None if np.isnan(rewards[row]) else float(rewards[row])
                self.sent[row].append((float(observations[row, 0]), bool(episode_starts[row]), reward))
                versions[row] = self.version
        actions = np.arange(self.n, dtype=np.int64) % 4
        zeros = np.zeros(self.n, np.uint64)
        return VectorStepResult(actions, None, None, None, versions, zeros, errors, Timings(0, 0, 0))


class Notes:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.lines: list[str] = []

    def update(self, line: Any) -> None:
        self.lines.append(line())

    def note(self, text: str) -> None:
        self.notes.append(text)


class World:
    """A player with its environments, policy and clock; every look at the clock costs a millisecond."""

    def __init__(self, n: int = 1, **arguments: Any) -> None:
        self.now_s = 0.0
        self.pauses_s: list[float] = []
        self.envs = [CountingEnv() for _ in range(n)]
        self.policy, self.notes = FakePolicy(n), Notes()
        fake: Any = self.policy
        self.player = Player(self.envs, fake, clock=self.clock, sleep=self.sleep, **arguments)

    def clock(self) -> float:
        self.now_s += 0.001
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.pauses_s.append(seconds)
        self.now_s += seconds

    def play(self) -> Any:
        return self.player.play(self.notes)


def test_the_last_reward_of_an_episode_travels_with_the_first_step_of_the_next() -> None:
    world = World(num_episodes=2, seed=7)
    statistics = world.play()
    assert world.policy.sent[0] == [
        (0, True, None), (1, False, 1), (2, False, 2),
        # Observation 3 ended the episode: there is nothing to do about it, so it is not sent.
        (4, True, 3), (5, False, 1), (6, False, 2),
    ]  # fmt: skip
    assert world.player.last_rewards.tolist() == [3]
    assert (statistics.num_episodes, statistics.num_steps) == (2, 6)
    assert statistics.by_version[1].mean == 6.0 and statistics.by_version[1].spread == 0.0
    assert world.envs[0].seeds == [7, None]
    assert all(type(action) is int for action in world.envs[0].actions)


def test_exactly_as_many_episodes_begin_as_were_asked_for() -> None:
    world = World(3, num_episodes=4, seed=1)
    assert world.play().num_episodes == 4
    assert [len(sent) for sent in world.policy.sent] == [6, 3, 3]
    assert [env.seeds[0] for env in world.envs] == [1, 2, 3]
    assert world.policy.masks[-1] == [True, False, False]


def test_more_environments_than_episodes_rest() -> None:
    world = World(3, num_episodes=1)
    assert world.play().num_episodes == 1
    assert [len(sent) for sent in world.policy.sent] == [3, 0, 0]


def test_stops_between_two_steps_when_asked() -> None:
    world = World()
    answers = iter([False, False, True])
    statistics = world.player.play(world.notes, lambda: next(answers))
    assert statistics.num_steps == 2 and world.player.last_rewards.tolist() == [2]


def test_episodes_count_for_the_version_that_ends_them() -> None:
    world = World(num_episodes=3)
    answers = iter(range(100))

    def should_stop() -> bool:
        world.policy.version = 1 if next(answers) < LENGTH else 2
        return False

    statistics = world.player.play(world.notes, should_stop)
    assert {version: returns.count for version, returns in statistics.by_version.items()} == {1: 1, 2: 2}
    assert statistics.summary()[1:3] == [
        "         1         1        6.000     0.000",
        "         2         2        6.000     0.000",
    ]


def test_a_lost_episode_begins_anew_and_is_not_counted() -> None:
    world = World(2, num_episodes=2)
    world.policy.script = [{}, {0: SessionLostError("the server restarted")}]
    statistics = world.play()
    assert (statistics.num_episodes, statistics.num_interrupted) == (2, 1)
    assert world.policy.sent[0] == [(0, True, None), (2, True, None), (3, False, 1), (4, False, 2)]
    assert world.notes.notes == ["1 episodes lost, they begin anew: the server restarted"]


def test_rows_that_are_not_served_send_the_same_observation_again_and_the_others_go_on() -> None:
    world = World(2, num_episodes=4)
    world.policy.script = [{}, {}, {}, {0: draining()}]
    statistics = world.play()
    assert statistics.num_episodes == 4
    assert [sent[:2] for sent in world.policy.sent[0][2:5]] == [(2, False), (4, True), (5, False)]
    # Row 0 rests while row 1 plays on; only then is there nothing to do but wait.
    assert world.policy.masks[4:7] == [[False, True], [False, True], [True, False]]
    assert len(world.pauses_s) == 1 and 0 < world.pauses_s[0] <= 0.5
    assert len(world.notes.notes) == 1 and "wait for the server, at most 30 s: DRAINING" in world.notes.notes[0]


def test_a_server_that_stays_away_is_an_error_when_patience_ends() -> None:
    world = World(patience_s=2.0)
    world.policy.script = [{0: unavailable()} for _ in range(100)]
    with pytest.raises(ServerUnavailableError, match="connection refused; the server did not come back within 2 s"):
        world.play()
    assert 2 < world.now_s < 3


def test_patience_begins_anew_after_the_server_was_back() -> None:
    world = World(num_episodes=2, patience_s=1.2)
    away: dict[int, TenutoError] = {0: DrainingError("draining")}
    world.policy.script = [away, away, away, {}, away, away, away, {}]
    assert world.play().num_episodes == 2
    assert len(world.notes.notes) == 2


def test_patience_counts_from_when_the_server_was_last_seen() -> None:
    world = World(2, num_episodes=2, patience_s=1.2)
    down: dict[int, TenutoError] = {0: unavailable()}
    # Row 1 is served meanwhile; only when it has finished does nobody see the server any more.
    world.policy.script = [down] * 100
    with pytest.raises(ServerUnavailableError, match=r"within 1\.2 s"):
        world.play()
    assert world.player.statistics.num_episodes == 1
    assert 1.2 < world.now_s < 2.0


def test_a_draining_server_is_waited_for_longer_than_one_that_is_gone() -> None:
    world = World(patience_s=1.2)
    drains: list[dict[int, TenutoError]] = [{0: draining()} for _ in range(20)]
    gone: list[dict[int, TenutoError]] = [{0: unavailable()} for _ in range(100)]
    world.policy.script = drains + gone
    with pytest.raises(ServerUnavailableError, match=r"did not come back within 1\.2 s"):
        world.play()
    # 20 answers half a second apart, and then its patience.
    assert 9.5 + 1.2 < world.now_s < 9.5 + 2.5


def test_a_refusal_ends_the_game() -> None:
    world = World(2)
    world.policy.script = [{1: refusal(pb.OBSERVATION_NOT_FINITE, grpc.StatusCode.INVALID_ARGUMENT)}]
    with pytest.raises(ObservationError):
        world.play()


def test_spaces_that_differ_are_named() -> None:
    fake: Any = FakePolicy(1)
    fake.action_space = spaces.Discrete(5)
    fake.served = pb.GetPolicyResponse(policy_name="walker")
    with pytest.raises(
        SpaceMismatchError, match=r"action space: got Discrete\(4\) .*expected Discrete\(5\) .*'walker'"
    ):
        Player([CountingEnv()], fake)


def test_the_line_tells_speed_latency_and_who_waits() -> None:
    world = World(num_episodes=1)
    world.play()
    # A round trip is two looks at the clock apart.
    assert world.notes.lines[-1].startswith("episodes 1  return 6.000  ")
    assert world.notes.lines[-1].endswith(" steps/s  version 1  p50 1.00 p99 1.00 ms")
    world.player.statistics.num_away = 3
    assert world.player.statistics.line(1.0).endswith("  version 1  3 waiting")


@pytest.mark.parametrize("num_away", [0, 128])
@pytest.mark.parametrize("episode_return", [0.0, -0.12345, -9999.9, 12345.6])
def test_the_line_fits_a_terminal_also_after_a_long_game(num_away: int, episode_return: float) -> None:
    statistics = PlayStatistics(num_away=num_away)
    for count in range(10_000):
        statistics.add_episode(9999, episode_return)
        statistics.add_step(count * 0.005, 0.0999 if count % 10 else 1.2346, 256, 9999)
    line = statistics.line(50.0)
    assert len(line) <= 80
    assert line.startswith("episodes 10000  return ") and line.endswith("128 waiting" if num_away else " ms")


def test_the_live_line_never_wraps() -> None:
    out = io.StringIO()
    console = Console(file=out, width=20, force_terminal=True)
    with LiveView(Live("", console=console, auto_refresh=False), clock=lambda: 1.0) as view:
        view.update(lambda: "episodes 1  return 6.000  12345 steps/s")
    assert "episodes 1  return …\n" in out.getvalue() and "steps" not in out.getvalue()
