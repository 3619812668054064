"""Station 2: rows that arrive in one turn of the event loop become columns, and are checked together.

Legend: n rows of a turn, O flattened observation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import nan
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tenuto_proto import ObservationCodec
from tenuto_proto.tensors import WIRE_DTYPES
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.calls import StepCall
from tenuto_server.errors import Refusal, as_refusal
from tenuto_server.policies import ServedPolicy


@dataclass(eq=False, slots=True)
class StepColumns:
    """Rows whose form is right, as columns of n."""

    session_ids: NDArray[np.uint64]
    owners: NDArray[np.int32]
    """Numbers that the session table gave to who calls; -1 where it has no session of theirs."""
    step_indices: NDArray[np.uint64]
    episode_starts: NDArray[np.bool_]
    rewards: NDArray[np.float32]
    """NaN where not known."""
    observations: NDArray[np.float32]
    """[n, O], flattened."""
    refused: dict[int, Refusal]
    """Rows whose values were refused; they go no further."""
    replayed: dict[int, int]
    """Rows that are sent again after a restart: row -> the version that answered it before."""

    def of(self, call: StepCall) -> StepColumns:
        """The rows of one call."""
        rows = slice(call.first, call.first + call.num_rows)
        return StepColumns(
            self.session_ids[rows],
            self.owners[rows],
            self.step_indices[rows],
            self.episode_starts[rows],
            self.rewards[rows],
            self.observations[rows],
            {row - call.first: refusal for row, refusal in self.refused.items() if rows.start <= row < rows.stop},
            {row - call.first: version for row, version in self.replayed.items() if rows.start <= row < rows.stop},
        )


class _Form(NamedTuple):
    """What a leaf of an observation must look like on the wire."""

    position: int
    dtype: int
    shape: tuple[int, ...]
    num_bytes: int
    """Of one row."""
    array_dtype: np.dtype[Any]
    """As it travels."""


@cache
def _forms(codec: ObservationCodec) -> dict[str, _Form]:
    return {
        leaf.name: _Form(
            position, WIRE_DTYPES[leaf.dtype], leaf.shape, leaf.dtype.itemsize * leaf.size, leaf.dtype.newbyteorder("<")
        )
        for position, leaf in enumerate(codec.leaves)
    }


def _clipped(version: int) -> int:
    """No version is as large as what the columns of the server do not hold."""
    return min(version, 2**62)


class Turn:
    """The calls of one policy that arrived together. Built on the event loop; :meth:`check` may run on a thread."""

    def __init__(self, policy: ServedPolicy) -> None:
        self.policy = policy
        self.calls: list[StepCall] = []
        self._session_ids: list[int] = []
        self._owners: list[int] = []
        """Of each call."""
        self._step_indices: list[int] = []
        self._episode_starts: list[bool] = []
        self._rewards: list[float] = []
        self._data: list[list[bytes]] = [[] for _ in policy.codec.leaves]
        self._refused: dict[int, Refusal] = {}
        self._replayed: dict[int, int] = {}
        self._columns: StepColumns | None = None
        self._forms = _forms(policy.codec)

    @property
    def num_floats(self) -> int:
        """Elements of the flattened observations."""
        return len(self._session_ids) * self.policy.codec.flat_size

    def add_row(self, call: StepCall, request: pb.StepRequest) -> None:
        """Take a Step. Raises WireError (OBSERVATION_*), and has taken nothing then."""
        self._add_observations(request.observation, None)
        call.first = len(self._session_ids)
        self.calls.append(call)
        self._session_ids.append(request.session_id)
        self._owners.append(self.policy.sessions.owner_number(call.principal.name))
        self._step_indices.append(request.step_index)
        self._episode_starts.append(request.episode_start)
        self._rewards.append(request.reward if request.HasField("reward") else nan)
        if version := request.replayed_version:
            self._replayed[call.first] = _clipped(version)

    def add_rows(self, call: StepCall, request: pb.StepBatchRequest, refused: dict[int, Refusal]) -> None:
        """Take a StepBatch whose columns are as long as they should be, but for the rows that are refused already.

        Raises WireError (OBSERVATION_*), and has taken nothing then.
        """
        n = call.num_rows
        self._add_observations(request.observations, n)
        call.first = first = len(self._session_ids)
        self.calls.append(call)
        # A slice is far cheaper than reading protobuf's list element by element.
        self._session_ids += request.session_ids[:]
        self._owners.append(self.policy.sessions.owner_number(call.principal.name))
        self._step_indices += request.step_indices[:]
        self._episode_starts += request.episode_starts[:] or [False] * n
        self._rewards += request.rewards[:] or [nan] * n
        self._refused.update((first + row, refusal) for row, refusal in refused.items())
        for row, version in enumerate(request.replayed_versions):
            if version:
                self._replayed[first + row] = _clipped(version)

    def _add_observations(self, tensors: Sequence[pb.NamedTensor], num_rows: int | None) -> None:
        lead = () if num_rows is None else (num_rows,)
        found: list[bytes | None] = [None] * len(self._data)
        for named in tensors:
            tensor = named.tensor
            form = self._forms.get(named.name)
            if form is None or found[form.position] is not None:
                break
            shape, data = tensor.shape, tensor.data
            # Lengths first: a client may claim any shape.
            if tensor.dtype != form.dtype or len(data) != form.num_bytes * (num_rows or 1):
                break
            if len(shape) != len(lead + form.shape) or tuple(shape) != lead + form.shape:
                break
            found[form.position] = data
        parts = [data for data in found if data is not None]
        if len(parts) != len(tensors) or len(parts) != len(found):
            self.policy.codec.unpack(tensors, num_rows)
            raise AssertionError("the codec takes what the turn does not")
        for column, data in zip(self._data, parts, strict=True):
            column.append(data)

    def check(self) -> StepColumns:
        """Check the values of all rows and flatten them, once; also from a thread. Returns the columns."""
        if self._columns is None:
            n, codec = len(self._session_ids), self.policy.codec
            rows: dict[str, NDArray[Any]] = {
                name: np.frombuffer(b"".join(data), form.array_dtype).reshape(n, *form.shape)
                for (name, form), data in zip(self._forms.items(), self._data, strict=True)
            }
            refused = {row: as_refusal(error) for row, error in codec.refused_rows(rows).items()}
            self._columns = StepColumns(
                np.array(self._session_ids, np.uint64),
                np.repeat(np.array(self._owners, np.int32), [call.num_rows for call in self.calls]),
                np.array(self._step_indices, np.uint64),
                np.array(self._episode_starts, np.bool_),
                np.array(self._rewards, np.float32),
                codec.flatten(rows, refused),
                refused | self._refused,
                self._replayed,
            )
        return self._columns

    def fail(self, error: Exception) -> None:
        """Answer every call that is not answered yet with a fault of ours."""
        for call in self.calls:
            call.finish(error)
