"""Old checkpoints of POPGym's classes become versions that play the same, and nothing in them is run.

The checkpoints and what POPGym's own models answered were recorded by tests/data/popgym/make.py.
"""

import os
import pickle
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import popgym.envs
import pytest
import torch
from gymnasium import spaces
from ray.rllib.models.preprocessors import get_preprocessor
from ray.rllib.utils.filter import MeanStdFilter, NoFilter
from torch import nn

import tenuto_envs
from old_checkpoints import DATA, ENV, assert_refused, dnc_of, import_from, imported, weights, write
from old_stack import MODELS, SMALL, batched, build
from tenuto_models import Policy
from tenuto_trainer.errors import ImportedError
from tenuto_trainer.importing import inert_pickle, old_policy, rllib_checkpoint
from tenuto_trainer.modelv2 import BaseModel, Frameconv

CLASSES = ("DiffNC", "Frameconv")
EASY = sorted(env["id"] for env in popgym.envs.ALL_EASY.values())


@pytest.mark.parametrize("cls", CLASSES)
def test_imported_policy_plays_as_the_original(cls: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert import_from(DATA / cls, tmp_path) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == f"published {tmp_path / 'r' / 'p' / '1'}"
    assert printed.err == ""
    version = imported(tmp_path)
    env = tenuto_envs.make(ENV)
    assert version.policy.observation_space == env.observation_space
    assert version.policy.action_space == env.action_space
    assert version.training.env_steps == 510
    with np.load(DATA / cls / "episode.npz") as recorded:
        observations, logits, values = (torch.from_numpy(recorded[k]) for k in ("observations", "logits", "values"))
    assert len(observations) == 51
    state = version.policy.initial_state(1)
    for t in range(51):
        with torch.no_grad():
            output, state = version.policy.step(observations[t : t + 1], state)
        torch.testing.assert_close(output.logits[0], logits[t], rtol=0, atol=1e-6)
        torch.testing.assert_close(output.value[0], values[t], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Maze environments have been shown:DeprecationWarning:popgym")
@pytest.mark.parametrize("env_id", EASY)
def test_observations_are_flattened_in_the_order_of_rllib(env_id: str) -> None:
    env = tenuto_envs.make(env_id)
    preprocessor = get_preprocessor(env.observation_space)(env.observation_space)
    env.action_space.seed(0)
    observation, _ = env.reset(seed=0)
    for _ in range(5):
        flat = spaces.flatten(env.observation_space, observation)
        np.testing.assert_array_equal(np.asarray(flat, np.float32), preprocessor.transform(observation))
        observation, _, _, _, _ = env.step(env.action_space.sample())


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("config", [{}, {"preprocessor": nn.Sequential(nn.Linear(12, 9), nn.LeakyReLU())}])
def test_what_our_own_classes_learned_is_published_too(
    cls: type[BaseModel], config: dict[str, Any], tmp_path: Path
) -> None:
    period = {"embedding_period": 50} if cls is Frameconv else {}
    model = build(cls, **config, **period)
    custom = {**SMALL[cls], **config, **period}
    state = {
        "weights": {name: tensor.numpy() for name, tensor in model.state_dict().items()},
        "policy_spec": {"config": {"observation_filter": "NoFilter", "model": {"custom_model_config": custom}}},
    }
    (tmp_path / "policy_state.pkl").write_bytes(pickle.dumps(state))
    assert import_from(tmp_path, tmp_path) == 0
    policy, observations = imported(tmp_path).policy, torch.randn(6, 10)
    with torch.no_grad():
        logits, _ = model({"obs": observations}, batched(model, 1), torch.tensor([6]))
        output, _ = policy.unroll(observations[None], policy.initial_state(1))
    torch.testing.assert_close(output.logits[0], logits, rtol=0, atol=1e-5)


# What RLlib has written over the years.


def assert_same_weights(policy: Policy, tmp_path: Path, cls: str) -> None:
    assert import_from(DATA / cls, tmp_path / "original") == 0
    original = imported(tmp_path / "original").policy.state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in policy.state_dict().items())


@pytest.mark.parametrize("inner", ["policies/default_policy", "policies/default_policy/policy_state.pkl"])
def test_a_policys_folder_or_file_will_do(inner: str, tmp_path: Path) -> None:
    assert import_from(DATA / "DiffNC" / inner, tmp_path) == 0
    assert_same_weights(imported(tmp_path).policy, tmp_path, "DiffNC")


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("as_file", [True, False])
def test_ray_1_checkpoints_are_pickles_in_a_pickle(
    protocol: int, as_file: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"weights": OrderedDict(weights("Frameconv")), "global_timestep": 7, "_optimizer_variables": []}
    worker = {"filters": {"default_policy": NoFilter()}, "state": {"default_policy": state}, "policy_specs": {}}
    payload = {"worker": pickle.dumps(worker, protocol), "train_exec_impl": None}
    file = tmp_path / "checkpoint_000002" / "checkpoint-2"
    file.parent.mkdir()
    file.write_bytes(pickle.dumps(payload, protocol))
    file.with_name("checkpoint-2.tune_metadata").write_bytes(b"")
    assert import_from(file if as_file else file.parent, tmp_path) == 0
    assert "does not say what the activations are" in capsys.readouterr().err
    assert imported(tmp_path).training.env_steps == 7
    assert_same_weights(imported(tmp_path).policy, tmp_path, "Frameconv")


def test_msgpack_checkpoints_are_read(tmp_path: Path) -> None:
    encoded = {
        name: {b"nd": True, b"type": a.dtype.str, b"kind": b"", b"shape": a.shape, b"data": a.tobytes()}
        for name, a in weights("DiffNC").items()
    }
    config = {"observation_filter": "NoFilter", "model": {"max_seq_len": 64}, "numbers": [{b"nd": False, b"data": b""}]}
    payload = msgpack.packb({"weights": encoded, "policy_spec": {"config": config}})
    (tmp_path / "policy_state.msgpck").write_bytes(payload)
    assert import_from(tmp_path, tmp_path) == 0
    assert_same_weights(imported(tmp_path).policy, tmp_path, "DiffNC")
    (tmp_path / "policy_state.msgpck").write_bytes(payload[:-10])
    with pytest.raises(ImportedError, match="msgpack that cannot be read"):
        rllib_checkpoint.read(tmp_path)


def test_fortran_order_big_endian_and_half_precision_are_read(tmp_path: Path) -> None:
    given = weights("DiffNC")
    assert given["core.output.weight"].shape == (16, 24)
    other = np.asfortranarray(given["core.output.weight"].astype(">f8"))
    half = given["core.output.bias"].astype(np.float16)
    read = rllib_checkpoint.read(write(tmp_path, **{"core.output.weight": other, "core.output.bias": half})).weights
    np.testing.assert_array_equal(read["core.output.weight"], given["core.output.weight"])
    np.testing.assert_array_equal(read["core.output.bias"], half)


# A checkpoint is not to be trusted.


class Calls:
    """Pickled as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Builds:
    """Pickled as an object that a class or function makes, which then takes a state, items and keys."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return (*self.call, iter([1, 2]), iter([("a", 1)]))


def test_what_a_checkpoint_would_run_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    hostile = [
        Calls(os.system, f"touch {marker}"),
        Calls(open, str(marker), "w"),
        Calls(eval, f"open({str(marker)!r}, 'w')"),
        Calls(getattr, "", "join"),
        Builds(os.mkdir, (str(marker),), {"a": 1}),
        Calls(np.save, str(marker), np.ones(2)),
    ]
    folder = write(tmp_path, config={"hostile": hostile, "model": {"custom_model_config": {"also": hostile}}})
    assert import_from(folder, tmp_path) == 0
    assert not marker.exists()
    assert not marker.with_suffix(".npy").exists()


def test_nothing_but_containers_and_arrays_is_built() -> None:
    thing = inert_pickle.loads(pickle.dumps({"a": NoFilter(), "b": nn.Linear(2, 3), "c": Path("x"), "d": os.system}))
    assert [isinstance(thing[key], inert_pickle.Placeholder) for key in "ab"] == [True, True]
    assert type(thing["a"]).__name__ == "NoFilter"
    assert issubclass(thing["c"], inert_pickle.Placeholder)
    assert issubclass(thing["d"], inert_pickle.Placeholder)
    assert thing["d"]("true") is thing["d"]
    plain = {
        "x": [1, 2.5, None, True],
        "y": ("z", b"b", {3}, frozenset({4})),
        "o": OrderedDict(a=1),
        "n": np.float32(2),
    }
    assert inert_pickle.loads(pickle.dumps(plain)) == plain


@pytest.mark.parametrize("name", sorted(inert_pickle._ALLOWED))
def test_a_pickle_cannot_change_the_reader_itself(name: tuple[str, str]) -> None:
    made = inert_pickle._ALLOWED[name]
    before = dict(vars(made))
    # GLOBAL, then BUILD with (None, {"__new__": 1}): attributes that are set one by one.
    pickled = b"\x80\x02c" + "\n".join(name).encode() + b"\nN}X\x07\x00\x00\x00__new__K\x01s\x86b."
    with pytest.raises(ImportedError):
        inert_pickle.loads(pickled)
    assert dict(vars(made)) == before


def test_bytes_that_are_no_pickle_or_a_broken_one_are_refused_whatever_they_are() -> None:
    good = pickle.dumps({"w": np.arange(6.0).reshape(2, 3), "f": NoFilter(), "n": np.int64(3), "l": [1, {2}]}, 4)
    draw = random.Random(0)
    refused = 0
    for _ in range(3000):
        broken = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        try:
            read = inert_pickle.loads(bytes(broken[: draw.randint(1, len(broken))]))
            if isinstance(read, dict) and isinstance(read.get("w"), inert_pickle.Array):
                read["w"].resolve()
        except ImportedError:
            refused += 1
    assert refused > 1000


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "pickle that cannot be read"),
        (b"no pickle", "pickle that cannot be read"),
        (pickle.dumps([1]), "got list, expected a checkpoint of RLlib's old API stack"),
        (pickle.dumps({"weights": {"a": "b"}}), "weights: got 'a', which is no array of numbers"),
        (pickle.dumps({"weights": {"a": np.array([None])}}), "weights: got 'a', which is no array of numbers"),
        (pickle.dumps({"worker": pickle.dumps({"state": {}})}), "expected a checkpoint of RLlib's old API stack"),
    ],
)
def test_files_that_hold_no_policy_are_refused(payload: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "policy_state.pkl").write_bytes(payload)
    with pytest.raises(ImportedError, match=message):
        rllib_checkpoint.read(tmp_path)


