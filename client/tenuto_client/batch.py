"""One vector step on its way: the observations of N environments as columns, cut into requests, and the answers put
together again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenuto_client.errors import TenutoError, UnexpectedReplyError
from tenuto_client.results import Timings, VectorStepResult
from tenuto_client.served import ServedPolicy
from tenuto_proto import array_from_wire, array_to_wire
from tenuto_proto.v1 import policy_pb2 as pb

Rows = NDArray[np.int64]
"""Some of the rows 0 .. N - 1, ascending."""
QUEUE_SHARE = 0.8
"""Share of an attempt's time that rows may wait for the device, so that the server's refusal still arrives in time."""


@dataclass(frozen=True)
class ObservationBatch:
    """The observations of a vector step: ``packed`` holds all N rows, ``columns`` (``[N, *shape]``) are views of it."""

    packed: list[pb.NamedTensor]
    columns: dict[str, NDArray[Any]]
    starts: NDArray[np.bool_]
    """``[N]``: a new episode begins with the row."""
    rewards: NDArray[np.float32]
    """``[N]``: of the previous action; NaN: not known."""

    @classmethod
    def pack(
        cls, served: ServedPolicy, observations: Any, starts: NDArray[np.bool_], rewards: NDArray[np.float32]
    ) -> ObservationBatch:
        """Copy the observations. Raises ObservationError."""
        packed = served.pack(observations, len(starts))
        return cls(packed, {named.name: array_from_wire(named.tensor) for named in packed}, starts, rewards)

    def merged(self, older: ObservationBatch, rows: NDArray[np.bool_]) -> ObservationBatch:
        """Return this batch with ``rows`` (``[N]``) taken from an older one. Modifies neither."""
        columns: dict[str, NDArray[Any]] = {}
        for name, column in self.columns.items():
            columns[name] = column.copy()
            columns[name][rows] = older.columns[name][rows]
        packed = [pb.NamedTensor(name=name, tensor=array_to_wire(column)) for name, column in columns.items()]
        starts = np.where(rows, older.starts, self.starts)
        return ObservationBatch(packed, columns, starts, np.where(rows, older.rewards, self.rewards))

    def equal_rows(self, other: ObservationBatch) -> NDArray[np.bool_]:
        """Which rows hold the same observation in both: ``[N]``."""
        equal = np.ones(len(self.starts), np.bool_)
        for name, column in self.columns.items():
            equal &= (column == other.columns[name]).reshape(len(column), -1).all(axis=1)
        return equal

    def chunks(self, rows: Rows, served: ServedPolicy) -> list[Rows]:
        """Cut rows into pieces that fit the server's limits on rows and bytes of a request."""
        size = max(min(len(rows), served.max_rows), 1)
        return [rows[first : first + size] for first in range(0, len(rows), size)]

    def request(
        self,
        rows: Rows,
        session_ids: NDArray[np.uint64],
        step_indices: NDArray[np.uint64],
        outputs: pb.Outputs,
        timeout_s: float,
    ) -> pb.StepBatchRequest:
        """Return the request that steps ``rows``; the other columns are all rows' ``[N]``."""
        everything = len(rows) == len(self.starts)
        request = pb.StepBatchRequest(
            session_ids=session_ids[rows].tolist(),
            step_indices=step_indices[rows].tolist(),
            observations=self.packed
            if everything
            else [pb.NamedTensor(name=n, tensor=array_to_wire(column[rows])) for n, column in self.columns.items()],
            outputs=outputs,
            queue_timeout_ms=max(int(timeout_s * QUEUE_SHARE * 1000), 1),
        )
        if (starts := self.starts[rows]).any():
            request.episode_starts.extend(starts.tolist())
        if not np.isnan(rewards := self.rewards[rows]).all():
            request.rewards.extend(rewards.tolist())
        return request


class ResultBuilder:
    """Collects the answers of a vector step's requests. Rows without an answer hold zeros or NaN."""

    def __init__(self, served: ServedPolicy, num_envs: int, outputs: frozenset[str]) -> None:
        self._served, self._num_envs = served, num_envs
        self._action_dtype, self._action_shape = served.action_dtype_and_shape
        self._actions = np.zeros((num_envs, *self._action_shape), self._action_dtype)
        self._floats: dict[str, NDArray[np.float32] | None] = {
            name: np.full(num_envs, np.nan, np.float32) if name in outputs else None for name in ("value", "log_prob")
        }
        self._wants_logits = "logits" in outputs
        self._logits: NDArray[np.float32] | None = None
        self._versions = np.zeros(num_envs, np.uint64)
        self._step_indices = np.zeros(num_envs, np.uint64)
        self._durable_steps: NDArray[np.uint64] | None = None
        self._queue_us = self._compute_us = self._batch_size = 0

    def add(
        self, rows: Rows, good: NDArray[np.bool_], reply: pb.StepBatchResponse, step_indices: NDArray[np.uint64]
    ) -> None:
        """Take the ``good`` rows of the answer to ``rows``, whose indices are among ``step_indices`` (``[N]``).

        Modifies nothing where it raises UnexpectedReplyError.
        """
        n = len(rows)
        actions = self._served.array(reply.actions, (n, *self._action_shape))
        floats = {
            name: self._served.array(tensor, (n,))
            for name, tensor in (("value", reply.values), ("log_prob", reply.log_probs))
            if self._floats[name] is not None
        }
        logits = self._served.array(reply.logits) if self._wants_logits else None
        if len(reply.versions) != n or (logits is not None and (logits.ndim != 2 or len(logits) != n)):
            raise UnexpectedReplyError(f"reply: got {len(reply.versions)} rows, expected {n}")
        if len(reply.durable_steps) not in (0, n):
            raise UnexpectedReplyError(f"reply: got {len(reply.durable_steps)} durable steps, expected {n}")
        kept = rows[good]
        if reply.durable_steps:
            if self._durable_steps is None:
                self._durable_steps = np.zeros(self._num_envs, np.uint64)
            self._durable_steps[kept] = np.asarray(reply.durable_steps, np.uint64)[good]
        self._actions[kept] = actions[good]
        for name, column in floats.items():
            target = self._floats[name]
            assert target is not None
            target[kept] = column[good]
        if logits is not None:
            if self._logits is None:
                self._logits = np.full((self._num_envs, logits.shape[1]), np.nan, np.float32)
            self._logits[kept] = logits[good]
        self._step_indices[kept] = step_indices[kept]
        self._versions[kept] = np.asarray(reply.versions, np.uint64)[good]
        self._queue_us = max(self._queue_us, reply.timings.queue_us)
        self._compute_us = max(self._compute_us, reply.timings.compute_us)
        self._batch_size = max(self._batch_size, reply.timings.batch_size)

    def build(self, errors: Mapping[int, TenutoError]) -> VectorStepResult:
        """Return the whole step."""
        return VectorStepResult(
            actions=self._actions,
            values=self._floats["value"],
            log_probs=self._floats["log_prob"],
            logits=self._logits,
            versions=self._versions,
            step_indices=self._step_indices,
            errors=dict(sorted(errors.items())),
            timings=Timings(self._queue_us, self._compute_us, self._batch_size),
            durable_steps=self._durable_steps,
        )
