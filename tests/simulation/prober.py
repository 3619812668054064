"""A client that speaks the contract by hand: it keeps the rules itself and asks for what breaks them.

It is written from policy.proto alone, so that the production client is not what the server is measured with.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable
from typing import Any

import grpc
import numpy as np

from simulation import laws
from simulation.clients import Client
from simulation.laws import Chain, reason_of
from simulation.rolling import observe
from tenuto_client.errors import ReplayMismatchError
from tenuto_proto import array_from_wire, array_to_wire
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_proto.v1.policy_pb2_grpc import PolicyServiceStub

_PASSES = {"", "QUEUE_FULL", "QUEUE_TIMEOUT", "STEP_IN_FLIGHT", "DRAINING", "STORE_UNAVAILABLE", "COMPUTE_FAILED",
           "QUOTA_EXCEEDED", "CAPACITY_REACHED", "POLICY_UNKNOWN", "VERSION_UNKNOWN"}  # fmt: skip
"""Refusals that faults explain; "" is a connection that failed."""


class Refused(Exception):
    """How a call has ended, if not with its reply."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        super().__init__(f"{error.code().name} {error.details()}")
        self.code, self.reason = error.code(), reason_of(error.trailing_metadata() or ())
        self.details = str(error.details())


def _request(session_id: int, index: int, seen: tuple[int, int], begins: bool, replayed: int = 0) -> pb.StepRequest:
    tensor = pb.NamedTensor(name="observation", tensor=array_to_wire(observe(*seen)))
    return pb.StepRequest(
        session_id=session_id, step_index=index, episode_start=begins, observation=[tensor],
        outputs=pb.Outputs(value=True, log_prob=True, logits=True), replayed_version=replayed,
    )  # fmt: skip


