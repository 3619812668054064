"""A version's step over the arena in place: called on a CPU, captured on a GPU, the same sequence in both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import CUDA, DEVICES, interpreted, needs_cuda
from serving import small_policy
from tenuto_models import Policy
from tenuto_models.sampling import uniforms
from tenuto_server.arena import StateArena
from tenuto_server.device_step import DeviceResults, DeviceStep, can_fuse

CAPACITY, BUCKETS = 12, (1, 4, 8)
OBSERVATIONS = spaces.Box(-1, 1, (7,))
ACTIONS = {
    "discrete": spaces.Discrete(5, start=-2),
    "multi-discrete": spaces.MultiDiscrete([[3, 4], [2, 2]]),
    "multi-binary": spaces.MultiBinary((2, 2)),
    "box": spaces.Box(-2, 3, (2,)),
}
WAYS = [
    pytest.param("cpu", False, id="cpu"),
    pytest.param("cpu", True, id="cpu-fused", marks=interpreted),
    pytest.param("cuda", False, id="cuda", marks=[pytest.mark.gpu, needs_cuda]),
    pytest.param("cuda", True, id="cuda-fused", marks=[pytest.mark.gpu, needs_cuda]),
]


@pytest.fixture(params=["dnc", "frameconv"])
def memory(request: pytest.FixtureRequest) -> str:
    return request.param


def policy_of(memory: str, actions: str = "discrete") -> Policy:
    return small_policy(memory, OBSERVATIONS, ACTIONS[actions]).eval().requires_grad_(False)


class Served:
    """A policy's arena and step. The spare row, which nobody may read, is not finite."""

    def __init__(self, policy: Policy, device: str, fused: bool, **options: Any) -> None:
        self.policy = policy.to(device)
        self.arena = StateArena(policy.state_spec, CAPACITY, torch.device(device))
        spare = {t.name: torch.full((1, *t.shape), 7, dtype=t.dtype, device=device) for t in policy.state_spec}
        spare = {name: tensor * torch.nan if tensor.is_floating_point() else tensor for name, tensor in spare.items()}
        self.arena.scatter(torch.tensor([CAPACITY], device=device), spare, torch.tensor([True], device=device))
        self.step = DeviceStep(self.policy, self.arena, BUCKETS, torch.device(device), fused=fused, **options)

    def advance(self, columns: dict[str, Any]) -> DeviceResults:
        return self.step.compute(**columns)

    def state(self) -> np.ndarray:
        """Every session's values side by side ``[C, …]``."""
        rows = (self.arena.read(slot).values() for slot in range(CAPACITY))
        return np.stack([np.concatenate([t.ravel() for t in row]) for row in rows])


def columns_of(policy: Policy, slots: list[int], index: int) -> dict[str, Any]:
    """What some sessions send at a step; each always the same whoever else sends."""
    ids, indices = np.array(slots, np.uint64), np.full(len(slots), index, np.uint64)
    return {
        "slots": np.array(slots),
        # Session s begins anew every s + 3 steps.
        "episode_starts": index % (np.array(slots) + 3) == 0,
        "observations": 2 * uniforms(ids + np.uint64(100), indices, 7) - 1,
        "uniforms": uniforms(ids, indices, policy.distribution.num_uniforms),
        "deterministic": np.array(slots) % 3 == 0,
    }


def assert_equal(got: DeviceResults, expected: DeviceResults, rows: Any = slice(None)) -> None:
    for name, one, other in zip(got._fields, got, expected, strict=True):
        np.testing.assert_array_equal(one, other[rows], err_msg=name)
        assert one.dtype == other.dtype


