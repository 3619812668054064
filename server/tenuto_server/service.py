"""The gRPC face: every method of the service, on the event loop; nothing here computes.

Steps go through :class:`Intake`; what the methods raise becomes a status in guard.py.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenuto_proto import array_to_wire
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_proto.v1 import policy_pb2_grpc
from tenuto_server.authentication import Authentication
from tenuto_server.batch_queue import Ticket
from tenuto_server.calls import Answer, StepCall
from tenuto_server.durability import Durability, Snapshotter
from tenuto_server.engine import Engine
from tenuto_server.errors import Refusal, session_arriving, session_exists, unknown_session
from tenuto_server.intake import Intake
from tenuto_server.metrics import Metrics
from tenuto_server.policies import PolicyRegistry, ServedPolicy
from tenuto_server.principals import Principal
from tenuto_server.quotas import Quotas
from tenuto_server.sessions import Ended, SessionOptions
from tenuto_server.snapshots import check_fit, unseal, write_snapshots
from tenuto_server.stepper import Stepper
from tenuto_server.stream import StepStream


class PolicyService(policy_pb2_grpc.PolicyServiceServicer):
    """Implements tenuto.v1.PolicyService. The laws are in policy.proto."""

    def __init__(
        self,
        registry: PolicyRegistry,
        stepper: Stepper,
        intake: Intake,
        engine: Engine,
        metrics: Metrics,
        limits: pb.Limits,
        server_epoch: int,
        clock: Callable[[], float],
        authentication: Authentication,
        snapshotter: Snapshotter,
        durability: Durability | None,
    ) -> None:
        """``durability``: None where sessions end with the process. Every method asks ``authentication`` first."""
        self._registry, self._stepper, self._intake = registry, stepper, intake
        self._engine, self._metrics = engine, metrics
        self._limits, self._server_epoch, self._clock = limits, server_epoch, clock
        self._snapshotter, self._durability = snapshotter, durability
        self._authentication, self._authenticate = authentication, authentication.principal
        self._quotas = Quotas(registry, clock)

    # ------------------------------------------------------------------ policies and sessions

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Any) -> pb.GetPolicyResponse:
        """Describe a policy."""
        self._authenticate(context)
        policy = self._registry.find(request.policy_name)
        described = policy.describe(policy.find_version(request.version), self._limits, self._server_epoch)
        described.refused.extend(self._registry.refused.to_wire(policy.name))
        return described

    async def OpenSession(self, request: pb.OpenSessionRequest, context: Any) -> pb.OpenSessionResponse:
        """Lease a slot."""
        principal = self._authenticate(context)
        if self._stepper.draining:
            raise Refusal(pb.DRAINING, "the server is shutting down and opens no session")
        policy = self._registry.find(request.policy_name)
        version = policy.find_version(request.version)
        session_id = request.session_id or secrets.randbits(64) or 1
        await self._fetch(session_id)
        other = self._registry.of_session(session_id, None)
        if other is not None and other is not policy:
            if self._registry.of_session(session_id, principal.name) is None:
                raise session_exists(session_id)
            raise Refusal(pb.SESSION_EXISTS, f"session {session_id}: is, or was, one of policy {other.name!r}")
        seed = request.seed if request.HasField("seed") else session_id
        known = session_id in policy.sessions
        if not known:
            self._quotas.require_session(principal)
        options = SessionOptions(request.version, seed, request.deterministic)
        policy.sessions.open(session_id, options, self._clock(), principal.name)
        if not known:
            self._metrics.sessions_opened.labels(policy.name).inc()
            if self._durability is not None:
                self._durability.begin(session_id)
        return pb.OpenSessionResponse(
            session_id=session_id,
            policy_name=policy.name,
            version=version.version,
            seed=seed,
            server_epoch=self._server_epoch,
            durable=self._durability is not None,
        )

    async def CloseSession(self, request: pb.CloseSessionRequest, context: Any) -> pb.CloseSessionResponse:
        """End a session; its fate is remembered, so that a repeated close gets the same answer."""
        owner = self._authenticate(context).name
        self._intake.end_turn()  # A step that came before is under way.
        await self._fetch_newest(request.session_id)
        policy = self._policy_of(request.session_id, owner)
        sessions = policy.sessions
        ended = sessions.ended(request.session_id, owner)
        if ended is None or ended.reason != pb.SESSION_CLOSED:
            slot = sessions.find(request.session_id, owner)
            under_way: Ticket | None = sessions.ticket[slot]
            reward = request.reward if request.HasField("reward") else np.nan
            ended = self.end_session(policy, slot, pb.SESSION_CLOSED, reward)
            if under_way is not None:
                await under_way.settled()
                ended = sessions.ended(request.session_id, owner) or ended
        return pb.CloseSessionResponse(num_steps=ended.num_steps, num_episodes=ended.num_episodes)

    def end_session(self, policy: ServedPolicy, slot: int, reason: int, last_reward: float = np.nan) -> Ended:
        """End a session and count why; the only place where sessions end."""
        session_id, is_exported = int(policy.sessions.session_id[slot]), bool(policy.sessions.exported[slot])
        ended, finished = policy.sessions.end(slot, reason, last_reward)
        if self._durability is not None and not (
            # Another server may go on with it; a store that nobody writes to forgets it.
            self._durability.is_shared and (is_exported or reason == pb.SESSION_EXPIRED)
        ):
            # With the step that may be under way.
            self._durability.end(session_id, ended.num_steps + 1)
        self._metrics.observe_returns(policy.name, finished)
        label = pb.ErrorReason.Name(reason).removeprefix("SESSION_").lower()
        self._metrics.sessions_ended.labels(policy.name, label).inc()
        return ended

    async def ListSessions(self, request: pb.ListSessionsRequest, context: Any) -> pb.ListSessionsResponse:
        """List open sessions, a page at a time: the caller's own, an admin everybody's."""
        owner = _sees(self._authenticate(context))
        policies = [self._registry.find(request.policy_name)] if request.policy_name else list(self._registry)
        size = min(request.page_size or 100, 1000)
        after = request.after_session_id
        ids = ((i, p) for p in policies for i in p.sessions.session_ids(owner) if i > after or not after)
        found = sorted(ids, key=lambda pair: pair[0])
        page = found[:size]
        return pb.ListSessionsResponse(
            sessions=[self._describe(p, p.sessions.find(i, owner)) for i, p in page], more=len(found) > size
        )

    async def InspectSession(self, request: pb.InspectSessionRequest, context: Any) -> pb.InspectSessionResponse:
        """Read one session's state between two batches; an admin also that of others."""
        owner = _sees(self._authenticate(context))
        await self._fetch_newest(request.session_id)
        policy, slot = self._find(request.session_id, owner)
        generation = policy.sessions.pool.generation[slot]

        def describe(state: dict[str, NDArray[Any]]) -> pb.InspectSessionResponse:
            if policy.sessions.pool.generation[slot] != generation:
                policy.sessions.find(request.session_id, owner)  # Raises what became of it.
            session = self._describe(policy, slot)
            # Before its first step the slot still holds what another session left there.
            untouched = session.next_step_index == 0
            tensors = {k: np.zeros_like(v) if untouched else v for k, v in state.items()}
            return pb.InspectSessionResponse(
                session=session,
                state=[pb.NamedTensor(name=k, tensor=array_to_wire(v)) for k, v in tensors.items()],
            )

        return await self._engine.call_then(lambda: policy.arena.read(slot), describe)

    async def ExportSession(self, request: pb.ExportSessionRequest, context: Any) -> pb.ExportSessionResponse:
        """Stop a session and return it; an admin also that of others."""
        owner = _sees(self._authenticate(context))
        self._intake.end_turn()  # A step that came before is under way.
        await self._fetch_newest(request.session_id)
        policy = self._policy_of(request.session_id, owner)
        sessions = policy.sessions
        slot = sessions.find(request.session_id, owner)
        if sessions.is_arriving(request.session_id):
            raise session_arriving(request.session_id)
        generation, was_exported = sessions.pool.generation[slot], bool(sessions.exported[slot])
        sessions.exported[slot] = True
        try:
            under_way: Ticket | None = sessions.ticket[slot]
            if under_way is not None:
                await under_way.settled()
            if sessions.pool.generation[slot] != generation:
                sessions.find(request.session_id, owner)  # Raises what became of it.
            group = await self._snapshotter.take(policy, np.array([slot]))
            if not len(group):
                sessions.find(request.session_id, owner)
            if not len(group) or not sessions.exported[slot]:
                message = f"session {request.session_id}: was imported while it was exported; try again"
                raise Refusal(pb.STEP_IN_FLIGHT, message)
            [sealed] = write_snapshots(group)
        except BaseException:
            if sessions.pool.generation[slot] == generation:
                sessions.exported[slot] = was_exported
            raise
        return pb.ExportSessionResponse(snapshot=sealed)

    async def ImportSession(self, request: pb.ImportSessionRequest, context: Any) -> pb.ImportSessionResponse:
        """Go on with a session that was exported, here or elsewhere. It is the caller's, whosever it was."""
        principal = self._authenticate(context)
        if self._stepper.draining:
            raise Refusal(pb.DRAINING, "the server is shutting down and takes no session over")
        snapshot = unseal(request.snapshot)
        session_id = snapshot.session_id
        await self._fetch(session_id)
        policy = self._registry.of_session(session_id, principal.name)
        if policy is not None and policy.name == snapshot.policy_name and session_id in policy.sessions:
            slot = policy.sessions.slot_of(session_id)
            if snapshot.next_step_index == policy.sessions.next_index[slot]:
                # It is here as it is there: the export is taken back, or this is the same import again.
                check_fit(snapshot, policy)
                if policy.sessions.is_arriving(session_id):
                    raise session_arriving(session_id)
                policy.sessions.exported[slot] = False
                return self._imported(policy, slot)
        admit = partial(self._admit_import, principal, snapshot)
        policy, slot = await self._snapshotter.adopt(request.snapshot, principal.name, admit=admit)
        self._metrics.sessions_opened.labels(policy.name).inc()
        return self._imported(policy, slot)

    def _admit_import(self, principal: Principal, snapshot: pb.SessionSnapshot) -> None:
        """Raise Refusal where a session that is, or was, here keeps it from coming, or the caller has too many."""
        if self._stepper.draining:
            raise Refusal(pb.DRAINING, "the server is shutting down and takes no session over")
        session_id = snapshot.session_id
        policy = self._registry.of_session(session_id, None)
        if policy is not None and self._registry.of_session(session_id, principal.name) is None:
            raise session_exists(session_id)
        if policy is not None and policy.name != snapshot.policy_name:
            raise Refusal(pb.SESSION_EXISTS, f"session {session_id}: is, or was, one of policy {policy.name!r}")
        if policy is None or session_id not in policy.sessions:
            self._quotas.require_session(principal)
        elif not policy.sessions.is_older_copy(session_id, snapshot.next_step_index):
            raise Refusal(pb.SESSION_EXISTS, f"session {session_id}: exists, and has taken other steps")

    def _imported(self, policy: ServedPolicy, slot: int) -> pb.ImportSessionResponse:
        session_id = int(policy.sessions.session_id[slot])
        return pb.ImportSessionResponse(
            session_id=session_id,
            next_step_index=int(policy.sessions.next_index[slot]),
            server_epoch=self._server_epoch,
            durable=self._durability is not None,
        )

    async def _fetch(self, session_id: int) -> None:
        """Look in the store for a session that is not here. Raises Refusal."""
        durability = self._durability
        if durability is None or not durability.has_more:
            return
        policy = self._registry.of_session(session_id, None)
        if policy is None or policy.sessions.expired(session_id) is not None:
            await durability.fetch([session_id])

    async def _fetch_newest(self, session_id: int) -> None:
        """Look in a store that is shared for what another server has made of a session, also of one that is here.

        Raises Refusal where the store does not answer and the session is not here.
        """
        if self._durability is None or not self._durability.is_shared:
            return await self._fetch(session_id)
        try:
            return await self._durability.fetch([session_id])
        except Refusal as refusal:
            if refusal.reason != pb.STORE_UNAVAILABLE or self._registry.of_session(session_id, None) is None:
                raise

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
            principal=s.owner_name(slot),
            durable_step=max(0, int(s.durable_index[slot])),
            exported=bool(s.exported[slot]),
        )

    def _find(self, session_id: int, owner: str | None) -> tuple[ServedPolicy, int]:
        """Find an open session and its slot: a principal's, or anybody's for None, which :func:`_sees` makes of an
        admin. Raises Refusal (SESSION_UNKNOWN, _CLOSED, _EXPIRED); one of somebody else is unknown.
        """
        policy = self._policy_of(session_id, owner)
        return policy, policy.sessions.find(session_id, owner)

    def _policy_of(self, session_id: int, owner: str | None) -> ServedPolicy:
        """Find the policy of a principal's session, of anybody's for None. Raises Refusal (SESSION_UNKNOWN)."""
        policy = self._registry.of_session(session_id, owner)
        if policy is None:
            raise unknown_session(session_id, self._server_epoch)
        return policy

    # ------------------------------------------------------------------ steps

    async def Step(self, request: pb.StepRequest, context: Any) -> pb.StepResponse:
        """Advance one session: a batch of one row, answered with a status of its own."""
        return await self._step("Step", request, context)

    async def StepBatch(self, request: pb.StepBatchRequest, context: Any) -> pb.StepBatchResponse:
        """Advance many sessions; each row fails or succeeds alone."""
        return await self._step("StepBatch", request, context)

    async def StepStream(self, request_iterator: AsyncIterator[pb.StepBatchRequest], context: Any) -> None:
        """Answer StepBatch messages as they finish. Everything under way is cancelled when the client vanishes."""
        with self._authentication.stream(context) as caller:
            party = _party(caller.principal, context)

            def begin(request: pb.StepBatchRequest, answer: Callable[[Answer | Exception], None]) -> StepCall:
                return self._begin(caller.principal, party, "StepStream", None, request, answer)

            await StepStream(context, begin, self._stepper.leave, self._metrics).run()

    async def _step(self, rpc: str, request: pb.StepRequest | pb.StepBatchRequest, context: Any) -> Any:
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        principal = self._authenticate(context)
        party, remaining_s = _party(principal, context), context.time_remaining()
        call = self._begin(principal, party, rpc, remaining_s, request, partial(_resolve, answered))
        try:
            return await answered
        except asyncio.CancelledError:
            self._stepper.leave(call)
            raise

    def _begin(
        self,
        principal: Principal,
        party: str,
        rpc: str,
        remaining_s: float | None,
        request: pb.StepRequest | pb.StepBatchRequest,
        answer: Callable[[Answer | Exception], None],
    ) -> StepCall:
        """Send a request on its way. ``remaining_s``: of the call's own deadline.

        What there is no time or no room for is refused before anything of it is looked at: refusing must cost less than
        serving. Raises Refusal.
        """
        timeout_s = self._limits.queue_timeout_s
        if remaining_s is not None:
            timeout_s = min(timeout_s, remaining_s)
        if isinstance(request, pb.StepBatchRequest) and request.queue_timeout_ms:
            timeout_s = min(timeout_s, request.queue_timeout_ms / 1000)
        now_s = self._clock()
        num_rows = len(request.session_ids) if isinstance(request, pb.StepBatchRequest) else 1
        if timeout_s <= 0:
            message = "the step's deadline had passed when it arrived; it was not applied"
            raise Refusal(pb.QUEUE_TIMEOUT, message, num_rows=num_rows)
        if num_rows <= self._limits.max_batch_rows:
            self._stepper.batcher.queue.require_room(num_rows, party, timeout_s)
            self._quotas.take_steps(principal, num_rows)
        call = StepCall(rpc, request, now_s, now_s + timeout_s, answer, num_rows, principal, party)
        self._intake.take(call)
        return call


def _party(principal: Principal, context: Any) -> str:
    """Whose steps these are in the queue. Without names a host stands for whoever calls from it: not a connection, or
    who opens more of them would get more.
    """
    return principal.name or context.peer().rpartition(":")[0]


def _sees(principal: Principal) -> str | None:
    """Whose sessions a principal may look at, as find() and session_ids() take it: its own, an admin everybody's."""
    return None if principal.is_admin else principal.name


def _resolve(answered: asyncio.Future[Answer], outcome: Answer | Exception) -> None:
    if answered.done():  # Its call was cancelled and is about to leave.
        return
    if isinstance(outcome, Exception):
        answered.set_exception(outcome)
    else:
        answered.set_result(outcome)
