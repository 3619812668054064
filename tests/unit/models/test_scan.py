"""The DNC's compiled code against its step in plain torch, which autograd differentiates: values and every gradient."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tenuto_models import DNCConfig
from tenuto_models.dnc import DNCCore, kernels
from tenuto_models.dnc.kernels import Sizes
from tenuto_models.errors import InputError
from tenuto_models.linear import Linear, multiplier, product
from tenuto_models.memory import State, initial_state

B, T, F = 3, 7, 6


def walked(core: DNCCore, z: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
    outputs = []
    for t in range(z.shape[1]):
        y, state = core.step(z[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def lively_core(*sizes: int) -> DNCCore:
    """A core whose gates move: with fresh weights they all stay near one half."""
    core = DNCCore(F, DNCConfig(*sizes)).double()
    with torch.no_grad():
        core.access.interface.weight.mul_(4)
    return core


def used_state(core: DNCCore) -> dict[str, torch.Tensor]:
    fresh = {name: tensor.double() for name, tensor in initial_state(core.state_spec, B).items()}
    _, state = walked(core, torch.randn(B, 5, F, dtype=torch.float64), fresh)
    return {name: tensor.detach() for name, tensor in state.items()}


@pytest.mark.parametrize("sizes", [(10, 5, 4, 3), (8, 1, 3, 1), (4, 6, 1, 2)], ids=str)
@pytest.mark.parametrize("start", ["fresh", "used"])
def test_values_and_all_gradients_equal_those_of_the_loop(sizes: tuple[int, ...], start: str) -> None:
    core = lively_core(*sizes)
    before = used_state(core) if start == "used" else initial_state(core.state_spec, B)
    before = {name: tensor.double().clone().requires_grad_() for name, tensor in before.items()}
    z = torch.randn(B, T, F, dtype=torch.float64, requires_grad=True)
    # Cells that are all alike are interchangeable: of a fresh memory only what does not name a cell is unique.
    compared = before.keys() if start == "used" else {"h", "c", "read_vectors"}
    inputs = dict(core.named_parameters()) | {"z": z} | {name: before[name] for name in compared}
    towards = torch.randn(B, T, sizes[0], dtype=torch.float64)

    expected, expected_state = walked(core, z, before)
    got, state = core.unroll(z, before)

    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    for name in compared:
        torch.testing.assert_close(state[name], expected_state[name], rtol=0, atol=1e-13, msg=name)
    wanted = torch.autograd.grad((expected * towards).sum(), list(inputs.values()))
    found = torch.autograd.grad((got * towards).sum(), list(inputs.values()))
    for name, a, b in zip(inputs, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13, msg=lambda m, n=name: f"gradient of {n}: {m}")


def test_without_gradients_a_sequence_gives_the_same_bits() -> None:
    core = lively_core(10, 5, 4, 3)
    before, z = used_state(core), torch.randn(B, T, F, dtype=torch.float64)
    seq_lens = torch.tensor([7, 0, 3])
    with_tape, state = core.unroll(z, before, seq_lens)
    with torch.no_grad():
        without, same_state = core.unroll(z, before, seq_lens)
    assert torch.equal(without, with_tape)
    assert all(torch.equal(same_state[name], state[name]) for name in state)


def test_gradients_stay_finite_where_gates_saturate() -> None:
    core = lively_core(8, 4, 4, 2)
    with torch.no_grad():
        core.access.interface.weight.mul_(1e4)
    y, _ = core.unroll(torch.randn(B, 40, F, dtype=torch.float64), used_state(core))
    y.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in core.parameters() if p.grad is not None)


def test_a_sequence_leaves_the_state_it_was_given_as_it_was() -> None:
    core = lively_core(8, 4, 4, 2)
    before = used_state(core)
    kept = {name: tensor.clone() for name, tensor in before.items()}
    y, _ = core.unroll(torch.randn(B, T, F, dtype=torch.float64), before)
    y.sum().backward()
    assert all(torch.equal(before[name], kept[name]) for name in kept)


def test_two_backward_passes_over_one_sequence_give_the_same_gradients() -> None:
    core = lively_core(8, 4, 4, 2)
    y, _ = core.unroll(torch.randn(B, T, F, dtype=torch.float64), used_state(core))
    first = torch.autograd.grad(y.sum(), list(core.parameters()), retain_graph=True)
    second = torch.autograd.grad(y.sum(), list(core.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_sequence_that_nobody_holds_frees_its_tape_at_once() -> None:
    core = lively_core(8, 4, 4, 2)
    state = used_state(core)
    gc.collect()
    gc.disable()
    before = num_tensors()  # Of tests that failed, say.
    try:
        y, after = core.unroll(torch.randn(B, T, F, dtype=torch.float64), state)
        assert num_tensors() > before
        del y, after
        assert num_tensors() == before
    finally:
        gc.enable()


def num_tensors() -> int:
    return sum(type(thing) is torch.Tensor for thing in gc.get_objects())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_step_without_gradients_equals_the_one_in_plain_torch(dtype: torch.dtype) -> None:
    core = lively_core(10, 5, 4, 3).to(dtype)
    state = {name: tensor.to(dtype) for name, tensor in used_state(core.double()).items()}
    core, z = core.to(dtype), 3 * torch.randn(B, F, dtype=dtype)
    expected, expected_state = core.step(z, state)
    with torch.no_grad():
        got, got_state = core.step(z, state)
    atol = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)
    for name in state:
        torch.testing.assert_close(got_state[name], expected_state[name], rtol=0, atol=atol, msg=name)


def test_a_row_that_is_not_finite_reaches_no_other_row() -> None:
    core = DNCConfig(8, 4, 4, 2).build(F)
    state, z = initial_state(core.state_spec, 3), torch.randn(3, F)
    state["memory"][1, 2, 0] = float("nan")
    state["usage_vector"][2, 1] = float("inf")
    with torch.no_grad():
        y, after = core.step(z, state)
        alone, _ = core.step(z[[0, 0]], {name: tensor[[0, 0]] for name, tensor in state.items()})
    assert torch.equal(y[0], alone[0])
    assert [bool(torch.isfinite(row).all()) for row in after["memory"]] == [True, False, False]


def test_padding_is_neither_computed_nor_differentiated() -> None:
    core = lively_core(10, 5, 4, 3)
    before, seq_lens = used_state(core), torch.tensor([4, 0, 7])
    z = torch.randn(B, T, F, dtype=torch.float64, requires_grad=True)
    y, state = core.unroll(z, before, seq_lens)
    towards = torch.randn_like(y)
    (found,) = torch.autograd.grad((y * towards).sum(), [z])
    for row, length in enumerate(seq_lens.tolist()):
        alone = {name: tensor[row : row + 1] for name, tensor in before.items()}
        expected, after = walked(core, z[row : row + 1, :length], alone) if length else (z[:1, :0, :1], alone)
        torch.testing.assert_close(y[row, :length], expected[0].expand(-1, 10), rtol=0, atol=1e-13)
        assert torch.equal(y[row, length:], core.output.bias.expand(T - length, -1))
        for name in state:
            torch.testing.assert_close(state[name][row], after[name][0], rtol=0, atol=1e-13, msg=name)
        if length:
            (wanted,) = torch.autograd.grad((expected[0] * towards[row, :length]).sum(), [z])
            torch.testing.assert_close(found[row], wanted[row], rtol=1e-9, atol=1e-13)
        else:
            assert not found[row].any()


def test_dtypes_without_compiled_code_are_computed_step_by_step() -> None:
    core = DNCConfig(8, 4, 4, 2).build(F).bfloat16()
    state = initial_state(core.state_spec, 2)
    before = {name: tensor.bfloat16() for name, tensor in state.items()}
    z = torch.randn(2, T, F, dtype=torch.bfloat16)
    expected, last = walked(core, z, before)
    _, after_3 = walked(core, z[:, :3], before)
    y, state = core.unroll(z, before, torch.tensor([7, 3]))
    assert torch.equal(y, expected)
    assert torch.equal(state["memory"], torch.stack([last["memory"][0], after_3["memory"][1]]))
    y.float().sum().backward()
    assert all(parameter.grad is not None for parameter in core.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_are_torchs_up_to_the_last_bits_everywhere(dtype: torch.dtype) -> None:
    """Of an LSTM whose state is zero, the gates are its inputs, activated."""
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.logspace(-9, 2, 300), torch.tensor([-1e30, -0.0, 0.0, 1e30])])
    x = x.to(dtype)
    size = len(x)
    gates = x.repeat(1, 4)
    before, after = torch.zeros(1, 2 * size, dtype=dtype), torch.zeros(1, 2 * size, dtype=dtype)
    kernels.lstm(
        gates.numpy(), before.numpy(), after.numpy(), after[:, :size].contiguous().numpy(), Sizes(size, 0, 0, 0)
    )  # fmt: skip
    i, f, g, o = gates.view(4, size)
    exact, eps = x.double(), torch.finfo(dtype).eps
    # Below e^-87 float32 has no normal numbers; the gates are as good as closed there.
    least = 1e-37 if dtype == torch.float32 else 1e-300
    for gate in (i, f, o):
        torch.testing.assert_close(gate.double(), torch.sigmoid(exact), rtol=64 * eps, atol=least)
    torch.testing.assert_close(g.double(), torch.tanh(exact), rtol=8 * eps, atol=0)


@pytest.mark.parametrize("strength", [0.0, 15.0, 500.0])
def test_float32_gradients_are_those_of_float64(strength: float) -> None:
    core = lively_core(16, 6, 5, 2)
    with torch.no_grad():  # Strengths of the content weightings, which make scores large.
        core.access.interface.bias[[10, 11, 17]] += strength
    before = {name: tensor.requires_grad_() for name, tensor in used_state(core).items()}
    z = torch.randn(B, T, F, dtype=torch.float64)

    def gradients(core: DNCCore, z: torch.Tensor, state: State) -> dict[str, torch.Tensor]:
        y, _ = core.unroll(z, state)
        inputs = dict(core.named_parameters()) | dict(state)
        return dict(zip(inputs, torch.autograd.grad(y.square().sum(), list(inputs.values())), strict=True))

    wanted = gradients(core, z, before)
    single = {name: tensor.detach().float().requires_grad_() for name, tensor in before.items()}
    found = gradients(core.float(), z.float(), single)
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name].double(), gradient, rtol=0, atol=2e-4 * scale, msg=name)


def test_empty_cells_and_keys_of_zeros_have_the_gradient_of_a_norm_that_is_zero() -> None:
    core = lively_core(10, 5, 4, 3)
    with torch.no_grad():  # The first read key and the write key are always zero.
        for rows in (slice(0, 4), slice(15, 19)):
            core.access.interface.weight[rows], core.access.interface.bias[rows] = 0, 0
    before = used_state(core)
    before["memory"][:, 2] = 0
    before = {name: tensor.requires_grad_() for name, tensor in before.items()}
    z = torch.randn(B, T, F, dtype=torch.float64)
    inputs = [before["memory"], *core.parameters()]
    expected, _ = walked(core, z, before)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    got, _ = core.unroll(z, before)
    found = torch.autograd.grad(got.square().sum(), inputs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("call", ["step", "unroll"])
def test_what_does_not_fit_is_refused_before_anything_is_computed(call: str) -> None:
    """The kernels look at no bounds: a wrong size would be somebody else's memory."""
    core = DNCConfig(8, 4, 2, 2).build(F)
    state, z = initial_state(core.state_spec, 2), torch.zeros(2, *([3] if call == "unroll" else []), F)
    wrong = {
        "state memory": {"memory": torch.zeros(2, 2, 4)},
        "state c": {"c": torch.zeros(2, 1, 7)},
        "state usage_vector": {"usage_vector": torch.zeros(1, 4)},
        "state h": {"h": torch.zeros(2, 1, 8, dtype=torch.float64)},
    }
    for what, tensor in wrong.items():
        with torch.no_grad(), pytest.raises(InputError, match=rf"^{what}: got \["):
            getattr(core, call)(z, {**state, **tensor})
    with torch.no_grad(), pytest.raises(InputError, match=f"^z: got {F - 1} features, expected {F}$"):
        getattr(core, call)(z[..., 1:], state)