class Plain:
    """The policy's own step on the CPU, with the state of all sessions, and the results in the engine's terms."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.states = policy, policy.initial_state(CAPACITY)

    def advance(self, columns: dict[str, Any]) -> DeviceResults:
        tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
        slots, distribution = tensors["slots"], self.policy.distribution
        begun = ~tensors["episode_starts"]
        before = {k: v[slots] * begun.view(-1, *[1] * (v.dim() - 1)) for k, v in self.states.items()}
        output, after = self.policy.step(tensors["observations"], before)
        for name, tensor in after.items():
            self.states[name][slots] = tensor
        greedy, drawn = distribution.greedy(output.logits), distribution.sample(output.logits, tensors["uniforms"])
        raw = torch.where(tensors["deterministic"].unsqueeze(1), greedy, drawn)
        log_probs = distribution.log_prob(output.logits, raw)
        results = distribution.to_space(raw), output.value, log_probs, output.logits, torch.ones(len(slots)) > 0
        return DeviceResults(*(t.numpy() for t in results))

    def state(self) -> np.ndarray:
        return np.concatenate([t.flatten(1).numpy() for t in self.states.values()], axis=1)


@pytest.mark.parametrize(("device", "fused"), WAYS)
def test_steps_of_changing_company_equal_the_policys_own(memory: str, device: str, fused: bool) -> None:
    served, plain = Served(policy_of(memory), device, fused), Plain(policy_of(memory))
    draw = np.random.default_rng(0)
    for index in range(16):
        # All sessions at first, in two batches; later any, in an order of their own.
        order = draw.permutation(CAPACITY).tolist()
        for slots in (order[:8], order[8:]) if index == 0 else (order[: 1 + index % 5],):
            columns = columns_of(plain.policy, slots, index)
            got, expected = served.advance(columns), plain.advance(columns)
            for name, one, other in zip(got._fields, got, expected, strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(served.state(), plain.state(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("actions", ACTIONS)
@pytest.mark.parametrize(("device", "fused"), WAYS)
def test_actions_of_every_kind_come_back_in_their_space(actions: str, device: str, fused: bool) -> None:
    served, plain = Served(policy_of("frameconv", actions), device, fused), Plain(policy_of("frameconv", actions))
    columns = columns_of(plain.policy, [3, 1, 4, 0, 5], 0)
    got, expected = served.advance(columns), plain.advance(columns)
    assert got.actions.dtype == expected.actions.dtype and got.actions.shape == (5, *ACTIONS[actions].shape)
    assert all(ACTIONS[actions].contains(action) for action in got.actions)
    np.testing.assert_allclose(got.actions, expected.actions, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("device", "fused"), WAYS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_that_is_not_finite_is_marked_and_its_state_stays(memory: str, device: str, fused: bool) -> None:
    served = Served(policy_of(memory), device, fused)
    served.advance(columns_of(served.policy, [0, 1, 2], 0))
    before = served.state()
    columns = columns_of(served.policy, [2, 0, 1], 1)
    columns["observations"][1] = np.inf
    assert served.advance(columns).finite.tolist() == [True, False, True]
    changed = (served.state() != before).any(axis=1)
    assert changed.tolist() == [False, True, True] + [False] * (CAPACITY - 3)


@pytest.mark.parametrize(("device", "fused"), WAYS)
@pytest.mark.parametrize(("head", "bias"), [("critic.2", torch.inf), ("actor.2", -200.0)], ids=["value", "log-prob"])
def test_neither_value_nor_log_probability_may_be_infinite(head: str, bias: float, device: str, fused: bool) -> None:
    # A standard deviation of e^-200 is 0.
    policy = policy_of("frameconv", "box")
    policy.get_submodule(head).get_parameter("bias").fill_(bias)
    served = Served(policy, device, fused)
    assert served.advance(columns_of(policy, [0, 1], 0)).finite.tolist() == [False, False]
    assert not served.state().any()


@pytest.mark.parametrize(("device", "fused"), [*WAYS[1:2], *WAYS[3:]])
def test_a_row_gets_the_same_bits_in_every_bucket_if_its_products_are_in_tiles(
    memory: str, device: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter leaves a tile to numpy, whose library has other bits for a row in another place on some CPUs.
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("ik,kj->ij", a, b).astype(dtype))
    policy = policy_of(memory)
    together, apart = (Served(policy, device, fused, tiles="ieee") for _ in range(2))
    for index in range(2):
        whole = together.advance(columns_of(policy, list(range(8)), index))
        for part in ([5], [7, 0, 2], [1, 3, 4, 6]):
            alone = apart.advance(columns_of(policy, part, index))
            assert_equal(alone, whole, part)
        np.testing.assert_array_equal(apart.state(), together.state())


@pytest.mark.parametrize(("device", "fused"), WAYS)
def test_preparing_a_bucket_touches_no_session(memory: str, device: str, fused: bool) -> None:
    served = Served(policy_of(memory), device, fused)
    served.advance(columns_of(served.policy, [0, 1, 2, 3], 0))
    before = served.state()
    served.step.prepare(8)
    served.step.repeat()
    np.testing.assert_array_equal(served.state(), before)


@pytest.mark.parametrize(("device", "fused"), WAYS)
def test_results_are_kept_by_who_got_them(device: str, fused: bool) -> None:
    served = Served(policy_of("frameconv"), device, fused)
    first = served.advance(columns_of(served.policy, [0, 1, 2], 0))
    copies = DeviceResults(*(column.copy() for column in first))
    served.advance(columns_of(served.policy, [3, 4, 5, 6, 7], 1))
    assert_equal(first, copies)


@pytest.mark.parametrize(("device", "fused"), WAYS)
def test_two_versions_step_the_sessions_of_one_arena(memory: str, device: str, fused: bool) -> None:
    old, new = policy_of(memory), small_policy(memory, OBSERVATIONS, ACTIONS["discrete"], seed=1).requires_grad_(False)
    served, plain = Served(old, device, fused), Plain(policy_of(memory))
    other = DeviceStep(new.to(device), served.arena, BUCKETS, torch.device(device), fused=fused)
    for index in range(3):
        columns = columns_of(old, [0, 1, 2], index)
        got, expected = served.advance(columns), plain.advance(columns)
        different = other.compute(**columns_of(new, [3, 4], index))
        np.testing.assert_allclose(got.logits, expected.logits, rtol=0, atol=1e-4)
        assert different.finite.all() and np.abs(different.logits - got.logits[:2]).max() > 0.01


class Crossings(TorchDispatchMode):
    """Notes the operations that touch a tensor beside the device, or need its values on the host."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.num_operations, self.found = device, 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, results)) if isinstance(t, torch.Tensor)]
        self.num_operations += 1
        if any(t.device.type != self.device for t in tensors) or func is torch.ops.aten._local_scalar_dense.default:
            self.found.append(str(func))
        return results


