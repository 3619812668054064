"""One client process with tenuto's own client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tenuto_bench.cases import NUM_OBSERVATIONS, RECORDED_STEPS, Order, Recording, is_start, observation_number
from tenuto_bench.loops import Loop, main, observations, stacked
from tenuto_client import AsyncRemotePolicy, AsyncRemoteVectorPolicy, TenutoError
from tenuto_client.access_files import AccessFiles

OUTPUTS = ("value",)


def _access(order: Order) -> dict[str, Any]:
    files = AccessFiles(**{name: Path(path) for name, path in order.access_files.items()})
    return {"credentials": files.credentials(), "token": files.token()}


class SessionLoop(Loop):
    """One environment."""

    failures = (TenutoError,)

    def __init__(self, order: Order, number: int, *, recorded: bool) -> None:
        super().__init__(range(number, number + 1), int(recorded))
        transport = "stream" if order.case.mode == "stream" else "unary"
        self._policy = AsyncRemotePolicy(
            order.address,
            order.case.policy,
            transport=transport,
            seed=number,
            outputs=OUTPUTS,
            timeout_s=10.0,
            **_access(order),
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

    failures = (TenutoError,)

    def __init__(self, order: Order, numbers: range, recorded: int) -> None:
        super().__init__(numbers, recorded)
        self._policy = AsyncRemoteVectorPolicy(
            order.address, len(numbers), order.case.policy, transport="stream", seed=numbers[0], outputs=OUTPUTS,
            timeout_s=10.0, **_access(order),
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


if __name__ == "__main__":
    main(loops_of)
