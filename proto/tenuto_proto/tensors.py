"""Numpy arrays on the wire: dtype, shape and little-endian bytes."""

from __future__ import annotations

import sys
from math import prod
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tenuto_proto.errors import WireError
from tenuto_proto.v1 import policy_pb2 as pb

_NAMES = {value: name.removeprefix("DATA_TYPE_").lower() for name, value in pb.DataType.items() if value != 0}
DTYPES: dict[int, np.dtype[Any]] = {value: np.dtype(name) for value, name in _NAMES.items()}
WIRE_DTYPES: dict[np.dtype[Any], pb.DataType] = {dtype: cast(pb.DataType, value) for value, dtype in DTYPES.items()}
MAX_DIMENSIONS = 32
"""Of a tensor on the wire; more would make its size a very long number."""
_SWAP = sys.byteorder == "big"


def array_to_wire(array: NDArray[Any]) -> pb.Tensor:
    """Pack an array. Raises WireError (OBSERVATION_DTYPE) for a dtype that has no place on the wire."""
    tensor = pb.Tensor()
    write_array(tensor, array)
    return tensor


def write_array(tensor: pb.Tensor, array: NDArray[Any]) -> None:
    """Pack an array into an empty tensor, such as the field of a message, which is cheaper than a copy. Raises as
    :func:`array_to_wire`.
    """
    dtype = WIRE_DTYPES.get(array.dtype)
    if dtype is None:
        raise WireError(pb.OBSERVATION_DTYPE, f"dtype: got {array.dtype}, expected one of {sorted(_NAMES.values())}")
    tensor.dtype = dtype
    tensor.shape.extend(array.shape)
    tensor.data = array_bytes(array)


def array_bytes(array: NDArray[Any]) -> bytes:
    """Return the elements of an array of a wire dtype as they travel, row-major and little-endian."""
    return (array.byteswap() if _SWAP else array).tobytes()


def array_from_wire(tensor: pb.Tensor) -> NDArray[Any]:
    """Unpack a tensor; the array is read-only and shares the message's bytes.

    Raises WireError: OBSERVATION_DTYPE for an unknown dtype, OBSERVATION_SHAPE where bytes and shape disagree.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise WireError(pb.OBSERVATION_DTYPE, f"dtype: got {tensor.dtype}, expected one of {sorted(DTYPES)}")
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise WireError(
            pb.OBSERVATION_SHAPE, f"shape: got {len(tensor.shape)} dimensions, expected at most {MAX_DIMENSIONS}"
        )
    shape = tuple(tensor.shape)
    expected = prod(shape) * dtype.itemsize
    if len(tensor.data) != expected:
        raise WireError(
            pb.OBSERVATION_SHAPE,
            f"data: got {len(tensor.data)} bytes, expected {expected} for {dtype} of shape {shape}",
        )
    try:
        array = np.frombuffer(tensor.data, dtype=dtype).reshape(shape)
    except ValueError as error:  # No elements, but a dimension beyond what an array can have.
        raise WireError(pb.OBSERVATION_SHAPE, f"shape: got {shape}, which no array can have") from error
    return array.byteswap() if _SWAP else array
