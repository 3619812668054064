"""One client process: closed loops over its sessions, with tenuto's own client.

Reads an order as a line of JSON, opens its sessions, prints ``ready``, waits for a line, warms up, prints
``measuring``, measures, prints its share, and closes the sessions when its standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np

from tenuto_bench.cases import (
    NUM_OBSERVATIONS,
    RECORDED_STEPS,
    Case,
    Order,
    Recording,
    Share,
    is_start,
    observation_number,
)
from tenuto_client import AsyncRemotePolicy, AsyncRemoteVectorPolicy, TenutoError

OUTPUTS = ("value",)


class Loop(ABC):
    """The closed loop of one policy object: a session, or the rows of a vector policy."""

    def __init__(self, numbers: range, recorded: int) -> None:
        self.numbers, self.steps = numbers, 0
        self.recordings = [Recording(number, number) for number in numbers[:recorded]]

    @abstractmethod
    async def connect(self) -> None:
        """Open the sessions and prepare what is sent."""

    @abstractmethod
    async def call(self) -> None:
        """Make the next step of all rows and record it."""

    @abstractmethod
    async def close(self) -> None:
        """End the sessions."""


class SessionLoop(Loop):
    """One environment."""

    def __init__(self, order: Order, number: int, *, recorded: bool) -> None:
        super().__init__(range(number, number + 1), int(recorded))
        transport = "stream" if order.case.mode == "stream" else "unary"
        self._policy = AsyncRemotePolicy(
            order.address, order.case.policy, transport=transport, seed=number, outputs=OUTPUTS, timeout_s=10.0
        )

    async def connect(self) -> None:
        """Open the session."""
        await self._policy.connect()
        self._observations = observations(self._policy.observation_space)

    async def call(self) -> None:
        """Make one step."""
        observation = self._observations[observation_number(self.numbers[0], self.steps)]
        result = await self._policy.step(observation, episode_start=is_start(self.steps), reward=0.0)
        if self.recordings and self.steps < RECORDED_STEPS:
            record(self.recordings[0], result.version, result.action, result.value)
        self.steps += 1

    async def close(self) -> None:
        """End the session."""
        await self._policy.close()


class VectorLoop(Loop):
    """The environments of one vector policy."""

    def __init__(self, order: Order, numbers: range, recorded: int) -> None:
        super().__init__(numbers, recorded)
        self._policy = AsyncRemoteVectorPolicy(
            order.address, len(numbers), order.case.policy, transport="stream", seed=numbers[0], outputs=OUTPUTS,
            timeout_s=10.0,
        )  # fmt: skip

    async def connect(self) -> None:
        """Open the sessions and stack what is sent."""
        await self._policy.connect()
        space = self._policy.observation_space
        single = observations(space)
        # Row i of step s sends what session i sends; it comes round every NUM_OBSERVATIONS steps.
        self._batches = [
            stacked(space, [single[observation_number(number, step)] for number in self.numbers])
            for step in range(NUM_OBSERVATIONS)
        ]
        self._rewards = np.zeros(len(self.numbers), np.float32)

    async def call(self) -> None:
        """Make one step of all rows."""
        starts = np.full(len(self.numbers), is_start(self.steps))
        batch = self._batches[self.steps % NUM_OBSERVATIONS]
        result = await self._policy.step(batch, episode_starts=starts, rewards=self._rewards)
        if self.steps < RECORDED_STEPS:
            for row, recording in enumerate(self.recordings):
                assert result.values is not None
                record(recording, result.versions[row], result.actions[row], result.values[row])
        self.steps += 1

    async def close(self) -> None:
        """End the sessions."""
        await self._policy.close()


def record(recording: Recording, version: Any, action: Any, value: Any) -> None:
    """Append one step."""
    recording.versions.append(int(version))
    recording.actions.append(np.asarray(action).tolist())
    recording.values.append(float(value))


def observations(space: Any) -> list[Any]:
    """The load's observations, the same in every process."""
    space.seed(0)
    return [space.sample() for _ in range(NUM_OBSERVATIONS)]


def stacked(space: Any, rows: list[Any]) -> Any:
    """A batch in the layout of gymnasium's vector environments."""
    from gymnasium.vector.utils import concatenate, create_empty_array

    return concatenate(space, rows, create_empty_array(space, len(rows)))


def loops_of(order: Order) -> list[Loop]:
    """The loops of this process; its first sessions are the recorded ones."""
    numbers = range(order.first, order.first + order.count)
    if order.case.mode != "batch":
        return [SessionLoop(order, n, recorded=i < order.sampled) for i, n in enumerate(numbers)]
    rows = order.case.rows
    return [
        VectorLoop(order, numbers[i : i + rows], max(0, min(rows, order.sampled - i)))
        for i in range(0, len(numbers), rows)
    ]


async def run(order: Order) -> None:
    """Connect, wait for the sign, warm up, measure, report, and close when told to."""
    loops, errors, latencies = loops_of(order), Counter[str](), list[float]()
    for loop in loops:
        await loop.connect()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)

    async def drive(loop: Loop, end_s: float) -> int:
        calls = 0
        while (began_s := time.perf_counter()) < end_s:
            try:
                await loop.call()
                calls += 1
            except TenutoError as error:
                errors[type(error).__name__] += 1
            latencies.append(time.perf_counter() - began_s)
        return calls * len(loop.numbers)

    async def drive_all(seconds: float) -> int:
        end_s = time.perf_counter() + seconds
        return sum(await asyncio.gather(*(drive(loop, end_s) for loop in loops)))

    await drive_all(order.warmup_s)
    latencies.clear()
    print("measuring", flush=True)
    began_s, cpu_s = time.perf_counter(), time.process_time()
    steps = await drive_all(order.seconds)
    took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    recordings = [recording for loop in loops for recording in loop.recordings]
    share = Share(steps, took_s, [1e3 * s for s in latencies], cpu_s, dict(errors), recordings)
    print(json.dumps(asdict(share)), flush=True)
    # The sessions stay until nobody listens any more.
    await asyncio.to_thread(sys.stdin.readline)
    await asyncio.gather(*(loop.close() for loop in loops))


def main() -> None:
    """Entry point of a client process."""
    told = json.loads(sys.stdin.readline())
    asyncio.run(run(Order(**(told | {"case": Case(**told["case"])}))))


if __name__ == "__main__":
    main()
