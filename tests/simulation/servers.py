"""The production server in a simulated process: :class:`tenuto_server.main.Server` as it is, with its own wiring,
sweeps and drain, over an outside world that :func:`outside` puts in the place of the real one.
"""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from simulation.loop import PROCESS, Process
from simulation.network import ListeningServer
from simulation.rolling import RollingPolicy, RollingStep, Weights
from tenuto_client import aio_transport, shared_stream
from tenuto_models import Checkpoint, TrainingProgress
from tenuto_server import engine as engine_module
from tenuto_server import main as main_module
from tenuto_server import reload as reload_module
from tenuto_server.arena import StateArena
from tenuto_server.config import ServerConfig
from tenuto_server.engine import Engine
from tenuto_server.guard import guarded
from tenuto_server.metrics import Metrics

POLICY = "policy"


class Repository:
    """Published versions; a folder would be that."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.versions: dict[int, Weights] = {1: Weights(1)}
        self._history: list[tuple[float, int, Weights]] = [(0.0, 1, Weights(1))]

    @property
    def newest(self) -> int:
        return max(self.versions)

    def publish(self, version: int, weights: Weights) -> None:
        """Also instead of another one, which nobody should do."""
        self.versions[version] = weights
        self._history.append((self._clock(), version, weights))

    def weights_between(self, version: int, since_s: float) -> list[Weights]:
        """What a version has been since some time."""
        found: list[Weights] = []
        for when_s, number, weights in self._history:
            if number == version:
                found = [weights] if when_s <= since_s else [*found, weights]
        return found

    def read(self, version: int) -> Checkpoint:
        weights = self.versions[version]
        policy: Any = RollingPolicy(weights)
        return Checkpoint(POLICY, version, policy, TrainingProgress(), 0.0, weights.sha256)


class VirtualEngine(Engine):
    """The production engine, whose thread is two delays: until it takes a job, and until the loop hears of it."""

    def __init__(self, device: torch.device, buckets: Any, threads: int = 1, *, deterministic: bool = False) -> None:
        self.device, self._buckets, self._threads, self._deterministic = device, tuple(buckets), threads, deterministic
        self._num_under_way = 0
        self._waiting: deque[tuple[Any, Any]] = deque()
        self._is_running = False
        self._over: deque[tuple[Any, Any, Any]] = deque()
        """Jobs that the loop is about to hear of, in order."""
        self._told_s = 0.0
        self._loop: Any = asyncio.get_running_loop()
        self._world = self._loop.world
        self._process = PROCESS.get()

    def make_step(self, policy: Any, arena: StateArena) -> Any:
        return RollingStep(policy, arena, self._world)

    def submit(self, job: Any, done: Any, *, brief: bool = False) -> None:
        if brief and not self._num_under_way:
            done(*engine_module._outcome(job))
            return
        self._num_under_way += 1
        self._waiting.append((job, done))
        self._begin()

    def _begin(self) -> None:
        if not self._is_running and self._waiting:
            self._is_running = True
            self._loop.call_later(self._world.compute_s(), self._run, *self._waiting.popleft())

    def _run(self, job: Any, done: Any) -> None:
        result, error = engine_module._outcome(job)
        if self._process is not None and self._process.is_dead:
            return
        self._over.append((done, result, error))
        self._told_s = max(self._told_s, self._loop.now_s + self._world.handover_s())
        self._loop.call_at(self._told_s, self._settle)
        self._is_running = False
        self._begin()

    def _settle(self) -> None:
        done, result, error = self._over.popleft()
        self._num_under_way -= 1
        done(result, error)

    def close(self) -> None:
        """There is no thread."""


class SimulatedServer(main_module.Server):
    """It listens to the simulated network; all else is production's."""

    async def _listen(self) -> Any:
        await self._set_health(serving=False)
        self.metrics_server: Any = SimpleNamespace(close=lambda: None, port=0)
        process = PROCESS.get()
        assert isinstance(process, ServerProcess)
        process.service = guarded(self.service, self.metrics)
        return ListeningServer(process)


class ServerProcess(Process):
    """One process of one host."""

    def __init__(self, world: Any, name: str) -> None:
        super().__init__(name)
        self.world, self.loop = world, world.loop
        self.is_listening = False
        self.service: Any = None
        self.server: SimulatedServer | None = None
        self.calls: dict[Any, None] = {}
        """Under way here."""
        self.applied: dict[tuple[int, int], int] = {}
        """Slot and generation -> the last step whose state was stored there."""
        self.replies: dict[int, dict[int, Any]] = {}
        """What the laws remember of the last steps that were answered here: session -> index -> reply."""

    @property
    def newest(self) -> int:
        """Version that new episodes begin with; 0: none."""
        policy = None if self.server is None else self.server.registry.get(POLICY)
        return 0 if policy is None else policy.newest.version

    async def run(self, config: ServerConfig) -> None:
        self.server = SimulatedServer(config)
        await self.server.run()


