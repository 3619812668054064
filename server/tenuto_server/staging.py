"""The columns of a batch side by side in one buffer, on the host and on the device, so that they cross in one copy.

Legend: B rows of a bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT_BYTES = 16
"""Of a column's begin: what compilers of kernels hope for."""


@dataclass(frozen=True)
class Column:
    """One value of every row."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...] = ()
    """Of one row's value."""
    padding: float = 0
    """What a row of padding holds."""


@dataclass(frozen=True, eq=False)
class StagedColumns:
    """The columns of one bucket: views of the buffers, which all buckets share."""

    host: dict[str, NDArray[Any]]
    """name -> ``[B, *shape]``"""
    device: dict[str, Tensor]
    """name -> ``[B, *shape]``"""
    host_bytes: Tensor
    device_bytes: Tensor

    def send(self) -> None:
        """Copy all columns to the device. On CUDA it returns before it is done, and the current stream waits."""
        self.device_bytes.copy_(self.host_bytes, non_blocking=True)

    def fetch(self) -> None:
        """Copy all columns to the host. On CUDA it returns before it is done: synchronize before you read."""
        self.host_bytes.copy_(self.device_bytes, non_blocking=True)


class Staging:
    """Owns both buffers, large enough for the largest bucket; the host's is pinned where the device is a GPU."""

    def __init__(self, columns: Sequence[Column], max_rows: int, device: torch.device) -> None:
        self.columns = tuple(columns)
        _, num_bytes = self._places(max_rows)
        self._host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    def columns_of(self, num_rows: int) -> StagedColumns:
        """Lay out a bucket's columns. Those of another bucket stand in the same bytes."""
        places, num_bytes = self._places(num_rows)
        host, device = (
            {
                c.name: buffer[at : at + prod((num_rows, *c.shape)) * c.dtype.itemsize]
                .view(c.dtype)
                .view(num_rows, *c.shape)
                for c, at in zip(self.columns, places, strict=True)
            }
            for buffer in (self._host, self._device)
        )
        return StagedColumns(
            {name: tensor.numpy() for name, tensor in host.items()},
            device,
            self._host[:num_bytes],
            self._device[:num_bytes],
        )

    def _places(self, num_rows: int) -> tuple[list[int], int]:
        """Where each column begins, and the bytes of all."""
        places, end = list[int](), 0
        for column in self.columns:
            places.append(end)
            num_bytes = prod((num_rows, *column.shape)) * column.dtype.itemsize
            end += -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return places, end
