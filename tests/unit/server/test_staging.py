"""Columns cross side by side, in one copy, and every bucket has a layout of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import CUDA
from tenuto_server.staging import Column, Staging

COLUMNS = (
    Column("flags", torch.bool),
    Column("slots", torch.int64),
    Column("values", torch.float32, (3, 2)),
    Column("nothing", torch.float32, (0,)),
    Column("bits", torch.int8, (5,)),
)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_what_is_sent_arrives_and_what_is_fetched_comes_back(device: str) -> None:
    staging, draw = Staging(COLUMNS, 8, torch.device(device)), np.random.default_rng(0)
    for num_rows in (3, 8, 1, 3):
        staged = staging.columns_of(num_rows)
        sent = {name: draw.integers(0, 2, column.shape) for name, column in staged.host.items()}
        for name, column in sent.items():
            staged.host[name][:] = column
        staged.send()
        for column in COLUMNS:
            arrived = staged.device[column.name]
            assert arrived.shape == (num_rows, *column.shape) and arrived.dtype == column.dtype
            np.testing.assert_array_equal(arrived.cpu().numpy(), sent[column.name])
            arrived.add_(1) if column.dtype != torch.bool else arrived.logical_not_()
        staged.fetch()
        torch.cuda.synchronize() if device == "cuda" else None
        for name, column in sent.items():
            np.testing.assert_array_equal(staged.host[name], column + 1 if name != "flags" else column == 0)


def test_every_column_begins_where_kernels_like_it() -> None:
    staging = Staging(COLUMNS, 8, torch.device("cpu"))
    staged = staging.columns_of(5)
    begins = [tensor.data_ptr() - staged.device_bytes.data_ptr() for tensor in staged.device.values() if tensor.numel()]
    # 5 flags, 5 slots of 8 bytes, 5 times 6 values of 4 bytes.
    assert begins == [0, 16, 64, 192]
