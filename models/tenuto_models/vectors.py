"""Matrix products on a CPU's vector registers: ``y = act(x Wᵀ + b)`` of float32, as fast for one row as its weights
can be read.

Weights are packed once, column panel by column panel, so that the innermost loop reads them in order. That loop is
written in LLVM's own terms: a tile of rows times a panel of columns stays in vector registers while it runs over K.

Every element of y is one chain of fused multiply-adds, k = 0 … K-1, that begins with the bias. How many rows there are
and where a row stands changes only which tile computes it, not a bit of it.

Legend: M rows, K inputs, N outputs; Np is N rounded up to whole vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from tenuto_models.jit import cpu_features

Array = NDArray[Any]


def _vector_registers() -> tuple[int, int, bool]:
    """Floats in a vector register of this CPU, the number of such registers, whether it can multiply and add in one."""
    features = cpu_features()
    if features.get("avx512f"):
        return 16, 32, True
    if features.get("avx2"):
        return 8, 16, bool(features.get("fma"))
    if features.get("neon"):
        return 4, 32, True
    return 4, 16, False


LANES, _NUM_REGISTERS, _FUSED = _vector_registers()
"""Floats in a vector."""
BLOCK = 96
"""Rows that go through all layers together: what they need stays in the cache, and tiles of 6 and 12 fit."""
_PANEL = 4 if _NUM_REGISTERS == 32 else 2
"""Vectors in a wide panel; what is left of N is cut into panels of one vector."""
_WIDE = _PANEL * LANES


def padded(num_outputs: int) -> int:
    """Return Np."""
    return -(-num_outputs // LANES) * LANES


def pack(weight: Array, bias: Array) -> NDArray[np.float32]:
    """Lay out ``W [N, K]`` and ``b [N]`` for :func:`linear`: panels one by one, each ``[K, width]``; then b."""
    outputs, inputs = weight.shape
    rows = np.zeros((padded(outputs), inputs), np.float32)
    rows[:outputs] = weight
    firsts = [*range(0, len(rows) // _WIDE * _WIDE, _WIDE), *range(len(rows) // _WIDE * _WIDE, len(rows), LANES)]
    panels = [rows[first:last].T.ravel() for first, last in zip(firsts, [*firsts[1:], len(rows)], strict=True)]
    return np.concatenate([*panels, np.pad(bias.astype(np.float32), (0, len(rows) - outputs))])


def scratch_size(rows: int, inputs: int) -> int:
    """Return how many floats of scratch :func:`linear` needs: none."""
    return 0


def _tile(rows: int, vectors: int) -> Any:
    """Return the product of so many rows with one panel of so many vectors, as a function for compiled code."""

    @intrinsic
    def tile(
        typing_context: Any, x: Any, x_at: Any, x_stride: Any, packed: Any, panel_at: Any, bias_at: Any, inputs: Any,
        y: Any, y_at: Any, y_stride: Any, slope: Any,
    ) -> Any:  # fmt: skip
        signature = types.void(x, x_at, x_stride, packed, panel_at, bias_at, inputs, y, y_at, y_stride, slope)
        return signature, _emit

    def _emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, x_at, x_stride, packed, panel_at, bias_at, inputs, y, y_at, y_stride, slope = arguments
        index, lane = ir.IntType(64), ir.IntType(32)
        vector = ir.VectorType(ir.FloatType(), LANES)
        undefined = ir.Constant(vector, ir.Undefined)

        def pointer(argument: int, array: Any, at: Any) -> Any:
            data = context.make_array(signature.args[argument])(context, builder, array).data
            return builder.gep(data, [at])

        def beyond(start: Any, count: Any) -> Any:
            return builder.gep(start, [count if isinstance(count, ir.Value) else index(count)])

        def load(start: Any) -> Any:
            return builder.load(builder.bitcast(start, vector.as_pointer()), align=4)

        def spread(scalar: Any) -> Any:
            first = builder.insert_element(undefined, scalar, lane(0))
            return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(lane, LANES), [0] * LANES))

        def multiply_add(a: Any, b: Any, c: Any) -> Any:
            if not _FUSED:
                return builder.fadd(builder.fmul(a, b), c)
            kind = ir.FunctionType(vector, [vector] * 3)
            return builder.call(
                cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32"), [a, b, c]
            )

        x_start, panel, bias, y_start = (
            pointer(0, x, x_at), pointer(3, packed, panel_at), pointer(3, packed, bias_at), pointer(7, y, y_at)
        )  # fmt: skip
        x_rows = [beyond(x_start, builder.mul(x_stride, index(row))) for row in range(rows)]
        biases = [load(beyond(bias, v * LANES)) for v in range(vectors)]

        before, body, after = builder.block, builder.append_basic_block("k"), builder.append_basic_block("end")
        builder.branch(body)
        builder.position_at_end(body)
        k = builder.phi(index)
        k.add_incoming(index(0), before)
        sums = [[builder.phi(vector) for _ in range(vectors)] for _ in range(rows)]
        weights = [load(beyond(panel, builder.add(builder.mul(k, index(vectors * LANES)), index(v * LANES))))
                   for v in range(vectors)]  # fmt: skip
        grown: list[list[Any]] = []
        for row in range(rows):
            value = spread(builder.load(beyond(x_rows[row], k)))
            grown.append([multiply_add(value, weights[v], sums[row][v]) for v in range(vectors)])
        following = builder.add(k, index(1))
        k.add_incoming(following, body)
        for row in range(rows):
            for v in range(vectors):
                sums[row][v].add_incoming(biases[v], before)
                sums[row][v].add_incoming(grown[row][v], body)
        builder.cbranch(builder.icmp_signed("<", following, inputs), body, after)

        builder.position_at_end(after)
        slopes, zeros = spread(slope), ir.Constant(vector, [0.0] * LANES)
        for row in range(rows):
            y_row = beyond(y_start, builder.mul(y_stride, index(row)))
            for v in range(vectors):
                value = grown[row][v]
                # NaN is not above 0 and stays NaN.
                value = builder.select(builder.fcmp_ordered(">", value, zeros), value, builder.fmul(value, slopes))
                builder.store(value, builder.bitcast(beyond(y_row, v * LANES), vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return tile


# With the panel's vectors and one value of x these fill the registers, and no more.
_six_rows, _four_rows, _two_rows, _one_row = (_tile(rows, _PANEL) for rows in (6, 4, 2, 1))
_twelve_rows_narrow, _four_rows_narrow, _one_row_narrow = (_tile(rows, 1) for rows in (12, 4, 1))
_LANES, _PANEL_WIDTH = LANES, _WIDE


@njit(nogil=True, error_model="numpy")
def linear(
    x: Array, x_at: int, x_stride: int, rows: int, packed: Array, at: int, inputs: int, outputs: int, y: Array,
    y_at: int, y_stride: int, slope: float, scratch: Array,
) -> None:  # fmt: skip
    """``y = act(x Wᵀ + b)`` with ``act(v) = v`` above 0, else ``slope v``; slope 1 is the identity.

    Flat arrays: row r of x begins at ``x_at + r x_stride``, row r of y at ``y_at + r y_stride``; what lies between N
    and Np in a row of y is overwritten. W and b stand at ``packed[at:]``, as :func:`pack` lays them out. Uses no
    ``scratch``.
    """
    all_outputs = (outputs + _LANES - 1) // _LANES * _LANES
    bias_at, column = at + all_outputs * inputs, y_at
    end = y_at + all_outputs
    while column + _PANEL_WIDTH <= end:
        row = 0
        while rows - row >= 6:
            _six_rows(x, x_at + row * x_stride, x_stride, packed, at, bias_at, inputs, y, row * y_stride + column,
                      y_stride, slope)  # fmt: skip
            row += 6
        if rows - row >= 4:
            _four_rows(x, x_at + row * x_stride, x_stride, packed, at, bias_at, inputs, y, row * y_stride + column,
                       y_stride, slope)  # fmt: skip
            row += 4
        if rows - row >= 2:
            _two_rows(x, x_at + row * x_stride, x_stride, packed, at, bias_at, inputs, y, row * y_stride + column,
                      y_stride, slope)  # fmt: skip
            row += 2
        if rows - row >= 1:
            _one_row(x, x_at + row * x_stride, x_stride, packed, at, bias_at, inputs, y, row * y_stride + column,
                     y_stride, slope)  # fmt: skip
        at, bias_at, column = at + _PANEL_WIDTH * inputs, bias_at + _PANEL_WIDTH, column + _PANEL_WIDTH
    while column < end:
        row = 0
        while rows - row >= 12:
            _twelve_rows_narrow(x, x_at + row * x_stride, x_stride, packed, at, bias_at, inputs, y,
                                row * y_stride + column, y_stride, slope)  # fmt: skip
            row += 12
        while rows - row >= 4:
            _four_rows_narrow(x, x_at + row * x_stride, x_stride, packed, at, bias_at, inputs, y,
                              row * y_stride + column, y_stride, slope)  # fmt: skip
            row += 4
        while row < rows:
            _one_row_narrow(x, x_at + row * x_stride, x_stride, packed, at, bias_at, inputs, y,
                            row * y_stride + column, y_stride, slope)  # fmt: skip
            row += 1
        at, bias_at, column = at + _LANES * inputs, bias_at + _LANES, column + _LANES
