"""Observations of one space: nested values <-> named leaves on the wire -> checked rows -> the policy's flat vector.

Works on the wire's Space, so that a client without gymnasium can use it. N is the number of rows; one observation is
a batch of one row everywhere but in :meth:`ObservationCodec.pack`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tenuto_proto.errors import WireError
from tenuto_proto.tensors import DTYPES, MAX_DIMENSIONS, WIRE_DTYPES, array_bytes, array_from_wire
from tenuto_proto.v1 import policy_pb2 as pb

Rows = dict[str, NDArray[Any]]
"""Leaf name -> ``[N, *shape]``."""
ROOT = "observation"
_FLOAT32_MAX = np.finfo(np.float32).max


@dataclass(frozen=True)
class Leaf:
    """One array of a space. ``classes`` is None for arrays that are flattened as they are, else the one-hot widths."""

    name: str
    path: tuple[str | int, ...]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    low: NDArray[Any]
    high: NDArray[Any]
    classes: NDArray[np.int64] | None

    @cached_property
    def size(self) -> int:
        """Elements of one observation."""
        return prod(self.shape)

    @cached_property
    def flat_size(self) -> int:
        """Width in the flattened observation."""
        return self.size if self.classes is None else int(self.classes.sum())

    @cached_property
    def _are_bounds_finite(self) -> bool:
        """Whether what lies within the bounds is a finite float32."""
        return bool((np.abs([self.low, self.high]) <= _FLOAT32_MAX).all())

    def flatten(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """``[N, *shape]`` -> float32 ``[N, flat_size]``, as ``gymnasium.spaces.flatten`` does row by row."""
        flat = rows.reshape(len(rows), self.size)
        if self.classes is None:
            return flat.astype(np.float32)
        one_hot = np.zeros((len(rows), self.flat_size), np.float32)
        offsets = np.concatenate([[0], np.cumsum(self.classes)[:-1]])
        columns = flat.astype(np.int64) - self.low.reshape(1, -1).astype(np.int64) + offsets
        one_hot[np.arange(len(rows))[:, None], columns] = 1
        return one_hot

    def refused_rows(self, rows: NDArray[Any]) -> dict[int, WireError]:
        """Which rows ``[N, *shape]`` hold NaN or infinity, or are not in the space: row -> error."""
        good = (rows >= self.low) & (rows <= self.high)
        if not self._are_bounds_finite:
            # Finite as float32, which the policy computes in.
            good &= np.abs(rows) <= _FLOAT32_MAX
        if np.count_nonzero(good) == good.size:
            return {}
        refused: dict[int, WireError] = {}
        bad = ~good.reshape(len(rows), -1)
        flat, low, high = rows.reshape(len(rows), -1), self.low.ravel(), self.high.ravel()
        for row in np.flatnonzero(bad.any(axis=1)).tolist():
            element = int(np.argmax(bad[row]))
            got, bounds = flat[row, element], f"{low[element]}..{high[element]}"
            reason, expected = pb.OBSERVATION_OUT_OF_SPACE, bounds
            if self.dtype.kind == "f" and not abs(got) <= _FLOAT32_MAX:
                reason, expected = pb.OBSERVATION_NOT_FINITE, "a finite float32"
            message = f"observation {self.name!r} element {element}: got {got}, expected {expected}"
            refused[row] = WireError(reason, message)
        return refused


class ObservationCodec:
    """Knows the leaves of one observation space. Immutable; safe to share between threads."""

    def __init__(self, space: pb.Space) -> None:
        """Read a space. Raises WireError where the message is not a valid space."""
        self.leaves = tuple(_leaves(space, ()))
        self.flat_size = sum(leaf.flat_size for leaf in self.leaves)
        self._by_name = {leaf.name: leaf for leaf in self.leaves}
        if len(self._by_name) != len(self.leaves):
            names = [leaf.name for leaf in self.leaves]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise WireError(
                pb.OBSERVATION_FIELDS, f"space: got several leaves named {twice}, expected one of each name"
            )
        self._children: dict[tuple[str | int, ...], set[str | int]] = {}
        for leaf in self.leaves:
            for depth, part in enumerate(leaf.path):
                self._children.setdefault(leaf.path[:depth], set()).add(part)

    def specs(self) -> list[pb.TensorSpec]:
        """Describe the leaves for GetPolicyResponse.observation."""
        return [pb.TensorSpec(name=leaf.name, dtype=WIRE_DTYPES[leaf.dtype], shape=leaf.shape) for leaf in self.leaves]

    def pack(self, observation: Any, num_rows: int | None = None) -> list[pb.NamedTensor]:
        """Pack a nested observation, or with ``num_rows`` a batch in the layout of gymnasium's vector environments
        (the same nesting, each leaf ``[num_rows, *shape]``; a Tuple's columns in a tuple, never in a list).

        Raises WireError: OBSERVATION_FIELDS for a missing or extra part, OBSERVATION_DTYPE for a value that does not
        convert without loss of kind (float to integer), OBSERVATION_SHAPE for a wrong shape.
        """
        lead = () if num_rows is None else (num_rows,)
        # A list in a batch is as likely a list of observations as a list of columns: only a tuple is clear.
        sequences = (tuple, list) if num_rows is None else (tuple,)
        columns = [array_bytes(self._column(observation, leaf, lead, sequences)) for leaf in self.leaves]
        return self.tensors(columns, num_rows)

    def pack_row(self, observation: Any) -> tuple[bytes, ...]:
        """Pack a nested observation as the bytes of its tensors, in the order of ``leaves``. Raises as :meth:`pack`."""
        return tuple([array_bytes(self._column(observation, leaf, (), (tuple, list))) for leaf in self.leaves])

    def tensors(self, columns: Iterable[bytes], num_rows: int | None) -> list[pb.NamedTensor]:
        """Return what :meth:`pack` returns: of one row as :meth:`pack_row` packs it, or of ``num_rows`` rows whose
        bytes stand one after the other in each column.
        """
        lead = () if num_rows is None else (num_rows,)
        return [
            pb.NamedTensor(
                name=leaf.name, tensor=pb.Tensor(dtype=WIRE_DTYPES[leaf.dtype], shape=lead + leaf.shape, data=column)
            )
            for leaf, column in zip(self.leaves, columns, strict=True)
        ]

    def _column(
        self, observation: Any, leaf: Leaf, lead: tuple[int, ...], sequences: tuple[type[Any], ...]
    ) -> NDArray[Any]:
        """Return one leaf of an observation, ``[*lead, *shape]`` in its dtype; perhaps the caller's own array."""
        value = np.asarray(_at(observation, leaf, self._children, sequences))
        fits = value.dtype == leaf.dtype
        if not fits and not np.can_cast(value.dtype, leaf.dtype, "same_kind") and not _is_integral(value, leaf):
            raise WireError(
                pb.OBSERVATION_DTYPE, f"observation {leaf.name!r} dtype: got {value.dtype}, expected {leaf.dtype}"
            )
        if value.shape != lead + leaf.shape:
            raise WireError(
                pb.OBSERVATION_SHAPE,
                f"observation {leaf.name!r} shape: got {value.shape}, expected {lead + leaf.shape}",
            )
        if fits:
            return value
        converted = value.astype(leaf.dtype)
        if leaf.dtype.kind != "f" and not np.array_equal(converted, value):
            raise WireError(
                pb.OBSERVATION_OUT_OF_SPACE,
                f"observation {leaf.name!r}: got {value.min()}..{value.max()}, which does not fit {leaf.dtype}",
            )
        return converted

    def unpack(self, tensors: Iterable[pb.NamedTensor], num_rows: int | None) -> Rows:
        """Unpack wire leaves into rows; ``num_rows`` None: a single observation, which becomes one row.

        Raises WireError (OBSERVATION_FIELDS, _DTYPE, _SHAPE). Values are not looked at, see :meth:`refused_rows`.
        """
        given: Rows = {}
        for named in tensors:
            leaf = self._by_name.get(named.name)
            if leaf is None or named.name in given:
                what = "twice" if leaf is not None else "which is no leaf"
                raise WireError(
                    pb.OBSERVATION_FIELDS,
                    f"observation: got {named.name!r} {what}, expected {sorted(self._by_name)}",
                )
            if named.tensor.dtype != WIRE_DTYPES[leaf.dtype]:
                got = DTYPES.get(named.tensor.dtype, named.tensor.dtype)
                raise WireError(
                    pb.OBSERVATION_DTYPE, f"observation {leaf.name!r} dtype: got {got}, expected {leaf.dtype}"
                )
            lead = () if num_rows is None else (num_rows,)
            # Compared before anything is computed from it: a client may claim any shape.
            if len(named.tensor.shape) != len(lead + leaf.shape) or tuple(named.tensor.shape) != lead + leaf.shape:
                got = f"{tuple(named.tensor.shape[:MAX_DIMENSIONS])}, {len(named.tensor.shape)} dimensions"
                raise WireError(
                    pb.OBSERVATION_SHAPE, f"observation {leaf.name!r} shape: got {got}, expected {lead + leaf.shape}"
                )
            array = array_from_wire(named.tensor)
            given[leaf.name] = array if lead else array[None]
        if len(given) != len(self.leaves):
            missing = sorted(self._by_name.keys() - given.keys())
            raise WireError(pb.OBSERVATION_FIELDS, f"observation: missing {missing}, expected {sorted(self._by_name)}")
        return given

    def refused_rows(self, rows: Rows) -> dict[int, WireError]:
        """Return the rows whose values are not in the space: row -> error (OBSERVATION_NOT_FINITE, _OUT_OF_SPACE)."""
        refused: dict[int, WireError] = {}
        for leaf in self.leaves:
            refused = leaf.refused_rows(rows[leaf.name]) | refused
        return refused

    def flatten(self, rows: Rows, refused: Iterable[int] = ()) -> NDArray[np.float32]:
        """Checked rows -> float32 ``[N, flat_size]``, equal to ``gymnasium.spaces.flatten`` of every row that is not
        refused; what stands in a refused row means nothing.
        """
        if bad := list(refused):
            rows = {leaf.name: rows[leaf.name].copy() for leaf in self.leaves}
            for leaf in self.leaves:
                rows[leaf.name][bad] = leaf.low
        parts = [leaf.flatten(rows[leaf.name]) for leaf in self.leaves]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _leaves(space: pb.Space, path: tuple[str | int, ...]) -> Iterator[Leaf]:
    kind = space.WhichOneof("kind")
    name = "/".join(str(part) for part in path) or ROOT
    if kind == "tuple":
        for i, child in enumerate(space.tuple.spaces):
            yield from _leaves(child, (*path, i))
    elif kind == "dict":
        for entry in space.dict.entries:
            yield from _leaves(entry.space, (*path, entry.key))
    elif kind == "box":
        low, high = array_from_wire(space.box.low), array_from_wire(space.box.high)
        yield Leaf(name, path, low.dtype, low.shape, low, high, None)
    elif kind == "discrete":
        d = space.discrete
        low, last, classes = np.array(d.start), np.array(d.start + d.n - 1), np.array([d.n])
        yield Leaf(name, path, DTYPES[d.dtype], (), low, last, classes)
    elif kind == "multi_discrete":
        nvec, low = (array_from_wire(t) for t in (space.multi_discrete.nvec, space.multi_discrete.start))
        yield Leaf(name, path, DTYPES[space.multi_discrete.dtype], nvec.shape, low, low + nvec - 1, nvec.ravel())
    elif kind == "multi_binary":
        shape = tuple(space.multi_binary.shape)
        low = np.zeros(shape, np.int8)
        yield Leaf(name, path, np.dtype(np.int8), shape, low, low + 1, None)
    else:
        raise WireError(pb.OBSERVATION_FIELDS, f"space {name!r}: got an empty message, expected one kind of space")


def _at(
    observation: Any,
    leaf: Leaf,
    children: Mapping[tuple[str | int, ...], set[str | int]],
    sequences: tuple[type[Any], ...],
) -> Any:
    """Follow a leaf's path into a nested observation; every level must have exactly the children that it should."""
    for depth, part in enumerate(leaf.path):
        expected = children[leaf.path[:depth]]
        if isinstance(part, str):
            fits = isinstance(observation, Mapping) and cast("Mapping[Any, Any]", observation).keys() == expected
        else:
            fits = isinstance(observation, sequences) and len(cast("list[Any]", observation)) == len(expected)
        if not fits:
            raise _misfit(observation, leaf.path[:depth], expected, sequences)
        observation = cast("Any", observation)[part]
    return observation


def _misfit(
    observation: Any, path: tuple[str | int, ...], expected: set[str | int], sequences: tuple[type[Any], ...]
) -> WireError:
    """Return the error of a level that has not the children that it should."""
    where = "/".join(str(part) for part in path) or ROOT
    is_mapping = all(isinstance(part, str) for part in expected)
    kind = "a mapping with the keys" if is_mapping else "a tuple with the positions"
    got: Any = type(observation).__name__
    if is_mapping and isinstance(observation, Mapping):
        got = sorted(cast("Mapping[Any, Any]", observation), key=str)
    elif not is_mapping and isinstance(observation, sequences):
        got = list(range(len(cast("list[Any]", observation))))
    return WireError(pb.OBSERVATION_FIELDS, f"{where}: got {got}, expected {kind} {sorted(expected, key=str)}")


def _is_integral(value: NDArray[Any], leaf: Leaf) -> bool:
    """Signed and unsigned integers and booleans may stand for each other; whether the values fit is checked after."""
    return value.dtype.kind in "iub" and leaf.dtype.kind in "iub"
