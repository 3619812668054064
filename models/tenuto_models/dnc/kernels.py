"""The DNC's small operations as compiled loops over rows: what torch would do in some hundred calls per step.

Two pairs, each a step forward and its adjoint: the LSTM's pointwise part, and one access of the memory.
:mod:`tenuto_models.dnc.addressing` has the equations in their plain form. Matrix products are torch's.

Every row is computed by itself: what stands in the other rows, and how many they are, does not change a bit of it.
All kernels stand in this one file because numba's cache on disk sees only changes of a kernel's own file.

Legend: B rows, H controller size, R read heads, W cell size, N memory cells, I interface size, S state size. Arrays are
C-contiguous. A state row holds ``h, c, read_vectors, memory, link_matrix, precedence, read_weights, write_weights,
usage_vector``. A name ``d_x`` is the gradient of the loss with respect to ``x``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload
from numpy.typing import NDArray

from tenuto_models.jit import Kernel, jit

DELTA = 1e-6
"""The reference's δ: keeps cosines and the allocation's products away from zero."""

Array = NDArray[Any]


class Sizes(NamedTuple):
    """H, N, W and R of the legend."""

    hidden: int
    cells: int
    width: int
    heads: int

    @property
    def features(self) -> int:
        """Controller output and read vectors, ``H + R W``."""
        return self.hidden + self.heads * self.width

    @property
    def interface(self) -> int:
        """I."""
        return (self.heads + 3) * self.width + 5 * self.heads + 3

    @property
    def trace(self) -> int:
        """Values of a row's access that its adjoint needs: the activated interface, cosines, weightings."""
        return self.interface + (4 * self.heads + 2) * self.cells


# Elementary functions.


def _exp_parts(x: float) -> tuple[float, float]:
    """``(2^k, e^r - 1)`` with ``e^x = 2^k e^r``; compiled, ``|r| <= ln(2) / 2``, in float32 by a polynomial that
    vectorises.
    """
    return 1.0, math.expm1(x)


@overload(_exp_parts, jit_options={"error_model": "numpy", "fastmath": {"contract"}})
def _(x: Any) -> Any:
    if x != types.float32:

        def by_libm(x: Any) -> Any:
            x = min(max(x, -708.0), 709.0)
            k = np.floor(x / math.log(2) + 0.5)
            return 2.0**k, math.expm1(x - k * math.log(2))

        return by_libm
    f = np.float32
    log2_e, half, one = f(1 / math.log(2)), f(0.5), f(1)
    lowest, highest = f(-87), f(88)  # Beyond, float32 underflows and overflows.
    # ln 2 in two parts: k times the first is exact.
    ln2_high = f(355 / 512)
    ln2_low = f(math.log(2) - 355 / 512)
    c2, c3, c4, c5, c6, c7 = (f(1 / math.factorial(i)) for i in range(2, 8))
    bias, mantissa_bits = np.int32(127), np.int32(23)

    def by_polynomial(x: Any) -> Any:
        x = min(max(x, lowest), highest)
        k = np.floor(x * log2_e + half)
        r = (x - k * ln2_high) - k * ln2_low
        e = r * (one + r * (c2 + r * (c3 + r * (c4 + r * (c5 + r * (c6 + r * c7))))))
        return np.int32((np.int32(k) + bias) << mantissa_bits).view(np.float32), e

    return by_polynomial


@jit
def _exp(x: Any) -> Any:
    scale, e = _exp_parts(x)
    return scale + scale * e


@jit
def _sigmoid(x: Any) -> Any:
    one = type(x)(1)
    return one / (one + _exp(-x))


@jit
def _tanh(x: Any) -> Any:
    # (e^2x - 1) / (e^2x + 1), the numerator without cancellation.
    one, two = type(x)(1), type(x)(2)
    scale, e = _exp_parts(two * x)
    e = scale * e + (scale - one)
    return e / (e + two)


@jit
def _softplus(x: Any) -> Any:
    # torch's threshold: above it the function is x up to rounding.
    return x if x > 20 else type(x)(math.log1p(math.exp(x)))


@jit
def _softmax(x: Array) -> None:
    """In place over ``[K]``."""
    largest = x[0]
    for k in range(1, x.size):
        largest = max(largest, x[k])
    total = type(largest)(0)
    for k in range(x.size):
        x[k] = _exp(x[k] - largest)
        total += x[k]
    for k in range(x.size):
        x[k] /= total