@pytest.mark.parametrize("lengths", [[4, 1], [-1, 1], [1], [1, 1, 1]], ids=str)
def test_lengths_that_no_row_has_are_refused(lengths: list[int]) -> None:
    core = DNCConfig(8, 4, 2, 2).build(F)
    with pytest.raises(InputError, match=r"^seq_lens: got \[.*\], expected 2 numbers from 0 to 3$"):
        core.unroll(torch.zeros(2, 3, F), initial_state(core.state_spec, 2), torch.tensor(lengths))


STEP = """
import torch
from tenuto_models import DNCConfig
from tenuto_models.memory import initial_state

torch.manual_seed(0)
core = DNCConfig(8, 4, 2, 2).build(3)
with torch.no_grad():
    y, _ = core.step(torch.ones(2, 3), initial_state(core.state_spec, 2))
print([round(v, 5) for v in y[0].tolist()])
"""


def test_compiled_code_on_disk_may_be_damaged_and_compiling_forbidden(tmp_path: Path) -> None:
    def step(**environment: str) -> str:
        everything = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), **environment}
        done = subprocess.run([sys.executable, "-c", STEP], env=everything, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr
        return done.stdout

    expected = step()
    kept = [*tmp_path.rglob("*.nbi"), *tmp_path.rglob("*.nbc")]
    assert len(kept) >= 4
    for path in kept:
        path.write_bytes(path.read_bytes()[:5])
    assert step() == expected
    assert step(NUMBA_DISABLE_JIT="1") == expected


@pytest.mark.parametrize("num_features", [8, 320])
def test_linear_computes_what_torch_computes(num_features: int) -> None:
    ours = Linear(num_features, 256)
    theirs = torch.nn.Linear(num_features, 256)
    theirs.load_state_dict(ours.state_dict())
    # Not contiguous: a slice of a sequence whose time comes first.
    x = torch.randn(9, 4, num_features + 3).transpose(0, 1)[..., 3:].requires_grad_()
    towards = torch.randn(4, 9, 256)
    found = torch.autograd.grad((ours(x) * towards).sum(), [x, *ours.parameters()])
    wanted = torch.autograd.grad((theirs(x) * towards).sum(), [x, *theirs.parameters()])
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_products_take_matrices_of_any_strides() -> None:
    a, b = torch.randn(40, 300)[:, 100:], torch.randn(200, 500)[:, 100:400]
    for left, right in ((a, b), (torch.randn(200, 40).t(), b), (a, torch.randn(300, 200).t())):
        torch.testing.assert_close(product(left, right), left @ right, rtol=0, atol=1e-3)
        torch.testing.assert_close(multiplier(right)(left), left @ right, rtol=0, atol=1e-3)
