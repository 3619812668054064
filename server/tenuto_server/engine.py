"""The one thread that owns the device: gathers state, runs the forward pass, scatters state, one batch at a time.

Legend: B rows of a batch, padded to a bucket; O flattened observation; A raw action width; K logits.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from tenuto_models import Policy
from tenuto_models.checkpoint import TrainingProgress
from tenuto_models.sampling import uniforms
from tenuto_server.arena import SlotPool, Slots, StateArena
from tenuto_server.errors import ConfigurationError

log = logging.getLogger(__name__)
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, eq=False)
class ServedVersion:
    """One checkpoint on the device. The arena and the pool are those of its policy, shared by all its versions."""

    policy_name: str
    version: int
    policy: Policy
    training: TrainingProgress
    arena: StateArena
    pool: SlotPool


@dataclass(frozen=True)
class StepRows:
    """The rows of one or more tickets, as columns."""

    slots: Slots
    generations: NDArray[np.int64]
    observations: NDArray[np.float32]
    """[n, O]"""
    episode_starts: NDArray[np.bool_]
    seeds: NDArray[np.uint64]
    step_indices: NDArray[np.uint64]
    deterministic: NDArray[np.bool_]
    rewards: NDArray[np.float32]
    """Not used by the engine; NaN where not known."""
    session_ids: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.slots)

    @staticmethod
    def concatenate(parts: Sequence[StepRows]) -> StepRows:
        """Stack the rows of several tickets in order."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(vars(p).values() for p in parts), strict=True)
        return StepRows(*(np.concatenate(column) for column in columns))


@dataclass(frozen=True)
class StepResults:
    """What a batch came to, on the host."""

    rows: StepRows
    actions: NDArray[Any]
    """[n, *action shape]"""
    values: NDArray[np.float32]
    log_probs: NDArray[np.float32]
    logits: NDArray[np.float32]
    """[n, K]"""
    finite: NDArray[np.bool_]
    """Rows whose logits, value and log-probability are finite; the others were not applied."""
    station_s: dict[str, float]
    """Seconds spent in gather, run and scatter."""


class Engine:
    """Runs jobs in order on a thread of its own; results come back to the event loop. No job waits for another."""

    def __init__(self, device: torch.device, buckets: Sequence[int]) -> None:
        self.device, self.buckets = device, tuple(buckets)
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], T], done: Callable[[T | None, BaseException | None], None]) -> None:
        """Queue a job from the event loop; ``done(result, error)`` is called there when it is over."""
        loop = asyncio.get_running_loop()

        def work() -> None:
            try:
                result, error = job(), None
            except BaseException as caught:  # noqa: BLE001 (handed to the caller whatever it is)
                result, error = None, caught
            try:
                loop.call_soon_threadsafe(done, result, error)
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
        while (job := self._jobs.get()) is not None:
            job()

    def bucket_for(self, num_rows: int) -> int:
        """Return the smallest bucket that holds this many rows."""
        return next(size for size in self.buckets if size >= num_rows)

    @torch.inference_mode()
    def run(self, checkpoint: ServedVersion, rows: StepRows) -> StepResults:
        """Advance every row by one step. The state of a row with non-finite results is left as it was."""
        began = time.perf_counter()
        policy, arena, n = checkpoint.policy, checkpoint.arena, len(rows)
        checkpoint.pool.require_current(rows.slots, rows.generations)
        padding = self.bucket_for(n) - n
        slots = self._to_device(rows.slots, padding, fill=arena.spare)
        starts = self._to_device(rows.episode_starts, padding)
        observations = self._to_device(rows.observations, padding)
        draws = uniforms(rows.seeds, rows.step_indices, policy.distribution.num_uniforms)
        draws = self._to_device(draws, padding, fill=0.5)
        deterministic = self._to_device(rows.deterministic, padding)
        state = arena.gather(slots, starts)

        gathered = time.perf_counter()
        output, after = policy.step(observations, state)
        distribution = policy.distribution
        greedy = deterministic.view(-1, 1)
        raw = torch.where(greedy, distribution.greedy(output.logits), distribution.sample(output.logits, draws))
        actions, log_probs = distribution.to_space(raw), distribution.log_prob(output.logits, raw)
        finite = torch.isfinite(output.logits).all(dim=1) & torch.isfinite(output.value + log_probs)

        ran = time.perf_counter()
        checkpoint.pool.require_current(rows.slots, rows.generations)
        arena.scatter(slots, after, keep=finite)
        host = [t[:n].cpu().numpy() for t in (actions, output.value, log_probs, output.logits, finite)]
        scattered = time.perf_counter()
        return StepResults(
            rows, *host, station_s={"gather": gathered - began, "run": ran - gathered, "scatter": scattered - ran}
        )

    def warm(self, checkpoint: ServedVersion, bucket: int) -> NDArray[np.float32]:
        """Run one bucket of padding and return row 0's logits: the first call of a size is slow, and this is it."""
        pad = np.full(bucket, checkpoint.arena.spare)
        rows = StepRows(
            slots=pad,
            generations=checkpoint.pool.generation[pad],
            observations=np.linspace(-1, 1, checkpoint.policy.observation_size, dtype=np.float32)[None].repeat(
                bucket, 0
            ),
            episode_starts=np.ones(bucket, np.bool_),
            seeds=np.zeros(bucket, np.uint64),
            step_indices=np.zeros(bucket, np.uint64),
            deterministic=np.ones(bucket, np.bool_),
            rewards=np.zeros(bucket, np.float32),
            session_ids=np.zeros(bucket, np.uint64),
        )
        return self.run(checkpoint, rows).logits[0]

    def _to_device(self, column: NDArray[Any], padding: int, fill: float = 0) -> torch.Tensor:
        """Copy a host column ``[n, ...]`` to the device, padded to the bucket."""
        if padding:
            column = np.concatenate([column, np.full((padding, *column.shape[1:]), fill, column.dtype)])
        return torch.from_numpy(column).to(self.device)


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