class Host:
    """Starts one process after another."""

    config: ServerConfig

    def __init__(self, world: Any, address: str) -> None:
        self.world, self.address = world, address
        self.process: ServerProcess | None = None
        self.num_started = 0

    def start(self) -> None:
        if self.process is not None or self.world.is_over:
            return
        self.num_started += 1
        process = self.process = ServerProcess(self.world, f"{self.address}#{self.num_started}")
        self.world.trace("start", process.name)
        process.start(process.run(self.config)).add_done_callback(partial(self._ended, process))

    def crash(self, why: str) -> None:
        """End the process at once; another one follows."""
        process = self.process
        if process is None:
            return
        self.world.trace("crash", process.name, why)
        self.world.count("crash")
        process.is_dead, self.process = True, None
        self.world.num_downs += 1
        self.world.loop.bury(process)
        self.world.network.crashed(process)
        self.world.network.later(self.world.restart_s(), self.start)

    def terminate(self) -> None:
        """Send SIGTERM."""
        process = self.process
        if process is not None and process.signals:
            self.world.trace("SIGTERM", process.name)
            self.world.count("drain")
            self.world.loop.call_soon(process.signals[signal.SIGTERM], context=process.context)

    def _ended(self, process: ServerProcess, task: asyncio.Task[None]) -> None:
        if process.is_dead:
            return
        if task.cancelled() or (error := task.exception()) is not None:
            self.world.laws.broken("no unexpected error", f"{process.name} ended with {error!r}")
            return
        self.world.trace("ended", process.name)
        process.is_dead, self.process = True, None
        self.world.num_downs += 1
        self.world.loop.bury(process)
        self.world.network.later(self.world.restart_s(), self.start)


@cache
def _metrics(device: torch.device) -> Metrics:
    """All servers count into the same: to declare every metric takes as long as a dozen steps."""
    return Metrics(device)


def _world() -> Any:
    return asyncio.get_running_loop().world  # pyright: ignore


async def _awatch(*_: Any, stop_event: asyncio.Event, rust_timeout: int, **__: Any) -> AsyncIterator[Any]:
    while not stop_event.is_set():
        try:
            await asyncio.wait_for(stop_event.wait(), rust_timeout / 1000)
        except asyncio.TimeoutError:
            yield set()


async def _no_test(*_: Any) -> None:
    """The self-test is about devices."""


def _end_at_once(error: BaseException) -> None:
    world, process = _world(), PROCESS.get()
    world.laws.broken("no unexpected error", f"a server gave itself up: {error} ({error.__cause__})")
    world.crash(process, "fatal")


@contextmanager
def outside() -> Generator[None]:
    """Put the simulated outside world in the place of clocks, threads, files and sockets, for as long as this lasts."""
    clock = SimpleNamespace(monotonic=lambda: asyncio.get_running_loop().time())
    secrets = SimpleNamespace(randbits=lambda bits: _world().rng_of("secrets").getrandbits(bits))
    collector = SimpleNamespace(collect=lambda: None, freeze=lambda: None)
    replaced: list[tuple[Any, str, Any]] = [
        (main_module, "time", clock),
        (main_module, "secrets", secrets),
        (main_module, "Engine", VirtualEngine),
        (main_module, "Metrics", _metrics),
        (main_module, "open_store", lambda url, lifetime_s: _world().disk.open()),
        (main_module, "_end_at_once", _end_at_once),
        (reload_module, "awatch", _awatch),
        (reload_module, "gc", collector),
        (reload_module, "checkpoint", SimpleNamespace(versions=lambda folder: sorted(_world().repository.versions))),
        (reload_module, "_policies", lambda repository: [POLICY]),
        (reload_module, "_identity", lambda folder: None),
        (reload_module, "_form", lambda folder: _world().repository.versions.get(int(folder.name))),
        (reload_module, "_read", lambda folder, *_: _world().repository.read(int(folder.name))),
        (reload_module.Reloader, "_test", _no_test),
        (aio_transport, "open_channel", lambda address, credentials: _world().network.channel(address)),
        (shared_stream, "open_channel", lambda address, credentials: _world().network.channel(address)),
    ]
    before = [getattr(owner, name) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(replaced, before, strict=True):
            setattr(owner, name, value)


def config(folder: Path, **changes: Any) -> ServerConfig:
    """A server's configuration; nothing in ``folder`` is ever looked at."""
    return ServerConfig(repository=folder, device="cpu", stall_exit_s=0, **changes)