def test_folders_that_hold_no_policy_are_refused_with_what_is_in_them(tmp_path: Path) -> None:
    with pytest.raises(ImportedError, match="which does not exist"):
        rllib_checkpoint.read(tmp_path / "none")
    (tmp_path / "params.json").touch()
    with pytest.raises(ImportedError, match=r"found \['params.json'\]"):
        rllib_checkpoint.read(tmp_path)
    (tmp_path / "learner_group").mkdir()
    with pytest.raises(ImportedError, match="new API stack, expected the old"):
        rllib_checkpoint.read(tmp_path)


# What would not play as before is refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"core.output.bias": None}, r"missing \['core.output.bias'\]"),
        ({"core.output.weight": None}, "expected those of POPGym's DiffNC or Frameconv"),
        ({"feature_map.0.weight": None}, "missing 'feature_map.0.weight'"),
        ({"surprise": np.ones(1)}, r"not expected \['surprise'\]"),
        ({"actor.1.weight": np.ones(4)}, r"actor.1.weight: got shape \(4,\), expected 2 dimensions"),
        ({"actor.1.bias": np.ones(5)}, r"actor.1.bias: got shape \(5,\), expected \(4,\)"),
        ({"pre.0.weight": np.full((16, 16), np.nan, np.float32)}, "got NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    changes: dict[str, Any], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert import_from(write(tmp_path, **changes), tmp_path) == 1
    assert_refused(message, tmp_path, capfd)


def nested(depth: int) -> nn.Module:
    return nn.Sequential(nested(depth - 1)) if depth else nn.Identity()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"observation_filter": "MeanStdFilter"}, r"observation_filter: got \['MeanStdFilter'\], expected NoFilter"),
        ({"model": {"custom_model_config": {"actor": nn.Sequential(nn.Linear(16, 16), nn.Tanh())}}},
         r"actor: got layers \['Linear', 'Tanh'\]"),
        ({"model": {"custom_model_config": {"critic": nn.Sequential(nn.Linear(16, 16), nn.LeakyReLU(0.2))}}},
         r"critic: got layers \['Linear', 'LeakyReLU\(0.2\)'\]"),
        ({"model": {"custom_model_config": {"preprocessor": torch.tanh}}}, "preprocessor: got layers .*getattr"),
        ({"model": {"custom_model_config": {"actor": nested(12)}}}, "Sequentials nested more than 10 deep"),
    ],
)  # fmt: skip
def test_settings_that_a_server_does_not_have_are_refused(
    config: Any, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert import_from(write(tmp_path, config=config), tmp_path) == 1
    assert_refused(message, tmp_path, capfd)


def test_a_filter_that_only_the_worker_knows_of_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    worker = {
        "filters": {"default_policy": MeanStdFilter((10,))},
        "state": {"default_policy": {"weights": weights("DiffNC")}},
    }
    (tmp_path / "checkpoint-1").write_bytes(pickle.dumps({"worker": pickle.dumps(worker)}))
    assert import_from(tmp_path, tmp_path) == 1
    assert_refused("got \\['MeanStdFilter'\\]", tmp_path, capfd)


@pytest.mark.parametrize(
    ("env", "code", "message"),
    [
        ("popgym-CountRecallEasy-v0", 1, "observation: the checkpoint is made for 10 numbers, popgym-Count.* has 33"),
        ("popgym-RepeatPreviosEasy-v0", 2, "did you mean 'popgym-RepeatPreviousEasy-v0'"),
    ],
)
def test_an_environment_of_other_widths_is_refused(
    env: str, code: int, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert import_from(DATA / "DiffNC", tmp_path, env=env) == code
    assert_refused(message, tmp_path, capfd)


def test_another_number_of_actions_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changes = {"actor.1.weight": np.ones((5, 16), np.float32), "actor.1.bias": np.ones(5, np.float32)}
    assert import_from(write(tmp_path, **changes), tmp_path) == 1
    assert_refused("action: the checkpoint is made for 5 numbers, .* has 4", tmp_path, capfd)


def test_unscaled_continuous_actions_are_refused() -> None:
    box = spaces.Box(-2, 2, (1,))
    with pytest.raises(ImportedError, match="normalize_actions: got False"):
        old_policy._require_as_served({"normalize_actions": False}, frozenset(), box)
    with pytest.raises(ImportedError, match="custom_action_dist: got 'beta'"):
        old_policy._require_as_served({"model": {"custom_action_dist": "beta"}}, frozenset(), box)
    assert old_policy._require_as_served({"model": {"custom_model_config": {}}}, frozenset({"NoFilter"}), box) == []


def test_sizes_that_the_tensors_leave_open_are_taken_from_the_configuration_or_asked_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path, **dnc_of(3, 10))
    assert import_from(folder, tmp_path) == 1
    assert_refused(
        r"expected one of \[\(6, 5\), \(3, 10\)\]; say which with --read-heads and --cell-size", tmp_path, capfd
    )
    assert import_from(folder, tmp_path / "flag", "--cell-size", "10") == 0
    assert imported(tmp_path / "flag").policy.config.memory.num_read_heads == 3  # type: ignore[union-attr]
    assert import_from(folder, tmp_path / "wrong", "--cell-size", "7") == 1
    assert_refused("got read heads and cell size {'cell_size': 7}", tmp_path / "wrong", capfd)
    custom = {"read_heads": 6, "cell_size": 5}
    folder = write(tmp_path, config={"model": {"custom_model_config": custom}}, **dnc_of(6, 5))
    assert import_from(folder, tmp_path / "config") == 0
    assert imported(tmp_path / "config").policy.config.memory.num_read_heads == 6  # type: ignore[union-attr]
