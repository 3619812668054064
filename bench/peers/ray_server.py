"""The Frameconv step on Ray Serve: its gRPC proxy, the consistent-hash router, ``@serve.batch``; the states in a dict.

python ray_server.py REPOSITORY FOLDER    prints the port; FOLDER is for Ray's own files
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import serve
from ray.serve.config import RequestRouterConfig, gRPCOptions

from tenuto_models import checkpoint
from tenuto_models.sampling import uniforms
from tenuto_proto.v1 import policy_pb2 as pb

CPUS = 2
ROUTER: Any = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
SERVICER = "tenuto_proto.v1.policy_pb2_grpc.add_PolicyServiceServicer_to_server"


@serve.deployment(
    num_replicas=1,
    max_ongoing_requests=1024,
    request_router_config=RequestRouterConfig(
        request_router_class=ROUTER,
        # A session's state is in one replica: no other may answer in its place.
        request_router_kwargs={"num_fallback_replicas": 0},
    ),
    logging_config={"log_level": "WARNING", "enable_access_log": False},
)
class Frameconv:
    """One replica; the states of its sessions in a dict."""

    def __init__(self, repository: str) -> None:
        torch.set_num_threads(1)
        self._policy = checkpoint.read(Path(repository) / "frameconv" / "1").policy.eval().requires_grad_(False)
        self._states: dict[int, tuple[dict[str, torch.Tensor], int]] = {}

    async def Step(self, request: pb.StepRequest) -> pb.StepResponse:
        """Answer one step; Serve calls the method that is named as the rpc."""
        return await self.advance(request)

    @serve.batch(max_batch_size=256, batch_wait_timeout_s=0.001)
    async def advance(self, requests: list[pb.StepRequest]) -> list[pb.StepResponse]:
        """Answer a batch: one row per request."""
        policy, distribution = self._policy, self._policy.distribution
        fresh = {name: tensor[0] for name, tensor in policy.initial_state(1).items()}
        rows = [(fresh, 0) if r.episode_start else self._states[r.session_id] for r in requests]
        state = {name: torch.stack([row[name] for row, _ in rows]) for name in fresh}
        ids = np.array([r.session_id for r in requests], np.uint64)
        steps = np.array([step for _, step in rows], np.uint64)
        data = b"".join(r.observation[0].tensor.data for r in requests)
        observations = torch.from_numpy(np.frombuffer(data, np.float32).copy()).view(len(rows), -1)
        with torch.inference_mode():
            output, after = policy.step(observations, state)
            draws = torch.from_numpy(uniforms(ids, steps, distribution.num_uniforms))
            actions = distribution.to_space(distribution.sample(output.logits, draws)).numpy()
        replies: list[pb.StepResponse] = []
        for row, request in enumerate(requests):
            self._states[request.session_id] = ({k: v[row] for k, v in after.items()}, int(steps[row]) + 1)
            action = pb.Tensor(dtype=pb.DATA_TYPE_INT64, data=actions[row].tobytes())
            replies.append(pb.StepResponse(step_index=request.step_index, version=1, action=action))
        return replies


def main(repository: str, folder: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        address="local", num_cpus=CPUS, include_dashboard=False, object_store_memory=100_000_000, _temp_dir=folder,
        logging_level=logging.ERROR, log_to_driver=False,
    )  # fmt: skip
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": "127.0.0.1", "port": 0},
        grpc_options=gRPCOptions(port=port, grpc_servicer_functions=[SERVICER]),
    )
    serve.run(Frameconv.options(ray_actor_options={"num_cpus": 0}).bind(repository), name="frameconv", route_prefix="/")
    print(port, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
