"""One step of ours against one step of POPGym's classes, teacher-forced from the recorded states."""

from itertools import permutations

import pytest
import torch

from golden import CASES, GoldenCase

TOLERANCE = 2e-6


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return GoldenCase(*request.param)


def permuted(state: dict[str, torch.Tensor], row: int, order: list[int]) -> dict[str, torch.Tensor]:
    """The DNC state of one row with its memory cells in another order."""
    one = {k: v[row] for k, v in state.items()}
    index = torch.tensor(order)
    for name in ("precedence", "read_weights", "write_weights", "usage_vector"):
        one[name] = one[name][..., index]
    one["memory"] = one["memory"][index]
    one["link_matrix"] = one["link_matrix"][:, index][:, :, index]
    return one


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=TOLERANCE)


def test_each_step_from_a_golden_state_matches_outputs_and_state(case: GoldenCase) -> None:
    policy = case.policy()
    for t in range(case.length):
        output, state = policy.step(case.obs[:, t], case.state_before(t))
        for name, ours in (("core_out", output.core), ("logits", output.logits), ("value", output.value)):
            torch.testing.assert_close(ours, case.arrays[f"step/{name}"][:, t], rtol=0, atol=TOLERANCE)
        golden = case.state_after(t)
        assert state.keys() == golden.keys()
        for row in range(case.obs.shape[0]):
            one = {k: v[row] for k, v in golden.items()}
            if all(close(state[k][row], one[k]) for k in one):
                continue
            assert case.starts_from_ties and "memory" in one, f"step {t} row {row} differs without ties"
            cells = range(one["memory"].shape[0])
            candidates = (permuted(state, row, list(order)) for order in permutations(cells))
            assert any(all(close(c[k], one[k]) for k in one) for c in candidates), f"step {t} row {row}"


def test_free_run_from_the_start_matches_outputs(case: GoldenCase) -> None:
    policy, state = case.policy(), case.initial
    for t in range(case.length):
        output, state = policy.step(case.obs[:, t], state)
        torch.testing.assert_close(output.logits, case.arrays["step/logits"][:, t], rtol=0, atol=1e-5)


def test_masked_sequence_matches_outputs(case: GoldenCase) -> None:
    output, _ = case.policy().unroll(case.obs, case.initial)
    torch.testing.assert_close(output.logits, case.arrays["step/logits"], rtol=0, atol=1e-5)
