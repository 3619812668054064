"""One batch on the device: what a row gets does not depend on its company, and the laws are asserted."""

from __future__ import annotations

import asyncio
import threading
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from serving import OBSERVATIONS, small_policy
from tenuto_models import Checkpoint, TrainingProgress
from tenuto_server.device_step import DeviceStep
from tenuto_server.engine import Engine, ServedVersion, choose_device
from tenuto_server.errors import ConfigurationError
from tenuto_server.policies import MismatchError, ServedPolicy
from tenuto_server.step import StepRows

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]
CAPACITY = 64


class Bench:
    """An engine with one policy, run without its thread."""

    def __init__(self, device: str, memory: str) -> None:
        self.policy = small_policy(memory)
        self.engine = Engine(torch.device(device), (4, 8, 16, 32, 64))
        checkpoint = Checkpoint("policy", 1, small_policy(memory), TrainingProgress(), 0.0, "")
        self.served = ServedPolicy(checkpoint, self.engine, CAPACITY, server_epoch=1)
        self.version: ServedVersion = self.served.prepare(checkpoint, self.engine)

    def rows(self, slots: list[int], observations: np.ndarray, index: int, **columns: Any) -> StepRows:
        n, pool = len(slots), self.version.pool
        defaults: dict[str, Any] = {
            "slots": np.array(slots),
            "generations": pool.generation[slots],
            "observations": observations[slots],
            "episode_starts": np.full(n, index == 0),
            "seeds": np.array(slots, np.uint64),
            "step_indices": np.full(n, index, np.uint64),
            "deterministic": np.zeros(n, np.bool_),
            "rewards": np.zeros(n, np.float32),
            "session_ids": np.array(slots, np.uint64),
        }
        return StepRows(**(defaults | columns))


@pytest.fixture(params=["dnc", "frameconv"])
def memory(request: pytest.FixtureRequest) -> str:
    return request.param


