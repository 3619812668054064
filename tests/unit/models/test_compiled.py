"""The compiled step computes what Policy.step and the distributions compute, and a row's bits are its own."""

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

from tenuto_models import DNCConfig, FrameconvConfig, Policy, PolicyConfig
from tenuto_models.compiled import BLOCK, Chosen, CompiledStep
from tenuto_models.jit import Kernel, cpu_features
from tenuto_models.sampling import uniforms

BOX = spaces.Box(-1, 1, (5,))
ACTIONS = [
    spaces.Discrete(6, start=-2),
    spaces.MultiDiscrete([2, 9, 3], start=[1, 0, -4]),
    spaces.MultiBinary((2, 2)),
    spaces.Box(np.float32([-2, -np.inf, 0]), np.float32([2, np.inf, 1e-3]), (3,)),
    spaces.Box(-1, 1, (2, 2), np.float64),
]
CONFIGS = {
    "plain dnc": PolicyConfig(DNCConfig(24, 4, 6, 2), 16, actor_widths=(16,), critic_widths=(16,)),
    "odd dnc": PolicyConfig(DNCConfig(7, 5, 3, 1), 9, (11,), (13, 5), (), (3, 4, 5), 50),
    "plain frameconv": PolicyConfig(FrameconvConfig(24), 16, actor_widths=(16,), critic_widths=(16,)),
    "odd frameconv": PolicyConfig(FrameconvConfig(33, 2), 19, (), (70,), (31, 8, 9), (), 9),
    "real dnc": PolicyConfig.for_memory("dnc"),
    "real frameconv": PolicyConfig.for_memory("frameconv"),
}


def lively(config: PolicyConfig, action_space: spaces.Space[Any] = ACTIONS[0]) -> Policy:
    """A policy whose memory and actions depend on what it sees."""
    torch.manual_seed(0)
    policy = Policy(BOX, action_space, config)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.5 / parameter.shape[-1] ** 0.5 * torch.randn_like(parameter))
    return policy


class Play:
    """Sessions that are stepped, and the memory in which their state lies."""

    def __init__(self, policy: Policy, sessions: int, threads: int = 1) -> None:
        self.policy, self.step = policy, CompiledStep(policy, threads)
        size = sum(spec.num_elements for spec in policy.core.state_spec)
        self.state, self.counters = np.full((sessions, size), 7, np.float32), np.full(sessions, 99)
        self.random = np.random.default_rng(1)
        self.observations = self.random.uniform(-1, 1, (40, sessions, policy.observation_size)).astype(np.float32)

    def advance(self, slots: np.ndarray, index: int, starts: Any = None, deterministic: bool = False) -> Chosen:
        n = len(slots)
        return self.step.advance(
            self.state,
            self.counters,
            slots,
            np.full(n, index == 0) if starts is None else starts,
            self.observations[index, slots],
            slots.astype(np.uint64),
            np.full(n, index, np.uint64),
            np.full(n, deterministic),
        )

    def state_before(self, starts: np.ndarray) -> dict[str, torch.Tensor]:
        """The state of all sessions by name, zeroed where an episode starts."""
        columns = torch.from_numpy(self.state).split([s.num_elements for s in self.policy.core.state_spec], dim=1)
        named = {s.name: c.unflatten(1, s.shape) for s, c in zip(self.policy.core.state_spec, columns, strict=True)}
        named["t"] = torch.from_numpy(self.counters)[:, None]
        return {k: torch.where(torch.from_numpy(starts).view(-1, *[1] * (v.dim() - 1)), 0, v) for k, v in named.items()}