@pytest.mark.parametrize("actions", ACTIONS)
def test_between_its_two_copies_a_step_neither_waits_for_the_device_nor_crosses_to_it(
    memory: str, actions: str
) -> None:
    # Capturing forbids both. A device without memory stands for the GPU: what is not on it is on the host.
    meta = torch.device("meta")
    policy = policy_of(memory, actions).to(meta)
    step = DeviceStep(policy, StateArena(policy.state_spec, CAPACITY, meta), BUCKETS, meta)
    inputs, outputs = step._inputs.columns_of(8), step._outputs.columns_of(8)
    with torch.inference_mode(), Crossings("meta") as crossings:
        step._compute(inputs.device, outputs.device)
    assert crossings.num_operations > 50 and crossings.found == []


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_that_run_are_taken(device: str) -> None:
    assert can_fuse(torch.device(device))


def test_kernels_that_cannot_run_are_not_taken_and_the_log_says_why(tmp_path: Path) -> None:
    # Not interpreted, and without a compiler: as in an image for a GPU that has none.
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CC")}
    environment |= {"PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    script = f"import torch\nfrom tenuto_server.device_step import can_fuse\nprint(can_fuse(torch.device('{device}')))"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n" and "fused kernels do not run: RuntimeError" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_cpu_captures_nothing_and_needs_no_triton() -> None:
    policy, cpu = policy_of("dnc"), torch.device("cpu")
    arena = StateArena(policy.state_spec, CAPACITY, cpu)
    step = DeviceStep(policy, arena, BUCKETS, cpu)
    assert not step.is_captured and not step.is_fused
    with pytest.raises(AssertionError, match="only a GPU has graphs"):
        DeviceStep(policy, arena, BUCKETS, cpu, captured=True)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("fused", [False, True])
def test_a_captured_step_computes_the_bits_of_the_called_one(memory: str, fused: bool, device: str) -> None:
    captured, called = (Served(policy_of(memory), device, fused, captured=way) for way in (True, False))
    for index in range(30):
        slots = [(index * 5 + k) % CAPACITY for k in range(1 + index % 8)]
        columns = columns_of(captured.policy, slots, index)
        assert_equal(captured.advance(columns), called.advance(columns))
    np.testing.assert_array_equal(captured.state(), called.state())


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize(("tiles", "atol"), [("ieee", 1e-4), ("tf32x3", 1e-4), ("tf32", 0.05)])
def test_a_step_is_as_accurate_as_its_tiles(memory: str, tiles: Any, atol: float, device: str) -> None:
    served, plain = Served(policy_of(memory), device, True, tiles=tiles), Plain(policy_of(memory))
    for index in range(30):
        columns = columns_of(plain.policy, list(range(8)), index)
        got, expected = served.advance(columns), plain.advance(columns)
        np.testing.assert_allclose(got.logits, expected.logits, rtol=0, atol=atol)
