"""A server in miniature whose sessions outlive it, for the client's half of survival; a script of fates drives it.

It keeps of each session a digest of its running episode, from which the actions follow: a step that is lost, doubled,
swapped or answered by another version changes every action after it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import grpc
import numpy as np

from scripted import Answer, Outside, draining, queue_full, refusal, timed_out, unavailable
from tenuto_client.effects import Call, Program, Sleep
from tenuto_client.errors import TenutoError, error_from_reason
from tenuto_client.results import StepResult
from tenuto_client.session import Session
from tenuto_proto import array_to_wire
from tenuto_proto.v1 import policy_pb2 as pb


class Fate(Enum):
    """What happens at a call."""

    FINE = "the call is answered"
    LOST_REQUEST = "the call does not arrive"
    LOST_REPLY = "the call is carried out, but its answer does not arrive"
    FULL = "the server has too much to do"
    CRASH = "the server ends before the call"
    CRASH_AFTER = "the server ends after the call is carried out, before it is answered"
    CRASH_COLD = "the server ends before the call; the next one knows old versions after three calls only"
    DRAIN = "the server stores all sessions and ends"
    STORE = "the server stores all sessions first"
    STORE_QUIETLY = "as STORE, but the server ends before anybody hears of it"
    PUBLISH = "a new version is there first"


@dataclass
class Held:
    """A session at the server, or a snapshot of it."""

    seed: int
    num_steps: int = 0
    version: int = 0
    digest: bytes = b""
    reply: pb.StepResponse = field(default_factory=pb.StepResponse)
    durable_step: int = 0
    exported: bool = False


def act(digest: bytes, seed: int, step_index: int, version: int, begins: bool, mode: int) -> tuple[bytes, int]:
    """Return the digest after a step, and its action."""
    before = b"" if begins else digest
    after = hashlib.sha256(before + f"/{seed}/{step_index}/{version}/{mode}".encode()).digest()
    return after, after[0] % 5


class DurableServer(Outside):
    """Answers as the contract says; ``fates`` are used up call by call, then all is fine."""

    def __init__(self, fates: Iterable[Fate] = (), clock: Outside | None = None) -> None:
        self._clock = clock
        super().__init__()
        self.fates = list(fates)
        self.rng = random.Random(1)
        self.newest = 3
        self.cold_calls = 0
        """Calls for which old versions are not there yet."""
        self.num_restarts = 0
        self.held: dict[int, Held] = {}
        self.stored: dict[int, list[Held]] = {}
        """Snapshots, oldest first: the one that was told of, and later ones."""
        self.is_durable = True

    @property
    def now_s(self) -> float:
        return self._now_s if self._clock is None else self._clock.now_s

    @now_s.setter
    def now_s(self, now_s: float) -> None:
        if self._clock is None:
            self._now_s = now_s
        else:
            self._clock.now_s = now_s

    def store(self, told: bool = True) -> None:
        for session_id, session in self.held.items():
            session.durable_step = session.num_steps if told else session.durable_step
            snapshots = self.stored.setdefault(session_id, [])
            if told:
                snapshots.clear()
            snapshots.append(replace(session))

    def restart(self) -> None:
        """Come back with what was stored: of each session anything that is not older than what was told."""
        self.epoch += 1
        self.num_restarts += 1
        self.held = {}
        for session_id, snapshots in self.stored.items():
            session = replace(self.rng.choice(snapshots))
            session.durable_step = max(s.durable_step for s in snapshots)
            self.held[session_id] = session

    def answer(self, call: Call) -> Any:
        return self._answer(call)

    def _answer(self, call: Call) -> Any:
        self.calls.append(call)
        fate = self.fates.pop(0) if self.fates else Fate.FINE
        if fate is Fate.LOST_REQUEST:
            self.now_s += call.timeout_s
            return timed_out()
        if fate is Fate.FULL and call.method.startswith("Step"):
            return queue_full()
        if fate in (Fate.CRASH, Fate.CRASH_COLD):
            self.restart()
            self.cold_calls = 3 if fate is Fate.CRASH_COLD else 0
            return unavailable()
        if fate is Fate.DRAIN:
            self.store()
            self.restart()
            return draining()
        if fate is Fate.STORE:
            self.store()
        elif fate is Fate.STORE_QUIETLY:
            self.store(told=False)
            self.restart()
            return unavailable()
        elif fate is Fate.PUBLISH:
            self.newest += 1
        answer = self.faultless(call)
        self.cold_calls = max(self.cold_calls - 1, 0)
        if fate is Fate.LOST_REPLY:
            self.now_s += call.timeout_s
            return timed_out()
        if fate is Fate.CRASH_AFTER:
            self.restart()
            return unavailable()
        return answer

    def faultless(self, call: Call) -> Answer:
        request: Any = call.request
        if call.method == "OpenSession":
            session = self.held.get(request.session_id)
            if session is not None and session.num_steps:
                return refusal(pb.SESSION_EXISTS, grpc.StatusCode.ALREADY_EXISTS)
            seed = request.seed if request.HasField("seed") else request.session_id
            self.held[request.session_id] = Held(seed)
            return pb.OpenSessionResponse(
                session_id=request.session_id,
                version=self.newest,
                seed=seed,
                server_epoch=self.epoch,
                durable=self.is_durable,
            )
        if call.method == "Step":
            [mode] = [named.tensor.data[0] for named in request.observation if named.name == "mode"]
            return self._step(
                call, request.session_id, request.step_index, request.episode_start, mode, request.replayed_version
            )
        if call.method == "StepBatch":
            return self._batch(call, request)
        if call.method == "ExportSession":
            session = self.held.get(request.session_id)
            if session is None:
                return self._unknown(call)
            session.exported = True
            return pb.ExportSessionResponse(snapshot=pb.SealedSnapshot(snapshot=_to_bytes(request.session_id, session)))
        if call.method == "ImportSession":
            session_id, session = _from_bytes(request.snapshot.snapshot)
            there = self.held.get(session_id)
            if there is not None and not there.exported and there.num_steps != session.num_steps:
                return refusal(pb.SESSION_EXISTS, grpc.StatusCode.ALREADY_EXISTS)
            self.newest = max(self.newest, session.version)
            self.held[session_id] = session
            self.stored[session_id] = [replace(session)]
            return pb.ImportSessionResponse(
                session_id=session_id,
                next_step_index=session.num_steps,
                server_epoch=self.epoch,
                durable=self.is_durable,
            )
        if call.method == "CloseSession":
            self.held.pop(request.session_id, None)
            self.stored.pop(request.session_id, None)
            return pb.CloseSessionResponse()
        return super().faultless(call)

    def _unknown(self, call: Call) -> TenutoError:
        metadata = {"server_epoch": str(self.epoch)}
        return error_from_reason(grpc.StatusCode.NOT_FOUND, pb.SESSION_UNKNOWN, "?", metadata, call.server_epoch)

    def _step(
        self, call: Call, session_id: int, step_index: int, begins: bool, mode: int, replayed_version: int
    ) -> pb.StepResponse | TenutoError:
        session = self.held.get(session_id)
        if session is None:
            return self._unknown(call)
        if session.exported:
            return refusal(pb.SESSION_EXPORTED, grpc.StatusCode.FAILED_PRECONDITION)
        if session.num_steps and step_index == session.num_steps - 1:
            session.reply.durable_step = session.durable_step
            return session.reply
        if step_index != session.num_steps:
            return refusal(pb.STEP_INDEX_MISMATCH, grpc.StatusCode.ABORTED, expected=str(session.num_steps))
        begins = begins or not step_index
        version = (replayed_version or self.newest) if begins else session.version
        if replayed_version and (replayed_version != version or (self.cold_calls and version < self.newest)):
            return refusal(pb.VERSION_UNKNOWN, grpc.StatusCode.NOT_FOUND)
        session.digest, action = act(session.digest, session.seed, step_index, version, begins, mode)
        session.version, session.num_steps = version, step_index + 1
        session.reply = pb.StepResponse(
            step_index=step_index,
            version=version,
            action=array_to_wire(np.array(action)),
            durable_step=session.durable_step,
        )
        return session.reply

    def _batch(self, call: Call, request: pb.StepBatchRequest) -> pb.StepBatchResponse:
        n = len(request.session_ids)
        [modes] = [np.frombuffer(o.tensor.data, np.int64) for o in request.observations if o.name == "mode"]
        starts = request.episode_starts or [False] * n
        replayed = request.replayed_versions or [0] * n
        reply = pb.StepBatchResponse(request_id=request.request_id)
        actions = np.zeros(n, np.int64)
        rows = zip(request.session_ids, request.step_indices, starts, modes.tolist(), replayed, strict=True)
        for row, columns in enumerate(rows):
            answer = self._step(call, *columns)
            if isinstance(answer, TenutoError):
                assert answer.code is not None
                reason = pb.ErrorReason.Value(answer.reason)
                wire = pb.Error(code=answer.code.value[0], reason=reason, message="?", metadata=answer.metadata)
                reply.errors.append(pb.RowError(row=row, error=wire))
                answer = pb.StepResponse()
            else:
                actions[row] = answer.action.data[0]
            reply.versions.append(answer.version)
            if self.is_durable:
                reply.durable_steps.append(answer.durable_step)
        reply.actions.CopyFrom(array_to_wire(actions))
        return reply


def _to_bytes(session_id: int, session: Held) -> bytes:
    snapshot = pb.SessionSnapshot(
        session_id=session_id,
        seed=session.seed,
        version=session.version,
        next_step_index=session.num_steps,
        weights_sha256=session.digest.hex(),
        reply=session.reply,
    )
    return snapshot.SerializeToString(deterministic=True)


def _from_bytes(data: bytes) -> tuple[int, Held]:
    it = pb.SessionSnapshot.FromString(data)
    digest = bytes.fromhex(it.weights_sha256)
    return it.session_id, Held(it.seed, it.next_step_index, it.version, digest, it.reply, it.next_step_index)


def step_as_a_transport_does(
    server: DurableServer, session: Session, observation: Any, episode_start: bool, reward: float | None
) -> StepResult:
    """See Transport.step."""
    with session.alone:
        step = session.begin(observation, episode_start, reward)
        answer = None if step is None else server.answer(step.call(session.first_attempt_s))
        if step is not None and (result := step.success(answer)) is not None:
            session.applied(result)
            return result
    if step is None:
        return server.drive(session.step(observation, episode_start, reward))
    return server.drive(_answered(session.settle(step), answer))


def _answered(program: Program[StepResult], answer: Any) -> Program[StepResult]:
    """The rest of a program whose first effect is answered already."""
    try:
        next(program)
        effect = program.send([answer])
        while True:
            received = yield effect
            effect = next(program) if isinstance(effect, Sleep) else program.send(received)
    except StopIteration as stop:
        return stop.value


def undisturbed(seed: int, plays: Sequence[tuple[int, bool]], versions: Sequence[int]) -> list[int]:
    """The actions of a run in which nothing happens, for (mode, episode starts) and the versions that answered."""
    digest, actions = b"", list[int]()
    for step_index, ((mode, begins), version) in enumerate(zip(plays, versions, strict=True)):
        digest, action = act(digest, seed, step_index, version, begins or not step_index, mode)
        actions.append(action)
    return actions
