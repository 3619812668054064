"""Owns the device, on a thread of its own: gathers state, runs the forward pass, scatters state, a batch at a time."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

from tenuto_models import Policy, TrainingProgress
from tenuto_models.compiled import CompiledStep
from tenuto_models.errors import TornError
from tenuto_models.threads import name_thread
from tenuto_server.arena import SlotPool, StateArena
from tenuto_server.device_step import DeviceStep, can_fuse
from tenuto_server.errors import ConfigurationError, FatalError
from tenuto_server.host_step import HostStep
from tenuto_server.step import Step, StepResults, StepRows

log = logging.getLogger(__name__)
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, eq=False)
class ServedVersion:
    """One checkpoint on the device. The arena and the pool are those of its policy, shared by all its versions."""

    policy_name: str
    version: int
    training: TrainingProgress
    weights_sha256: str
    observation_size: int
    """O, floats of a flattened observation."""
    step: Step
    arena: StateArena
    pool: SlotPool


class Engine:
    """Runs jobs in order on a thread of its own; results come back to the event loop. No job waits for another.

    A brief job that finds the thread idle runs on the event loop's: handing it over and back would take longer.
    """

    def __init__(
        self, device: torch.device, buckets: Sequence[int], threads: int = 1, *, deterministic: bool = False
    ) -> None:
        """``buckets``: sizes that batches are padded to on a GPU, ascending; ``threads``: CPU threads that share a
        large batch; ``deterministic``: on a GPU take slower products whose rows do not depend on each other.
        """
        self.device, self._buckets, self._threads = device, tuple(buckets), threads
        self._deterministic = deterministic
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._num_under_way = 0
        """Jobs that are queued or run, by the event loop's count."""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def make_step(self, policy: Policy, arena: StateArena) -> Step:
        """Return what computes a policy's steps on the engine's device."""
        if self.device.type == "cpu":
            return HostStep(CompiledStep(policy, self._threads), arena)
        module = policy.to(self.device).eval().requires_grad_(False)
        # Products whose bits no company changes are slower than the library's.
        tiles = "ieee" if self._deterministic and can_fuse(self.device) else None
        return DeviceStep(module, arena, self._buckets, self.device, tiles=tiles)

    def submit(
        self, job: Callable[[], T], done: Callable[[T | None, BaseException | None], None], *, brief: bool = False
    ) -> None:
        """Queue a job from the event loop; ``done(result, error)`` is called there when it is over.

        ``brief``: it may hold the event loop up; where nothing is under way it is over, and told, before this returns.
        """
        if brief and not self._num_under_way:
            done(*_outcome(job))
            return
        loop = asyncio.get_running_loop()
        self._num_under_way += 1

        def settle(result: T | None, error: BaseException | None) -> None:
            self._num_under_way -= 1
            done(result, error)

        def work() -> None:
            result, error = _outcome(job)
            try:
                loop.call_soon_threadsafe(settle, result, error)
            except RuntimeError:
                log.warning("the event loop closed before a job of the engine was done")

        self._jobs.put(work)

    async def call(self, job: Callable[[], T]) -> T:
        """Run a job between two batches and wait for its result."""
        return await self.call_then(job, lambda result: result)

    async def call_then(self, job: Callable[[], T], then: Callable[[T], U]) -> U:
        """Run a job between two batches and wait for ``then(result)``, which the event loop computes before it hears of
        any later job.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(result: T | None, error: BaseException | None) -> None:
            if future.cancelled():
                return
            try:
                if error is not None:
                    raise error
                future.set_result(then(cast("T", result)))
            except BaseException as caught:  # noqa: BLE001 (handed to the caller whatever it is)
                future.set_exception(caught)

        self.submit(job, done)
        return await future

    def close(self) -> None:
        """Let the thread end after the jobs that are queued."""
        self._jobs.put(None)
        self._thread.join(timeout=10)

    def _work(self) -> None:
        name_thread("engine")
        while (job := self._jobs.get()) is not None:
            job()
            # Its batch would else live until the next one.
            del job

    def run(self, version: ServedVersion, rows: StepRows) -> StepResults:
        """Advance every row by one step. The state of a row with non-finite results is left as it was.

        Raises FatalError where the device is lost, or state may have changed; whatever else it raises, none has.
        """
        version.pool.require_current(rows.slots, rows.generations)
        try:
            results = version.step.advance(rows)
        except (RuntimeError, TornError) as error:
            if isinstance(error, TornError) or _is_lost(error):
                first_line = str(error.__cause__ or error).splitlines()[0]
                raise FatalError(f"{self.device} cannot be relied upon any more: {first_line}") from error
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            raise
        try:
            version.pool.require_current(rows.slots, rows.generations)
        except AssertionError as error:
            raise FatalError(str(error)) from error
        return results


def _outcome(job: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """Run a job: its result, or what it raised, whatever that is."""
    try:
        return job(), None
    except BaseException as caught:  # noqa: BLE001 (handed to the caller)
        return None, caught


def _is_lost(error: RuntimeError) -> bool:
    """Whether it is one of those errors of a GPU after which all that a process asks of it fails."""
    text = str(error)
    return not isinstance(error, torch.OutOfMemoryError) and "CUDA error" in text and "out of memory" not in text


def choose_device(name: str) -> torch.device:
    """Resolve the setting ``device``. Raises ConfigurationError where it does not exist here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"device: got {name!r}, expected cpu, cuda, cuda:N or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"device: got {name!r}, expected cpu, cuda, cuda:N or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(f"device: got {name!r}, but there are {torch.cuda.device_count()} CUDA devices")
    return device