class Prober(Client):
    """One session after another."""

    def __init__(self, world: Any, name: str) -> None:
        super().__init__(world, name)
        self._channel: Any = None
        self._stub: Any = None
        self._chain: Chain | None = None
        self._plan: deque[tuple[tuple[int, int], bool]] = deque()
        """The next steps, where they are known already."""
        self._sent: list[tuple[tuple[int, int], bool, pb.StepResponse]] = []
        """All steps of the session, and their replies."""

    def chains(self) -> Iterable[Chain]:
        return () if self._chain is None else (self._chain,)

    async def play(self) -> None:
        self._channel = self.world.network.channel(self.address)
        self._stub = PolicyServiceStub(self._channel)
        while not self.is_last:
            await self._step()
            if self.rng.random() < 0.2:
                probe = self.rng.choice(
                    (self._repeat, self._skip, self._trespass, self._spoil, self._inspect, self._double, self._list,
                     self._again, self._travel, self._leave)
                )  # fmt: skip
                self.world.count(f"probe {probe.__name__[1:]}")
                await probe()
            elif self.rng.random() < 0.02:
                await self._close()
            await self.think()
        for _ in range(3):
            await self._step()

    async def close(self) -> None:
        await self._close()
        await self._channel.close()

    # ------------------------------------------------------------------ calls

    async def _call(self, method: str, request: Any) -> Any:
        """One call. Raises Refused."""
        metadata = () if self.token is None else (("authorization", f"Bearer {self.token}"),)
        try:
            return await getattr(self._stub, method)(request, timeout=self.rng.choice((0.3, 2.0)), metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise Refused(error) from None

    async def _insist(self, method: str, request: Any) -> Any:
        """A call until it is answered with something else than a fault."""
        while True:
            try:
                return await self._call(method, request)
            except Refused as refused:
                if refused.reason not in _PASSES:
                    raise
                if not refused.reason and refused.code not in (
                    grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED,
                ):  # fmt: skip
                    self._wrong(laws.ERROR, f"{method}: {refused}")
                    raise
            await asyncio.sleep(self.rng.random() * 0.1)

    def _wrong(self, law: str, text: str) -> None:
        self.world.laws.broken(law, f"{self.name}: {text}")

    # ------------------------------------------------------------------ the steps

    async def _open(self, chain: Chain) -> bool:
        """Open, perhaps again. Returns whether that was possible."""
        request = pb.OpenSessionRequest(session_id=chain.session_id, seed=chain.seed, deterministic=chain.greedy)
        try:
            await self._insist("OpenSession", request)
        except Refused as refused:
            if refused.reason == "SESSION_EXISTS" and chain.index:
                return False
            self._wrong(laws.ERROR, f"OpenSession: {refused}")
        return True

    async def _step(self) -> None:
        num_downs = self.world.num_downs
        if self._chain is None:
            ids = self.rng.getrandbits(63) + 1, self.rng.getrandbits(60)
            born_s = self.world.loop.now_s
            self._chain, self._sent = Chain(*ids, self.rng.random() < 0.5, num_downs=num_downs, born_s=born_s), []
            await self._open(self._chain)
        chain = self._chain
        seen, begins = self._plan.popleft() if self._plan else (self.seen(), self.begins())
        since_s = self.world.loop.now_s
        while True:
            try:
                reply = await self._insist("Step", _request(chain.session_id, chain.index, seen, begins))
            except Refused as refused:
                if not await self._mend(chain, refused):
                    self._chain = None
                    return
            else:
                break
        action = int(array_from_wire(reply.action))
        durable = reply.durable_step if self.world.is_durable else None
        begins = begins or not chain.index
        self.world.laws.stepped(
            chain, seen, begins, since_s, index=reply.step_index, version=reply.version, action=action,
            value=reply.value, durable=durable,
        )  # fmt: skip
        self._sent.append((seen, begins, reply))

    async def _mend(self, chain: Chain, refused: Refused) -> bool:
        """Send again what a restart has undone. Returns whether the session goes on."""
        world, expected = self.world, -1
        if refused.reason == "STEP_INDEX_MISMATCH" and "overtaken" not in refused.details:
            expected = int(refused.details.rpartition(" ")[2])
        elif refused.reason == "SESSION_UNKNOWN":
            if not world.is_durable or world.may_lose(chain, refused):
                world.laws.lost(chain, refused)
                return False
            if chain.durable:
                self._wrong(laws.LOST, f"session {chain.session_id}, {chain.durable} steps durable: {refused}")
            if await self._open(chain):
                expected = 0
            else:
                return True
        elif refused.reason == "SESSION_EXPIRED":
            world.laws.lost(chain, refused)
            return False
        elif refused.reason == "SESSION_EXPORTED":
            # A request to export it came late.
            await self._thaw(chain)
            return True
        if not 0 <= expected < max(chain.index, 1):
            if "overtaken" not in refused.details:
                self._wrong(laws.ORDER, f"session {chain.session_id} at step {chain.index}: {refused}")
            return True
        if expected < chain.durable and not world.may_lose(chain, refused):
            self._wrong(laws.DURABLE, f"session {chain.session_id}: back at {expected}, told {chain.durable}")
        for index in range(expected, chain.index):
            seen, begins, told = self._sent[index]
            try:
                reply = await self._insist("Step", _request(chain.session_id, index, seen, begins, told.version))
            except Refused as again:
                # It was restarted once more, or goes on elsewhere.
                if again.reason in ("STEP_INDEX_MISMATCH", "SESSION_UNKNOWN"):
                    return True
                self._wrong(laws.ERROR, f"replay of step {index}: {again}")
                return True
            if not self._is_same(reply, told):
                world.laws.lost(chain, ReplayMismatchError(f"step {index} was answered otherwise"))
                return False
        return True

    @staticmethod
    def _is_same(reply: pb.StepResponse, told: pb.StepResponse) -> bool:
        names = ("step_index", "version", "action", "value", "log_prob", "logits")
        return all(getattr(reply, name) == getattr(told, name) for name in names)

    # ------------------------------------------------------------------ what breaks the rules, or nearly

    async def _repeat(self) -> None:
        """The last step again."""
        if self._chain is None or not self._sent:
            return
        seen, begins, told = self._sent[-1]
        request = _request(self._chain.session_id, told.step_index, seen, begins, told.version)
        try:
            reply = await self._call("Step", request)
            if not self._is_same(reply, told) and not self.world.may_lose(self._chain, None):
                self._wrong(laws.REPEAT, f"step {told.step_index} again: got {reply}, first {told}")
        except Refused as refused:
            if refused.reason not in {*_PASSES, "SESSION_UNKNOWN", "STEP_INDEX_MISMATCH", "SESSION_EXPIRED"}:
                self._wrong(laws.REPEAT, f"step {told.step_index} again: {refused}")

    async def _skip(self) -> None:
        """A step that is not the next one."""
        chain = self._chain
        if chain is None:
            return
        # It may arrive late, so a near one is what will be sent anyway.
        while len(self._plan) < 3:
            self._plan.append((self.seen(), self.begins()))
        ahead = self.rng.choice((1, 2, 10**6, 2**62))
        seen, begins = self._plan[ahead] if ahead < 3 else (self.seen(), True)
        await self._must_fail("Step", _request(chain.session_id, chain.index + ahead, seen, begins))

    async def _must_fail(self, method: str, request: Any, law: str = laws.REFUSED, allowed: Any = None) -> None:
        try:
            reply = await self._call(method, request)
        except Refused as refused:
            if allowed is not None and refused.reason not in _PASSES and refused.reason not in allowed:
                self._wrong(law, f"{method}: {refused}")
        else:
            self._wrong(law, f"{method} {request} got {reply}")

    async def _trespass(self) -> None:
        """The session of somebody else."""
        if self.token is None:
            return
        others = [c for client in self.world.clients if client.principal != self.principal for c in client.chains()]
        if not others:
            return
        chain = self.rng.choice(others)
        if self._chain is not None and self.rng.random() < 0.5:
            await self._smuggle(self._chain, chain)
            return
        method, request = self.rng.choice((
            ("Step", _request(chain.session_id, chain.index, self.seen(), False)),
            ("InspectSession", pb.InspectSessionRequest(session_id=chain.session_id)),
            ("CloseSession", pb.CloseSessionRequest(session_id=chain.session_id)),
            ("ExportSession", pb.ExportSessionRequest(session_id=chain.session_id)),
        ))  # fmt: skip
        await self._must_fail(method, request, laws.PRIVATE, {"SESSION_UNKNOWN"})

    async def _smuggle(self, own: Chain, other: Chain) -> None:
        """The session of somebody else, in a batch beside one that is ours."""
        observations = np.stack([observe(*self.seen()), observe(*self.seen())])
        request = pb.StepBatchRequest(
            session_ids=[own.session_id, other.session_id], step_indices=[own.index + 10**6, other.index],
            observations=[pb.NamedTensor(name="observation", tensor=array_to_wire(observations))],
        )  # fmt: skip
        try:
            reply = await self._call("StepBatch", request)
        except Refused:
            return
        reasons = {error.row: pb.ErrorReason.Name(error.error.reason) for error in reply.errors}
        if reasons.get(1) not in {"SESSION_UNKNOWN", *_PASSES}:
            self._wrong(laws.PRIVATE, f"a batch with session {other.session_id} of somebody else: {reply}")

    async def _list(self) -> None:
        """All that there are."""
        if self.token is None:
            return
        try:
            reply = await self._call("ListSessions", pb.ListSessionsRequest(page_size=1000))
        except Refused as refused:
            if refused.reason not in _PASSES:
                self._wrong(laws.ERROR, f"ListSessions: {refused}")
            return
        others = {c.session_id for client in self.world.clients if client.principal != self.principal
                  for c in client.chains()}  # fmt: skip
        if seen := others & {session.session_id for session in reply.sessions}:
            self._wrong(laws.PRIVATE, f"sees the sessions {seen}")

    async def _spoil(self) -> None:
        """An observation that is none."""
        chain = self._chain
        if chain is None:
            return
        request = _request(chain.session_id, chain.index, (0, 0), False)
        bad = np.array([np.nan, 0.0], np.float32) if self.rng.random() < 0.5 else observe(2**24, 0)
        request.observation[0].tensor.CopyFrom(array_to_wire(bad))
        allowed = {"OBSERVATION_NOT_FINITE", "OBSERVATION_OUT_OF_SPACE", "SESSION_UNKNOWN", "SESSION_EXPIRED"}
        await self._must_fail("Step", request, laws.REFUSED, allowed)

    async def _double(self) -> None:
        """A batch that has the session twice, and sessions that nobody has."""
        chain = self._chain
        if chain is None:
            return
        nobody = self.rng.getrandbits(63) + 1
        ids = [chain.session_id, nobody, nobody, chain.session_id]
        observations = np.zeros((4, 2), np.float32)
        request = pb.StepBatchRequest(
            session_ids=ids, step_indices=[chain.index] * 4,
            observations=[pb.NamedTensor(name="observation", tensor=array_to_wire(observations))],
        )  # fmt: skip
        try:
            reply = await self._call("StepBatch", request)
        except Refused as refused:
            if refused.reason not in {*_PASSES, "BATCH_TOO_LARGE"} or refused.code == grpc.StatusCode.INTERNAL:
                self._wrong(laws.REFUSED, f"StepBatch: {refused}")
            return
        if {error.row for error in reply.errors} != {0, 1, 2, 3}:
            self._wrong(laws.REFUSED, f"a session twice in a batch: {reply}")

    async def _inspect(self) -> None:
        """The state itself."""
        chain = self._chain
        if chain is None or not chain.index:
            return
        try:
            reply = await self._call("InspectSession", pb.InspectSessionRequest(session_id=chain.session_id))
        except Refused as refused:
            if refused.reason not in {*_PASSES, "SESSION_UNKNOWN", "SESSION_EXPIRED"}:
                self._wrong(laws.ERROR, f"InspectSession: {refused}")
            return
        if reply.session.next_step_index == chain.index:
            memory = int(array_from_wire(reply.state[0].tensor)[0]) % 2**64
            if memory not in chain.memories.values():
                self._wrong(laws.SAME, f"session {chain.session_id} remembers {memory}, expected {chain.memories}")
            if reply.session.num_episodes != chain.num_episodes:
                self._wrong(laws.SAME, f"{reply.session.num_episodes} episodes, expected {chain.num_episodes}")
        elif reply.session.next_step_index > chain.index:
            self._wrong(laws.ORDER, f"{reply.session.next_step_index} steps, expected {chain.index}")

    async def _again(self) -> None:
        """Opening a session that has steps."""
        chain = self._chain
        if chain is None or not chain.durable or self.world.may_lose(chain, None):
            return
        request = pb.OpenSessionRequest(session_id=chain.session_id, seed=chain.seed, deterministic=chain.greedy)
        await self._must_fail("OpenSession", request, laws.REFUSED, {"SESSION_EXISTS", "SESSION_EXPIRED"})

    async def _travel(self) -> None:
        """Out of the server and into it again."""
        chain = self._chain
        if chain is None or not chain.index:
            return
        try:
            taken = await self._call("ExportSession", pb.ExportSessionRequest(session_id=chain.session_id))
            snapshot = pb.SessionSnapshot.FromString(taken.snapshot.snapshot)
            if snapshot.next_step_index > chain.index:
                self._wrong(laws.ORDER, f"exported with {snapshot.next_step_index} steps, expected {chain.index}")
            torn = pb.SealedSnapshot(snapshot=taken.snapshot.snapshot[:-1], sha256=taken.snapshot.sha256)
            await self._must_fail("ImportSession", pb.ImportSessionRequest(snapshot=torn), laws.REFUSED)
        except Refused as refused:
            if refused.reason not in {*_PASSES, "SESSION_UNKNOWN", "SESSION_EXPIRED"}:
                self._wrong(laws.ERROR, f"ExportSession: {refused}")
            if refused.reason:
                return
        await self._thaw(chain)

    async def _thaw(self, chain: Chain) -> None:
        """Go on with a session that was exported, or perhaps was."""
        try:
            taken = await self._insist("ExportSession", pb.ExportSessionRequest(session_id=chain.session_id))
            await self._insist("ImportSession", pb.ImportSessionRequest(snapshot=taken.snapshot))
        except Refused as refused:
            # A server that was restarted has forgotten the export, or the session: the next step tells.
            if refused.reason not in ("SESSION_EXISTS", "SNAPSHOT_MISMATCH", "SESSION_UNKNOWN", "SESSION_EXPIRED"):
                self._wrong(laws.ERROR, f"{chain.session_id}: {refused}")

    async def _leave(self) -> None:
        """Close while a step is under way, which is answered first where it came first."""
        chain = self._chain
        if chain is None or not chain.index:
            return
        self._chain = None
        self.world.closed_ids.add(chain.session_id)
        seen, since_s = self.seen(), self.world.loop.now_s
        step = _request(chain.session_id, chain.index, seen, False)
        close = pb.CloseSessionRequest(session_id=chain.session_id)
        reply, closed = await asyncio.gather(
            self._call("Step", step), self._call("CloseSession", close), return_exceptions=True
        )
        for outcome in (reply, closed):
            if isinstance(outcome, BaseException) and not isinstance(outcome, Refused):
                raise outcome
        if isinstance(reply, pb.StepResponse):
            self.world.laws.stepped(
                chain, seen, False, since_s, index=reply.step_index, version=reply.version,
                action=int(array_from_wire(reply.action)), value=reply.value, durable=None,
            )  # fmt: skip
        if isinstance(closed, pb.CloseSessionResponse) and not 0 <= closed.num_steps <= chain.index + 1:
            self._wrong(laws.ORDER, f"closed after {closed.num_steps} steps, expected {chain.index}")
        if isinstance(closed, Refused):
            with contextlib.suppress(Refused):
                await self._insist("CloseSession", close)

    async def _close(self) -> None:
        chain, self._chain = self._chain, None
        if chain is None:
            return
        self.world.closed_ids.add(chain.session_id)
        request = pb.CloseSessionRequest(session_id=chain.session_id)
        epoch = self.world.num_downs
        try:
            reply = await self._insist("CloseSession", request)
            again = await self._insist("CloseSession", request)
        except Refused as refused:
            may_be_gone = self.world.num_downs > chain.num_downs or refused.reason == "SESSION_EXPIRED"
            if not may_be_gone:
                self._wrong(laws.LOST, f"CloseSession: {refused}")
            return
        if epoch == self.world.num_downs:
            self.world.closed.append((chain.session_id, epoch))
            # Another server that shares the store may have an older copy, and does not know that it was closed.
            if again != reply and not self.world.is_shared:
                self._wrong(laws.REPEAT, f"closed twice: {reply}, then {again}")
            if reply.num_steps > chain.index:
                self._wrong(laws.ORDER, f"closed after {reply.num_steps} steps, expected {chain.index}")