def flat_observations(n: int) -> np.ndarray:
    OBSERVATIONS.seed(0)
    return np.stack([spaces.flatten(OBSERVATIONS, OBSERVATIONS.sample()) for _ in range(n)]).astype(np.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_gets_the_same_whoever_shares_its_batch(device: str, memory: str) -> None:
    together, apart = Bench(device, memory), Bench(device, memory)
    exact = device == "cpu"
    for index in range(6):
        observations = flat_observations(40)
        whole = together.engine.run(together.version, together.rows(list(range(40)), observations, index))
        order = np.random.default_rng(index).permutation(40).tolist()
        for part in (order[:1], order[1:4], order[4:20], order[20:]):
            alone = apart.engine.run(apart.version, apart.rows(part, observations, index))
            if exact:
                np.testing.assert_array_equal(alone.logits, whole.logits[part])
                np.testing.assert_array_equal(alone.actions, whole.actions[part])
            else:
                np.testing.assert_allclose(alone.logits, whole.logits[part], atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_the_engine_computes_the_policy(device: str, memory: str) -> None:
    bench, state = Bench(device, memory), small_policy(memory).initial_state(10)
    for index in range(8):
        observations = flat_observations(10)
        results = bench.engine.run(bench.version, bench.rows(list(range(10)), observations, index))
        with torch.inference_mode():
            output, state = bench.policy.step(torch.from_numpy(observations), state)
        np.testing.assert_allclose(results.logits, output.logits.numpy(), atol=1e-4)
        np.testing.assert_allclose(results.values, output.value.numpy(), atol=1e-4)
        assert results.finite.all() and set(results.station_s) == {"gather", "run", "scatter"}
    for name, tensor in bench.version.arena.read(7).items():
        np.testing.assert_allclose(tensor, state[name][7].numpy(), atol=1e-4)


def test_the_two_ways_to_step_agree(memory: str) -> None:
    host, device = Bench("cpu", memory), Bench("cpu", memory)
    arena = device.version.arena
    step = DeviceStep(device.policy, arena, (4, 8, 16), torch.device("cpu"))
    for index in range(5):
        observations = flat_observations(11)
        rows = host.rows(list(range(11)), observations, index)
        expected, got = host.engine.run(host.version, rows), step.advance(rows)
        np.testing.assert_allclose(got.logits, expected.logits, atol=1e-4)
        np.testing.assert_array_equal(got.actions, expected.actions)
        assert got.finite.all() and got.station_s.keys() == expected.station_s.keys()
    for name, tensor in host.version.arena.read(7).items():
        np.testing.assert_allclose(arena.read(7)[name], tensor, atol=1e-4)


def test_a_slot_that_changed_hands_stops_the_batch() -> None:
    bench = Bench("cpu", "dnc")
    slot = bench.version.pool.lease()
    assert slot is not None
    rows = bench.rows([slot], flat_observations(1).repeat(CAPACITY, 0), 0)
    bench.version.pool.release(slot)
    with pytest.raises(AssertionError, match="changed hands"):
        bench.engine.run(bench.version, rows)
    assert not any(tensor.any() for tensor in bench.version.arena.read(slot).values())


def test_rows_without_finite_results_are_marked_and_not_stored(memory: str) -> None:
    bench = Bench("cpu", memory)
    observations = flat_observations(3)
    observations[1] = np.inf
    results = bench.engine.run(bench.version, bench.rows([0, 1, 2], observations, 0))
    assert results.finite.tolist() == [True, False, True]
    assert not any(tensor.any() for tensor in bench.version.arena.read(1).values())
    assert any(tensor.any() for tensor in bench.version.arena.read(2).values())


@pytest.mark.parametrize("head", ["actor.2.bias", "critic.2.bias"])
def test_neither_logits_nor_value_may_be_infinite(head: str) -> None:
    bench = Bench("cpu", "frameconv")
    policy = small_policy("frameconv")
    policy.get_parameter(head).detach()[0] = torch.inf
    version = bench.served.prepare(Checkpoint("policy", 2, policy, TrainingProgress(), 0.0, ""), bench.engine)
    results = bench.engine.run(version, bench.rows([0], flat_observations(1), 0))
    assert results.finite.tolist() == [False]


async def test_a_brief_job_runs_where_it_is_submitted_unless_another_is_under_way() -> None:
    engine, here, told = Engine(torch.device("cpu"), (4,)), threading.get_ident(), list[Any]()
    engine.submit(threading.get_ident, lambda *outcome: told.append(outcome), brief=True)
    assert told == [(here, None)]

    go_on = threading.Event()
    slow = asyncio.ensure_future(engine.call(go_on.wait))
    await asyncio.sleep(0)
    ended = asyncio.Event()

    def done(*outcome: Any) -> None:
        told.append(outcome)
        ended.set()

    engine.submit(threading.get_ident, done, brief=True)
    assert len(told) == 1, "a brief job ran beside another"
    go_on.set()
    await slow
    await ended.wait()
    assert told[1][0] not in (here, None)
    # And then the next one runs here again; what it raises is told like a result.
    engine.submit(lambda: 1 / 0, done, brief=True)
    assert isinstance(told[2][1], ZeroDivisionError)
    engine.close()


def test_a_host_says_what_a_batch_will_take_from_what_others_took() -> None:
    bench = Bench("cpu", "dnc")
    step, observations = bench.version.step, flat_observations(40)
    assert step.expected_s(1) == inf, "nobody knows yet"

    def advance(slots: list[int], took_s: float) -> None:
        clock = iter([0.0, took_s])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tenuto_server.host_step.time.perf_counter", lambda: next(clock))
            step.advance(bench.rows(slots, observations, 0))

    advance([0], 1.0)
    assert step.expected_s(1) == 1.0
    # A mean: one batch that had to wait for a core changes it by a little, and it is not forgotten at once.
    advance([0], 11.0)
    assert step.expected_s(1) == pytest.approx(2.0)
    advance([0], 1.0)
    assert step.expected_s(1) == pytest.approx(1.9)
    # Other sizes, and what is shared among threads, stand for themselves.
    assert step.expected_s(2) == inf
    advance(list(range(40)), 3.0)
    assert step.expected_s(40) == 3.0 and step.expected_s(39) == step.expected_s(41) == step.expected_s(65) == inf


async def test_what_fails_after_a_job_reaches_its_caller() -> None:
    def fail(_: int) -> None:
        raise LookupError("gone meanwhile")

    engine = Engine(torch.device("cpu"), (4,))
    with pytest.raises(LookupError, match="gone meanwhile"):
        await engine.call_then(lambda: 1, fail)
    with pytest.raises(ZeroDivisionError):
        await engine.call(lambda: 1 // 0)
    engine.close()


def test_a_policy_of_another_shape_does_not_join_the_versions() -> None:
    bench = Bench("cpu", "dnc")
    for other in (
        small_policy("frameconv"),
        small_policy("dnc", action_space=spaces.Discrete(2)),
        small_policy("dnc", observation_space=spaces.Box(-1, 1, (7,))),
    ):
        with pytest.raises(MismatchError, match=r"got .* expected"):
            bench.served.prepare(Checkpoint("policy", 2, other, TrainingProgress(), 0.0, ""), bench.engine)


@pytest.mark.parametrize("name", ["tpu", "mps", "cuda:99", ""])
def test_a_device_that_is_not_here_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="device: got"):
        choose_device(name)
