"""Sessions that share a stream: the actions of a call each, in far fewer messages, and nobody notices another's end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving import OBSERVATIONS, ServerProcess, hanging_while_exists, publish, small_policy
from tenuto_client import (
    AsyncRemotePolicy,
    ClientClosedError,
    DeadlineError,
    RemotePolicy,
    SessionClosedError,
    SessionLostError,
)
from tenuto_client.shared_stream import SharedStream
from tenuto_proto.v1 import policy_pb2 as pb

NUM_ENVS, NUM_STEPS = 24, 12


def samples(n: int, seed: int) -> list[Any]:
    OBSERVATIONS.seed(seed)
    return [OBSERVATIONS.sample() for _ in range(n)]


OBSERVED = [samples(NUM_STEPS, seed) for seed in range(NUM_ENVS)]


def sharing(server: ServerProcess, env: int = 0, name: str = "dnc", **options: Any) -> AsyncRemotePolicy:
    return AsyncRemotePolicy(server.address, name, transport="stream", seed=env, **options)


async def play(policy: AsyncRemotePolicy, env: int) -> list[int]:
    return [(await policy.step(o, episode_start=t % 5 == 0)).action for t, o in enumerate(OBSERVED[env])]


def play_alone(server: ServerProcess, env: int, name: str) -> list[int]:
    with RemotePolicy(server.address, name, seed=env) as policy:
        return [policy.step(o, episode_start=t % 5 == 0).action for t, o in enumerate(OBSERVED[env])]


def is_open(loop: asyncio.AbstractEventLoop) -> bool:
    return bool(SharedStream._of_loop.get(loop))


async def test_many_sessions_of_two_policies_act_as_each_does_alone_in_few_messages(server: ServerProcess) -> None:
    names = ["dnc" if env % 3 else "frameconv" for env in range(NUM_ENVS)]
    messages = 'tenuto_requests_total{rpc="StepStream"}'
    policies = [sharing(server, env, name) for env, name in enumerate(names)]
    await asyncio.gather(*(policy.connect() for policy in policies))
    before = await asyncio.to_thread(server.metric, messages)
    got = await asyncio.gather(*(play(policy, env) for env, policy in enumerate(policies)))
    sent = await asyncio.to_thread(server.metric, messages) - before
    await asyncio.gather(*(policy.close() for policy in policies))
    expected = [await asyncio.to_thread(play_alone, server, env, name) for env, name in enumerate(names)]
    assert got == expected
    assert NUM_STEPS <= sent <= NUM_ENVS * NUM_STEPS / 3
    assert not is_open(asyncio.get_running_loop())


async def test_sessions_that_are_answered_together_step_together(server: ServerProcess) -> None:
    messages = 'tenuto_requests_total{rpc="StepStream"}'
    policies = [sharing(server, env) for env in range(NUM_ENVS)]
    await asyncio.gather(*(policy.connect() for policy in policies))
    before = await asyncio.to_thread(server.metric, messages)
    await asyncio.gather(*(play(policy, env) for env, policy in enumerate(policies)))
    assert await asyncio.to_thread(server.metric, messages) - before == NUM_STEPS
    await asyncio.gather(*(policy.close() for policy in policies))


async def test_what_cannot_be_sent_is_refused_to_its_sender_alone(server: ServerProcess) -> None:
    async with sharing(server, 1) as wrong, sharing(server, 2) as other:
        await asyncio.gather(wrong.step(OBSERVED[1][0]), other.step(OBSERVED[2][0]))
        no_reward: Any = [1.0]
        failed, good = await asyncio.gather(
            wrong.step(OBSERVED[1][1], reward=no_reward), other.step(OBSERVED[2][1]), return_exceptions=True
        )
        assert isinstance(failed, TypeError) and not isinstance(good, BaseException) and good.step_index == 1
        assert (await wrong.step(OBSERVED[1][1], reward=1.0)).step_index == 1


async def test_two_steps_of_a_session_at_once_are_refused(server: ServerProcess) -> None:
    async with sharing(server, 1) as policy:
        await policy.step(OBSERVED[1][0])
        first, second = await asyncio.gather(
            policy.step(OBSERVED[1][1]), policy.step(OBSERVED[1][2]), return_exceptions=True
        )
        assert not isinstance(first, BaseException) and first.step_index == 1 and isinstance(second, RuntimeError)
        assert (await policy.step(OBSERVED[1][2])).step_index == 2


async def test_what_was_asked_for_comes_with_each_row(server: ServerProcess) -> None:
    outputs = ("value", "log_prob", "logits")
    async with sharing(server, 1, outputs=outputs) as one, sharing(server, 2, outputs=()) as other:
        full, bare = await asyncio.gather(one.step(OBSERVED[1][0]), other.step(OBSERVED[2][0]))
    assert full.logits is not None and full.log_prob is not None and full.value is not None
    log_softmax = full.logits - np.log(np.exp(full.logits).sum())
    assert full.log_prob == pytest.approx(log_softmax[full.action], abs=1e-5)
    assert bare.value is bare.log_prob is bare.logits is None and full.step_index == bare.step_index == 0


async def test_a_session_that_is_gone_fails_alone(server: ServerProcess) -> None:
    async with sharing(server, 1) as gone, sharing(server, 2) as other:
        await asyncio.gather(gone.step(OBSERVED[1][0]), other.step(OBSERVED[2][0]))
        await asyncio.to_thread(server.stub.CloseSession, pb.CloseSessionRequest(session_id=gone.session_id))
        failed, good = await asyncio.gather(
            gone.step(OBSERVED[1][1]), other.step(OBSERVED[2][1]), return_exceptions=True
        )
        assert isinstance(failed, SessionClosedError) and not isinstance(good, BaseException) and good.step_index == 1


async def test_leaving_ends_nobody_elses_steps_and_the_last_one_closes(server: ServerProcess) -> None:
    loop = asyncio.get_running_loop()
    first, second = sharing(server, 1), sharing(server, 2)
    await asyncio.gather(first.connect(), second.connect())
    step = asyncio.create_task(second.step(OBSERVED[2][0]))
    await first.close()
    assert (await step).step_index == 0 and is_open(loop)
    with pytest.raises(ClientClosedError):
        await first.step(OBSERVED[1][0])
    await second.close()
    assert not is_open(loop)
    async with sharing(server, 1) as again:
        assert (await again.step(OBSERVED[1][0])).step_index == 0


async def test_a_cancelled_step_is_settled_by_the_next_call(server: ServerProcess) -> None:
    async with sharing(server, 1) as policy, sharing(server, 2) as other:
        step = asyncio.create_task(policy.step(OBSERVED[1][0]))
        beside = asyncio.create_task(other.step(OBSERVED[2][0]))
        await asyncio.sleep(0)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        assert (await beside).step_index == 0
        assert (await policy.step(OBSERVED[1][0])).step_index == 0, "the same observation gets the one step's action"
        assert (await policy.step(OBSERVED[1][1])).step_index == 1


async def test_messages_keep_the_servers_limit_of_rows(tmp_path: Path) -> None:
    publish(tmp_path, small_policy(), "dnc")
    with ServerProcess(tmp_path, "--max-batch", "4") as server:
        policies = [sharing(server, env) for env in range(10)]
        results = await asyncio.gather(*(play(policy, env) for env, policy in enumerate(policies)))
        await asyncio.gather(*(policy.close() for policy in policies))
        assert [len(actions) for actions in results] == [NUM_STEPS] * 10


async def test_a_device_that_hangs_costs_each_step_its_own_time_and_nothing_else(tmp_path: Path) -> None:
    hang = tmp_path / "hang"
    publish(tmp_path / "repository", small_policy(), "dnc")
    with ServerProcess(tmp_path / "repository", fault=hanging_while_exists(hang)) as server:
        alone = RemotePolicy(server.address, "dnc", transport="stream", timeout_s=0.5)
        async with sharing(server, 1, timeout_s=0.5) as hasty, sharing(server, 2, timeout_s=20) as patient:
            await asyncio.gather(hasty.step(OBSERVED[1][0]), patient.step(OBSERVED[2][0]))
            await asyncio.to_thread(alone.step, OBSERVED[3][0])
            hang.touch()
            waiting = asyncio.create_task(patient.step(OBSERVED[2][1]))
            with pytest.raises(DeadlineError) as caught:
                await hasty.step(OBSERVED[1][1])
            assert caught.value.outcome_unknown and not waiting.done()
            with pytest.raises(DeadlineError):
                await asyncio.to_thread(alone.step, OBSERVED[3][1])
            hang.unlink()
            assert (await waiting).step_index == 1
            assert (await hasty.step(OBSERVED[1][1])).step_index == 1
            assert (await asyncio.to_thread(alone.step, OBSERVED[3][1])).step_index == 1
            await asyncio.to_thread(alone.close)


async def test_a_server_that_is_killed_loses_the_sessions_and_the_next_one_serves_them(tmp_path: Path) -> None:
    publish(tmp_path, small_policy(), "dnc")
    with ServerProcess(tmp_path) as server:
        policies = [sharing(server, env) for env in range(3)]
        await asyncio.gather(*(policy.step(OBSERVED[env][0]) for env, policy in enumerate(policies)))
        server.process.kill()
        server.wait()
        port = str(server.port)
    with ServerProcess(tmp_path, "--port", port):
        failed = await asyncio.gather(
            *(policy.step(OBSERVED[env][1]) for env, policy in enumerate(policies)), return_exceptions=True
        )
        assert all(isinstance(error, SessionLostError) for error in failed)
        begun = await asyncio.gather(
            *(policy.step(OBSERVED[env][0], episode_start=True) for env, policy in enumerate(policies))
        )
        assert [result.step_index for result in begun] == [0, 0, 0]
        await asyncio.gather(*(policy.close() for policy in policies))


@pytest.mark.parametrize("kind", [RemotePolicy, AsyncRemotePolicy])
def test_another_transport_is_refused(server: ServerProcess, kind: Any) -> None:
    with pytest.raises(ValueError, match="transport"):
        kind(server.address, transport="batch")
