"""Matrix products on a CPU's tile unit (AMX): ``y = act(x Wᵀ + b)`` of float32 by sums of products of bfloat16.

A float32 is the sum of three bfloat16, exactly: ``x = x1 + x2 + x3``. Of the nine products of two such numbers the six
that reach a float32's last bit are added up: x3 w1, x2 w1, x2 w2, x1 w2, x1 w1, x1 w3. The unit multiplies 16 rows by
32 inputs by 16 outputs at once, 16 times as many products as a vector instruction, so that six of them still gain.

Weights stay float32 in memory, which is what few rows wait for; a block of them is split just before it is used, and
stays in the first cache for the other rows. Every element of y begins with its bias, to which the unit adds block
after block of 32 inputs in the same order, be there one row or many.

What the unit adds it rounds to nearest; numbers below 1.2e-38 are zero to it, parts of numbers among them: below some
1e-32 a product is less exact than a float32's. A value that is not finite makes its whole row NaN.

Legend: M rows, K inputs, N outputs; Kp and Np are these rounded up to multiples of 32. A tile is 1 KiB: 16 rows of 64
bytes; one of bfloat16 holds in the 32 bits at [r, c] what belongs to k = c and k = c + 16 (of x) or to k = r and
k = r + 16 (of W). Addresses and distances are in bytes.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from tenuto_models.jit import cpu_features

Array = NDArray[Any]
LANES = 32
"""Outputs are computed by so many."""
BLOCK = 256
"""Rows that go through all layers together: many, since weights are split once for all of them."""
_TILE = 1024
_SPLIT = 3 * _TILE
"""Of 16 rows or columns of a block: their first, second and third parts."""
_AHEAD = 2048
"""How far ahead of their split weights are fetched for up to 16 rows; with more the products leave time for it."""
_ORDER = ((3, 1), (2, 1), (2, 2), (1, 2), (1, 1), (1, 3))
"""Parts of x and of W that are multiplied. From one to the next only one of them changes, so that less is loaded."""
_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


def is_allowed() -> bool:
    """Whether what is compiled here may use the unit. Asks Linux for it, which holds for the whole process."""
    wanted = ("amx-tile", "amx-bf16", "avx512f")
    if sys.platform != "linux" or platform.machine() != "x86_64" or not all(map(cpu_features().get, wanted)):
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def padded(num_outputs: int) -> int:
    """Return Np."""
    return -(-num_outputs // LANES) * LANES


def pack(weight: Array, bias: Array) -> NDArray[np.float32]:
    """Lay out ``W [N, K]`` and ``b [N]`` for :func:`linear`: W as ``[Np / 32, Kp / 32, 2, 16, 2, 16]``, which are
    panel, block of inputs, half of the panel, input k of the block beside k + 16, and output; then b.
    """
    outputs, inputs = weight.shape
    n, k = padded(outputs), -(-inputs // 32) * 32
    rows = np.pad(weight.astype(np.float32), ((0, n - outputs), (0, k - inputs)))
    panels = rows.reshape(n // 32, 2, 16, k // 32, 2, 16).transpose(0, 3, 1, 5, 4, 2)
    return np.concatenate([panels.ravel(), np.pad(bias.astype(np.float32), (0, n - outputs))])


def scratch_size(rows: int, inputs: int) -> int:
    """Return how many floats of scratch :func:`linear` needs."""
    blocks = -(-inputs // 32)
    # To the next cache line; the end of a row; x split, and W split, a panel of it at least two blocks long.
    return (64 + 128 + (2 + -(-rows // 16)) * blocks * _SPLIT + 2 * _SPLIT) // 4


def _instructions(emit: Callable[..., None]) -> Any:
    """Make what emits instructions, given a builder and integers, a function for compiled code."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit(builder, *cgutils.unpack_tuple(builder, arguments[0]))
        return context.get_dummy_value()

    @intrinsic
    def function(typing_context: Any, *arguments: Any) -> Any:
        return types.void(types.StarArgUniTuple(types.int64, len(arguments))), generate

    return function


