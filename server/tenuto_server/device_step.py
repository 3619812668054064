"""One version's step as a fixed sequence per bucket: on a GPU a CUDA graph of a few kernels over the arena in place,
with one copy there and one back. On a CPU the same sequence is simply called.

Legend: n rows of a batch, B rows of its bucket, O flattened observation, A raw action width, K logits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenuto_models import Policy, PolicyOutput
from tenuto_models.errors import TornError
from tenuto_models.sampling import uniforms
from tenuto_server.arena import Slots, StateArena
from tenuto_server.staging import Column, StagedColumns, Staging
from tenuto_server.step import StepResults, StepRows

if TYPE_CHECKING:
    from tenuto_models.fused import Precision

log = logging.getLogger(__name__)
_NUM_WARM_UPS = 3
"""Runs before a capture: libraries choose and load their kernels in them, and Triton compiles its own."""


def can_fuse(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device; logs why not. Without them torch's own do, many more of them."""
    if find_spec("triton") is None:
        obstacle = "Triton is not installed"
    else:
        from tenuto_models.fused import obstacle_on

        obstacle = obstacle_on(device)
    if obstacle is not None:
        log.warning(
            "steps on %s are slower than they could be, since its fused kernels do not run: %s", device, obstacle
        )
    return obstacle is None


class DeviceResults(NamedTuple):
    """What a batch came to, on the host: arrays of their own."""

    actions: NDArray[Any]
    """[n, *action shape]"""
    values: NDArray[np.float32]
    log_probs: NDArray[np.float32]
    logits: NDArray[np.float32]
    """[n, K]"""
    finite: NDArray[np.bool_]
    """Rows whose logits, value and log-probability are finite; the state of the others is as it was."""


@dataclass(frozen=True, eq=False)
class _Bucket:
    inputs: StagedColumns
    outputs: StagedColumns
    run: Callable[[], object]
    """Computes the outputs from the inputs and moves the state on, all on the device."""


