"""The world outside of a program, without a network: a clock that only pauses move, a server that reads a script."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
import numpy as np
from gymnasium import spaces

from tenuto_client.effects import Call, Program, Sleep
from tenuto_client.errors import TenutoError, error_from_reason
from tenuto_client.options import PolicyOptions
from tenuto_client.retry import Timing
from tenuto_proto import ObservationCodec, array_to_wire, space_to_wire
from tenuto_proto.v1 import policy_pb2 as pb

T = TypeVar("T")
Answer = Any
"""A reply, a TenutoError, or a function of the call that returns one of the two."""

OBSERVATIONS = spaces.Dict({"camera": spaces.Box(-1, 1, (2,)), "mode": spaces.Discrete(3)})
ACTIONS = spaces.Discrete(5)
EPOCH, NEW_EPOCH = 77, 78
LOST_REPLY = "lost reply"
"""The answer of a call that runs into its timeout."""


def observation(value: float = 0.0, mode: int = 0) -> dict[str, Any]:
    return {"camera": np.full(2, value, np.float32), "mode": mode}


def refusal(reason: pb.ErrorReason, code: grpc.StatusCode, **metadata: str) -> TenutoError:
    return error_from_reason(code, reason, pb.ErrorReason.Name(reason), metadata)


def unavailable() -> TenutoError:
    return error_from_reason(grpc.StatusCode.UNAVAILABLE, 0, "connection refused", {})


def timed_out() -> TenutoError:
    return error_from_reason(grpc.StatusCode.DEADLINE_EXCEEDED, 0, "Deadline Exceeded", {})


def queue_full() -> TenutoError:
    return refusal(pb.QUEUE_FULL, grpc.StatusCode.RESOURCE_EXHAUSTED)


def draining() -> TenutoError:
    return refusal(pb.DRAINING, grpc.StatusCode.UNAVAILABLE)


def session_unknown(epoch: int) -> Answer:
    """What a server of this epoch answers to a session that it does not know."""

    def answer(call: Call) -> TenutoError:
        metadata = {"server_epoch": str(epoch)}
        return error_from_reason(grpc.StatusCode.NOT_FOUND, pb.SESSION_UNKNOWN, "?", metadata, call.server_epoch)

    return answer


class Outside:
    """Drives programs. Answers steps from ``script``; once that is used up, as a faultless server does."""

    def __init__(self, observation_space: Any = OBSERVATIONS, **limits: Any) -> None:
        self.now_s = 100.0
        self.calls: list[Call] = []
        self.pauses_s: list[float] = []
        self.script: list[Answer] = []
        self.epoch = EPOCH
        self.scripts: dict[str, list[Answer]] = {"GetPolicy": [], "OpenSession": [], "CloseSession": []}
        self.policy = pb.GetPolicyResponse(
            policy_name="walker",
            version=3,
            versions=[2, 3],
            observation_space=space_to_wire(observation_space),
            action_space=space_to_wire(ACTIONS),
            observation=ObservationCodec(space_to_wire(observation_space)).specs(),
            limits=pb.Limits(**{"max_batch_rows": 256, "max_message_bytes": 1 << 20, "idle_timeout_s": 300, **limits}),
        )

    def options(self, **options: Any) -> PolicyOptions:
        timing = Timing(clock=lambda: self.now_s, rng=random.Random(0))
        return PolicyOptions(**{"timing": timing, "outputs": frozenset(), **options})

    def drive(self, program: Program[T]) -> T:
        try:
            effect = next(program)
            while True:
                if isinstance(effect, Sleep):
                    self.pauses_s.append(effect.seconds)
                    self.now_s += effect.seconds
                    effect = next(program)
                else:
                    effect = program.send([self._answer(call) for call in effect.calls])
        except StopIteration as stop:
            return stop.value

    def sent(self, method: str) -> list[Any]:
        """The requests of one method, in order."""
        return [call.request for call in self.calls if call.method == method]

    def _answer(self, call: Call) -> Any:
        self.calls.append(call)
        script = self.scripts.get(call.method, self.script)
        answer: Answer = script.pop(0) if script else self.faultless
        if answer is LOST_REPLY:
            self.now_s += call.timeout_s
            return timed_out()
        return answer(call) if callable(answer) else answer

    def faultless(self, call: Call) -> Any:
        request: Any = call.request
        if call.method == "GetPolicy":
            reply = pb.GetPolicyResponse()
            reply.CopyFrom(self.policy)
            reply.server_epoch = self.epoch
            return reply
        if call.method == "OpenSession":
            return pb.OpenSessionResponse(session_id=request.session_id, version=3, server_epoch=self.epoch)
        if call.method == "Step":
            # The action tells the observation that it answers.
            [mode] = [named.tensor.data[0] for named in request.observation if named.name == "mode"]
            return pb.StepResponse(step_index=request.step_index, version=3, action=array_to_wire(np.array(mode)))
        if call.method == "StepBatch":
            return batch_reply(request)
        return pb.CloseSessionResponse()


def batch_reply(request: pb.StepBatchRequest, errors: dict[int, TenutoError] | None = None) -> pb.StepBatchResponse:
    """Each row's action is the mode in its observation, its value ten times its step index; of failed rows too, which
    the client must not mind.
    """
    n = len(request.session_ids)
    [modes] = [np.frombuffer(o.tensor.data, np.int64) for o in request.observations if o.name == "mode"]
    actions = modes.copy()
    reply = pb.StepBatchResponse(request_id=request.request_id, versions=[3] * n)
    for row, error in (errors or {}).items():
        assert error.code is not None
        reply.versions[row] = 0
        reason = pb.ErrorReason.Value(error.reason) if error.reason else pb.ERROR_REASON_UNSPECIFIED
        wire = pb.Error(code=error.code.value[0], reason=reason, message=str(error), metadata=error.metadata)
        reply.errors.append(pb.RowError(row=row, error=wire))
    reply.actions.CopyFrom(array_to_wire(actions))
    if request.outputs.value:
        reply.values.CopyFrom(array_to_wire(np.array(request.step_indices, np.float32) * 10))
    return reply


def rows_fail(errors: dict[int, TenutoError]) -> Callable[[Call], pb.StepBatchResponse]:
    """The answer to a StepBatch in which these rows of the request fail."""

    def answer(call: Call) -> pb.StepBatchResponse:
        assert isinstance(call.request, pb.StepBatchRequest)
        return batch_reply(call.request, errors)

    return answer
