"""One client process: sends steps at a given rate whether or not they are answered, and tells what became of them.

Reads orders from standard input, a JSON object a line, and answers each with one line. Bare stubs over streams, since
tenuto's own client would back off. A message steps the sessions of one group; refused, the group waits for its next
turn with the same step, so that what is offered does not depend on what is answered.

Legend: R rows of a message, one for each session of a group.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_proto.v1.policy_pb2_grpc import PolicyServiceStub

_EOF: Any = grpc.aio.EOF
_OPENING = 64
"""Calls to open sessions that are under way at once."""
_LAST_S = 5.0
"""Seconds that answers are waited for after the end."""


@dataclass(eq=False)
class Group:
    """Sessions that step together, and their message."""

    request: pb.StepBatchRequest
    stream: Stream
    due_s: float = 0.0
    """When the message under way should have been sent."""


class Load:
    """The groups of this process and what has become of their messages."""

    def __init__(self, address: str, deadline_ms: int) -> None:
        self.address, self.deadline_ms = address, deadline_ms
        self.loop = asyncio.get_running_loop()
        self.idle: deque[Group] = deque()
        self.closed_loop = False
        self.begin_s = self.end_s = 0.0
        self.clear()

    def clear(self) -> None:
        """Begin to count."""
        self.good = self.offered = self.unsent = self.under_way = 0
        self.failed: Counter[str] = Counter()
        self.latencies: list[float] = []
        self.refused_latencies: list[float] = []

    async def connect(self, num_groups: int, rows: int, num_streams: int) -> None:
        """Open the sessions."""
        streams = [Stream(self, self.address) for _ in range(num_streams)]
        stub = streams[0].stub
        policy = await stub.GetPolicy(pb.GetPolicyRequest())
        tensors = [
            pb.NamedTensor(
                name=leaf.name,
                tensor=pb.Tensor(
                    dtype=leaf.dtype, shape=[rows, *leaf.shape], data=bytes(4 * rows * int(np.prod(leaf.shape)))
                ),
            )
            for leaf in policy.observation
        ]
        gate = asyncio.Semaphore(_OPENING)

        async def open_one() -> int:
            async with gate:
                return (await stub.OpenSession(pb.OpenSessionRequest())).session_id

        for number in range(num_groups):
            ids = await asyncio.gather(*[open_one() for _ in range(rows)])
            request = pb.StepBatchRequest(
                session_ids=ids,
                step_indices=[0] * rows,
                observations=tensors,
                request_id=number,
                queue_timeout_ms=self.deadline_ms,
            )
            self.idle.append(Group(request, streams[number % num_streams]))

    async def run(
        self, messages_per_s: float | None, in_flight: int, warmup_s: float, seconds: float
    ) -> dict[str, Any]:
        """Send at a rate or, without one, keep so many messages under way."""
        self.clear()
        self.closed_loop = messages_per_s is None
        now_s = self.loop.time()
        self.begin_s, self.end_s = now_s + warmup_s, now_s + warmup_s + seconds
        if messages_per_s is None:
            for _ in range(min(in_flight, len(self.idle))):
                self.send(self.loop.time())
            await asyncio.sleep(self.end_s - self.loop.time())
        else:
            pauses = np.random.default_rng().exponential(1 / messages_per_s, 4096).tolist()
            due_s, number = now_s, 0
            while due_s < self.end_s:
                if (pause_s := due_s - self.loop.time()) > 0:
                    await asyncio.sleep(pause_s)
                elif number % 16 == 0:
                    # Behind: answers must be read nevertheless.
                    await asyncio.sleep(0)
                self.send(due_s)
                number += 1
                due_s += pauses[number % len(pauses)]
        self.closed_loop = False
        last_s = self.loop.time() + _LAST_S
        while self.under_way and self.loop.time() < last_s:  # noqa: ASYNC110 (it counts down)
            await asyncio.sleep(0.01)
        return {
            "seconds": seconds,
            "good": self.good,
            "offered": self.offered,
            "unsent": self.unsent,
            "unanswered": self.under_way,
            "failed": dict(self.failed),
            "latencies_ms": self.latencies,
            "refused_ms": self.refused_latencies,
        }

    def send(self, due_s: float) -> None:
        """Send the next group's message, if there is a group that is not waiting for its answer."""
        counts = self.begin_s <= due_s < self.end_s
        if not self.idle:
            self.unsent += counts
            return
        group = self.idle.popleft()
        self.offered += counts * len(group.request.session_ids)
        self.under_way += 1
        group.due_s = due_s
        group.stream.post(group)

    def answered(self, group: Group, reply: pb.StepBatchResponse) -> None:
        """Count what became of a message."""
        now_s = self.loop.time()
        self.under_way -= 1
        counts = self.begin_s <= now_s < self.end_s
        rows = len(group.request.session_ids)
        latency_ms = 1e3 * (now_s - group.due_s)
        if reply.HasField("error"):
            if counts:
                self.failed[pb.ErrorReason.Name(reply.error.reason)] += rows
                self.refused_latencies.append(latency_ms)
        else:
            failed = {e.row for e in reply.errors}
            for e in reply.errors:
                self.failed[pb.ErrorReason.Name(e.error.reason)] += counts
            indices = group.request.step_indices
            indices[:] = [index + (row not in failed) for row, index in enumerate(indices)]
            if counts and len(failed) < rows:
                self.good += rows - len(failed)
                self.latencies.append(latency_ms)
        self.idle.append(group)
        if self.closed_loop:
            self.send(now_s)


class Stream:
    """A connection with one StepStream."""

    def __init__(self, load: Load, address: str) -> None:
        self._load = load
        self.stub: Any = PolicyServiceStub(
            grpc.aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),))
        )
        self._call = self.stub.StepStream()
        self._outbox: asyncio.Queue[Group] = asyncio.Queue()
        self._groups: dict[int, Group] = {}
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]

    def post(self, group: Group) -> None:
        """Send a group's message as soon as the stream takes it."""
        self._groups[group.request.request_id] = group
        self._outbox.put_nowait(group)

    async def _write(self) -> None:
        while True:
            await self._call.write((await self._outbox.get()).request)

    async def _read(self) -> None:
        while (reply := await self._call.read()) is not _EOF:
            self._load.answered(self._groups.pop(reply.request_id), reply)


async def main() -> None:
    """Serve the orders of standard input, in the server's shadow: clients are usually on other machines."""
    os.nice(10)
    load: Load | None = None
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        if load is None:
            load = Load(order.pop("address"), order.pop("deadline_ms"))
            await load.connect(**order)
            answer: dict[str, Any] = {}
        else:
            answer = await load.run(**order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
