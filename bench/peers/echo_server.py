"""A floor: grpc.aio that answers tenuto's messages at once, with as many bytes, and computes nothing.

python echo_server.py    prints the port
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_proto.v1 import policy_pb2_grpc

TIMINGS = pb.Timings(queue_us=500, compute_us=500, batch_size=100)


class Echo(policy_pb2_grpc.PolicyServiceServicer):
    """Answers of the sizes that tenuto's have."""

    async def Step(self, request: pb.StepRequest, context: Any) -> pb.StepResponse:
        """Answer for one session."""
        action = pb.Tensor(dtype=pb.DATA_TYPE_INT64, data=bytes(8))
        return pb.StepResponse(
            step_index=request.step_index, version=1, action=action, value=0.5, timings=TIMINGS
        )  # fmt: skip

    async def StepStream(
        self, request_iterator: AsyncIterator[pb.StepBatchRequest], context: Any
    ) -> AsyncIterator[pb.StepBatchResponse]:
        """Answer each message for all of its sessions."""
        async for request in request_iterator:
            n = len(request.session_ids)
            yield pb.StepBatchResponse(
                request_id=request.request_id,
                versions=[1] * n,
                actions=pb.Tensor(dtype=pb.DATA_TYPE_INT64, shape=[n], data=bytes(8 * n)),
                values=pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[n], data=bytes(4 * n)),
                timings=TIMINGS,
            )


async def main() -> None:
    server = grpc.aio.server()
    policy_pb2_grpc.add_PolicyServiceServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
