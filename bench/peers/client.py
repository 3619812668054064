"""The closed loops of a peer's clients, in one process: each session sends its next step when it has its action.

python client.py websocket|triton HOST:PORT SESSIONS WARMUP_S SECONDS    prints steps, seconds, CPU and latencies
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from tenuto_bench.cases import NUM_OBSERVATIONS, is_start, observation_number

Step = Callable[[np.ndarray, bool], Awaitable[Any]]
RNG = np.random.default_rng(0)
OBSERVATIONS = [RNG.uniform(-1, 1, 32).astype(np.float32) for _ in range(NUM_OBSERVATIONS)]


@asynccontextmanager
async def websocket(address: str, session: int) -> AsyncIterator[Step]:
    """One connection per session, as openpi's clients have."""
    import msgpack
    from websockets.asyncio.client import connect

    async with connect(f"ws://{address}", compression=None, max_size=None, proxy=None) as connection:
        await connection.send(str(session))

        async def step(observation: np.ndarray, start: bool) -> Any:
            await connection.send(msgpack.packb({"observation": observation.tobytes(), "episode_start": start}))
            return msgpack.unpackb(await connection.recv())["action"]

        yield step


_triton: dict[str, Any] = {}


@asynccontextmanager
async def triton(address: str, session: int) -> AsyncIterator[Step]:
    """One channel for all sessions, unary; each session is a sequence."""
    import tritonclient.grpc.aio as client

    if address not in _triton:
        _triton[address] = client.InferenceServerClient(address)
    channel, output = _triton[address], [client.InferRequestedOutput("action")]

    async def step(observation: np.ndarray, start: bool) -> Any:
        given = client.InferInput("observation", [1, 32], "FP32")
        given.set_data_from_numpy(observation[None])
        result = await channel.infer(
            "frameconv", [given], outputs=output, sequence_id=session + 1, sequence_start=start
        )
        return result.as_numpy("action")

    yield step


async def main(kind: str, address: str, sessions: int, warmup_s: float, seconds: float) -> None:
    """Drive all sessions and print what came of it."""
    latencies: list[float] = []

    async def drive(step: Step, session: int, ends: list[float]) -> int:
        taken = counted = 0
        for i, end_s in enumerate(ends):
            while (began_s := time.perf_counter()) < end_s:
                await step(OBSERVATIONS[observation_number(session, taken)], is_start(taken))
                taken += 1
                if i:
                    counted += 1
                    latencies.append(1e3 * (time.perf_counter() - began_s))
        return counted

    async def one(session: int, ready: asyncio.Barrier, began: list[float]) -> int:
        async with (websocket if kind == "websocket" else triton)(address, session) as step:
            await ready.wait()
            if not began:
                began.append(time.perf_counter())
            return await drive(step, session, [began[0] + warmup_s, began[0] + warmup_s + seconds])

    async def cpu() -> float:
        await asyncio.sleep(warmup_s)
        print("measuring", flush=True)
        return time.process_time()

    ready, began = asyncio.Barrier(sessions + 1), list[float]()
    running = asyncio.gather(*(one(session, ready, began) for session in range(sessions)))
    await ready.wait()
    cpu_s = await cpu()
    steps = sum(await running)
    share = {"steps": steps, "seconds": seconds, "cpu_s": time.process_time() - cpu_s, "latencies_ms": latencies}
    print(json.dumps(share), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5])))
