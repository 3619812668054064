"""Bare messages to a server, and the replay that says what a session should have got."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2, status_pb2
from gymnasium import spaces

from serving import OBSERVATIONS, ServerProcess
from tenuto_models import Policy
from tenuto_models.sampling import uniforms
from tenuto_proto import ObservationCodec, array_from_wire, space_to_wire
from tenuto_proto.v1 import policy_pb2 as pb

CODEC = ObservationCodec(space_to_wire(OBSERVATIONS))


def observations(n: int, seed: int = 0) -> list[Any]:
    OBSERVATIONS.seed(seed)
    return [OBSERVATIONS.sample() for _ in range(n)]


def refused(call: Any, *arguments: Any, **options: Any) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Make a call that must fail; returns its status code, reason and metadata."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **options)
    error: Any = caught.value
    for key, value in error.trailing_metadata():
        if key == "grpc-status-details-bin":
            info = error_details_pb2.ErrorInfo()
            assert status_pb2.Status.FromString(value).details[0].Unpack(info)
            assert info.domain == "tenuto.v1"
            return error.code(), info.reason, dict(info.metadata)
    return error.code(), "", {}


def failure(call: Callable[[], Any]) -> tuple[Any, ...]:
    """All that a client can see of a call that fails: code, text, and every piece of metadata."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), error.details(), sorted((k, v) for k, v in error.trailing_metadata() or ())


def reason(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    code, _, metadata = failure(call)
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(dict(metadata)["grpc-status-details-bin"]).details[0].Unpack(info)
    return code, info.reason


class WireSession:
    """A session spoken to with bare messages."""

    def __init__(self, server: ServerProcess, policy: str = "dnc", **options: Any) -> None:
        self.stub = server.stub
        opened = self.stub.OpenSession(pb.OpenSessionRequest(policy_name=policy, **options))
        self.id, self.index = opened.session_id, 0

    def request(self, observation: Any, index: int | None = None, **fields: Any) -> pb.StepRequest:
        return pb.StepRequest(
            session_id=self.id,
            step_index=self.index if index is None else index,
            observation=CODEC.pack(observation),
            outputs=pb.Outputs(value=True, log_prob=True, logits=True),
            **fields,
        )

    def step(self, observation: Any, **fields: Any) -> pb.StepResponse:
        response = self.stub.Step(self.request(observation, **fields))
        self.index += 1
        return response

    def state(self) -> dict[str, np.ndarray]:
        response = self.stub.InspectSession(pb.InspectSessionRequest(session_id=self.id))
        return {t.name: array_from_wire(t.tensor) for t in response.state}


def batch(sessions: list[WireSession], observed: list[Any], **fields: Any) -> pb.StepBatchRequest:
    stacked = tuple(np.stack(column) for column in zip(*observed, strict=True))
    defaults: dict[str, Any] = {
        "session_ids": [s.id for s in sessions],
        "step_indices": [s.index for s in sessions],
        "observations": CODEC.pack(stacked, len(observed)),
        "outputs": pb.Outputs(value=True, log_prob=True, logits=True),
    }
    return pb.StepBatchRequest(**(defaults | fields))


def replay(steps: Iterable[tuple[Any, bool, Policy]], seed: int) -> Iterator[tuple[int, float]]:
    """Actions and values of one session by itself, from (observation, episode start, policy of the episode).

    Computed with the policies alone, in a batch padded as the server pads its smallest.
    """
    state: dict[str, torch.Tensor] = {}
    for index, (observation, start, policy) in enumerate(steps):
        if start or index == 0:
            state = policy.initial_state(4)
        flat = torch.zeros(4, policy.observation_size)
        flat[0] = torch.from_numpy(np.asarray(spaces.flatten(OBSERVATIONS, observation), np.float32))
        with torch.inference_mode():
            output, state = policy.step(flat, state)
            draw = uniforms(np.array([seed], np.uint64), np.array([index], np.uint64), 1)
            action = policy.distribution.sample(output.logits[:1], torch.from_numpy(draw))
        yield int(action[0, 0]), float(output.value[0])
