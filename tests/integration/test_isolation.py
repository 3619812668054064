"""Whatever is cancelled, retried, closed and reloaded at once: no session ever sees another's state.

Every session's actions and values must equal a replay of its own observations by itself. The seed of the storm is
printed on failure, though its timing is the machine's.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from serving import OBSERVATIONS, ServerProcess, publish, small_policy, wait_until
from tenuto_models import Policy
from tenuto_proto import array_from_wire
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_proto.v1 import policy_pb2_grpc
from wire import CODEC, replay

STEPS = 60
RETRIED = {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED}


@dataclass
class Life:
    """One session's history as its client saw it."""

    session_id: int
    observed: list[tuple[Any, bool]] = field(default_factory=list[Any])
    replies: list[tuple[int, int, float]] = field(default_factory=list[Any])
    """(version, action, value) of every step whose reply arrived."""

    def check(self, versions: dict[int, Policy]) -> None:
        steps = [(o, start, versions[v]) for (o, start), (v, _, _) in zip(self.observed, self.replies, strict=False)]
        expected = list(replay(steps, seed=self.session_id))
        assert [a for _, a, _ in self.replies] == [a for a, _ in expected]
        np.testing.assert_allclose([v for _, _, v in self.replies], [v for _, v in expected], atol=1e-4)
        episode = 0
        for (_, start), (version, _, _) in zip(self.observed, self.replies, strict=False):
            episode = version if start or not episode else episode
            assert version == episode, "the version changed within an episode"


class Storm:
    """Clients of all kinds that misbehave, on one event loop."""

    def __init__(self, stub: Any, policy: str, seed: int) -> None:
        self.stub, self.policy, self.random = stub, policy, random.Random(seed)
        self.lives: list[Life] = []
        self.samples = np.random.default_rng(seed)

    async def open(self) -> Life:
        while True:
            session_id = self.random.getrandbits(64) or 1
            try:
                await self.stub.OpenSession(pb.OpenSessionRequest(session_id=session_id, policy_name=self.policy))
            except grpc.RpcError as error:
                assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                await asyncio.sleep(0)
                continue
            self.lives.append(Life(session_id))
            return self.lives[-1]

    def observe(self, life: Life) -> tuple[Any, bool]:
        observation = (self.samples.uniform(-1, 1, 3).astype(np.float32), int(self.samples.integers(4)))
        life.observed.append((observation, not life.replies or self.random.random() < 0.08))
        return life.observed[-1]

    async def close(self, life: Life) -> None:
        await self.stub.CloseSession(pb.CloseSessionRequest(session_id=life.session_id))

    async def single(self) -> None:
        """One session after another over unary Step, with deadlines that often pass and calls cancelled at will."""
        life = await self.open()
        for _ in range(STEPS):
            observation, start = self.observe(life)
            request = pb.StepRequest(
                session_id=life.session_id,
                step_index=len(life.replies),
                episode_start=start,
                observation=CODEC.pack(observation),
                outputs=pb.Outputs(value=True),
            )
            while True:
                call = self.stub.Step(request, timeout=self.random.choice([0.0005, 0.003, 5.0]))
                if self.random.random() < 0.15:
                    asyncio.get_running_loop().call_later(self.random.uniform(0, 0.004), call.cancel)
                try:
                    reply = await call
                except (grpc.RpcError, asyncio.CancelledError) as error:
                    assert isinstance(error, asyncio.CancelledError) or error.code() in RETRIED, error
                    continue
                life.replies.append((reply.version, int(array_from_wire(reply.action)), reply.value))
                break
            if self.random.random() < 0.04:
                if self.random.random() < 0.5:  # Close while a step is under way; its reply is of no interest.
                    observation, start = self.observe(life)
                    request.step_index = len(life.replies)
                    abandoned = self.stub.Step(request)
                    await self.close(life)
                    abandoned.cancel()
                else:
                    await self.close(life)
                life = await self.open()
        await self.close(life)

    async def vector(self, rpc: str) -> None:
        """Several sessions at once over StepBatch or StepStream, rows retried until each has its reply."""
        lives = [await self.open() for _ in range(6)]
        for _ in range(STEPS):
            waiting = {life.session_id: (life, *self.observe(life)) for life in lives}
            while waiting:
                rows = list(waiting.values())
                stacked = tuple(np.stack(column) for column in zip(*(o for _, o, _ in rows), strict=True))
                request = pb.StepBatchRequest(
                    session_ids=[life.session_id for life, _, _ in rows],
                    step_indices=[len(life.replies) for life, _, _ in rows],
                    episode_starts=[start for _, _, start in rows],
                    observations=CODEC.pack(stacked, len(rows)),
                    outputs=pb.Outputs(value=True),
                    queue_timeout_ms=self.random.choice([0, 1, 5]),
                )
                response = await self._send(rpc, request)
                if response is None:
                    continue
                failed = {e.row: e.error.code for e in response.errors}
                assert {grpc.StatusCode(_status(c)) for c in failed.values()} <= RETRIED, response.errors
                actions, values = array_from_wire(response.actions), array_from_wire(response.values)
                for row, (life, _, _) in enumerate(rows):
                    if row not in failed:
                        life.replies.append((response.versions[row], int(actions[row]), float(values[row])))
                        del waiting[life.session_id]
        for life in lives:
            await self.close(life)

    async def _send(self, rpc: str, request: pb.StepBatchRequest) -> pb.StepBatchResponse | None:
        """The reply, or None where the call was given up in mid-step."""

        async def once() -> AsyncIterator[pb.StepBatchRequest]:
            yield request

        call = self.stub.StepStream(once()) if rpc == "StepStream" else self.stub.StepBatch(request)
        if self.random.random() < 0.2:
            asyncio.get_running_loop().call_later(self.random.uniform(0, 0.004), call.cancel)
        try:
            return await call if rpc == "StepBatch" else await call.read()
        except (grpc.RpcError, asyncio.CancelledError):
            return None


