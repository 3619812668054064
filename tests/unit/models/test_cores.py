"""Laws of the memory cores and of the policy around them, at the seed's default sizes and at small ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from serving import small_policy
from tenuto_models import ConfigError, DNCConfig, FrameconvConfig, Policy, PolicyConfig
from tenuto_models.dnc import addressing

BOX = spaces.Box(-1, 1, (6,))


@pytest.fixture(params=["dnc", "frameconv"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return small_policy(request.param, BOX)


def equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def walked(policy: Policy, observation: torch.Tensor, seq_lens: list[int]) -> Any:
    """Step every row by itself, each for its own length: the outputs that count and the states after them."""
    outputs, states = [], []
    for row, length in enumerate(seq_lens):
        state = policy.initial_state(1)
        for t in range(length):
            output, state = policy.step(observation[row : row + 1, t], state)
            outputs.append(output.logits[0])
        states.append(state)
    return torch.stack(outputs), {k: torch.cat([s[k] for s in states]) for k in states[0]}


def test_steps_one_by_one_equal_one_masked_sequence(policy: Policy) -> None:
    observation, seq_lens = torch.randn(4, 9, 6), [9, 0, 4, 1]
    logits, states = walked(policy, observation, seq_lens)
    output, after = policy.unroll(observation, policy.initial_state(4), torch.tensor(seq_lens))
    valid = torch.arange(9) < torch.tensor(seq_lens)[:, None]
    torch.testing.assert_close(output.logits[valid], logits, rtol=0, atol=1e-5)
    equal_states(after, states, atol=1e-5)


def test_a_sequence_in_two_parts_equals_the_whole(policy: Policy) -> None:
    observation = torch.randn(3, 10, 6)
    whole, after = policy.unroll(observation, policy.initial_state(3))
    first, between = policy.unroll(observation[:, :4], policy.initial_state(3))
    second, end = policy.unroll(observation[:, 4:], between)
    torch.testing.assert_close(torch.cat([first.value, second.value], 1), whole.value, rtol=0, atol=1e-5)
    equal_states(end, after, atol=1e-5)


def test_padding_never_touches_a_state(policy: Policy) -> None:
    observation, seq_lens = torch.randn(3, 8, 6), torch.tensor([3, 8, 5])
    _, clean = policy.unroll(observation, policy.initial_state(3), seq_lens)
    observation[0, 3:], observation[2, 5:] = torch.nan, 1e9
    _, dirty = policy.unroll(observation, policy.initial_state(3), seq_lens)
    equal_states(clean, dirty)


def test_gradients_reach_every_parameter(policy: Policy) -> None:
    output, _ = policy.unroll(torch.randn(4, 6, 6), policy.initial_state(4))
    (output.logits.square().sum() + output.value.sum()).backward()
    silent = [n for n, p in policy.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_gradients_of_the_unrolled_dnc_match_finite_differences() -> None:
    policy = small_policy("dnc", BOX).double()
    observation = torch.randn(2, 4, 6, dtype=torch.float64)
    start = {k: v.double() if v.is_floating_point() else v for k, v in policy.initial_state(2).items()}
    # A tie-free start: at ties the sort, and so the gradient, is not unique.
    _, start = policy.unroll(observation, start)
    start = {k: v.detach() for k, v in start.items()}

    def value(weight: torch.Tensor) -> torch.Tensor:
        parameters = {"core.access.interface.weight": weight}
        output, _ = torch.func.functional_call(policy, parameters, (observation, start))
        return output.value.sum()

    weight = policy.get_parameter("core.access.interface.weight").detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(value, (weight,), eps=1e-6, atol=1e-6, fast_mode=True)


def test_reads_of_the_last_step_reach_the_controller_within_a_sequence() -> None:
    """The seed's defect 3: in a training sequence its reads never came back, so this gradient was exactly zero."""
    policy = small_policy("dnc", BOX)
    output, _ = policy.unroll(torch.randn(2, 5, 6), policy.initial_state(2))
    output.value.sum().backward()
    gradient = policy.get_parameter("core.gates.weight").grad
    assert gradient is not None and gradient[:, 16 : 16 + 12].abs().sum() > 0


def test_step_modifies_neither_its_arguments_nor_the_module(policy: Policy) -> None:
    state, observation = policy.initial_state(2), torch.randn(2, 6)
    kept = (
        {k: v.clone() for k, v in state.items()},
        observation.clone(),
        {k: v.clone() for k, v in policy.state_dict().items()},
    )
    policy.step(observation, state)
    equal_states(state, kept[0])
    assert torch.equal(observation, kept[1])
    equal_states(dict(policy.state_dict()), kept[2])


@pytest.mark.parametrize(("memory", "floats"), [("dnc", 1200), ("frameconv", 768)])
def test_state_spec_is_known_at_construction_and_has_the_seeds_size(memory: str, floats: int) -> None:
    policy = Policy(BOX, spaces.Discrete(4), PolicyConfig.for_memory(memory))
    assert sum(t.num_elements for t in policy.state_spec if t.dtype == torch.float32) == floats
    assert policy.state_spec[-1].name == "t"
    state = policy.initial_state(3)
    for spec in policy.state_spec:
        assert state[spec.name].shape == (3, *spec.shape) and state[spec.name].dtype == spec.dtype
    core = sum(p.numel() for n, p in policy.named_parameters() if n.startswith("core."))
    # The seed's count, less the second LSTM bias, which adds nothing to the first.
    assert core == {"dnc": 708_743 - 1024, "frameconv": 262_400}[memory]


