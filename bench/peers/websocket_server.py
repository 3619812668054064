"""A peer of the openpi kind: msgpack over websockets, one forward pass per message, the state in the connection.

python websocket_server.py REPOSITORY    prints the port
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from websockets.asyncio.server import serve  # pyright: ignore[reportMissingImports]

from tenuto_models import Policy, checkpoint
from tenuto_models.sampling import uniforms


async def main(repository: Path) -> None:
    torch.set_num_threads(1)
    policy: Policy = checkpoint.read(repository / "frameconv" / "1").policy.eval().requires_grad_(False)
    distribution = policy.distribution

    async def handle(connection: Any) -> None:
        seed = np.array([int(await connection.recv())], np.uint64)
        state, step = policy.initial_state(1), 0
        async for message in connection:
            request = msgpack.unpackb(message)
            observation = torch.from_numpy(np.frombuffer(request["observation"], np.float32).copy()).view(1, -1)
            with torch.inference_mode():
                if request["episode_start"]:
                    state = policy.initial_state(1)
                output, state = policy.step(observation, state)
                draws = torch.from_numpy(uniforms(seed, np.array([step], np.uint64), distribution.num_uniforms))
                action = distribution.to_space(distribution.sample(output.logits, draws))
            step += 1
            reply = {"action": action.numpy().tobytes(), "value": float(output.value[0])}
            await connection.send(msgpack.packb(reply))

    async with serve(handle, "127.0.0.1", 0, compression=None, max_size=None) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