def _call(builder: Any, name: str, *arguments: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}"), arguments)


def _pointer(builder: Any, address: Any, offset: int, kind: Any = _I8) -> Any:
    return builder.inttoptr(builder.add(address, _I64(offset)), kind.as_pointer())


def _load(builder: Any, tile: int, address: Any, offset: int, stride: int = 64) -> None:
    _call(builder, "x86.tileloadd64", _I8(tile), _pointer(builder, address, offset), _I64(stride))


def _multiply_add(builder: Any, *tiles: int) -> None:
    _call(builder, "x86.tdpbf16ps", *map(_I8, tiles))


@_instructions
def _configure(builder: Any, first: Any, second: Any) -> None:
    """Begin with the unit: all tiles are zero, of 64 bytes a row, and of as many rows as the arguments' bytes say, four
    tiles each.
    """
    kind = ir.VectorType(_I32, 16)
    words: Any = ir.Constant(kind, [1, 0, 0, 0] + [0x00400040] * 4 + [0] * 8)
    for place, rows in ((12, first), (13, second)):
        words = builder.insert_element(words, builder.trunc(rows, _I32), _I32(place))
    memory = cgutils.alloca_once(builder, kind)
    builder.store(words, memory)
    _call(builder, "x86.ldtilecfg", builder.bitcast(memory, _I8.as_pointer()))


@_instructions
def _release(builder: Any) -> None:
    """End with the unit: nothing of it has to be saved when another thread's turn comes."""
    _call(builder, "x86.tilerelease")


def _split(builder: Any, source: Any, to: Any, row: int, *, rounds: bool) -> None:
    """Split 32 floats, the ``row``-th at ``source``, into three bfloat16 each: rows of the three tiles at ``to``.

    Parts are cut off, or rounded, which leaves no trend in what the three products that are left out come to.
    """
    whole, floats = ir.VectorType(_I32, 16), ir.VectorType(ir.FloatType(), 16)

    def constant(value: int) -> Any:
        return ir.Constant(whole, [value] * 16)

    def upper_half(rest: Any, part: int) -> Any:
        bits = builder.bitcast(rest, whole)
        if rounds and part < 2:
            rounded = builder.add(bits, constant(0x8000))
            if part == 0:
                # Not what would become infinite, nor what is not finite: the last part keeps a NaN.
                small = builder.icmp_unsigned("<", builder.and_(bits, constant(0x7FFFFFFF)), constant(0x7F7F8000))
                rounded = builder.select(small, rounded, bits)
            bits = rounded
        return builder.and_(bits, constant(0xFFFF0000))

    rests = [builder.load(_pointer(builder, source, 128 * row + at, floats), align=4) for at in (0, 64)]
    for part in range(3):
        halves = [upper_half(rest, part) for rest in rests]
        pairs = builder.or_(builder.lshr(halves[0], constant(16)), halves[1])
        builder.store(pairs, _pointer(builder, to, _TILE * part + 64 * row, whole), align=4)
        rests = [builder.fsub(r, builder.bitcast(h, floats)) for r, h in zip(rests, halves, strict=True)]


@_instructions
def _split_inputs(builder: Any, source: Any, to: Any) -> None:
    """Split 32 inputs of a row of x into the row ``to`` of tiles."""
    _split(builder, source, to, 0, rounds=True)


def _split_weights(builder: Any, source: Any, to: Any, row: int) -> None:
    """Split one of the 32 rows of a block of a panel, 16 of each half."""
    half = row // 16
    _split(builder, source, builder.add(to, _I64((_SPLIT - 16 * 64) * half)), row, rounds=False)


@_instructions
def _split_block(builder: Any, source: Any, to: Any) -> None:
    """Split a block of a panel."""
    for row in range(32):
        _split_weights(builder, source, to, row)


