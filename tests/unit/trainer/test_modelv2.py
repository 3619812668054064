"""POPGym's classes for RLlib's old stack: the seed's interface, its numbers, and none of its defects.

Trained by PPO in tests/integration/test_modelv2_training.py. That environments are registered with their own arguments,
not with a loop's variable, is for test_rl_module.py's runs: ``tenuto_trainer.ppo`` binds the id.
"""

import copy
import inspect
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from golden import CASES, GoldenCase
from old_stack import ACTIONS, MODELS, OBSERVATION, SMALL, batched, build, lively
from tenuto_models import ConfigError, ModelError
from tenuto_trainer.modelv2 import BaseModel, DiffNC, Frameconv
from tenuto_trainer.modelv2.embeddings import EMBEDDINGS

TOLERANCE = {"rtol": 0, "atol": 1e-5}
models = pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)


def observations(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, length, 10, generator=torch.Generator().manual_seed(seed))


def run(model: Any, obs: torch.Tensor, state: list[torch.Tensor], lengths: list[int]) -> tuple[torch.Tensor, Any]:
    """Logits ``[B, T, K]`` and the state after the rows."""
    with torch.no_grad():
        logits, after = model({"obs": obs.flatten(0, 1)}, state, torch.tensor(lengths))
    return logits.view(*obs.shape[:2], -1), after