# The LSTM's pointwise part.


@Kernel
def lstm(gates: Array, before: Array, after: Array, features: Array, sizes: Sizes) -> None:
    """Activate ``gates [B, 4 H]`` (i, f, g, o) in place and, from the states ``before [B, S]``, fill c and h of the
    states ``after`` and h of ``features [B, H + R W]``.
    """
    size = sizes.hidden
    for b in range(gates.shape[0]):
        i, f, g, o = gates[b, :size], gates[b, size : 2 * size], gates[b, 2 * size : 3 * size], gates[b, 3 * size :]
        h, c, old_c = after[b, :size], after[b, size : 2 * size], before[b, size : 2 * size]
        for k in range(size):
            i[k] = _sigmoid(i[k])
        for k in range(size):
            f[k] = _sigmoid(f[k])
        for k in range(size):
            g[k] = _tanh(g[k])
        for k in range(size):
            o[k] = _sigmoid(o[k])
        for k in range(size):
            c[k] = f[k] * old_c[k] + i[k] * g[k]
        for k in range(size):
            h[k] = o[k] * _tanh(c[k])
        features[b, :size] = h


@Kernel
def lstm_adjoint(
    gates: Array, before: Array, after: Array, d_features: Array, d_h: Array, d_state: Array, d_gates: Array,
    sizes: Sizes,
) -> None:  # fmt: skip
    """Fill ``d_gates [B, 4 H]``, before their activations; turn c of ``d_state [B, S]`` from after to before the step.

    The gradient of h is that of ``d_features [B, H + R W]`` and ``d_h [B, H]`` together; spoils ``d_h``.
    """
    size = sizes.hidden
    tanh_c = np.empty(size, gates.dtype)
    for b in range(gates.shape[0]):
        one = type(gates[b, 0])(1)
        i, f, g, o = gates[b, :size], gates[b, size : 2 * size], gates[b, 2 * size : 3 * size], gates[b, 3 * size :]
        d_i, d_f, d_g, d_o = (
            d_gates[b, :size], d_gates[b, size : 2 * size], d_gates[b, 2 * size : 3 * size], d_gates[b, 3 * size :]
        )  # fmt: skip
        old_c, c, d_c = before[b, size : 2 * size], after[b, size : 2 * size], d_state[b, size : 2 * size]
        outside, d = d_features[b, :size], d_h[b]
        # One array filled by each loop: of more, the compiler cannot tell that they do not overlap.
        for k in range(size):
            tanh_c[k] = _tanh(c[k])
        for k in range(size):
            d[k] += outside[k]
        for k in range(size):
            d_o[k] = d[k] * tanh_c[k] * o[k] * (one - o[k])
        for k in range(size):
            d_c[k] += d[k] * o[k] * (one - tanh_c[k] * tanh_c[k])
        for k in range(size):
            d_i[k] = d_c[k] * g[k] * i[k] * (one - i[k])
        for k in range(size):
            d_f[k] = d_c[k] * old_c[k] * f[k] * (one - f[k])
        for k in range(size):
            d_g[k] = d_c[k] * i[k] * (one - g[k] * g[k])
        for k in range(size):
            d_c[k] *= f[k]


# The memory access.


