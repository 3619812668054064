"""Both products are products of float32, and a row's bits are its own."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tenuto_models import amx, matmul, vectors

KINDS = [
    vectors,
    pytest.param(amx, marks=pytest.mark.skipif(not amx.is_allowed(), reason="no AMX here, or no leave to use it")),
]
SIZES = [(1, 1), (3, 16), (31, 33), (32, 32), (33, 64), (17, 83), (64, 7), (576, 96), (1024, 40)]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.rsplit(".")[-1])


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def product(kind: ModuleType, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, slope: float = 1) -> np.ndarray:
    """x Wᵀ + b, with something else around all that is read and written."""
    (rows, inputs), outputs, width = x.shape, len(bias), kind.padded(len(bias)) + 5
    packed = np.concatenate([drawn(48), kind.pack(weight, bias), np.full(64, np.nan, np.float32)])
    given = np.full((rows + 2, inputs + 3), np.nan, np.float32)
    given[1:-1, 2:-1] = x
    y = np.full((rows + 2, width), 7, np.float32)
    scratch = np.full(kind.scratch_size(rows, inputs) + 99, np.nan, np.float32)
    kind.linear(
        given.ravel(), inputs + 3 + 2, inputs + 3, rows, packed, 48, inputs, outputs, y.ravel(), width + 4, width,
        np.float32(slope), scratch[: len(scratch) - 99],
    )  # fmt: skip
    assert (y[[0, -1]] == 7).all() and (y[:, :4] == 7).all() and (y[:, -1] == 7).all(), "written where nothing is asked"
    assert np.isnan(scratch[-99:]).all(), "more scratch than said"
    return y[1:-1, 4 : 4 + outputs]


def exact(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ weight.T.astype(np.float64) + bias


@kinds
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@pytest.mark.parametrize("rows", [1, 2, 6, 13, 16, 17, 32, 33, 49, 100])
def test_a_product_is_the_product(kind: ModuleType, rows: int, inputs: int, outputs: int) -> None:
    x, weight, bias = drawn(rows, inputs), drawn(outputs, inputs, seed=1), drawn(outputs, seed=2)
    y, expected = product(kind, x, weight, bias, 0.25), exact(x, weight, bias)
    # What float32 may be off by: a few roundings of what is added up.
    off = np.abs(x).astype(np.float64) @ np.abs(weight).T + np.abs(bias)
    assert (np.abs(y - np.where(expected > 0, expected, 0.25 * expected)) <= 4e-7 * off).all()


@kinds
def test_a_long_product_is_as_exact_as_float32s(kind: ModuleType) -> None:
    """Rows and columns are of very different sizes."""
    x = drawn(64, 1024) * np.float32(10) ** np.linspace(-12, 12, 64, dtype=np.float32)[:, None]
    weight = drawn(96, 1024, seed=1) * np.float32(10) ** np.linspace(-6, 6, 96, dtype=np.float32)[:, None]
    bias = np.zeros(96, np.float32)
    expected, plain = exact(x, weight, bias), x @ weight.T
    scale = np.abs(x).astype(np.float64) @ np.abs(weight).T
    own, blas = (np.abs(y - expected) / scale for y in (product(kind, x, weight, bias), plain))
    assert own.max() < 2 * blas.max() + 1e-7 and own.mean() < 2 * blas.mean() + 1e-8


@kinds
def test_what_is_left_out_has_no_trend(kind: ModuleType) -> None:
    x, weight, bias = np.abs(drawn(200, 64)), np.abs(drawn(96, 64, seed=1)), np.zeros(96, np.float32)
    expected = exact(x, weight, bias)
    assert abs((product(kind, x, weight, bias) / expected - 1).mean()) < 8e-9


@kinds
@pytest.mark.parametrize("value", [1 + 2.0**-7 - 2.0**-23, 1 / 3, 0.1, np.pi, 1 - 2.0**-24])
def test_one_product_of_two_numbers_is_exact_to_the_last_bits(kind: ModuleType, value: float) -> None:
    x = np.full((1, 1), value, np.float32)
    y = product(kind, x, x, np.zeros(1, np.float32))
    assert abs(y[0, 0] / np.float64(x[0, 0]) ** 2 - 1) <= 4 * 2.0**-24


@kinds
@pytest.mark.parametrize(("inputs", "outputs"), [(3, 16), (33, 40), (320, 96)])
def test_number_and_place_of_rows_change_no_bit(kind: ModuleType, inputs: int, outputs: int) -> None:
    x, weight, bias = drawn(290, inputs), drawn(outputs, inputs, seed=1), drawn(outputs, seed=2)
    whole = product(kind, x, weight, bias, 0.01)
    first = 0
    for rows in (1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 93):
        apart = product(kind, x[first : first + rows], weight, bias, 0.01)
        np.testing.assert_array_equal(apart, whole[first : first + rows], strict=True)
        first += rows
    assert first == 290


@kinds
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, "payload"])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_row_that_is_not_finite_harms_no_other(kind: ModuleType, rows: int, value: Any) -> None:
    x, weight, bias = drawn(rows, 70), np.abs(drawn(50, 70, seed=1)), drawn(50, seed=2)
    expected, struck = product(kind, x, weight, bias), rows // 2
    # NaNs whose lowest or whose every bit is set, too.
    lowest, all_set = np.array([0x7F800001, 0x7FFFFFFF], np.uint32).view(np.float32)
    for one in (lowest, all_set) if value == "payload" else (np.float32(value),):
        for k in (0, 16, 69):
            bad = x.copy()
            bad[struck, k] = one
            y = product(kind, bad, weight, bias)
            assert not np.isfinite(y[struck]).any()
            others = np.arange(rows) != struck
            np.testing.assert_array_equal(y[others], expected[others])


@kinds
def test_the_largest_floats_stay_finite_where_float32s_do(kind: ModuleType) -> None:
    largest = np.finfo(np.float32).max
    x, weight = (
        np.array([[largest, 0], [-largest, 0], [largest / 2, -largest]], np.float32),
        np.eye(2, dtype=np.float32),
    )
    np.testing.assert_allclose(product(kind, x, weight, np.zeros(2, np.float32)), x, rtol=3e-7)


def test_a_generic_processor_gets_vectors_and_kept_code_is_told_apart() -> None:
    program = "from tenuto_models import matmul; print(matmul.KIND.__name__, matmul.LANES, matmul.DIGEST)"
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    kind, lanes, digest = done.stdout.split()
    assert (kind, lanes) == (vectors.__name__, "4")
    assert digest.startswith(kind) and matmul.DIGEST.startswith(matmul.KIND.__name__)
    assert digest == matmul.DIGEST or matmul.KIND is amx


@pytest.mark.skipif(not amx.is_allowed(), reason="no AMX here, or no leave to use it")
@pytest.mark.parametrize("features", ["", "+avx512f", "+avx512f,+amx-tile,-amx-bf16"])
def test_code_for_another_processor_does_without_the_unit(monkeypatch: pytest.MonkeyPatch, features: str) -> None:
    monkeypatch.setattr("numba.config.CPU_FEATURES", features)
    assert not amx.is_allowed()
    monkeypatch.setattr("numba.config.CPU_FEATURES", "+avx512f,+amx-tile,+amx-bf16")
    assert amx.is_allowed()


@pytest.mark.skipif(not amx.is_allowed(), reason="no AMX here, or no leave to use it")
def test_refused_leave_means_no_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx.ctypes, "CDLL", lambda name: type("", (), {"syscall": lambda self, *a: -1})())
    assert not amx.is_allowed()