def assert_equal_states(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


class Sum(BaseModel):
    """A memory as a user of POPGym's BaseModel writes one: the running sum of the features."""

    MODEL_CONFIG: ClassVar = {"hidden_size": 12, "preprocessor_input_size": 12, "gain": 1.0}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.core = nn.Linear(self.cfg["preprocessor_output_size"], self.cfg["hidden_size"])

    def initial_state(self) -> list[torch.Tensor]:
        return [torch.zeros(self.cfg["preprocessor_output_size"])]

    def forward_memory(self, z: Any, state: Any, t_starts: Any, seq_lens: Any) -> Any:
        sums = torch.cat([state[0].unsqueeze(1), z], dim=1).cumsum(dim=1)
        return self.core(self.cfg["gain"] * sums[:, 1:]), [sums[torch.arange(len(z)), seq_lens]]


# The interface.


@pytest.mark.parametrize("cls", [BaseModel, *MODELS], ids=lambda cls: cls.__name__)
def test_signatures_are_those_of_the_seed(cls: type[BaseModel]) -> None:
    names = {"obs_space", "action_space", "num_outputs", "model_config", "name", "custom_model_kwargs"}
    assert set(inspect.signature(cls).parameters) == names
    assert list(inspect.signature(cls.forward_memory).parameters) == ["self", "z", "state", "t_starts", "seq_lens"]
    assert list(inspect.signature(DiffNC.pack_state).parameters) == ["self", "ctrl_hidden", "memory_dict", "read_vecs"]


def test_states_are_listed_in_the_order_and_shapes_of_the_seed() -> None:
    model = DiffNC(OBSERVATION, ACTIONS, 4, {"max_seq_len": 8}, "model")
    shapes = [(1, 256), (1, 256), (64,), (16, 16), (1, 16, 16), (1, 16), (4, 16), (1, 16), (16,)]
    assert [tuple(t.shape) for t in model.initial_state()] == shapes
    assert [tuple(t.shape) for t in model.get_initial_state()] == [*shapes, (1,)]
    assert model.get_initial_state()[-1].dtype == torch.int64
    model = Frameconv(OBSERVATION, ACTIONS, 4, {"max_seq_len": 8}, "model")
    assert [tuple(t.shape) for t in model.get_initial_state()] == [(3, 256), (1,)]


def test_a_state_that_is_unpacked_and_packed_is_the_same() -> None:
    model = build(DiffNC)
    state = lively(model, 3)[:-1]
    ctrl_hidden, memory, reads = model.unpack_state(state)
    assert [tuple(t.shape) for t in ctrl_hidden[0]] == [(1, 3, 16), (1, 3, 16)]
    assert list(memory) == DiffNC.MEMORY_KEYS
    assert reads.shape == (3, 8)
    assert all(torch.equal(a, b) for a, b in zip(model.pack_state(ctrl_hidden, memory, reads), state, strict=True))
    with pytest.raises(ModelError, match="got 10 tensors"):
        model.unpack_state([*state, reads])


@models
def test_forward_memory_keeps_the_padding_and_the_shapes_of_the_state(cls: type[BaseModel]) -> None:
    model = build(cls)
    *state, t = lively(model, 3)
    y, after = model.forward_memory(torch.randn(3, 5, 12), state, t[:, 0], torch.tensor([5, 2, 1]))
    assert y.shape == (3, 5, 16)
    assert [s.shape for s in after] == [s.shape for s in state]


@pytest.mark.parametrize("golden", CASES, ids="-".join)
def test_steps_match_those_of_the_seed(golden: tuple[str, str]) -> None:
    case = GoldenCase(*golden)
    cls = {"DiffNC": DiffNC, "Frameconv": Frameconv}[case.config["cls"]]
    keys = (cls.BASE_CONFIG.keys() | cls.MODEL_CONFIG.keys()) & case.config["cfg"].keys()
    model = build(
        cls,
        **{key: case.config["cfg"][key] for key in keys},
        preprocessor=nn.Sequential(nn.Linear(32, 32), nn.LeakyReLU()),
        embedding_period=case.config["max_seq_len"],
    )
    cores = {k: v for k, v in case.policy().state_dict().items() if k.startswith("core.")}
    theirs = {k: torch.from_numpy(v) for k, v in case.parameters.items() if not k.startswith("core.")}
    weights = {**theirs, **cores}
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    for t in range(case.length):
        state = [tensor.float() for tensor in case.state_before(t).values()]
        logits, after = run(model, case.obs[:, t : t + 1], state, [1] * len(case.obs))
        torch.testing.assert_close(logits[:, 0], case.arrays["step/logits"][:, t], rtol=0, atol=2e-6)
        torch.testing.assert_close(model.value_function(), case.arrays["step/value"][:, t], rtol=0, atol=2e-6)
        if not case.starts_from_ties:
            assert_equal_states(after, list(case.state_after(t).values()))


def test_a_memory_written_for_the_seeds_base_model_runs() -> None:
    model = build(Sum, gain=0.5, embedding="sine")
    obs, state = observations(2, 6), batched(model, 2)
    logits, after = run(model, obs, state, [6, 3])
    assert logits.shape == (2, 6, 4)
    assert model.value_function().shape == (12,)
    _, short = run(model, obs[1:, :3], batched(model, 1), [3])
    assert_equal_states([s[1:] for s in after], short)
    with pytest.raises(NotImplementedError):
        BaseModel(OBSERVATION, ACTIONS, 4, {}, "model").get_initial_state()


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("mode", [{}, {"embedding_size": 5}, {"embedding_size": 5, "embedding_mode": "cat"}])
def test_every_embedding_runs_in_every_mode(name: str, mode: dict[str, Any]) -> None:
    model = build(Frameconv, embedding=name, **mode)
    obs, state = observations(2, 3), lively(model, 2)
    whole, _ = run(model, obs, state, [3, 3])
    for t in range(3):
        logits, state = run(model, obs[:, t : t + 1], state, [1, 1])
        torch.testing.assert_close(logits[:, 0], whole[:, t], **TOLERANCE)


def test_embedding_touches_only_its_features_and_all_others_are_weighted() -> None:
    x, t = torch.ones(1, 1, 12), torch.tensor([7])
    for mode, scaled, own, rest in [("add", True, 0.75, 0.25), ("cat", True, 0, 0.25), ("add", False, 1, 1)]:
        model = build(Frameconv, embedding="base2", embedding_size=4, embedding_mode=mode, scale_embedding=scaled)
        if scaled:
            model.embedding_strength.data.fill_(0.75)
            own = 0.25 if mode == "add" else 0
        digits = torch.tensor([1.0, 1, 1, 0]) * (0.75 if scaled else 1)
        expected = torch.cat([own + digits, torch.full((8,), float(rest))])
        torch.testing.assert_close(model._embedded(x, t)[0, 0], expected)


def test_rllib_padding_beyond_the_longest_row_is_kept_in_the_output() -> None:
    model = build(DiffNC)
    obs, state = observations(2, 8), lively(model, 2)
    logits, _ = run(model, obs, state, [3, 2])
    assert logits.shape == (2, 8, 4)
    assert model.value_function().shape == (16,)
    short, _ = run(model, obs[:, :3], state, [3, 2])
    torch.testing.assert_close(logits[:, :3], short, **TOLERANCE)


# The defects of the seed, in the order of the sheet that lists them.


@models
def test_every_parameter_exists_before_the_first_forward(cls: type[BaseModel]) -> None:
    """What a forward adds is in no optimizer, and is never trained."""
    model = build(cls)
    before = {name: id(p) for name, p in model.named_parameters()}
    run(model, observations(2, 3), batched(model, 2), [3, 3])
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert len([name for name in before if name.startswith("core.")]) == {DiffNC: 6, Frameconv: 2}[cls]


@models
def test_every_parameter_gets_a_gradient(cls: type[BaseModel]) -> None:
    """Also those whose place in the list RLlib counts on when it sets gradients to zero."""
    model = build(cls)
    logits, _ = model({"obs": observations(2, 5).flatten(0, 1)}, batched(model, 2), torch.tensor([5, 5]))
    (logits.square().sum() + model.value_function().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@models
def test_a_sequence_equals_its_steps_one_by_one(cls: type[BaseModel]) -> None:
    """The reads of one step reach the next one within a call too."""
    model = build(cls)
    if cls is DiffNC:
        with torch.no_grad():
            model.core.access.interface.weight.normal_()
    obs, state = observations(3, 7), lively(model, 3)
    whole, after = run(model, obs, state, [7, 7, 7])
    for t in range(7):
        logits, state = run(model, obs[:, t : t + 1], state, [1, 1, 1])
        torch.testing.assert_close(logits[:, 0], whole[:, t], **TOLERANCE)
    assert_equal_states(after, state)


def test_reads_within_a_sequence_carry_gradients_to_the_controller() -> None:
    model = build(DiffNC)
    logits, _ = model({"obs": observations(2, 5).flatten(0, 1)}, batched(model, 2), torch.tensor([5, 5]))
    logits.square().sum().backward()
    assert model.core.gates.weight.grad[:, 12:20].abs().sum() > 0


@models
def test_a_fresh_model_takes_the_weights_of_a_used_one(cls: type[BaseModel]) -> None:
    used, fresh = build(cls), build(cls)
    obs, state = observations(2, 3), batched(used, 2)
    expected, _ = run(used, obs, state, [3, 3])
    fresh.load_state_dict(used.state_dict())
    assert torch.equal(run(fresh, obs, state, [3, 3])[0], expected)


@models
def test_copies_of_a_fresh_model_have_the_same_core(cls: type[BaseModel]) -> None:
    model = build(cls)
    twin = copy.deepcopy(model)
    obs, state = observations(2, 3), batched(model, 2)
    assert torch.equal(run(model, obs, state, [3, 3])[0], run(twin, obs, state, [3, 3])[0])


@models
def test_keyword_arguments_count(cls: type[BaseModel]) -> None:
    model: Any = cls(OBSERVATION, ACTIONS, 4, {"max_seq_len": 8}, "model", **SMALL[cls])
    assert model.cfg["hidden_size"] == 16
    assert model.core.output_size == 16


@models
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hiden_size": 8}, r"unknown keys \['hiden_size'\], expected some of \[.*'hidden_size'"),
        ({"hidden_size": 0}, "hidden_size: got 0, expected an integer >= 1"),
        ({"hidden_size": True}, "hidden_size: got True"),
        ({"preprocessor_output_size": 2.5}, "preprocessor_output_size: got 2.5"),
        ({"actor": "Linear"}, "actor: got 'Linear', expected a torch.nn.Module or None"),
        ({"embedding": "cosine"}, r"embedding: got 'cosine', expected one of \[None, 'learned'"),
        ({"embedding": "sine", "embedding_mode": "cat"}, "embedding_size: got None"),
        ({"embedding_mode": "concat"}, "embedding_mode: got 'concat'"),
        ({"embedding_size": 13}, "embedding_size: got 13, expected at most preprocessor_input_size, which is 12"),
    ],
)
def test_bad_configuration_is_refused_with_its_key(cls: type[BaseModel], config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(cls, **config)


@pytest.mark.parametrize("key", ["preprocessor", "postprocessor", "actor", "critic"])
def test_modules_of_the_configuration_are_copied_and_left_as_they_are(key: str) -> None:
    width = {"preprocessor": 12}.get(key, 16)
    shared = nn.Sequential(nn.Linear(width, width), nn.LeakyReLU())
    before = copy.deepcopy(shared.state_dict())
    first, second = build(Frameconv, **{key: shared}), build(Frameconv, **{key: shared})
    assert all(torch.equal(shared.state_dict()[name], value) for name, value in before.items())
    ours = {id(p) for p in first.parameters()}
    assert not ours & {id(p) for p in (*second.parameters(), *shared.parameters())}


def test_models_with_default_modules_share_none() -> None:
    first = build(DiffNC)
    before = {name: value.clone() for name, value in first.state_dict().items()}
    second = build(DiffNC)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    assert all(torch.equal(first.state_dict()[name], value) for name, value in before.items())


@models
def test_hidden_size_alone_may_be_changed(cls: type[BaseModel]) -> None:
    model: Any = cls(OBSERVATION, ACTIONS, 4, {"max_seq_len": 8, "custom_model_config": {"hidden_size": 128}}, "model")
    assert model.cfg["postprocessor_output_size"] == 128
    logits, _ = run(model, observations(1, 2), batched(model, 1), [2])
    assert logits.shape == (1, 2, 4)


@models
def test_memory_takes_the_width_that_leaves_the_preprocessor(cls: type[BaseModel]) -> None:
    model = build(
        cls,
        preprocessor=nn.Linear(12, 7),
        postprocessor=nn.Linear(16, 9),
        actor=nn.Linear(9, 5),
        critic=nn.Sequential(nn.Linear(9, 20), nn.Tanh(), nn.Linear(20, 5)),
        embedding="sine",
    )
    assert model.core.input_size == model.cfg["preprocessor_output_size"] == 7
    assert model.cfg["postprocessor_output_size"] == 5
    logits, _ = run(model, observations(2, 3), lively(model, 2), [3, 1])
    assert logits.shape == (2, 3, 4)


@models
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"preprocessor": nn.Linear(11, 7)}, "preprocessor: got Linear.*, expected a module that takes 12 features"),
        ({"preprocessor_output_size": 20}, "preprocessor_output_size: got 20, but preprocessor makes"),
        ({"postprocessor": nn.Linear(12, 12)}, "postprocessor: got Linear.*takes 16 features"),
        ({"actor": nn.Linear(16, 8), "postprocessor_output_size": 16}, "postprocessor_output_size: got 16, but actor"),
        ({"preprocessor": nn.GRU(12, 12)}, "preprocessor: got GRU.*makes a tuple"),
        ({"critic": nn.Flatten(0)}, r"postprocessor_output_size: got None, but critic makes \[16\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_at_construction(
    cls: type[BaseModel], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(cls, **config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_layers": 2}, "num_layers: got 2, expected 1"),
        ({"num_hidden_layers": 2}, "num_hidden_layers: got 2, expected 1"),
        ({"nonlinearity": "relu"}, "nonlinearity: got 'relu', expected 'tanh'"),
        ({"cell_size": 17}, "cell_size: got 17, expected an integer from 1 to hidden_size, which is 16"),
        ({"cell_size": True}, "cell_size: got True, expected an integer from 1 to hidden_size"),
        ({"read_heads": 0}, "^read_heads: got 0, expected an integer >= 1"),
        ({"read_heads": "2"}, "^read_heads: got '2', expected an integer >= 1"),
    ],
)
def test_settings_that_no_core_has_are_refused_at_construction(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(DiffNC, **config)


@models
def test_state_of_a_short_row_is_the_one_before_its_padding(cls: type[BaseModel]) -> None:
    model = build(cls)
    obs, state = observations(3, 6), lively(model, 3)
    _, after = run(model, obs, state, [6, 2, 4])
    for row, length in enumerate([6, 2, 4]):
        _, alone = run(model, obs[row : row + 1, :length], [s[row : row + 1] for s in state], [length])
        assert_equal_states([s[row : row + 1] for s in after], alone)
    garbage = obs.clone()
    garbage[1, 2:], garbage[2, 4:] = torch.inf, torch.nan
    assert_equal_states(run(model, garbage, state, [6, 2, 4])[1], after)


def test_max_seq_len_does_not_change_the_function() -> None:
    short, long = build(Frameconv, max_seq_len=8), build(Frameconv, max_seq_len=1024)
    long.load_state_dict(short.state_dict())
    obs, state = observations(2, 6), lively(short, 2)
    assert torch.equal(run(short, obs, state, [6, 6])[0], run(long, obs, state, [6, 6])[0])


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_are_defined_beyond_their_period(name: str) -> None:
    model = build(Frameconv, embedding=name, embedding_period=4)
    *memory, t = lively(model, 2)
    logits, after = run(model, observations(2, 6), [*memory, t + 100_000], [6, 6])
    assert bool(logits.isfinite().all())
    assert after[-1].tolist() == [[100_010], [100_010]]


def test_a_model_holds_no_tensor_that_has_no_use() -> None:
    assert not {name for name in build(DiffNC).state_dict() if "embedding" in name}
    assert {name for name in build(Frameconv).state_dict() if "embedding" in name} == {"embedding_strength"}
    assert "embedding_strength" not in build(Frameconv, scale_embedding=False).state_dict()


@models
@pytest.mark.parametrize("gradients", [True, False])
def test_forward_modifies_nothing(cls: type[BaseModel], gradients: bool) -> None:
    model = build(cls).train(not gradients)
    if cls is Frameconv:
        model.embedding_strength.data.fill_(1.5)
    weights = copy.deepcopy(model.state_dict())
    obs, state = observations(2, 4).flatten(0, 1), [s.float() for s in lively(model, 2)]
    given = {"obs": obs, "obs_flat": obs}, list(state), torch.tensor([4, 2], dtype=torch.int32)
    before = copy.deepcopy((given[0], given[2])), [s.clone() for s in state]
    with torch.set_grad_enabled(gradients):
        model.forward(*given)
    assert model.training is not gradients
    assert all(a is b for a, b in zip(given[1], state, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state, before[1], strict=True))
    assert torch.equal(given[0]["obs"], before[0][0]["obs"])
    assert torch.equal(given[2], before[0][1])
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_an_embedding_strength_out_of_bounds_counts_as_the_bound() -> None:
    model = build(Frameconv)
    obs, state = observations(1, 3), lively(model, 1)
    model.embedding_strength.data.fill_(1.0)
    expected, _ = run(model, obs, state, [3])
    model.embedding_strength.data.fill_(1.5)
    assert torch.equal(run(model, obs, state, [3])[0], expected)


@models
@pytest.mark.parametrize("keys", [["obs"], ["obs_flat"], ["obs", "obs_flat"]])
def test_observations_are_taken_under_either_name(cls: type[BaseModel], keys: list[str]) -> None:
    model = build(cls)
    obs, state = observations(2, 3), lively(model, 2)
    expected, _ = run(model, obs, state, [3, 3])
    batch = dict.fromkeys(keys, obs.flatten(0, 1))
    for call in (model, model.forward):
        logits, _ = call(batch, state, torch.tensor([3, 3]))
        torch.testing.assert_close(logits.view(2, 3, 4), expected)
    assert list(batch) == keys


@models
def test_observations_of_another_width_are_refused(cls: type[BaseModel]) -> None:
    model = build(cls)
    with pytest.raises(ConfigError, match=r"obs_flat: got \[2, 11\], expected \[2 T, 10\]"):
        model({"obs": torch.zeros(2, 11)}, batched(model, 2), torch.tensor([1, 1]))
    with pytest.raises(ModelError, match="value_function: got no batch"):
        build(cls).value_function()


@models
@pytest.mark.parametrize("batch", [{}, {"obs": None}, {"obs_flat": np.zeros((2, 10))}, {"obs": torch.zeros(0, 10)}])
def test_observations_that_are_missing_or_no_tensor_are_refused(cls: type[BaseModel], batch: dict[str, Any]) -> None:
    model = build(cls)
    for call in (model, model.forward):
        with pytest.raises(ConfigError, match=r"obs_flat: got .*, expected \[2 T, 10\]"):
            call(batch, batched(model, 2), torch.tensor([1, 1]))


@models
@pytest.mark.parametrize("state", [None, [], [None]])
def test_a_call_without_a_state_is_refused(cls: type[BaseModel], state: Any) -> None:
    model = build(cls)
    for call in (model, model.forward):
        with pytest.raises(ModelError, match="state: got none, expected the tensors of get_initial_state"):
            call({"obs": torch.zeros(2, 10)}, state, torch.tensor([1, 1]))


@models
@pytest.mark.parametrize("lengths", [[3, 4], [-1, 3], [3], [3, 3, 3], [[3], [3]], 3])
def test_lengths_that_no_row_can_have_are_refused(cls: type[BaseModel], lengths: Any) -> None:
    model = build(cls)
    with pytest.raises(ModelError, match=r"seq_lens: got .*, expected 2 lengths from 0 to 3"):
        run(model, observations(2, 3), batched(model, 2), lengths)


@models
def test_lengths_may_be_a_list_or_an_array(cls: type[BaseModel]) -> None:
    model = build(cls)
    obs, state = observations(2, 3), lively(model, 2)
    expected, _ = run(model, obs, state, [3, 2])
    for lengths in ([3, 2], np.array([3, 2], np.int32)):
        with torch.no_grad():
            logits, _ = model({"obs": obs.flatten(0, 1)}, state, lengths)
        assert torch.equal(logits.view(2, 3, 4), expected)


@models
def test_a_model_that_was_used_can_be_copied(cls: type[BaseModel]) -> None:
    """The copy has seen no batch; the model goes on with its own."""
    model = build(cls)
    logits, _ = model({"obs": observations(2, 3).flatten(0, 1)}, batched(model, 2), torch.tensor([3, 3]))
    twin = copy.deepcopy(nn.ModuleList([model, model]))[1]
    assert type(twin) is cls
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    with pytest.raises(ModelError, match="value_function: got no batch"):
        twin.value_function()
    (logits.sum() + model.value_function().sum()).backward()
    again, _ = run(twin, observations(2, 3), batched(twin, 2), [3, 3])
    assert torch.equal(again, logits.detach().view(2, 3, 4))
    assert all(p.grad is None for p in twin.parameters())


@models
def test_an_episode_starts_from_zeros(cls: type[BaseModel]) -> None:
    model = build(cls)
    assert not any(bool(tensor.any()) for tensor in model.get_initial_state())


def test_hidden_size_need_not_be_a_multiple_of_the_stack_size() -> None:
    model = build(Frameconv, hidden_size=17, stack_size=4)
    assert run(model, observations(1, 2), batched(model, 1), [2])[0].shape == (1, 2, 4)
