"""The fused kernels beside the plain steps that they stand for: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from kernels import CUDA, DEVICES
from tenuto_models import DNCConfig, FrameconvConfig, Policy, PolicyConfig, PolicyOutput
from tenuto_models.distributions import distribution_for

triton = pytest.importorskip("triton", reason="this system has no Triton")
import triton.language as tl  # noqa: E402

from tenuto_models.fused import FixedTileLinear, FusedDraw, StateRows, can_draw, dnc, fix_tiles, fuse  # noqa: E402
from tenuto_models.fused.launch import launch  # noqa: E402

ROOT = Path(__file__).parents[3]
NUM_SESSIONS, SPARE = 9, 9
CONFIGS = {
    "dnc": PolicyConfig(DNCConfig(24, 4, 6, 2), 16),
    "dnc of odd sizes": PolicyConfig(DNCConfig(19, 5, 7, 3), 13, embedding_period=64),
    "dnc of one cell": PolicyConfig(DNCConfig(8, 1, 1, 1), 8),
    "dnc with wide cells": PolicyConfig(DNCConfig(16, 2, 16, 1), 8, preprocessor_widths=(11,)),
    "frameconv": PolicyConfig(FrameconvConfig(24), 16, embedding_period=64),
    "frameconv of odd sizes": PolicyConfig(FrameconvConfig(17, 6), 13),
}


def lively(config: PolicyConfig) -> Policy:
    torch.manual_seed(0)
    policy = Policy(spaces.Box(-1, 1, (6,)), spaces.Discrete(5), config).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return policy


class Sessions:
    """Nine sessions in rows, and the fused policy that steps them. What a row begins with is not to be read."""

    def __init__(self, policy: Policy, device: str) -> None:
        self.policy = policy.to(device)
        width = sum(t.num_elements for t in policy.state_spec if t.dtype == torch.float32)
        self.rows = StateRows(
            {
                torch.float32: torch.full((NUM_SESSIONS + 1, width), torch.nan, device=device),
                torch.int64: torch.full((NUM_SESSIONS + 1, 1), 7, device=device),
            }
        )
        self.fused = fuse(self.policy, self.rows)

    @torch.inference_mode()
    def step(self, slots: list[int], starts: list[bool], observation: Tensor, keep: list[bool] | None = None) -> Tensor:
        """Step rows; returns logits and value side by side ``[B, K + 1]``."""
        device = observation.device
        places = torch.tensor(slots, device=device), torch.tensor(starts, device=device)
        output, after = self.fused.step(observation, self.rows.gather(*places))
        kept = torch.tensor(keep or [True] * len(slots), device=device)
        self.rows.scatter(places[0], after, kept)
        return torch.cat([output.logits, output.value.unsqueeze(1)], dim=1)


class PlainSessions:
    """The same by the plain step, whose gradients torch could follow: the equations operation by operation."""

    def __init__(self, policy: Policy, device: str) -> None:
        self.policy, self.state = policy, policy.initial_state(NUM_SESSIONS, torch.device(device))

    def step(self, slots: list[int], starts: list[bool], observation: Tensor) -> Tensor:
        begun = ~torch.tensor(starts, device=observation.device)
        state = {k: v[slots] * begun.view(-1, *[1] * (v.dim() - 1)) for k, v in self.state.items()}
        output, after = self.policy.step(observation, state)
        for name, tensor in after.items():
            self.state[name][slots] = tensor.detach()
        return torch.cat([output.logits, output.value.unsqueeze(1)], dim=1).detach()

    def packed(self) -> Tensor:
        return torch.cat([v.flatten(1) for v in self.state.values() if v.dtype == torch.float32], dim=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_fused_steps_equal_the_plain_ones(config: PolicyConfig, device: str) -> None:
    policy, draw = lively(config), torch.Generator().manual_seed(1)
    sessions, plain = Sessions(policy, device), PlainSessions(policy, device)
    begun = set[int]()
    for step in range(36):
        order = torch.randperm(NUM_SESSIONS, generator=draw).tolist()
        slots = order if step == 0 else order[:3]
        starts = [s not in begun or bool(torch.rand((), generator=draw) < 0.15) for s in slots]
        begun |= {*slots}
        observation = torch.randn(len(slots), 6, generator=draw).to(device)
        got, expected = sessions.step(slots, starts, observation), plain.step(slots, starts, observation)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
        # Of all sessions: nobody else's state may move.
        torch.testing.assert_close(sessions.rows.rows[:SPARE], plain.packed(), rtol=0, atol=2e-5)
        assert torch.equal(sessions.rows.counters[:SPARE], plain.state["t"])
    assert sessions.rows.rows[SPARE].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [CONFIGS["dnc of odd sizes"], CONFIGS["frameconv"]], ids=["dnc", "frameconv"])
def test_a_row_gets_the_same_bits_whoever_stands_beside_it(config: PolicyConfig, device: str) -> None:
    policy, draw = lively(config), torch.Generator().manual_seed(2)
    together, apart = Sessions(policy, device), Sessions(policy, device)
    for sessions in (together, apart):
        fix_tiles(sessions.fused)
    for step in range(4):
        observation, starts = torch.randn(NUM_SESSIONS, 6, generator=draw).to(device), [step == 0] * NUM_SESSIONS
        whole = together.step(list(range(NUM_SESSIONS)), starts, observation)
        order = torch.randperm(NUM_SESSIONS, generator=draw).tolist()
        for part in (order[:1], order[1:4], order[4:]):
            assert torch.equal(apart.step(part, starts[: len(part)], observation[part]), whole[part])
        assert torch.equal(apart.rows.rows[:SPARE], together.rows.rows[:SPARE])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [CONFIGS["dnc"], CONFIGS["frameconv"]], ids=["dnc", "frameconv"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_that_is_not_kept_or_is_padding_changes_nothing(config: PolicyConfig, device: str) -> None:
    sessions, draw = Sessions(lively(config), device), torch.Generator().manual_seed(3)
    sessions.step([0, 1, 2], [True] * 3, torch.randn(3, 6, generator=draw).to(device))
    before = sessions.rows.rows.clone()
    observation = torch.randn(4, 6, generator=draw).to(device)
    observation[1] = torch.inf
    results = sessions.step([2, 1, SPARE, SPARE], [False, False, True, True], observation, [True, False, True, True])
    assert results.isfinite().all(dim=1).tolist() == [True, False, True, True]
    assert torch.equal(sessions.rows.rows[[0, 1]], before[[0, 1]]) and not torch.equal(sessions.rows.rows[2], before[2])
    assert sessions.rows.rows[SPARE].isnan().all() and sessions.rows.counters.flatten().tolist()[:3] == [1, 1, 2]


@pytest.mark.parametrize("device", DEVICES)
def test_cells_of_equal_usage_are_allocated_by_index(device: str) -> None:
    policy = lively(CONFIGS["dnc"])
    with torch.no_grad():
        # Write gate and allocation gate open, whatever the observation.
        policy.core.access.interface.weight[-8:-6], policy.core.access.interface.bias[-8:-6] = 0.0, 40.0
    sessions = Sessions(policy, device)
    sessions.step([4], [True], torch.zeros(1, 6, device=device))
    # All cells were empty. The write weights are followed by the usage, four cells each.
    torch.testing.assert_close(sessions.rows.rows[4, -8:-4].cpu(), torch.tensor([1.0, 0, 0, 0]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("inputs", "outputs"), [(37, 50), (64, 1), (5, 96)])
def test_a_layer_in_fixed_tiles_computes_it_in_the_same_bits_for_any_number_of_rows(
    inputs: int, outputs: int, device: str
) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs).requires_grad_(False).to(device)
    tiled = FixedTileLinear(plain)
    # Rows that do not stand close together, as the features of the DNC.
    x = torch.randn(70, inputs + 3, device=device)[:, :inputs]
    whole = tiled(x)
    torch.testing.assert_close(whole, plain(x), rtol=0, atol=1e-5)
    for part in (slice(1), slice(40, 45), slice(3, 70)):
        assert torch.equal(tiled(x[part]), whole[part])


def drawn(
    space: spaces.Space[Any], logits: Tensor, value: Tensor, uniforms: Tensor, greedy: Tensor
) -> dict[str, Tensor]:
    """What the kernel fills in."""
    distribution, n = distribution_for(space), len(logits)
    action = distribution.to_space(distribution.greedy(logits.cpu()))
    results = {
        "actions": torch.empty_like(action, device=logits.device),
        "values": torch.empty_like(value),
        "log_probs": torch.empty_like(value),
        "logits": torch.empty_like(logits),
        "finite": torch.empty(n, dtype=torch.bool, device=logits.device),
    }
    FusedDraw(distribution, logits.device)(PolicyOutput(logits, value, logits), uniforms, greedy, results)
    return results


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(1, start=3),
        spaces.Discrete(300, start=-2),
        spaces.MultiDiscrete([[3, 1], [2, 5]], start=[[1, 0], [-4, 2]]),
        spaces.MultiBinary((2, 3)),
    ],
    ids=lambda space: type(space).__name__,
)
def test_fused_draws_are_those_of_the_distribution(space: spaces.Space[Any], device: str) -> None:
    torch.manual_seed(0)
    distribution = distribution_for(space)
    # Few different logits, so that the likeliest classes are often tied; uniforms up to the ends of their interval.
    logits = torch.randint(-2, 3, (40, distribution.num_logits)).float().to(device)
    uniforms = torch.rand(40, distribution.num_uniforms, device=device)
    uniforms[0], uniforms[1] = 2.0**-24, 1 - 2.0**-24
    value, greedy = torch.randn(40, device=device), torch.arange(40, device=device) % 2 == 1
    greedy[1] = False
    results = drawn(space, logits, value, uniforms, greedy)
    raw = torch.where(greedy.unsqueeze(1), distribution.greedy(logits), distribution.sample(logits, uniforms))
    assert torch.equal(results["actions"], distribution.to_space(raw))
    assert torch.equal(results["values"], value) and torch.equal(results["logits"], logits)
    torch.testing.assert_close(results["log_probs"], distribution.log_prob(logits, raw), rtol=0, atol=2e-6)
    assert results["finite"].all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_uniform_at_the_border_of_two_classes_draws_the_upper_one(device: str) -> None:
    even = torch.zeros(1, 2, device=device)
    half, greedy = torch.full((1, 1), 0.5, device=device), torch.tensor([False], device=device)
    assert drawn(spaces.Discrete(2), even, even[:, 0], half, greedy)["actions"].tolist() == [1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_draw_is_finite_only_if_all_of_it_is(device: str) -> None:
    logits, value = torch.zeros(6, 5, device=device), torch.zeros(6, device=device)
    logits[1, 4], logits[2, 0], logits[3, 2] = torch.nan, torch.inf, -torch.inf
    value[4], value[5] = torch.inf, torch.nan
    uniforms, greedy = torch.full((6, 2), 0.5, device=device), torch.zeros(6, dtype=torch.bool, device=device)
    results = drawn(spaces.MultiDiscrete([2, 3]), logits, value, uniforms, greedy)
    assert results["finite"].tolist() == [True] + [False] * 5


def test_only_some_categoricals_are_drawn_by_the_kernel() -> None:
    assert can_draw(distribution_for(spaces.Discrete(8192))) and not can_draw(distribution_for(spaces.Discrete(8193)))
    assert not can_draw(distribution_for(spaces.Box(-1, 1, (2,))))


@triton.jit
def _evaluate(x, y, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    k = tl.arange(0, SIZE)
    tl.store(y + k, FUNCTION(tl.load(x + k)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("function", "exact", "rtol"),
    [(dnc._tanh, torch.tanh, 4e-7), (dnc._softplus, nn.functional.softplus, 1e-6)],
    ids=["tanh", "softplus"],
)
def test_elementary_functions_are_right_from_the_smallest_to_the_largest(function, exact, rtol, device: str) -> None:
    magnitudes = torch.cat([torch.logspace(-30, 4, 508), torch.tensor([0.0, 0.2499, 0.25, 20.0])])
    x = torch.cat([magnitudes, -magnitudes]).to(device)
    y = torch.empty_like(x)
    launch(_evaluate, (1,), x, y, FUNCTION=function, SIZE=len(x))
    expected = exact(x.double()).float()
    # Below its last bit at 1 a softplus may vanish: it multiplies a cosine.
    atol = 2e-7 if function is dnc._softplus else 0.0
    torch.testing.assert_close(y, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_the_compiler_takes_every_kernel_and_keeps_it_in_registers(capability: int, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, ROOT / "tests" / "compile_kernels.py", str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    spilled_bytes = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in spilled_bytes} == {
        "_collect",
        "_lstm",
        "_access",
        "_append",
        "_draw",
        "_store",
        "_linear",
    }
    assert {num_bytes for _, num_bytes in spilled_bytes} == {"0"}


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize(("precision", "atol"), [("ieee", 2e-6), ("tf32x3", 5e-6), ("tf32", 5e-3)])
def test_a_product_is_as_accurate_as_its_precision_says(precision, atol: float, device: str) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(576, 1024).requires_grad_(False).to(device)
    x = torch.randn(256, 576, device=device)
    exact = nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double()).float()
    torch.testing.assert_close(FixedTileLinear(plain, precision)(x), exact, rtol=0, atol=atol)
