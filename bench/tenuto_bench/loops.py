"""What every client process does, whoever's client it uses: closed loops over its sessions.

Reads an order as a line of JSON, opens its sessions, prints ``ready``, waits for a line, warms up, prints
``measuring``, measures, prints its share, and closes the sessions when its standard input ends. The event loop is
uvloop's where that is installed.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from tenuto_bench.cases import NUM_OBSERVATIONS, Case, Order, Recording, Share


class Loop(ABC):
    """The closed loop of one client object: a session, or the rows that it steps in one call."""

    failures: ClassVar[tuple[type[Exception], ...]] = ()
    """What a call may raise and the loop goes on; any other exception ends the process."""

    def __init__(self, numbers: range, recorded: int = 0) -> None:
        self.numbers, self.steps = numbers, 0
        self.recordings = [Recording(number, number) for number in numbers[:recorded]]

    @abstractmethod
    async def connect(self) -> None:
        """Open the sessions and prepare what is sent."""

    @abstractmethod
    async def call(self) -> None:
        """Make the next step of all rows and count it in ``steps``."""

    @abstractmethod
    async def close(self) -> None:
        """End the sessions."""


def main(loops_of: Callable[[Order], Sequence[Loop]]) -> None:
    """Entry point of a client process; ``loops_of`` is called in the event loop."""
    told = json.loads(sys.stdin.readline())
    order = Order(**(told | {"case": Case(**told["case"])}))
    try:
        from uvloop import run
    except ImportError:
        run = asyncio.run
    run(_run(order, loops_of))


async def _run(order: Order, loops_of: Callable[[Order], Sequence[Loop]]) -> None:
    loops = loops_of(order)
    try:
        for loop in loops:
            await loop.connect()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        print(json.dumps(asdict(await _measure(order, loops))), flush=True)
        # The sessions stay until nobody listens any more.
        await asyncio.to_thread(sys.stdin.readline)
    finally:
        # Also where not all could be opened: the server would keep the others for minutes.
        await asyncio.gather(*(loop.close() for loop in loops), return_exceptions=True)


async def _measure(order: Order, loops: Sequence[Loop]) -> Share:
    errors, latencies = Counter[str](), list[float]()

    async def drive(loop: Loop, end_s: float) -> int:
        calls = 0
        while (began_s := time.perf_counter()) < end_s:
            try:
                await loop.call()
                calls += 1
            except loop.failures as error:
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
    return Share(steps, took_s, [1e3 * s for s in latencies], cpu_s, dict(errors), recordings)


def observations(space: Any) -> list[Any]:
    """The load's observations, the same in every process."""
    space.seed(0)
    return [space.sample() for _ in range(NUM_OBSERVATIONS)]


def stacked(space: Any, rows: list[Any]) -> Any:
    """A batch in the layout of gymnasium's vector environments."""
    from gymnasium.vector.utils import concatenate, create_empty_array

    return concatenate(space, rows, create_empty_array(space, len(rows)))
