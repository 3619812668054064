"""State goes where it belongs: packed, gathered, zeroed at episode starts, scattered only where it may be."""

import torch

from tenuto_models import TensorSpec
from tenuto_server.arena import StateArena

SPEC = (TensorSpec("a", (2, 3)), TensorSpec("t", (1,), torch.int64), TensorSpec("b", (4,)))


def state(n: int, offset: float = 0.0) -> dict[str, torch.Tensor]:
    torch.manual_seed(n)
    return {
        "a": torch.randn(n, 2, 3) + offset,
        "t": torch.arange(n).view(n, 1) + 5,
        "b": torch.randn(n, 4) + offset,
    }


def test_what_is_scattered_is_gathered_and_neighbours_are_untouched() -> None:
    arena = StateArena(SPEC, 8, torch.device("cpu"))
    stored, slots = state(3), torch.tensor([5, 0, 7])
    arena.scatter(slots, stored, keep=torch.ones(3, dtype=torch.bool))
    back = arena.gather(slots.flip(0), torch.zeros(3, dtype=torch.bool))
    for name, tensor in stored.items():
        assert torch.equal(back[name], tensor.flip(0)) and back[name].dtype == tensor.dtype
    assert all(not tensor.any() for tensor in arena.read(1).values())
    assert arena.num_bytes == 9 * (10 * 4 + 8)


def test_an_episode_start_zeroes_every_tensor_of_its_row_only() -> None:
    arena = StateArena(SPEC, 2, torch.device("cpu"))
    slots, stored = torch.tensor([0, 1]), state(2)
    arena.scatter(slots, stored, keep=torch.tensor([True, True]))
    gathered = arena.gather(slots, torch.tensor([True, False]))
    for name, tensor in gathered.items():
        assert not tensor[0].any() and torch.equal(tensor[1], stored[name][1])


def test_a_row_that_is_not_kept_stays_as_it_was() -> None:
    arena = StateArena(SPEC, 2, torch.device("cpu"))
    slots, before = torch.tensor([0, 1]), state(2)
    arena.scatter(slots, before, keep=torch.tensor([True, True]))
    broken = {**state(2, offset=1.0), "a": torch.full((2, 2, 3), torch.nan)}
    arena.scatter(slots, broken, keep=torch.tensor([False, False]))
    after = arena.gather(slots, torch.zeros(2, dtype=torch.bool))
    assert all(torch.equal(after[name], before[name]) for name in before)