def _status(code: int) -> Any:
    return next(s.value for s in grpc.StatusCode if s.value[0] == code)


async def publisher(repository: Path, memory: str, versions: dict[int, Policy], done: asyncio.Event) -> None:
    """Publish one version after another until the storm is over."""
    while not done.is_set():
        number = max(versions) + 1
        versions[number] = small_policy(memory, OBSERVATIONS, seed=number)
        await asyncio.to_thread(publish, repository, versions[number], "policy", number)
        try:
            await asyncio.wait_for(done.wait(), 0.15)
        except asyncio.TimeoutError:
            continue


@pytest.mark.parametrize("memory", ["dnc", "frameconv"])
async def test_no_session_ever_sees_anothers_state(tmp_path: Path, memory: str) -> None:
    versions = {1: small_policy(memory, seed=1)}
    publish(tmp_path, versions[1])
    # Steps that wait for company are there to be cancelled; without, they would be over too soon.
    flags = ("--capacity", "40", "--max-batch", "16", "--max-wait-ms", "2", "--idle-timeout-s", "60")
    with ServerProcess(tmp_path, *flags) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            storm, done = Storm(policy_pb2_grpc.PolicyServiceStub(channel), "policy", seed=0), asyncio.Event()
            publishing = asyncio.create_task(publisher(tmp_path, memory, versions, done))
            clients = [storm.single() for _ in range(12)] + [storm.vector(r) for r in ("StepBatch", "StepStream")]
            try:
                await asyncio.wait_for(asyncio.gather(*clients), 150)
            finally:
                done.set()
                await publishing
        for life in storm.lives:
            life.check(versions)
        replies = sum(len(life.replies) for life in storm.lives)
        assert replies == STEPS * (12 + 2 * 6)
        assert len({v for life in storm.lives for v, _, _ in life.replies}) >= 3, "no reload happened in the storm"
        assert server.metric('tenuto_requests_total{code="CANCELLED"}') > 20, "nothing was cancelled in the storm"
        wait_until(lambda: server.metric('tenuto_sessions{policy="policy"}') == 0, "the gauge to follow")
        applied = server.metric('tenuto_steps_total{policy="policy"}')
        assert applied <= sum(len(life.observed) for life in storm.lives)
        assert not any("Traceback" in line for line in server.log)
