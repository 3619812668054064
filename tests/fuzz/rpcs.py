"""Fuzzes every rpc of the service: any bytes get a typed refusal or a right answer, and nobody else notices.

The production server without its socket: bytes go through the deserializer that gRPC registers and the guarded methods,
on one event loop. An input is a sequence of calls on it.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import random
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError, Message

from fuzz.mutation import blob, mutate_message
from serving import publish, small_policy
from tenuto_proto import array_from_wire, array_to_wire
from tenuto_proto.errors import STATUS_DETAILS_KEY, decode_status
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server import main as server_main
from tenuto_server import sessions as sessions_module
from tenuto_server.config import ServerConfig
from tenuto_server.guard import guarded
from tenuto_server.snapshots import seal
from wire import CODEC, replay

METHODS = {m.name: m for m in pb.DESCRIPTOR.services_by_name["PolicyService"].methods}
NAMES = sorted(METHODS)
SESSIONS = (1, 2, 3, 4, 5)
"""The sessions that inputs are about; others exist that they could only guess."""
BYSTANDER = 0x5EED_0F_A_B1D_E12
_LOOK_EVERY = 64
"""Inputs between two looks at the bystander and at what could leak."""
_CALL_S = 20.0

Call = tuple[str, bytes]
"""Method and request. The request of a StepStream is messages, each behind its length; of an ImportSession it may be a
bare snapshot, see :func:`pack`.
"""


def pack(calls: list[Call]) -> bytes:
    """Put calls into one input: for each the method's number, the length, the request."""
    return b"".join(struct.pack("<BH", NAMES.index(name), len(request)) + request for name, request in calls)


def unpack(data: bytes) -> list[Call]:
    """Read an input; any bytes are one."""
    calls, at = list[Call](), 0
    while at + 3 <= len(data) and len(calls) < 16:
        number, length = struct.unpack_from("<BH", data, at)
        calls.append((NAMES[number % len(NAMES)], data[at + 3 : at + 3 + length]))
        at += 3 + length
    return calls


def pack_stream(messages: list[bytes]) -> bytes:
    return b"".join(struct.pack("<H", len(m)) + m for m in messages)


def unpack_stream(data: bytes) -> list[bytes]:
    messages, at = list[bytes](), 0
    while at + 2 <= len(data) and len(messages) < 40:
        (length,) = struct.unpack_from("<H", data, at)
        messages.append(data[at + 2 : at + 2 + length])
        at += 2 + length
    return messages


class _Aborted(grpc.aio.AbortError):
    pass


class _Context:
    """What the methods ask of gRPC's."""

    def __init__(self, messages: list[bytes] | None = None) -> None:
        self.status: tuple[grpc.StatusCode, str, Any] | None = None
        self._messages = iter(messages or ())
        self.written: list[Any] = []

    def time_remaining(self) -> float | None:
        return None

    def invocation_metadata(self) -> tuple[Any, ...]:
        return ()

    def peer(self) -> str:
        return "fuzz"

    def done(self) -> bool:
        return self.status is not None

    def auth_context(self) -> dict[str, Any]:
        return {}

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        self.status = code, details, trailing_metadata
        raise _Aborted

    async def read(self) -> Any:
        await asyncio.sleep(0)
        for message in self._messages:
            return pb.StepBatchRequest.FromString(message)
        return grpc.aio.EOF

    async def write(self, message: Any) -> None:
        self.written.append(message)