class DeviceStep:
    """Advances the sessions of one policy by one of its versions. Owned by the engine's thread.

    The arena stays where it is for as long as this lives: captured graphs hold its address, and the weights'.
    """

    def __init__(
        self,
        policy: Policy,
        arena: StateArena,
        buckets: Sequence[int],
        device: torch.device,
        *,
        fused: bool | None = None,
        captured: bool | None = None,
        tiles: Precision | None = None,
    ) -> None:
        """Take a policy and an arena that are on the device.

        None is the best that is to be had there: on a GPU fused kernels (Triton) and captured graphs. ``tiles``
        replaces the library's matrix products in the fused step by products that are the same bits in every bucket, of
        that precision.
        """
        self.device = device
        on_gpu = self.device.type == "cuda"
        with self._context():
            self.is_fused = on_gpu and can_fuse(self.device) if fused is None else fused
        self.is_captured = on_gpu if captured is None else captured
        assert on_gpu or not self.is_captured, "only a GPU has graphs"
        assert self.is_fused or tiles is None, "tiles are a part of the fused step"
        self.sizes, self._prepared = tuple(sorted(buckets)), dict[int, _Bucket]()
        self._last: _Bucket | None = None
        """Whose columns the buffers hold."""
        self._spent_s = (0.0, 0.0, 0.0)
        """By the last batch, on filling its columns, on the device, and on reading the results."""
        self._state, self._policy, self._draw = arena, policy, self._draw_plainly
        self._distribution = distribution = policy.distribution.to(self.device)
        if self.is_fused:
            from tenuto_models.fused import FusedDraw, StateRows, can_draw, fix_tiles, fuse

            # The kernels address the arena's own memory.
            self._state = StateRows(arena.matrices)
            self._policy = fuse(policy, self._state)
            if tiles is not None:
                fix_tiles(self._policy, tiles)
            if can_draw(policy.distribution):
                self._draw = FusedDraw(policy.distribution, self.device)
        action = policy.distribution.to_space(policy.distribution.greedy(torch.zeros(1, distribution.num_logits)))
        self._inputs = Staging(
            [
                Column("slots", torch.int64, padding=arena.spare),
                Column("episode_starts", torch.bool, padding=True),
                Column("observations", torch.float32, (policy.observation_size,)),
                Column("uniforms", torch.float32, (distribution.num_uniforms,), padding=0.5),
                Column("deterministic", torch.bool),
            ],
            self.sizes[-1],
            self.device,
        )
        self._outputs = Staging(
            [
                Column("actions", action.dtype, tuple(action.shape[1:])),
                Column("values", torch.float32),
                Column("log_probs", torch.float32),
                Column("logits", torch.float32, (distribution.num_logits,)),
                Column("finite", torch.bool),
            ],
            self.sizes[-1],
            self.device,
        )
        self._graph_memory = torch.cuda.graph_pool_handle() if self.is_captured else None
        """Shared by all graphs: they run one after another, and nothing that stays is kept in it."""

    def expected_s(self, num_rows: int) -> float:
        """See Step: whoever waits for a GPU waits on a thread."""
        return inf

    def advance(self, rows: StepRows) -> StepResults:
        """See Step. Moving state is a part of *run* here; *gather* and *scatter* are filling what is copied there and
        reading what comes back.
        """
        draws = uniforms(rows.seeds, rows.step_indices, self._distribution.num_uniforms)
        results = self.compute(rows.slots, rows.episode_starts, rows.observations, draws, rows.deterministic)
        gather_s, run_s, scatter_s = self._spent_s
        return StepResults(rows, *results, station_s={"gather": gather_s, "run": run_s, "scatter": scatter_s})

    @torch.inference_mode()
    def compute(
        self,
        slots: Slots,
        episode_starts: NDArray[np.bool_],
        observations: NDArray[np.float32],
        uniforms: NDArray[np.float32],
        deterministic: NDArray[np.bool_],
    ) -> DeviceResults:
        """Advance n rows by one step; no slot is twice among them. Returns when the results are on the host.

        Columns ``[n]``; observations ``[n, O]``, uniforms ``[n, A]`` in (0, 1). A bucket's first call prepares it.
        Raises TornError where it fails after rows may have changed.
        """
        num_rows = len(slots)
        size = next(size for size in self.sizes if size >= num_rows)
        began_s = time.perf_counter()
        with self._context():
            self._last = bucket = self._prepared.get(size) or self._prepare(size)
            columns = (slots, episode_starts, observations, uniforms, deterministic)
            for column, values in zip(self._inputs.columns, columns, strict=True):
                staged = bucket.inputs.host[column.name]
                staged[:num_rows], staged[num_rows:] = values, column.padding
            bucket.inputs.send()
            sent_s = time.perf_counter()
            bucket.run()
            try:
                bucket.outputs.fetch()
                self._synchronize()
                ran_s = time.perf_counter()
                results = DeviceResults(*(column[:num_rows].copy() for column in bucket.outputs.host.values()))
            except Exception as error:
                raise TornError(f"a step of {num_rows} rows failed in the middle") from error
        self._spent_s = (sent_s - began_s, ran_s - sent_s, time.perf_counter() - ran_s)
        return results

    @torch.inference_mode()
    def prepare(self, size: int) -> None:
        """Make one bucket ready, which on a GPU captures its graph. Touches no session."""
        with self._context():
            if size not in self._prepared:
                self._last = self._prepare(size)

    @torch.inference_mode()
    def repeat(self) -> None:
        """Advance the rows of the last call once more with the same columns, on the device alone; does not wait for it.
        Of a bucket just prepared they are padding. For measurements.
        """
        assert self._last is not None, "nothing to repeat"
        with self._context():
            self._last.run()

    def _context(self) -> AbstractContextManager[object]:
        # Graphs, streams and Triton's kernels belong to the current device, whatever device their tensors are on.
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _prepare(self, size: int) -> _Bucket:
        inputs, outputs = self._inputs.columns_of(size), self._outputs.columns_of(size)
        for column in self._inputs.columns:
            inputs.host[column.name][:] = column.padding
        inputs.send()
        compute = partial(self._compute, inputs.device, outputs.device)
        bucket = _Bucket(inputs, outputs, self._captured(compute) if self.is_captured else compute)
        # Whoever fills the columns next must not meet a copy that is under way.
        self._synchronize()
        self._prepared[size] = bucket
        return bucket

    def _captured(self, compute: Callable[[], None]) -> Callable[[], object]:
        """Record what ``compute`` launches, after some runs that do not count, since they are of padding."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_NUM_WARM_UPS):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with the device meanwhile; the strictest mode would fail them.
        with torch.cuda.graph(graph, self._graph_memory, stream, capture_error_mode="thread_local"):
            compute()
        return graph.replay

    def _compute(self, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """Fill ``outputs [B, …]`` from ``inputs [B, …]`` and store the state of the rows that are finite.

        Nothing in here waits for the device or allocates on the host, so that it can be captured.
        """
        slots = inputs["slots"]
        state = self._state.gather(slots, inputs["episode_starts"])
        output, after = self._policy.step(inputs["observations"], state)
        self._draw(output, inputs["uniforms"], inputs["deterministic"], outputs)
        self._state.scatter(slots, after, keep=outputs["finite"])

    def _draw_plainly(
        self, output: PolicyOutput, uniforms: Tensor, deterministic: Tensor, results: Mapping[str, Tensor]
    ) -> None:
        """Draw with ``uniforms [B, A]``, or take the likeliest where ``deterministic [B]``, and fill the results."""
        distribution, logits = self._distribution, output.logits
        drawn = distribution.sample(logits, uniforms)
        raw = torch.where(deterministic.view(-1, 1), distribution.greedy(logits), drawn)
        log_probs = distribution.log_prob(logits, raw)
        finite = torch.isfinite(logits).all(dim=1) & torch.isfinite(output.value + log_probs)
        computed = (distribution.to_space(raw), output.value, log_probs, logits, finite)
        for column, result in zip(results.values(), computed, strict=True):
            column.copy_(result)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
