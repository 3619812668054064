"""The client process of every peer and of the echo: the closed loops of tenuto-bench around each one's own client.

python client.py websocket|triton|ray|echo    reads its order as tenuto_bench.loops says
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.spaces import Box

from tenuto_bench.cases import NUM_OBSERVATIONS, Order, is_start, observation_number
from tenuto_bench.loops import Loop, main, observations

OBSERVATIONS = observations(Box(-1, 1, (32,)))


class SessionLoop(Loop):
    """One session."""

    def __init__(self, number: int) -> None:
        super().__init__(range(number, number + 1))
        self.number = number

    async def connect(self) -> None:
        """Nothing to open."""

    async def close(self) -> None:
        """Nothing to end."""

    async def call(self) -> None:
        """Make one step."""
        await self.step(OBSERVATIONS[observation_number(self.number, self.steps)], is_start(self.steps))
        self.steps += 1

    async def step(self, observation: np.ndarray, start: bool) -> None:
        """Send one observation and wait for its action."""
        raise NotImplementedError


def websocket(order: Order) -> Sequence[Loop]:
    """One connection per session, as openpi's clients have; msgpack."""
    import msgpack
    from websockets.asyncio.client import connect  # pyright: ignore[reportMissingImports]

    class Websocket(SessionLoop):
        async def connect(self) -> None:
            self._connection = await connect(f"ws://{order.address}", compression=None, max_size=None, proxy=None)
            await self._connection.send(str(self.number))

        async def step(self, observation: np.ndarray, start: bool) -> None:
            await self._connection.send(msgpack.packb({"observation": observation.tobytes(), "episode_start": start}))
            assert "action" in msgpack.unpackb(await self._connection.recv())

        async def close(self) -> None:
            await self._connection.close()

    return [Websocket(number) for number in numbers_of(order)]


def triton(order: Order) -> Sequence[Loop]:
    """tritonclient's aio client, one channel per process, unary; each session is a sequence."""
    import tritonclient.grpc.aio as client  # pyright: ignore[reportMissingImports]

    channel, output = client.InferenceServerClient(order.address), [client.InferRequestedOutput("action")]

    class Triton(SessionLoop):
        async def step(self, observation: np.ndarray, start: bool, end: bool = False) -> None:
            given = client.InferInput("observation", [1, 32], "FP32")
            given.set_data_from_numpy(observation[None])
            result = await channel.infer(
                "frameconv", [given], outputs=output, sequence_id=self.number + 1, sequence_start=start,
                sequence_end=end,
            )  # fmt: skip
            assert result.as_numpy("action") is not None

        async def close(self) -> None:
            # Triton waits at its own end for sequences that were not ended.
            await self.step(OBSERVATIONS[0], start=False, end=True)

    return [Triton(number) for number in numbers_of(order)]


def ray(order: Order) -> Sequence[Loop]:
    """Bare stubs on Serve's gRPC proxy, one channel per process, unary; the metadata say which session it is."""
    pb, stub = stub_of(order.address)

    class Ray(SessionLoop):
        async def step(self, observation: np.ndarray, start: bool) -> None:
            request = pb.StepRequest(
                session_id=self.number, step_index=self.steps, episode_start=start, observation=[leaf(observation)]
            )
            metadata = (("application", "frameconv"), ("session_id", str(self.number)))
            assert (await stub.Step(request, metadata=metadata)).action.data

    return [Ray(number) for number in numbers_of(order)]


def echo(order: Order) -> Sequence[Loop]:
    """Bare stubs: a call per session, or one message for all sessions on a stream."""
    pb, stub = stub_of(order.address)
    outputs = pb.Outputs(value=True)

    class Unary(SessionLoop):
        async def step(self, observation: np.ndarray, start: bool) -> None:
            request = pb.StepRequest(
                session_id=self.number, step_index=self.steps, episode_start=start, observation=[leaf(observation)],
                reward=0.0, outputs=outputs,
            )  # fmt: skip
            assert (await stub.Step(request)).action.data

    class Stream(Loop):
        async def connect(self) -> None:
            self._stream = stub.StepStream()
            self._batches = [
                np.stack([OBSERVATIONS[observation_number(number, step)] for number in self.numbers])
                for step in range(NUM_OBSERVATIONS)
            ]
            self._rewards = np.zeros(len(self.numbers), np.float32)

        async def call(self) -> None:
            n = len(self.numbers)
            request = pb.StepBatchRequest(
                session_ids=self.numbers, step_indices=[self.steps] * n, episode_starts=[is_start(self.steps)] * n,
                observations=[leaf(self._batches[self.steps % NUM_OBSERVATIONS])], rewards=self._rewards,
                outputs=outputs, request_id=self.steps,
            )  # fmt: skip
            await self._stream.write(request)
            assert (await self._stream.read()).actions.data
            self.steps += 1

        async def close(self) -> None:
            await self._stream.done_writing()

    numbers = numbers_of(order)
    return [Stream(numbers)] if order.case.mode == "stream" else [Unary(number) for number in numbers]


def stub_of(address: str) -> tuple[Any, Any]:
    """The messages, and a stub on a channel of its own."""
    import grpc.aio

    from tenuto_proto.v1 import policy_pb2, policy_pb2_grpc

    return policy_pb2, policy_pb2_grpc.PolicyServiceStub(grpc.aio.insecure_channel(address))


def leaf(observations: np.ndarray) -> Any:
    """Observations ``float32 [..., 32]`` as a tensor on the wire."""
    from tenuto_proto.v1 import policy_pb2 as pb

    tensor = pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=observations.shape, data=observations.tobytes())
    return pb.NamedTensor(tensor=tensor)


def numbers_of(order: Order) -> range:
    """Return the numbers of this process's sessions."""
    return range(order.first, order.first + order.count)


if __name__ == "__main__":
    main({"websocket": websocket, "triton": triton, "ray": ray, "echo": echo}[sys.argv[1]])