def test_positional_embedding_has_no_limit_and_stays_exact() -> None:
    policy = small_policy("frameconv", BOX)
    assert policy.embedding is not None
    t = torch.tensor([0, 1, 63, 64, 1_000_003])
    exponent = np.arange(0, 16, 2) / 16
    angle = t.numpy()[:, None] * 64.0**-exponent
    expected = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(5, 16)
    np.testing.assert_allclose(policy.embedding(t).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("action_space", "logits"),
    [
        (spaces.Discrete(5, start=2), 5),
        (spaces.MultiDiscrete([3, 4], start=[1, 0]), 7),
        (spaces.MultiDiscrete([[2, 3], [2, 2]]), 9),
        (spaces.MultiBinary(3), 6),
        (spaces.MultiBinary([2, 2]), 8),
        (spaces.Box(-2, 2, (2,)), 4),
        (spaces.Box(np.array([-1, -np.inf], np.float32), np.array([3, np.inf], np.float32)), 4),
        (spaces.Box(0, 1, (2, 2), np.float64), 8),
        (spaces.Box(-0.1, 0.1, (3,), np.float64), 6),
        (spaces.Box(-1e300, 1e300, (1,), np.float64), 2),
    ],
)
def test_every_action_space_gets_actions_that_it_contains(action_space: spaces.Space[Any], logits: int) -> None:
    policy = small_policy("frameconv", BOX, action_space)
    output, _ = policy.step(torch.randn(64, 6), policy.initial_state(64))
    distribution = policy.distribution
    assert output.logits.shape == (64, logits)
    uniforms = torch.rand(64, distribution.num_uniforms).clamp(1e-6, 1 - 1e-6)
    for raw in (distribution.sample(output.logits, uniforms), distribution.greedy(output.logits)):
        actions = distribution.to_space(raw).detach().numpy().astype(action_space.dtype)
        for action in actions:
            assert action_space.contains(action.item() if isinstance(action_space, spaces.Discrete) else action)
        assert torch.isfinite(distribution.log_prob(output.logits, raw)).all()


def test_sampling_follows_the_distribution() -> None:
    policy = small_policy("frameconv", BOX, spaces.MultiDiscrete([3, 2]))
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5, -0.5]]).repeat(20_000, 1)
    uniforms = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0))
    raw = policy.distribution.sample(logits, uniforms)
    first = torch.bincount(raw[:, 0], minlength=3) / 20_000
    second = torch.bincount(raw[:, 1], minlength=2) / 20_000
    torch.testing.assert_close(first, torch.softmax(logits[0, :3], 0), atol=0.02, rtol=0)
    torch.testing.assert_close(second, torch.softmax(logits[0, 3:], 0), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DNCConfig(hidden_size=0),
        lambda: DNCConfig(num_cells=2.5),  # type: ignore[arg-type]
        lambda: FrameconvConfig(stack_size=1),
        lambda: PolicyConfig(feature_size=-1),
        lambda: PolicyConfig.for_memory("transformer"),
        lambda: PolicyConfig.from_json({**PolicyConfig().to_json(), "surprise": 1}),
        lambda: Policy(spaces.Text(5), spaces.Discrete(2), PolicyConfig()),
        lambda: Policy(BOX, spaces.Tuple([spaces.Discrete(2)]), PolicyConfig()),
    ],
)
def test_what_no_policy_can_be_built_from_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="got"):
        make()


# ------------------------------------------------------------------------------- addressing, by hand


def test_allocation_prefers_the_emptiest_cell() -> None:
    usage = torch.tensor([[0.9, 0.1, 0.5]])
    expected = torch.tensor([[(1 - 0.9) * 0.1 * 0.5, 1 - 0.1, (1 - 0.5) * 0.1]])
    torch.testing.assert_close(addressing.allocation_weights(usage), expected, atol=5e-6, rtol=0)


def test_allocation_breaks_ties_by_index() -> None:
    weights = addressing.allocation_weights(torch.zeros(1, 4))
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0, 0.0, 0.0]]), atol=5e-6, rtol=0)


def test_content_weights_of_an_empty_memory_are_uniform() -> None:
    weights = addressing.content_weights(torch.zeros(1, 4, 3), torch.ones(1, 2, 3), torch.full((1, 2), 5.0))
    torch.testing.assert_close(weights, torch.full((1, 2, 4), 0.25))


def test_link_remembers_the_order_of_two_writes() -> None:
    first, second = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    precedence = addressing.precedence_after(torch.zeros(1, 3), first)
    link = addressing.link_after(torch.zeros(1, 3, 3), precedence, second)
    expected = torch.zeros(1, 3, 3)
    expected[0, 1, 0] = 1
    torch.testing.assert_close(link, expected)


def test_freed_cells_lose_their_usage() -> None:
    usage = addressing.usage_after(
        torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 1.0]]]), torch.tensor([[0.75]])
    )
    torch.testing.assert_close(usage, torch.tensor([[1.0, 0.125]]))
