import subprocess
import sys
from typing import Any

import numpy as np
import popgym.envs
import pytest
from gymnasium import spaces

import tenuto_envs
from own_envs import Stub
from tenuto_envs import ConformObservation, MissingPackageError, ObservationError, UnknownEnvError, make

POPGYM = sorted(spec["id"] for spec in popgym.envs.ALL.values())
MAZES_WARN = "ignore:Maze environments have been shown:DeprecationWarning:popgym"


@pytest.mark.filterwarnings(MAZES_WARN)
@pytest.mark.parametrize("env_id", POPGYM)
def test_popgym_observations_lie_in_the_declared_space_until_the_episode_ends(env_id: str):
    env = make(env_id)
    env.action_space.seed(0)
    observation, _ = env.reset(seed=0)
    done = False
    while not done:
        assert env.observation_space.contains(observation)
        observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
        done = terminated or truncated
    assert env.observation_space.contains(observation)


def test_popgym_observation_carries_previous_action_and_first_step_flag():
    env = make("popgym-RepeatPreviousEasy-v0")
    (_, action, is_first), _ = env.reset(seed=0)
    assert (action, is_first) == (0, 1)
    (_, action, is_first), *_ = env.step(3)
    assert (action, is_first) == (3, 0)


def test_gymnasium_and_own_environments_are_made_by_id():
    assert make("CartPole-v1").spec.id == "CartPole-v1"
    assert make("own_envs:own").reset()[0] == 1


@pytest.mark.parametrize(
    ("env_id", "part"),
    [
        ("popgym-RepeatPreviousEsy-v0", "did you mean 'popgym-RepeatPreviousEasy-v0'"),
        ("popgym-LabyrinthEscpeEasy-v0", "did you mean 'popgym-LabyrinthEscapeEasy-v0'"),
        ("Cartpole-v1", "'CartPole-v1'"),
        ("CartPole-v99", "CartPole-v99"),
        ("", "got ''"),
        ("no_such_module:own", "no_such_module"),
        ("own_envs:owm", "did you mean 'own'"),
        ("own_envs:not_an_env", "returned int, expected a gymnasium.Env"),
    ],
)
def test_unknown_id_is_refused_with_close_matches(env_id: str, part: str):
    with pytest.raises(UnknownEnvError) as caught:
        make(env_id)
    assert part in str(caught.value)


def test_labyrinth_without_mazelib_says_what_to_install():
    code = "import sys; sys.modules['mazelib'] = None; import tenuto_envs; tenuto_envs.make(sys.argv[1])"
    command = [sys.executable, "-c", code, "popgym-LabyrinthEscapeEasy-v0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    error = done.stderr.splitlines()[-1]
    assert error.startswith("tenuto_envs.errors.MissingPackageError: environment 'popgym-LabyrinthEscapeEasy-v0' needs")
    assert "mazelib" in error and "pip install 'tenuto[gym]'" in error


def test_popgym_environment_without_popgym_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "popgym.wrappers", None)
    with pytest.raises(MissingPackageError, match=r"tenuto\[gym\]"):
        make("popgym-RepeatPreviousEasy-v0")


@pytest.mark.parametrize(
    ("space", "emitted", "expected"),
    [
        (spaces.Box(-1, 1, (2,), np.float32), np.array([0.5, 3.0]), np.array([0.5, 1.0], np.float32)),
        (spaces.Box(0, 255, (1,), np.uint8), np.array([300]), np.array([255], np.uint8)),
        (spaces.Discrete(3), 2.0, np.int64(2)),
        (spaces.MultiDiscrete([2, 3]), np.array([1.0, 2.0]), np.array([1, 2], np.int64)),
    ],
)
def test_wrong_dtype_or_range_is_cast_and_clipped(space: spaces.Space[Any], emitted: Any, expected: Any):
    observation, _ = ConformObservation(Stub(space, emitted)).reset()
    assert space.contains(observation)
    np.testing.assert_array_equal(observation, expected)
    assert observation.dtype == expected.dtype


def test_nested_observation_is_conformed_leaf_by_leaf():
    box = spaces.Box(-1, 1, (1,), np.float32)
    space = spaces.Dict({"a": spaces.Tuple([box, spaces.Discrete(2)])})
    observation, *_ = ConformObservation(Stub(space, {"a": (np.array([-7.0]), 1)})).step(0)
    assert space.contains(observation)
    assert observation["a"][0] == -1


@pytest.mark.parametrize(
    ("space", "emitted"),
    [
        (spaces.Box(-1, 1, (2,), np.float32), np.zeros(3)),
        (spaces.Box(-1, 1, (1,), np.float32), np.array([np.nan])),
        (spaces.Discrete(3), 3),
        (spaces.Discrete(3), 1.5),
        (spaces.Tuple([spaces.Discrete(2)]), (1, 1)),
        (spaces.Dict({"a": spaces.Discrete(2)}), {"b": 1}),
    ],
)
def test_observation_that_cannot_be_conformed_is_refused(space: spaces.Space[Any], emitted: Any):
    with pytest.raises(ObservationError, match="expected"):
        ConformObservation(Stub(space, emitted)).reset()


def test_public_names_are_pinned():
    assert tenuto_envs.__all__ == [
        "ConformObservation", "EnvError", "MissingPackageError", "ObservationError", "UnknownEnvError", "make",
    ]  # fmt: skip
