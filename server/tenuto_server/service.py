"""The gRPC face: checks requests against the served policy (station 2) and writes replies (station 8).

Every method runs on the event loop; nothing here computes. Refusals become statuses in one interceptor.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from tenuto_proto import WireError, array_to_wire
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_proto.v1 import policy_pb2_grpc
from tenuto_server.arena import Slots
from tenuto_server.batcher import Ticket
from tenuto_server.engine import Engine
from tenuto_server.errors import Refusal
from tenuto_server.interceptor import as_refusal
from tenuto_server.metrics import Metrics
from tenuto_server.policies import PolicyRegistry, ServedPolicy
from tenuto_server.sessions import Ended, SessionOptions
from tenuto_server.stepper import StepColumns, Stepper

log = logging.getLogger(__name__)
_MAX_INLINE_FLOATS = 65_536
"""Flattened floats of a request that are checked on the event loop: some hundred microseconds."""
MAX_STREAM_REQUESTS = 32
"""Requests of one stream that are under way at once; the server reads no further until one is answered."""


class PolicyService(policy_pb2_grpc.PolicyServiceServicer):
    """Implements tenuto.v1.PolicyService. The laws are in policy.proto."""

    def __init__(
        self,
        registry: PolicyRegistry,
        stepper: Stepper,
        engine: Engine,
        metrics: Metrics,
        limits: pb.Limits,
        server_epoch: int,
        clock: Callable[[], float],
    ) -> None:
        self._registry, self._stepper, self._engine, self._metrics = registry, stepper, engine, metrics
        self._limits, self._server_epoch, self._clock = limits, server_epoch, clock

    # ------------------------------------------------------------------ policies and sessions

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Any) -> pb.GetPolicyResponse:
        """Describe a policy."""
        policy = self._registry.find(request.policy_name)
        described = policy.describe(policy.find_version(request.version), self._limits, self._server_epoch)
        described.refused.extend(self._registry.refused.to_wire(policy.name))
        return described

    async def OpenSession(self, request: pb.OpenSessionRequest, context: Any) -> pb.OpenSessionResponse:
        """Lease a slot."""
        if self._stepper.draining:
            raise Refusal(pb.DRAINING, "the server is shutting down and opens no session")
        policy = self._registry.find(request.policy_name)
        version = policy.find_version(request.version)
        session_id = request.session_id or secrets.randbits(64) or 1
        owner = self._registry.of_session(session_id)
        if owner is not None and owner is not policy:
            raise Refusal(pb.SESSION_EXISTS, f"session {session_id}: is, or was, one of policy {owner.name!r}")
        seed = request.seed if request.HasField("seed") else session_id
        known = session_id in policy.sessions
        policy.sessions.open(session_id, SessionOptions(request.version, seed, request.deterministic), self._clock())
        if not known:
            self._metrics.sessions_opened.labels(policy.name).inc()
        return pb.OpenSessionResponse(
            session_id=session_id,
            policy_name=policy.name,
            version=version.version,
            seed=seed,
            server_epoch=self._server_epoch,
        )

    async def CloseSession(self, request: pb.CloseSessionRequest, context: Any) -> pb.CloseSessionResponse:
        """End a session; its fate is remembered, so that a repeated close gets the same answer."""
        policy = self._policy_of(request.session_id)
        sessions = policy.sessions
        ended = sessions.ended(request.session_id)
        if ended is None or ended.reason != pb.SESSION_CLOSED:
            slot = sessions.find(request.session_id)
            under_way: Ticket | None = sessions.ticket[slot]
            reward = request.reward if request.HasField("reward") else np.nan
            ended = self.end_session(policy, slot, pb.SESSION_CLOSED, reward)
            if under_way is not None:
                await under_way.join()
                ended = sessions.ended(request.session_id) or ended
        return pb.CloseSessionResponse(num_steps=ended.num_steps, num_episodes=ended.num_episodes)

    def end_session(self, policy: ServedPolicy, slot: int, reason: int, last_reward: float = np.nan) -> Ended:
        """End a session and count why; the only place where sessions end."""
        ended, finished = policy.sessions.end(slot, reason, last_reward)
        self._metrics.observe_returns(policy.name, finished)
        label = pb.ErrorReason.Name(reason).removeprefix("SESSION_").lower()
        self._metrics.sessions_ended.labels(policy.name, label).inc()
        return ended

    async def ListSessions(self, request: pb.ListSessionsRequest, context: Any) -> pb.ListSessionsResponse:
        """List open sessions, a page at a time."""
        policies = [self._registry.find(request.policy_name)] if request.policy_name else list(self._registry)
        size = min(request.page_size or 100, 1000)
        after = request.after_session_id
        found = sorted((i, p) for p in policies for i in p.sessions.session_ids() if i > after or not after)
        page = found[:size]
        return pb.ListSessionsResponse(
            sessions=[self._describe(p, p.sessions.find(i)) for i, p in page], more=len(found) > size
        )

    async def InspectSession(self, request: pb.InspectSessionRequest, context: Any) -> pb.InspectSessionResponse:
        """Read one session's state between two batches."""
        policy = self._policy_of(request.session_id)
        slot = policy.sessions.find(request.session_id)
        generation = policy.sessions.pool.generation[slot]

        def describe(state: dict[str, NDArray[Any]]) -> pb.InspectSessionResponse:
            if policy.sessions.pool.generation[slot] != generation:
                policy.sessions.find(request.session_id)  # Raises what became of it.
            session = self._describe(policy, slot)
            # Before its first step the slot still holds what another session left there.
            untouched = session.next_step_index == 0
            tensors = {k: np.zeros_like(v) if untouched else v for k, v in state.items()}
            return pb.InspectSessionResponse(
                session=session,
                state=[pb.NamedTensor(name=k, tensor=array_to_wire(v)) for k, v in tensors.items()],
            )

        return await self._engine.call_then(lambda: policy.arena.read(slot), describe)

    def _describe(self, policy: ServedPolicy, slot: int) -> pb.Session:
        s = policy.sessions
        return pb.Session(
            session_id=int(s.session_id[slot]),
            policy_name=policy.name,
            version=int(s.version[slot]),
            next_step_index=int(s.next_index[slot]),
            num_episodes=int(s.num_episodes[slot]),
            episode_return=float(s.episode_return[slot]),
            idle_s=max(0.0, self._clock() - float(s.last_active_s[slot])),
            deterministic=bool(s.deterministic[slot]),
            seed=int(s.seed[slot]),
        )

    def _policy_of(self, session_id: int) -> ServedPolicy:
        policy = self._registry.of_session(session_id)
        if policy is None:
            raise self._unknown(session_id)
        return policy

    def _unknown(self, session_id: int) -> Refusal:
        message = f"session {session_id}: never opened here, or ended long ago"
        return Refusal(pb.SESSION_UNKNOWN, message, {"server_epoch": str(self._server_epoch)})

    # ------------------------------------------------------------------ steps

    async def Step(self, request: pb.StepRequest, context: Any) -> pb.StepResponse:
        """Advance one session: a batch of one row, answered with a status of its own."""
        began_s = self._clock()
        policy = self._policy_of(request.session_id)
        flat, refused = await _checked(policy, request.observation, None)
        for refusal in refused.values():
            raise refusal
        columns = StepColumns(
            np.array([request.session_id], np.uint64),
            np.array([request.step_index], np.uint64),
            np.array([request.episode_start], np.bool_),
            np.array([request.reward if request.HasField("reward") else np.nan], np.float32),
            flat,
            {},
        )
        self._metrics.station["check"].observe(self._clock() - began_s)
        slots, failed = await self._stepper.advance(policy, columns, self._queue_timeout_s(context.time_remaining()))
        if failed:
            raise failed[0]
        replied_s, slot, replies = self._clock(), int(slots[0]), policy.replies
        response = pb.StepResponse(
            step_index=request.step_index,
            version=int(replies.version[slot]),
            action=array_to_wire(np.asarray(replies.action[slot])),
            timings=_timings(policy, slots),
        )
        if request.outputs.value:
            response.value = float(replies.value[slot])
        if request.outputs.log_prob:
            response.log_prob = float(replies.log_prob[slot])
        if request.outputs.logits:
            response.logits.CopyFrom(array_to_wire(replies.logits[slot]))
        self._observe_reply("Step", began_s, replied_s)
        return response

    async def StepBatch(self, request: pb.StepBatchRequest, context: Any) -> pb.StepBatchResponse:
        """Advance many sessions; each row fails or succeeds alone."""
        return await self._step_batch("StepBatch", request, context.time_remaining())

    async def StepStream(
        self, request_iterator: AsyncIterator[pb.StepBatchRequest], context: Any
    ) -> AsyncIterator[pb.StepBatchResponse]:
        """Answer StepBatch messages as they finish. Everything under way is cancelled when the client vanishes.

        A request holds its room until its answer is on the wire, so a client that does not read is not read from.
        """
        answers: asyncio.Queue[pb.StepBatchResponse | Exception | None] = asyncio.Queue()
        room = asyncio.Semaphore(MAX_STREAM_REQUESTS)

        async def answer(request: pb.StepBatchRequest) -> None:
            answers.put_nowait(await self._answer_in_stream(request))

        async def read() -> None:
            end: Exception | None = None
            await room.acquire()
            try:
                async for request in request_iterator:
                    task = asyncio.create_task(answer(request))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    await room.acquire()
            except Exception as error:  # noqa: BLE001 (a message that is none; whatever it was, the client must hear of it)
                end = error
            while tasks:
                await asyncio.wait(tasks)
            answers.put_nowait(end)

        tasks: set[asyncio.Task[None]] = set()
        reader = asyncio.create_task(read())
        try:
            while (response := await answers.get()) is not None:
                if isinstance(response, Exception):
                    self._metrics.count_request("StepStream", "INVALID_ARGUMENT")
                    message = f"a message of the stream cannot be read: {type(response).__name__}"
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
                else:
                    yield response
                    room.release()
        finally:
            for task in (reader, *tasks):
                task.cancel()

    async def _answer_in_stream(self, request: pb.StepBatchRequest) -> pb.StepBatchResponse:
        rpc = "StepStream"
        try:
            response = await self._step_batch(rpc, request, None)
            self._metrics.count_request(rpc, "OK")
            return response
        except asyncio.CancelledError:
            self._metrics.count_request(rpc, "CANCELLED")
            raise
        except (Refusal, WireError) as error:
            refusal = as_refusal(error)
            self._metrics.count_request(rpc, refusal.code.name)
            self._metrics.refusals.labels(refusal.reason_name).inc(refusal.num_rows)
            return pb.StepBatchResponse(request_id=request.request_id, error=refusal.to_wire())
        except Exception:
            log.exception("a StepStream request failed")
            self._metrics.count_request(rpc, "INTERNAL")
            failure = pb.Error(code=grpc.StatusCode.INTERNAL.value[0], message="internal error")
            return pb.StepBatchResponse(request_id=request.request_id, error=failure)

    async def _step_batch(
        self, rpc: str, request: pb.StepBatchRequest, remaining_s: float | None
    ) -> pb.StepBatchResponse:
        began_s = self._clock()
        ids = np.array(request.session_ids, np.uint64)
        n = len(ids)
        self._check_columns(request, n)
        policy = next((p for i in ids.tolist() if (p := self._registry.of_session(i)) is not None), None)
        if policy is None:
            return self._reply_batch(
                request, None, np.zeros(n, np.int64), {r: self._unknown(int(i)) for r, i in enumerate(ids)}
            )
        flat, refused = await _checked(policy, request.observations, n)
        if len(self._registry) > 1:
            refused |= self._rows_of_others(policy, ids)
        columns = StepColumns(
            ids,
            np.array(request.step_indices, np.uint64),
            np.array(request.episode_starts, np.bool_) if request.episode_starts else np.zeros(n, np.bool_),
            np.array(request.rewards, np.float32) if request.rewards else np.full(n, np.nan, np.float32),
            flat,
            refused,
        )
        self._metrics.station["check"].observe(self._clock() - began_s)
        timeout_s = self._queue_timeout_s(remaining_s)
        if request.queue_timeout_ms:
            timeout_s = min(timeout_s, request.queue_timeout_ms / 1000)
        slots, failed = await self._stepper.advance(policy, columns, timeout_s)
        replied_s = self._clock()
        response = self._reply_batch(request, policy, slots, failed)
        self._observe_reply(rpc, began_s, replied_s)
        return response

    def _check_columns(self, request: pb.StepBatchRequest, n: int) -> None:
        if n == 0:
            raise Refusal(pb.BATCH_EMPTY, "session_ids: got none, expected at least one")
        if n > self._limits.max_batch_rows:
            raise Refusal(pb.BATCH_TOO_LARGE, f"rows: got {n}, expected at most {self._limits.max_batch_rows}")
        columns: tuple[tuple[str, Sequence[Any], bool], ...] = (
            ("step_indices", request.step_indices, True),
            ("episode_starts", request.episode_starts, False),
            ("rewards", request.rewards, False),
        )
        for name, column, needed in columns:
            if len(column) != n and (needed or len(column) > 0):
                raise Refusal(pb.BATCH_COLUMNS, f"{name}: got {len(column)}, expected {n}, as many as session_ids")

    def _rows_of_others(self, policy: ServedPolicy, ids: NDArray[np.uint64]) -> dict[int, Refusal]:
        refused: dict[int, Refusal] = {}
        for row, session_id in enumerate(ids.tolist()):
            owner = self._registry.of_session(session_id)
            if owner is not None and owner is not policy:
                message = f"session {session_id}: got one of policy {owner.name!r}, expected {policy.name!r}"
                refused[row] = Refusal(pb.POLICY_MISMATCH, message)
        return refused

    def _reply_batch(
        self, request: pb.StepBatchRequest, policy: ServedPolicy | None, slots: Slots, failed: dict[int, Refusal]
    ) -> pb.StepBatchResponse:
        response = pb.StepBatchResponse(request_id=request.request_id)
        for row in sorted(failed):
            self._metrics.refusals.labels(failed[row].reason_name).inc()
            response.errors.append(pb.RowError(row=row, error=failed[row].to_wire()))
        if policy is None:
            response.versions.extend([0] * len(slots))
            return response
        bad = sorted(failed)

        def column(stored: NDArray[Any]) -> NDArray[Any]:
            values = stored[slots]
            values[bad] = 0
            return values

        replies = policy.replies
        response.versions.extend(column(replies.version).tolist())
        response.actions.CopyFrom(array_to_wire(column(replies.action)))
        if request.outputs.value:
            response.values.CopyFrom(array_to_wire(column(replies.value)))
        if request.outputs.log_prob:
            response.log_probs.CopyFrom(array_to_wire(column(replies.log_prob)))
        if request.outputs.logits:
            response.logits.CopyFrom(array_to_wire(column(replies.logits)))
        good = np.delete(slots, bad)
        if len(good):
            response.timings.CopyFrom(_timings(policy, good))
        return response

    def _queue_timeout_s(self, remaining_s: float | None) -> float:
        most = self._limits.queue_timeout_s
        return most if remaining_s is None else min(most, remaining_s)

    def _observe_reply(self, rpc: str, began_s: float, replied_s: float) -> None:
        now_s = self._clock()
        self._metrics.station["reply"].observe(now_s - replied_s)
        self._metrics.step[rpc].observe(now_s - began_s)


async def _checked(
    policy: ServedPolicy, tensors: Sequence[pb.NamedTensor], num_rows: int | None
) -> tuple[NDArray[np.float32], dict[int, Refusal]]:
    """Check and flatten observations: ``(float32 [n, O], refused rows)``; large ones on a thread, not on the loop."""

    def check() -> tuple[NDArray[np.float32], dict[int, Refusal]]:
        rows = policy.codec.unpack(tensors, num_rows)
        refused = {row: as_refusal(error) for row, error in policy.codec.refused_rows(rows).items()}
        return policy.codec.flatten(rows, refused), refused

    if policy.codec.flat_size * (num_rows or 1) <= _MAX_INLINE_FLOATS:
        return check()
    return await asyncio.to_thread(check)


def _timings(policy: ServedPolicy, slots: Slots) -> pb.Timings:
    """Timings of a reply: those of its slowest row."""
    replies = policy.replies
    return pb.Timings(
        queue_us=int(replies.queue_us[slots].max()),
        compute_us=int(replies.compute_us[slots].max()),
        batch_size=int(replies.batch_size[slots].max()),
    )