class _Complaints(logging.Handler):
    """What the server logs as an error is a finding, but results that are not finite: imported state may cause them."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "no finite result" not in record.getMessage():
            self.records.append(logging.Formatter().format(record))


class RpcTarget:
    """A server, the sessions that inputs are about, and a bystander whose every action is known."""

    def __init__(self, folder: Path) -> None:
        self._now_s = 1000.0
        # Steps of one input never look like those of many sessions at once, for which others would be waited for.
        server_main.time = SimpleNamespace(monotonic=self._clock)  # type: ignore[assignment]
        # Ids of ended sessions are not used twice; here those of long ago must be.
        sessions_module.MAX_REMEMBERED = 3
        self._policy = small_policy()
        publish(folder, self._policy, "policy")
        publish(folder, small_policy("frameconv"), "other")
        config = ServerConfig(folder, capacity=32, max_batch=8, max_queued=64)
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        self._complaints = _Complaints()
        logging.getLogger("tenuto_server").addHandler(self._complaints)
        logging.getLogger("tenuto_server").propagate = False
        self.outcomes: Counter[str] = Counter()
        self.num_inputs = 0
        self._loop.run_until_complete(asyncio.wait_for(self._build(config), 120))

    def _clock(self) -> float:
        self._now_s += 1e-6
        return self._now_s

    async def _build(self, config: ServerConfig) -> None:
        self._server = server_main.Server(config)
        await self._server.reloader.scan()
        assert len(self._server.registry) == 2, self._complaints.records
        self._service: Any = guarded(self._server.service, self._server.metrics)
        observed = ((np.random.default_rng(i).uniform(-1, 1, 3).astype(np.float32), i % 4) for i in itertools.count())
        first, second = itertools.tee(observed)
        self._observed = enumerate(first)
        self._expected: Iterator[tuple[int, float]] = replay(
            ((o, i % 50 == 0, self._policy) for i, o in enumerate(second)), seed=7
        )
        await self._open(BYSTANDER, seed=7)
        await self._begin_anew()
        self._baseline = self._counts()

    async def _open(self, session_id: int, policy: str = "policy", **options: Any) -> None:
        await self._service.OpenSession(
            pb.OpenSessionRequest(session_id=session_id, policy_name=policy, **options), _Context()
        )

    # ------------------------------------------------------------------ one input

    def __call__(self, data: bytes) -> None:
        """Make the calls of one input. Raises AssertionError for whatever should not be."""
        self.num_inputs += 1
        self._now_s += 1.0
        self._loop.run_until_complete(asyncio.wait_for(self._make(unpack(data)), _CALL_S))
        if self.num_inputs % _LOOK_EVERY == 0:
            self.look()

    async def _make(self, calls: list[Call]) -> None:
        for name, request in calls:
            self.outcomes[f"{name} {await self._call(name, request)}"] += 1
        assert not self._complaints.records, self._complaints.records[0]

    async def _call(self, name: str, data: bytes) -> str:
        method, context = METHODS[name], _Context()
        kind: Any = getattr(pb, method.input_type.name)
        if name == "StepStream":
            return await self._stream(unpack_stream(data))
        try:
            if name == "ImportSession" and data[:1] == b"\x00":
                # No bytes but those of a snapshot get past its digest.
                request = pb.ImportSessionRequest(snapshot=seal(pb.SessionSnapshot.FromString(data[1:])))
            else:
                request = kind.FromString(data)
        except DecodeError:
            return "undecodable"
        try:
            response = await getattr(self._service, name)(request, context)
        except _Aborted:
            assert context.status is not None
            return _check_status(*context.status)
        assert isinstance(response, getattr(pb, method.output_type.name))
        response.SerializeToString()
        if isinstance(request, pb.StepBatchRequest):
            _check_batch(request, response)
        elif isinstance(request, pb.StepRequest):
            assert response.step_index == request.step_index
            assert 0 <= int(array_from_wire(response.action)) < 5
        return "OK"

    async def _stream(self, messages: list[bytes]) -> str:
        context, requests = _Context(messages), list[pb.StepBatchRequest]()
        for message in messages:
            try:
                requests.append(pb.StepBatchRequest.FromString(message))
            except DecodeError:
                break
        try:
            await self._service.StepStream(None, context)
        except _Aborted:
            assert context.status is not None and context.status[0] == grpc.StatusCode.INVALID_ARGUMENT
            assert len(requests) < len(messages), context.status
        answered = Counter(response.request_id for response in context.written)
        assert answered == Counter(request.request_id for request in requests), "not each message was answered once"
        for response in context.written:
            if response.HasField("error"):
                _check_error(response.error)
            response.SerializeToString()
        return "OK" if context.status is None else "undecodable"

    # ------------------------------------------------------------------ what must hold between inputs

    def look(self) -> None:
        """The bystander steps as if nobody else were there, and nothing is left of what is over."""
        self._loop.run_until_complete(asyncio.wait_for(self._look(), _CALL_S))

    async def _look(self) -> None:
        index, observation = next(self._observed)
        request = pb.StepRequest(
            session_id=BYSTANDER, step_index=index, episode_start=index % 50 == 0, observation=CODEC.pack(observation)
        )
        request.outputs.value = True
        response = await self._service.Step(request, _Context())
        action, value = next(self._expected)
        assert int(array_from_wire(response.action)) == action, "the bystander acts differently"
        assert abs(response.value - value) < 1e-4, "the bystander's memory is another's"
        await self._begin_anew()
        counts = self._counts()
        assert counts == self._baseline, f"something is left: {counts}, expected {self._baseline}"

    async def _begin_anew(self) -> None:
        """Close what inputs have opened, forget it, and open their sessions again."""
        for policy in self._server.registry:
            for session_id in policy.sessions.session_ids(None):
                if session_id != BYSTANDER:
                    await self._service.CloseSession(pb.CloseSessionRequest(session_id=session_id), _Context())
        for number in range(sessions_module.MAX_REMEMBERED + 1):
            for policy in self._server.registry:
                forgotten = (1 << 63) + number
                await self._open(forgotten + (number << 8) + len(policy.name) * 1000, policy.name)
                await self._service.CloseSession(
                    pb.CloseSessionRequest(session_id=forgotten + (number << 8) + len(policy.name) * 1000), _Context()
                )
        for session_id in SESSIONS:
            await self._open(session_id, "other" if session_id == SESSIONS[-1] else "policy")

    def _counts(self) -> dict[str, int]:
        batcher, policies = self._server.stepper.batcher, list(self._server.registry)
        return {
            "leased": sum(p.sessions.pool.num_leased for p in policies),
            "busy": sum(int(p.sessions.busy[:-1].sum()) for p in policies),
            "tickets": sum(sum(t is not None for t in p.sessions.ticket) for p in policies),
            "queued": batcher.queue.num_rows + len(batcher.queue),
            "tasks": len(asyncio.all_tasks(self._loop)),
            "versions": sum(len(p.versions) for p in policies),
        }

    def num_objects(self) -> int:
        """Objects that the garbage collector knows, after it has run."""
        gc.collect()
        return len(gc.get_objects())

    def close(self) -> None:
        self._server.engine.close()
        self._loop.close()


def _check_status(code: grpc.StatusCode, details: str, trailing: Any) -> str:
    assert code not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.OK), (code, details)
    found = decode_status(dict(trailing)[STATUS_DETAILS_KEY]) if trailing else None
    assert found is not None and found[0], f"{code} {details!r} without a reason"
    details.encode()
    assert len(details) <= 600, f"a text of {len(details)} characters left the server"
    return pb.ErrorReason.Name(found[0])  # type: ignore[arg-type]


def _check_error(error: pb.Error) -> None:
    assert error.reason and error.code, error
    assert len(error.message) <= 600


def _check_batch(request: pb.StepBatchRequest, response: pb.StepBatchResponse) -> None:
    n = len(request.session_ids)
    rows = [failed.row for failed in response.errors]
    assert rows == sorted(set(rows)) and all(row < n for row in rows)
    for failed in response.errors:
        _check_error(failed.error)
    assert len(response.versions) == n
    if response.HasField("actions"):
        actions = array_from_wire(response.actions)
        assert len(actions) == n
        assert ((actions >= 0) & (actions < 5)).all()


# ---------------------------------------------------------------------------------------------- inputs


def seeds() -> list[bytes]:
    """Inputs that are sound: the corpus grows from them."""
    observation = (np.zeros(3, np.float32), 1)
    outputs = pb.Outputs(value=True, log_prob=True, logits=True)

    def step(session_id: int, index: int, **fields: Any) -> bytes:
        return pb.StepRequest(
            session_id=session_id, step_index=index, observation=CODEC.pack(observation), outputs=outputs, **fields
        ).SerializeToString()

    def batch(ids: list[int], index: int, **fields: Any) -> bytes:
        rows = CODEC.pack((np.zeros((len(ids), 3), np.float32), np.ones(len(ids), np.int64)), len(ids))
        return pb.StepBatchRequest(
            session_ids=ids, step_indices=[index] * len(ids), observations=rows, outputs=outputs, **fields
        ).SerializeToString()

    snapshot = pb.SessionSnapshot(format_version=1, session_id=9, policy_name="policy", seed=3)
    close = pb.CloseSessionRequest(session_id=1, reward=1.0).SerializeToString()
    opening = pb.OpenSessionRequest(session_id=9, policy_name="policy", version=1, seed=4, deterministic=True)
    return [
        pack(calls)
        for calls in (
            [("GetPolicy", pb.GetPolicyRequest(policy_name="policy", version=1).SerializeToString())],
            [("OpenSession", opening.SerializeToString()), ("Step", step(9, 0))],
            [("Step", step(1, 0, episode_start=True, reward=0.5)), ("Step", step(1, 1)), ("Step", step(1, 1))],
            [
                ("StepBatch", batch([1, 2, 3], 0, rewards=[0, 1, 2])),
                ("StepBatch", batch([3, 1], 1, queue_timeout_ms=5)),
            ],
            [("StepBatch", batch([1, 2], 0, episode_starts=[True, False], replayed_versions=[0, 1]))],
            [("StepStream", pack_stream([batch([1], 0, request_id=1), batch([1], 1), batch([2, 5], 0)]))],
            [("Step", step(1, 0)), ("CloseSession", close), ("CloseSession", close)],
            [("ListSessions", pb.ListSessionsRequest(policy_name="policy", page_size=2).SerializeToString())],
            [("Step", step(2, 0)), ("InspectSession", pb.InspectSessionRequest(session_id=2).SerializeToString())],
            [("Step", step(3, 0)), ("ExportSession", pb.ExportSessionRequest(session_id=3).SerializeToString())],
            [("ImportSession", b"\x00" + snapshot.SerializeToString()), ("Step", step(9, 0))],
        )
    ]


def exported_seeds(target: RpcTarget) -> list[bytes]:
    """Imports of a session of this very policy that has taken two steps, which then goes on: a sound one, and one that
    answers the last step again with an action that the policy does not have.
    """
    observation = CODEC.pack((np.zeros(3, np.float32), 1))

    async def make() -> list[bytes]:
        service = target._service
        for index in range(2):
            await service.Step(pb.StepRequest(session_id=4, step_index=index, observation=observation), _Context())
        exported = await service.ExportSession(pb.ExportSessionRequest(session_id=4), _Context())
        snapshot = pb.SessionSnapshot.FromString(exported.snapshot.snapshot)
        found = list[bytes]()
        for session_id, action in ((9, None), (10, 77)):
            snapshot.session_id = session_id
            if action is not None:
                snapshot.reply.action.CopyFrom(array_to_wire(np.array(action)))
            calls = [("ImportSession", b"\x00" + snapshot.SerializeToString())]
            for index in (1, 2):
                step = pb.StepRequest(session_id=session_id, step_index=index, observation=observation)
                calls.append(("Step", step.SerializeToString()))
            found.append(pack(calls))
        return found

    return target._loop.run_until_complete(make())


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Return an input that differs a little: in a message's field, in its bytes, or in the calls."""
    calls = unpack(data)
    for _ in range(1 + rng.randrange(3)):
        if not calls:
            return rng.randbytes(rng.randint(1, 64))
        at, kind = rng.randrange(len(calls)), rng.randrange(12)
        name, request = calls[at]
        if kind == 0:
            calls[at] = (name, blob(rng, request))
        elif kind == 1:
            calls.insert(rng.randint(0, len(calls)), calls[at])
        elif kind == 2:
            del calls[at]
        elif kind == 3:
            calls[at] = (rng.choice(NAMES), request)
        else:
            calls[at] = (name, _mutate_request(name, request, rng))
    return pack([(name, request[:60_000]) for name, request in calls[:16]])


def _mutate_request(name: str, request: bytes, rng: random.Random) -> bytes:
    if name == "StepStream":
        messages = unpack_stream(request) or [b""]
        at = rng.randrange(len(messages))
        if rng.random() < 0.2:
            messages.insert(at, messages[at])
        messages[at] = _mutate_bytes(pb.StepBatchRequest, messages[at], rng)
        return pack_stream(messages)
    if name == "ImportSession" and request[:1] == b"\x00":
        return b"\x00" + _mutate_bytes(pb.SessionSnapshot, request[1:], rng)
    return _mutate_bytes(getattr(pb, METHODS[name].input_type.name), request, rng)


def _mutate_bytes(kind: Any, data: bytes, rng: random.Random) -> bytes:
    try:
        message: Message = kind.FromString(data)
    except DecodeError:
        return blob(rng, data)
    mutate_message(message, rng)
    if rng.random() < 0.15 and hasattr(message, "session_id"):
        message.session_id = rng.choice(SESSIONS)  # type: ignore[attr-defined]
    return message.SerializeToString()[:60_000]