def _multiply_one(builder: Any, x: Any, next_x: Any, weights: Any) -> Iterator[None]:
    """Add to tiles 0 and 1 the product of 16 rows with a block of a panel, in steps."""
    for part in (1, 2, 3):
        _load(builder, 1 + part, x, _TILE * (part - 1))
    for half in range(2):
        for part in (1, 2, 3):
            _load(builder, 4 + part, weights, _SPLIT * half + _TILE * (part - 1))
        for x_part, part in _ORDER:
            _multiply_add(builder, half, 1 + x_part, 4 + part)
            yield


def _multiply_two(builder: Any, x: Any, next_x: Any, weights: Any) -> Iterator[None]:
    """Add to tiles 0 to 3 the product of twice 16 rows with a block of a panel, in steps."""
    loaded = 0, 0
    for x_part, part in _ORDER:
        if x_part != loaded[0]:
            _load(builder, 4, x, _TILE * (x_part - 1))
            _load(builder, 5, builder.add(x, next_x), _TILE * (x_part - 1))
        if part != loaded[1]:
            for half in range(2):
                _load(builder, 6 + half, weights, _SPLIT * half + _TILE * (part - 1))
        for row in range(2):
            for half in range(2):
                _multiply_add(builder, 2 * row + half, 4 + row, 6 + half)
            yield
        loaded = x_part, part