def packed_state(policy: Policy, state: dict[str, torch.Tensor]) -> np.ndarray:
    return torch.cat([state[spec.name].flatten(1) for spec in policy.core.state_spec], dim=1).numpy()


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_step_is_the_policys(name: str) -> None:
    policy = lively(CONFIGS[name])
    play = Play(policy, 11)
    for index in range(12):
        order = play.random.permutation(11)
        starts = play.random.random(11) < (1.0 if index == 0 else 0.2)
        # From the same state each time: a difference of rounding may change which cell the next step allocates.
        output, state = policy.step(torch.from_numpy(play.observations[index]), play.state_before(starts))
        chosen = play.advance(order, index, starts[order])
        np.testing.assert_allclose(chosen.logits, output.logits[order], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(chosen.values, output.value[order], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(play.state, packed_state(policy, state), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(play.counters, state["t"][:, 0])
        assert chosen.finite.all() and min(chosen.seconds) >= 0


@pytest.mark.parametrize("action_space", ACTIONS, ids=str)
@pytest.mark.parametrize("deterministic", [True, False])
@torch.inference_mode()
def test_an_action_is_the_distributions(action_space: spaces.Space[Any], deterministic: bool) -> None:
    policy, slots = lively(CONFIGS["plain frameconv"], action_space), np.arange(300)
    play, distribution = Play(policy, 300), policy.distribution
    for index in range(4):
        chosen = play.advance(slots, index, deterministic=deterministic)
        logits = torch.from_numpy(chosen.logits)
        draws = torch.from_numpy(
            uniforms(slots.astype(np.uint64), np.full(300, index, np.uint64), distribution.num_uniforms)
        )
        raw = distribution.greedy(logits) if deterministic else distribution.sample(logits, draws)
        expected = distribution.to_space(raw).numpy()
        assert chosen.actions.dtype == expected.dtype == action_space.dtype
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(chosen.actions, expected, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(chosen.actions, expected)
        np.testing.assert_allclose(chosen.log_probs, distribution.log_prob(logits, raw), rtol=1e-4, atol=2e-4)
        assert all(action in action_space for action in chosen.actions)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("threads", [1, 3])
def test_company_number_and_place_change_no_bit(name: str, threads: int) -> None:
    sessions = BLOCK + 101  # So that threads get parts of the last batch.
    whole, apart = (Play(lively(CONFIGS[name]), sessions, t) for t in (1, threads))
    for index in range(3):
        expected = whole.advance(np.arange(sessions), index)
        order, first = apart.random.permutation(sessions), 0
        for size in (1, 2, 3, 4, 5, 6, 7, 12, 13, sessions - 53):
            slots = order[first : first + size]
            chosen, first = apart.advance(slots, index), first + size
            for column in ("actions", "values", "log_probs", "logits"):
                np.testing.assert_array_equal(getattr(chosen, column), getattr(expected, column)[slots], column)
        assert first == sessions
        np.testing.assert_array_equal(apart.state, whole.state)


@pytest.mark.parametrize("name", ["plain dnc", "plain frameconv"])
def test_a_row_that_is_not_finite_keeps_its_state_and_harms_nobody(name: str) -> None:
    play, undisturbed = Play(lively(CONFIGS[name]), 8), Play(lively(CONFIGS[name]), 8)
    slots = np.arange(8)
    for index in range(2):
        play.advance(slots, index)
        undisturbed.advance(slots, index)
    before = play.state[3].copy(), play.counters[3]
    play.observations[2, 3] = np.nan
    chosen, expected = play.advance(slots, 2), undisturbed.advance(slots, 2)
    assert chosen.finite.tolist() == [i != 3 for i in range(8)]
    np.testing.assert_array_equal(play.state[3], before[0])
    assert play.counters[3] == before[1]
    others = slots != 3
    np.testing.assert_array_equal(chosen.logits[others], expected.logits[others])
    np.testing.assert_array_equal(play.state[others], undisturbed.state[others])


def test_columns_may_be_read_only_or_strided(monkeypatch: pytest.MonkeyPatch) -> None:
    play, other = Play(lively(CONFIGS["plain dnc"]), 8), Play(lively(CONFIGS["plain dnc"]), 8)
    expected = play.advance(np.arange(8), 0)
    monkeypatch.setattr(Kernel, "__call__", _uncompiled(Kernel.__call__))
    other.observations = np.repeat(other.observations, 2, axis=2)[:, :, ::2]
    slots = np.arange(16)[::2] // 2
    other.observations.flags.writeable = slots.flags.writeable = False
    np.testing.assert_array_equal(other.advance(slots, 0).logits, expected.logits)


def _uncompiled(call: Any) -> Any:
    """Run a kernel, which must have been compiled for such arguments."""

    def checked(kernel: Any, *arguments: Any) -> None:
        known = len(kernel._call.signatures)
        call(kernel, *arguments)
        assert len(kernel._call.signatures) == known

    return checked


@torch.inference_mode()
def test_late_steps_are_embedded_as_exactly_as_early_ones() -> None:
    policy = lively(CONFIGS["odd frameconv"])
    play, state = Play(policy, 4), policy.initial_state(4)
    play.state[:] = 0
    play.counters[:] = [10**6, 10**9, 3 * 10**9, 12345]
    state["t"][:, 0] = torch.from_numpy(play.counters)
    output, _ = policy.step(torch.from_numpy(play.observations[1]), state)
    np.testing.assert_allclose(play.advance(np.arange(4), 1).logits, output.logits, rtol=1e-4, atol=1e-5)


def test_draws_follow_the_normal_distribution_into_its_tails() -> None:
    policy = lively(CONFIGS["plain frameconv"], ACTIONS[4])
    with torch.no_grad():
        final = policy.actor[-1]
        final.weight.zero_()
        final.bias.zero_()
    play = Play(policy, 1)
    n = 50_000
    chosen = play.step.advance(
        np.zeros((n, play.state.shape[1]), np.float32), np.zeros(n, np.int64), np.arange(n), np.ones(n, np.bool_),
        np.zeros((n, 5), np.float32), np.arange(n, dtype=np.uint64), np.zeros(n, np.uint64), np.zeros(n, np.bool_),
    )  # fmt: skip
    draws = uniforms(np.arange(n, dtype=np.uint64), np.zeros(n, np.uint64), 4)
    quantiles = torch.special.ndtri(torch.from_numpy(draws).double()).numpy()
    np.testing.assert_allclose(chosen.actions.reshape(n, 4), np.clip(quantiles, -1, 1), atol=1e-6)
    density = (-0.5 * quantiles**2 - 0.5 * np.log(2 * np.pi)).sum(axis=1)
    np.testing.assert_allclose(chosen.log_probs, density, atol=1e-4)


@pytest.mark.parametrize(
    ("cpu", "features", "width"),
    [("skylake-avx512", "+avx,+avx2,+fma,+avx512f", 16), ("haswell", "+avx,+avx2,+fma", 8), ("x86-64", "+sse2", 4)],
)
def test_older_processors_compute_the_same(cpu: str, features: str, width: int, tmp_path: Any) -> None:
    """They have no tile unit, their vectors are shorter, and where they cannot multiply and add in one, rounding
    differs.
    """
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("names processors of another kind than this machine's")
    if "avx512f" in features and not cpu_features().get("avx512f"):
        pytest.skip("no AVX-512 here")
    program = (
        "import numpy as np, test_compiled as t\nfrom tenuto_models import matmul\n"
        "play = t.Play(t.lively(t.CONFIGS['plain dnc']), 20)\n"
        "for i in range(5): chosen = play.advance(np.arange(20), i)\n"
        "print(matmul.LANES, *chosen.values.tolist())"
    )
    environment = os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    lanes, *values = done.stdout.split()
    assert done.returncode == 0 and int(lanes) == width, done.stderr
    play = Play(lively(CONFIGS["plain dnc"]), 20)
    for index in range(5):
        chosen = play.advance(np.arange(20), index)
    np.testing.assert_allclose(np.array(values, np.float64), chosen.values, rtol=1e-4, atol=1e-5)
