"""The DNC's scan against its step in a loop, which autograd differentiates: values and every gradient, in float64."""

from __future__ import annotations

import gc

import pytest
import torch

from tenuto_models import DNCConfig
from tenuto_models.dnc import DNCCore
class Tape: pass
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
    with torch.no_grad():
        _, state = walked(core, torch.randn(B, 5, F, dtype=torch.float64), fresh)
    return dict(state)


def num_tapes() -> int:
    return sum(type(thing) is Tape for thing in gc.get_objects())


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
    gc.collect()
    gc.disable()
    before = num_tapes()  # Of tests that failed, say.
    try:
        y, state = core.unroll(torch.randn(B, T, F, dtype=torch.float64), used_state(core))
        assert num_tapes() == before + 1
        del y, state
        assert num_tapes() == before
    finally:
        gc.enable()


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