def _product(tiles: int, multiply: Callable[..., Iterator[None]]) -> tuple[Any, Any]:
    """Return the product of 32 rows (two tiles) or 16 (one) with a panel, once with weights that are split already,
    once with others.
    """

    @_instructions
    def load_biases(builder: Any, biases: Any) -> None:
        for row in range(tiles):
            for half in range(2):
                _load(builder, 2 * row + half, biases, 64 * half, stride=0)

    @_instructions
    def store_sums(builder: Any, y: Any, stride: Any) -> None:
        for row in range(tiles):
            start = builder.add(y, builder.mul(stride, _I64(16 * row)))
            for half in range(2):
                _call(builder, "x86.tilestored64", _I8(2 * row + half), _pointer(builder, start, 64 * half), stride)

    @_instructions
    def add_block(builder: Any, x: Any, next_x: Any, weights: Any) -> None:
        for _ in multiply(builder, x, next_x, weights):
            pass

    @_instructions
    def add_block_and_split(builder: Any, x: Any, next_x: Any, weights: Any, source: Any, to: Any) -> None:
        # 12 steps; the vector units have time for 32 splits meanwhile.
        for step, _ in enumerate(multiply(builder, x, next_x, weights)):
            for row in range(32 * step // 12, 32 * (step + 1) // 12):
                _split_weights(builder, source, to, row)
                if tiles == 1:
                    for at in (0, 64):
                        ahead = _pointer(builder, source, _AHEAD + 128 * row + at)
                        _call(builder, "prefetch.p0", ahead, _I32(0), _I32(3), _I32(1))

    @njit(nogil=True, error_model="numpy")
    def with_split(x: int, next_x: int, blocks: int, split: int, biases: int, y: int, y_stride: int) -> None:
        """``y = b + x Wᵀ``. ``x``: split rows, those of the second tile ``next_x`` bytes on; ``split``: W."""
        load_biases(biases)
        for block in range(blocks):
            add_block(x + block * _SPLIT, next_x, split + block * 2 * _SPLIT)
        store_sums(y, y_stride)

    @njit(nogil=True, error_model="numpy")
    def with_floats(
        x: int, next_x: int, blocks: int, weights: int, split: int, kept: int, biases: int, y: int, y_stride: int
    ) -> None:
        """The same; ``weights`` are split to ``split``, which has room for ``kept`` blocks."""
        load_biases(biases)
        _split_block(weights, split)
        place = 0
        for block in range(blocks - 1):
            weights, following = weights + 4096, place + 1 if place + 1 < kept else 0
            add_block_and_split(
                x + block * _SPLIT, next_x, split + place * 2 * _SPLIT, weights, split + following * 2 * _SPLIT
            )
            place = following
        add_block(x + (blocks - 1) * _SPLIT, next_x, split + place * 2 * _SPLIT)
        store_sums(y, y_stride)

    return with_split, with_floats


_one_tile_with_split, _one_tile_with_floats = _product(1, _multiply_one)
_two_tiles_with_split, _two_tiles_with_floats = _product(2, _multiply_two)


@njit(nogil=True, error_model="numpy")
def linear(
    x: Array, x_at: int, x_stride: int, rows: int, packed: Array, at: int, inputs: int, outputs: int, y: Array,
    y_at: int, y_stride: int, slope: float, scratch: Array,
) -> None:  # fmt: skip
    """``y = act(x Wᵀ + b)`` with ``act(v) = v`` above 0, else ``slope v``; slope 1 is the identity.

    Flat arrays: row r of x begins at ``x_at + r x_stride``, row r of y at ``y_at + r y_stride``; what lies between N
    and Np in a row of y is overwritten. W and b stand at ``packed[at:]``, as :func:`pack` lays them out. ``scratch``:
    see :func:`scratch_size`.
    """
    blocks, whole, rest = (inputs + 31) // 32, inputs // 32, inputs % 32
    end, kept = (outputs + 31) // 32 * 32, blocks if rows > 32 else 2
    # Whole cache lines from here on.
    skipped = -(scratch.ctypes.data // 4) % 16
    edge = scratch.ctypes.data + 4 * skipped
    split_x, tile_rows = edge + 128, blocks * _SPLIT
    split_w = split_x + (rows + 15) // 16 * tile_rows
    # In the order in which they are written.
    for first in range(0, rows, 16):
        for block in range(blocks):
            to = split_x + first // 16 * tile_rows + block * _SPLIT
            for row in range(first, min(first + 16, rows)):
                source = x.ctypes.data + 4 * (x_at + row * x_stride + 32 * block)
                if block == whole:
                    for k in range(32):
                        scratch[skipped + k] = x[x_at + row * x_stride + 32 * block + k] if k < rest else 0
                    source = edge
                _split_inputs(source, to + 64 * (row - first))
    weights, configured = packed.ctypes.data + 4 * at, 0
    biases = weights + 4 * end * 32 * blocks
    for column in range(0, end, 32):
        for row in range(0, rows, 32):
            left, to = min(32, rows - row), y.ctypes.data + 4 * (y_at + row * y_stride + column)
            start, b = split_x + row // 16 * tile_rows, biases + 4 * column
            if left != configured:
                # Rows of tiles 0 to 3, and of 4 to 7, the first of each in the lowest byte.
                if left > 16:
                    _configure(0x1010 + (left - 16) * 0x01010000, 0x10101010 - ((32 - left) << 8))
                else:
                    _configure(left * 0x01010101, 0x10101000 + left)
                configured = left
            if left > 16 and row:
                _two_tiles_with_split(start, tile_rows, blocks, split_w, b, to, 4 * y_stride)
            elif row:
                _one_tile_with_split(start, tile_rows, blocks, split_w, b, to, 4 * y_stride)
            elif left > 16:
                _two_tiles_with_floats(start, tile_rows, blocks, weights, split_w, kept, b, to, 4 * y_stride)
            else:
                _one_tile_with_floats(start, tile_rows, blocks, weights, split_w, kept, b, to, 4 * y_stride)
        weights += blocks * 4096
    _release()
    if slope != 1:
        for row in range(rows):
            values = y[y_at + row * y_stride : y_at + row * y_stride + end]
            for n in range(end):
                # NaN is not above 0 and stays NaN.
                values[n] = values[n] if values[n] > 0 else values[n] * slope