@jit
def _memory_of(state: Array, sizes: Sizes) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Cut memory, link matrix, precedence, read weights, write weights and usage out of a row ``[S]``."""
    cells, width, heads = sizes.cells, sizes.width, sizes.heads
    memory = 2 * sizes.hidden + heads * width
    link = memory + cells * width
    precedence = link + cells * cells
    reads = precedence + cells
    write = reads + heads * cells
    usage = write + cells
    return (
        state[memory:link].reshape((cells, width)), state[link:precedence].reshape((cells, cells)),
        state[precedence:reads], state[reads:write].reshape((heads, cells)), state[write:usage],
        state[usage : usage + cells],
    )  # fmt: skip


@jit
def _interface_of(emitted: Array, sizes: Sizes) -> tuple[Array, Array, Array, Array, Array, Array, Array, Array, Array]:
    """Cut read keys, read strengths, write key, write strength, erase vector, write vector, free gates, the allocation
    and the write gate, and read modes out of a row ``[I]``.
    """
    width, heads = sizes.width, sizes.heads
    strengths = heads * width
    write_key = strengths + heads
    write_strength = write_key + width
    erase = write_strength + 1
    write_vector = erase + width
    free = write_vector + width
    gates = free + heads
    modes = gates + 2
    return (
        emitted[:strengths].reshape((heads, width)), emitted[strengths:write_key], emitted[write_key:write_strength],
        emitted[write_strength:erase], emitted[erase:write_vector], emitted[write_vector:free], emitted[free:gates],
        emitted[gates:modes], emitted[modes : modes + 3 * heads].reshape((heads, 3)),
    )  # fmt: skip


@jit
def _weightings_of(trace: Array, sizes: Sizes) -> tuple[Array, Array, Array, Array]:
    """Cut cosines and content weightings ``[R + 1, N]`` (the last is the write head's), backward and forward weightings
    ``[R, N]`` out of what follows the interface in a trace.
    """
    cells, heads = sizes.cells, sizes.heads
    contents = (heads + 1) * cells
    backward = contents + (heads + 1) * cells
    forward = backward + heads * cells
    return (
        trace[:contents].reshape((heads + 1, cells)), trace[contents:backward].reshape((heads + 1, cells)),
        trace[backward:forward].reshape((heads, cells)),
        trace[forward : forward + heads * cells].reshape((heads, cells)),
    )  # fmt: skip


@jit
def _activate(emitted: Array, sizes: Sizes) -> None:
    """Keys and write vector by tanh, gates and erase vector by the sigmoid, strengths by softplus, modes by softmax."""
    read_keys, read_strengths, write_key, write_strength, erase, write_vector, free, gates, modes = _interface_of(
        emitted, sizes
    )
    for r in range(sizes.heads):
        for w in range(sizes.width):
            read_keys[r, w] = _tanh(read_keys[r, w])
        read_strengths[r] = _softplus(read_strengths[r])
        free[r] = _sigmoid(free[r])
        _softmax(modes[r])
    for w in range(sizes.width):
        write_key[w], write_vector[w], erase[w] = _tanh(write_key[w]), _tanh(write_vector[w]), _sigmoid(erase[w])
    write_strength[0] = _softplus(write_strength[0])
    gates[0], gates[1] = _sigmoid(gates[0]), _sigmoid(gates[1])


@jit
def _activate_adjoint(emitted: Array, d_emitted: Array, sizes: Sizes) -> None:
    """Turn ``d_emitted [I]`` from after the activations, whose values ``emitted [I]`` holds, to before them."""
    read_keys, read_strengths, write_key, write_strength, erase, write_vector, free, gates, modes = _interface_of(
        emitted, sizes
    )
    (d_read_keys, d_read_strengths, d_write_key, d_write_strength, d_erase, d_write_vector, d_free, d_gates,
     d_modes) = _interface_of(d_emitted, sizes)  # fmt: skip
    one = type(emitted[0])(1)
    for r in range(sizes.heads):
        for w in range(sizes.width):
            d_read_keys[r, w] *= one - read_keys[r, w] * read_keys[r, w]
        # softplus' = sigmoid = 1 - e^-softplus
        d_read_strengths[r] *= -math.expm1(-read_strengths[r])
        d_free[r] *= free[r] * (one - free[r])
        inner = modes[r, 0] * d_modes[r, 0] + modes[r, 1] * d_modes[r, 1] + modes[r, 2] * d_modes[r, 2]
        for k in range(3):
            d_modes[r, k] = modes[r, k] * (d_modes[r, k] - inner)
    for w in range(sizes.width):
        d_write_key[w] *= one - write_key[w] * write_key[w]
        d_write_vector[w] *= one - write_vector[w] * write_vector[w]
        d_erase[w] *= erase[w] * (one - erase[w])
    d_write_strength[0] *= -math.expm1(-write_strength[0])
    for k in range(2):
        d_gates[k] *= gates[k] * (one - gates[k])


@jit
def _content(memory: Array, key: Array, strength: Any, norms: Array, cosine: Array, content: Array) -> None:
    """``C(M, k, β) = softmax(cos(M, k) β)``: fill cosine and content ``[N]``; ``norms [N]`` are those of the cells."""
    delta, norm = type(strength)(DELTA), _norm(key)
    for n in range(memory.shape[0]):
        cosine[n] = _dot(memory[n], key) / (norm * norms[n] + delta)
        content[n] = cosine[n] * strength
    _softmax(content)


@jit
def _content_adjoint(
    memory: Array, norms: Array, key: Array, strength: Any, cosine: Array, content: Array, d_content: Array,
    d_memory: Array, d_key: Array,
) -> Any:  # fmt: skip
    """Add to ``d_memory [N, W]``, fill ``d_key [W]``, return the gradient of the strength; spoils ``d_content [N]``."""
    zero, delta, norm = type(strength)(0), type(strength)(DELTA), _norm(key)
    d_strength, d_norm, inner = zero, zero, _dot(content, d_content)
    d_key[:] = zero
    for n in range(memory.shape[0]):
        d_score = content[n] * (d_content[n] - inner)
        d_strength += d_score * cosine[n]
        # cos = dot / (|k| |M| + δ): d_dot, and what multiplies the derivative of the denominator.
        d_dot = d_score * strength / (norm * norms[n] + delta)
        d_denominator = d_dot * cosine[n]
        d_norm += d_denominator * norms[n]
        # The derivative of a norm is the unit vector, and 0 at 0.
        shrink = d_denominator * norm / norms[n] if norms[n] > 0 else zero
        for w in range(key.size):
            d_key[w] += d_dot * memory[n, w]
            d_memory[n, w] += d_dot * key[w] - shrink * memory[n, w]
    if norm > 0:
        for w in range(key.size):
            d_key[w] -= d_norm / norm * key[w]
    return d_strength


@jit
def _dot(a: Array, b: Array) -> Any:
    total = type(a[0])(0)
    for k in range(a.size):
        total += a[k] * b[k]
    return total


@jit
def _norm(x: Array) -> Any:
    return type(x[0])(math.sqrt(_dot(x, x)))


@jit
def _norms(memory: Array, norms: Array) -> None:
    for n in range(norms.size):
        norms[n] = _norm(memory[n])


@jit
def _allocate(usage: Array, order: Array, allocation: Array) -> None:
    """``a[φ_j] = (1 - u'[φ_j]) Π_{i<j} u'[φ_i]`` with φ ascending in ``u' = δ + (1-δ) u``, ties by index."""
    one, delta = type(usage[0])(1), type(usage[0])(DELTA)
    for n in range(usage.size):
        j = n
        while j > 0 and usage[order[j - 1]] > usage[n]:
            order[j] = order[j - 1]
            j -= 1
        order[j] = n
    product = one
    for j in range(usage.size):
        floored = delta + (one - delta) * usage[order[j]]
        allocation[order[j]] = (one - floored) * product
        product *= floored


@jit
def _allocate_adjoint(usage: Array, order: Array, d_allocation: Array, products: Array, d_usage: Array) -> None:
    """Add to ``d_usage [N]``; ``products [N]`` is scratch."""
    one, delta = type(usage[0])(1), type(usage[0])(DELTA)
    product = one
    for j in range(usage.size):
        products[j] = product
        product *= delta + (one - delta) * usage[order[j]]
    later = type(one)(0)  # What the cells that follow say of every product that holds this cell.
    for j in range(usage.size - 1, -1, -1):
        floored, d = delta + (one - delta) * usage[order[j]], d_allocation[order[j]]
        d_usage[order[j]] += (one - delta) * (later / floored - d * products[j])
        later += d * (one - floored) * products[j]


@Kernel
def access(interface: Array, before: Array, after: Array, features: Array, trace: Array, sizes: Sizes) -> None:
    """Write, then read: from ``interface [B, I]``, not yet activated, and the states ``before [B, S]`` fill read
    vectors and memory of the states ``after`` and the read vectors of ``features [B, H + R W]``.

    ``trace [B, Sizes.trace]`` is for the adjoint.
    """
    cells, width, heads, hidden = sizes.cells, sizes.width, sizes.heads, sizes.hidden
    dtype, size = interface.dtype, interface.shape[1]
    order, allocation, norms = np.empty(cells, np.int64), np.empty(cells, dtype), np.empty(cells, dtype)
    for row in range(interface.shape[0]):
        emitted = trace[row, :size]
        emitted[:] = interface[row]
        _activate(emitted, sizes)
        read_keys, read_strengths, write_key, write_strength, erase, vector, free, gates, modes = _interface_of(
            emitted, sizes
        )
        cosines, contents, backward, forward = _weightings_of(trace[row, size:], sizes)
        old_memory, old_link, old_precedence, old_reads, old_write, old_usage = _memory_of(before[row], sizes)
        memory, link, precedence, reads, write, usage = _memory_of(after[row], sizes)
        one, zero = type(emitted[0])(1), type(emitted[0])(0)

        # u = (u + (1-u) ww) Π_r (1 - f_r R_r)
        for n in range(cells):
            usage[n] = old_usage[n] + (one - old_usage[n]) * old_write[n]
        for r in range(heads):
            for n in range(cells):
                usage[n] *= one - free[r] * old_reads[r, n]

        # ww = gw (ga a + (1-ga) cw)
        _allocate(usage, order, allocation)
        _norms(old_memory, norms)
        _content(old_memory, write_key, write_strength[0], norms, cosines[heads], contents[heads])
        unwritten = one
        for n in range(cells):
            write[n] = gates[1] * (gates[0] * allocation[n] + (one - gates[0]) * contents[heads, n])
            unwritten -= write[n]

        # M = M + ww (v - e M)ᵀ, L[i,j] = (1 - ww[i] - ww[j]) L[i,j] + ww[i] p[j], p = (1 - Σ ww) p + ww
        for n in range(cells):
            ww = write[n]
            for w in range(width):
                memory[n, w] = old_memory[n, w] + ww * (vector[w] - erase[w] * old_memory[n, w])
            for j in range(cells):
                link[n, j] = (one - ww - write[j]) * old_link[n, j] + ww * old_precedence[j]
            link[n, n] = zero
        for n in range(cells):
            precedence[n] = unwritten * old_precedence[n] + write[n]

        # R = π · (Lᵀ R, L R, content), r = R M
        _norms(memory, norms)
        for r in range(heads):
            _content(memory, read_keys[r], read_strengths[r], norms, cosines[r], contents[r])
            backward[r] = zero
            for n in range(cells):
                forward[r, n] = _dot(link[n], old_reads[r])
                for j in range(cells):
                    backward[r, j] += old_reads[r, n] * link[n, j]
            read_vector = features[row, hidden + r * width : hidden + (r + 1) * width]
            read_vector[:] = zero
            for n in range(cells):
                reads[r, n] = modes[r, 0] * backward[r, n] + modes[r, 1] * forward[r, n] + modes[r, 2] * contents[r, n]
            for n in range(cells):
                for w in range(width):
                    read_vector[w] += reads[r, n] * memory[n, w]
        for k in range(heads * width):
            after[row, 2 * hidden + k] = features[row, hidden + k]


@Kernel
def access_adjoint(
    trace: Array, before: Array, after: Array, d_features: Array, d_state: Array, d_interface: Array, sizes: Sizes
) -> None:
    """Fill ``d_interface [B, I]``, before its activations; turn the memory of ``d_state [B, S]`` from after to before
    the step. ``d_features [B, H + R W]`` holds the gradient of the read vectors.
    """
    cells, width, heads = sizes.cells, sizes.width, sizes.heads
    dtype, size = trace.dtype, d_interface.shape[1]
    order, allocation, products = np.empty(cells, np.int64), np.empty(cells, dtype), np.empty(cells, dtype)
    norms, d_content, d_forward = np.empty(cells, dtype), np.empty(cells, dtype), np.empty(cells, dtype)
    d_backward, d_link_reads = np.empty(cells, dtype), np.empty(cells, dtype)
    for row in range(trace.shape[0]):
        emitted = trace[row, :size]
        read_keys, read_strengths, write_key, write_strength, erase, vector, free, gates, modes = _interface_of(
            emitted, sizes
        )
        (d_read_keys, d_read_strengths, d_write_key, d_write_strength, d_erase, d_vector, d_free, d_gates,
         d_modes) = _interface_of(d_interface[row], sizes)  # fmt: skip
        cosines, contents, backward, forward = _weightings_of(trace[row, size:], sizes)
        old_memory, old_link, old_precedence, old_reads, old_write, old_usage = _memory_of(before[row], sizes)
        memory, link, _, reads, write, usage = _memory_of(after[row], sizes)
        d_memory, d_link, d_precedence, d_reads, d_write, d_usage = _memory_of(d_state[row], sizes)
        one, zero = type(emitted[0])(1), type(emitted[0])(0)

        # r = R M, R = π · (Lᵀ R, L R, content)
        _norms(memory, norms)
        for r in range(heads):
            d_read_vector = d_features[row, sizes.hidden + r * width : sizes.hidden + (r + 1) * width]
            d_read, old_read = d_reads[r], old_reads[r]
            for n in range(cells):
                d_read[n] += _dot(memory[n], d_read_vector)
                for w in range(width):
                    d_memory[n, w] += reads[r, n] * d_read_vector[w]
            d_modes[r, 0], d_modes[r, 1] = _dot(backward[r], d_read), _dot(forward[r], d_read)
            d_modes[r, 2] = _dot(contents[r], d_read)
            for n in range(cells):
                d_backward[n], d_forward[n] = modes[r, 0] * d_read[n], modes[r, 1] * d_read[n]
                d_content[n] = modes[r, 2] * d_read[n]
            d_read_strengths[r] = _content_adjoint(
                memory, norms, read_keys[r], read_strengths[r], cosines[r], contents[r], d_content, d_memory,
                d_read_keys[r],
            )  # fmt: skip
            d_link_reads[:] = zero
            for n in range(cells):
                d_read[n] = _dot(link[n], d_backward)
                for j in range(cells):
                    d_link_reads[j] += d_forward[n] * link[n, j]
                    d_link[n, j] += d_forward[n] * old_read[j] + old_read[n] * d_backward[j]
            for n in range(cells):
                d_read[n] += d_link_reads[n]

        # p = (1 - Σ ww) p + ww
        unwritten, inner = one, _dot(d_precedence, old_precedence)
        for n in range(cells):
            unwritten -= write[n]
            d_write[n] += d_precedence[n] - inner
        for n in range(cells):
            d_precedence[n] *= unwritten
        # L[i,j] = (1 - ww[i] - ww[j]) L[i,j] + ww[i] p[j], 0 where i = j; M = M + ww (v - e M)ᵀ
        d_vector[:] = zero
        d_erase[:] = zero
        for n in range(cells):
            ww, d_ww = write[n], zero
            d_link[n, n] = zero
            d, old = d_link[n], old_link[n]
            for j in range(cells):
                d_ww += d[j] * (old_precedence[j] - old[j])
            for j in range(cells):
                d_write[j] -= d[j] * old[j]
            for j in range(cells):
                d_precedence[j] += ww * d[j]
            for j in range(cells):
                d[j] *= one - ww - write[j]
            d, old = d_memory[n], old_memory[n]
            for w in range(width):
                d_ww += d[w] * (vector[w] - erase[w] * old[w])
            for w in range(width):
                d_vector[w] += d[w] * ww
            for w in range(width):
                d_erase[w] -= d[w] * ww * old[w]
            for w in range(width):
                d[w] *= one - erase[w] * ww
            d_write[n] += d_ww

        # ww = gw (ga a + (1-ga) cw)
        _allocate(usage, order, allocation)
        _norms(old_memory, norms)
        by_allocation, by_content = _dot(d_write, allocation), _dot(d_write, contents[heads])
        d_gates[0] = gates[1] * (by_allocation - by_content)
        d_gates[1] = gates[0] * by_allocation + (one - gates[0]) * by_content
        for n in range(cells):
            d_content[n] = d_write[n] * gates[1] * (one - gates[0])
        d_write_strength[0] = _content_adjoint(
            old_memory, norms, write_key, write_strength[0], cosines[heads], contents[heads], d_content, d_memory,
            d_write_key,
        )  # fmt: skip
        d_allocation = d_content
        for n in range(cells):
            d_allocation[n] = d_write[n] * gates[1] * gates[0]
        _allocate_adjoint(usage, order, d_allocation, products, d_usage)

        # u = (u + (1-u) ww) Π_r (1 - f_r R_r)
        d_free[:] = zero
        for n in range(cells):
            grown, retention = old_usage[n] + (one - old_usage[n]) * old_write[n], one
            for r in range(heads):
                retention *= one - free[r] * old_reads[r, n]
                others = one
                for other in range(heads):
                    if other != r:
                        others *= one - free[other] * old_reads[other, n]
                d = d_usage[n] * grown * others
                d_free[r] -= d * old_reads[r, n]
                d_reads[r, n] -= d * free[r]
            d_write[n] = d_usage[n] * retention * (one - old_usage[n])
            d_usage[n] *= retention * (one - old_write[n])
        _activate_adjoint(emitted, d_interface[row], sizes)
