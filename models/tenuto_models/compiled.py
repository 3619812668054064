"""A policy's step on a CPU as one call into compiled code: state out of its rows, every layer, the choice of the
action, state back into its rows. Computes what ``Policy.step`` and the distribution compute in some hundred calls.

A row is computed by itself: neither the other rows, nor their number, nor its place among them changes a bit of it.

Legend: C rows of state, n rows of a batch, S floats of a row's state, O flattened observation, F features, H core
output, K logits, A raw action width; R, W of the DNC. "Padded" is rounded up to what products come in, see matmul.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
from numba import types
from numpy.typing import NDArray
from torch import nn

from tenuto_models import matmul, sampling
from tenuto_models.distributions import Categoricals, Gaussian
from tenuto_models.dnc import DNCCore, kernels
from tenuto_models.dnc.kernels import Sizes
from tenuto_models.errors import ConfigError, TornError
from tenuto_models.frameconv import FrameconvCore
from tenuto_models.jit import Kernel, digest, jit
from tenuto_models.matmul import BLOCK, LANES, linear, pack, padded, scratch_size
from tenuto_models.policy import Policy
from tenuto_models.sampling import uniform
from tenuto_models.threads import name_thread

Array = NDArray[Any]
_MIN_ROWS_OF_A_THREAD = 48
"""Fewer are not worth waking a thread for."""
_EPSILON = 1e-5
"""Of the layer normalisation."""
_CALLED = digest(kernels, sampling) + matmul.DIGEST
_LARGEST = float(np.finfo(np.float32).max)
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.intp))
_MONOTONIC = 1


class Net(NamedTuple):
    """A policy's weights and sizes, as kernels read them. Places are indices into a thread's scratch."""

    packed: Array
    """Weights and biases of all layers, one after another, as matmul.pack lays them out."""
    layers: Array
    """int64 ``[layers, 3]``: inputs, outputs, place in ``packed``."""
    slopes: Array
    """``[layers]``: of the activation below 0; 1 where there is none."""
    turns: Array
    """float64 ``[F / 2]`` of the sine embedding; empty where there is none."""
    strength: float
    """How much of the embedding is mixed in, 0 to 1."""
    core: int
    """The first layer of the core; those before it are the feature map and the preprocessor."""
    post: int
    """The first layer after the core."""
    actor: int
    """The first layer of the actor."""
    critic: int
    """The first layer of the critic; the actor's end."""
    width: int
    """Stride of the three buffers that layers read and write in turn, at 0, BLOCK width and 2 BLOCK width."""
    core_inputs: int
    """Place of what the core's first layer reads."""
    before: int
    """Place of the state before the step."""
    after: int
    """Place of the state after it."""
    rest: int
    """Place of what else the core needs."""
    product: int
    """Place of what a product needs, up to the scratch's end."""
    dnc: Sizes
    """Zeros for a Frameconv."""
    categories: Array
    """int64: sizes of the categoricals; empty: the action is a Gaussian's."""
    scale: Array
    """float64 ``[A]``: action = scale times raw action + shift."""
    shift: Array
    """float64 ``[A]``"""


class Batch(NamedTuple):
    """What goes into a step and what comes out of it; n rows each."""

    slots: Array
    """int64: which rows of the state."""
    episode_starts: Array
    """bool: the row's state begins at zero."""
    observations: Array
    """float32 ``[n, O]``"""
    seeds: Array
    """uint64"""
    step_indices: Array
    """uint64"""
    deterministic: Array
    """bool: the mode instead of a draw."""
    actions: Array
    """float64 ``[n, A]``, scaled and shifted, not yet in the space's dtype."""
    values: Array
    log_probs: Array
    logits: Array
    """float32 ``[n, K]``"""
    finite: Array
    """bool: all of the row's outputs are; the state of other rows is left as it was."""


@jit
def _nanoseconds(clock: Array) -> int:
    _clock_gettime(_MONOTONIC, clock.ctypes.data)
    return clock[0] * 1_000_000_000 + clock[1]


@jit
def _through(net: Net, first: int, last: int, work: Array, at: int, stride: int, rows: int, to: int, other: int) -> Any:
    """Send rows that begin at ``at`` through layers ``first`` to ``last``, which write to two buffers in turn.

    Returns where the result begins, its stride, and which of the two buffers does not hold it.
    """
    for layer in range(first, last):
        place, inputs, outputs = to * BLOCK * net.width, net.layers[layer, 0], net.layers[layer, 1]
        linear(work, at, stride, rows, net.packed, net.layers[layer, 2], inputs, outputs, work, place, net.width,
               net.slopes[layer], work[net.product :])  # fmt: skip
        at, stride, to, other = place, net.width, other, to
    return at, stride, to


@jit
def _normalise(x: Array) -> None:
    """Layer normalisation of ``[F]`` in place, without gain and offset."""
    size = np.float32(x.size)
    mean = np.float32(0)
    for k in range(x.size):
        mean += x[k]
    mean /= size
    variance = np.float32(0)
    for k in range(x.size):
        x[k] -= mean
        variance += x[k] * x[k]
    factor = np.float32(1) / np.float32(math.sqrt(variance / size + np.float32(_EPSILON)))
    for k in range(x.size):
        x[k] *= factor


@jit
def _sine(turns: Any) -> Any:
    """``sin(2π turns)`` by its series over a quarter turn; no branch, so that loops over it use vectors."""
    f = np.float32
    x = turns - f(np.floor(turns + f(0.5)))
    # Half a turn minus x has the same sine; what is left lies within a quarter.
    x = min(max(x, f(-0.5) - x), f(0.5) - x)
    y = x * f(2 * math.pi)
    z = y * y
    return y * (f(1) + z * (f(-1 / 6) + z * (f(1 / 120) + z * (f(-1 / 5040) + z * (
        f(1 / 362880) + z * (f(-1 / 39916800) + z * f(1 / 6227020800)))))))  # fmt: skip


@jit
def _embed(x: Array, step: int, turns: Array, strength: Any) -> None:
    """``x = (1-s) x + s PE[t]`` in place, see embedding.py."""
    rest = np.float32(1) - strength
    for i in range(x.size // 2):
        # In float64 until whole turns are gone, so that late steps are as exact as early ones.
        phase = step * turns[i]
        turn = np.float32(phase - np.floor(phase))
        x[2 * i] = rest * x[2 * i] + strength * _sine(turn)
        x[2 * i + 1] = rest * x[2 * i + 1] + strength * _sine(turn + np.float32(0.25))
    if x.size % 2:
        phase = step * turns[x.size // 2]
        x[x.size - 1] = rest * x[x.size - 1] + strength * _sine(np.float32(phase - np.floor(phase)))


@jit
def _features(net: Net, batch: Batch, first: int, rows: int, steps: Array, work: Array) -> Any:
    """Feature map, embedding and preprocessor; returns as :func:`_through`."""
    inputs, outputs, place = net.layers[0]
    flat = batch.observations.reshape(batch.observations.size)
    linear(flat, first * inputs, inputs, rows, net.packed, place, inputs, outputs, work, 0, net.width, net.slopes[0],
           work[net.product :])  # fmt: skip
    for r in range(rows):
        x = work[r * net.width : r * net.width + outputs]
        _normalise(x)
        if net.turns.size:
            _embed(x, steps[r], net.turns, np.float32(net.strength))
    return _through(net, 1, net.core, work, 0, net.width, rows, 1, 0)


@jit
def _frameconv(net: Net, work: Array, at: int, stride: int, rows: int, size: int, free: int) -> Any:
    """The core: frames are the window and, newest, the features; the window moves on by one. Returns as _through."""
    features = net.layers[net.core, 0] - size
    for r in range(rows):
        frames = work[net.core_inputs + r * (size + features) : net.core_inputs + (r + 1) * (size + features)]
        frames[:size] = work[net.before + r * size : net.before + (r + 1) * size]
        frames[size:] = work[at + r * stride : at + r * stride + features]
        work[net.after + r * size : net.after + (r + 1) * size] = frames[features:]
    return _through(net, net.core, net.core + 1, work, net.core_inputs, size + features, rows, free, 1 - free)


_lstm, _access = kernels.lstm.inner, kernels.access.inner


@jit
def _dnc(net: Net, work: Array, at: int, stride: int, rows: int, size: int, free: int) -> Any:
    """The core: controller, memory access, output layer. Returns as _through."""
    sizes = net.dnc
    hidden, read = sizes.hidden, sizes.heads * sizes.width
    inputs, outputs, place = net.layers[net.core]
    given = inputs - hidden - read
    for r in range(rows):
        x = work[net.core_inputs + r * inputs : net.core_inputs + (r + 1) * inputs]
        state = work[net.before + r * size : net.before + (r + 1) * size]
        x[:given] = work[at + r * stride : at + r * stride + given]
        x[given : given + read] = state[2 * hidden : 2 * hidden + read]
        x[given + read :] = state[:hidden]
    before = work[net.before : net.before + rows * size].reshape((rows, size))
    after = work[net.after : net.after + rows * size].reshape((rows, size))
    place_of = net.rest
    gates_width = (outputs + LANES - 1) // LANES * LANES
    gates = work[place_of : place_of + rows * gates_width].reshape((rows, gates_width))
    linear(work, net.core_inputs, inputs, rows, net.packed, place, inputs, outputs, work, place_of, gates_width,
           net.slopes[net.core], work[net.product :])  # fmt: skip
    place_of += rows * gates_width
    features = work[place_of : place_of + rows * (hidden + read)].reshape((rows, hidden + read))
    features_at = place_of
    _lstm(gates, before, after, features, sizes)
    place_of += rows * (hidden + read)
    inputs, outputs, place = net.layers[net.core + 1]
    interface_width = (outputs + LANES - 1) // LANES * LANES
    interface = work[place_of : place_of + rows * interface_width].reshape((rows, interface_width))
    linear(work, features_at, hidden + read, rows, net.packed, place, inputs, outputs, work, place_of,
           interface_width, net.slopes[net.core + 1], work[net.product :])  # fmt: skip
    place_of += rows * interface_width
    trace_width = interface_width + (4 * sizes.heads + 2) * sizes.cells
    trace = work[place_of : place_of + rows * trace_width].reshape((rows, trace_width))
    _access(interface, before, after, features, trace, sizes)
    return _through(net, net.core + 2, net.core + 3, work, features_at, hidden + read, rows, free, 1 - free)


@jit
def _quantile(u: float) -> float:
    """The standard normal's quantile of u in (0, 1): Hastings' estimate (Abramowitz and Stegun 26.2.22), then two steps
    of Halley's method.
    """
    tail = min(u, 1 - u)
    t = math.sqrt(-2 * math.log(tail))
    x = t - (2.30753 + 0.27061 * t) / (1 + 0.99229 * t + 0.04481 * t * t)
    for _ in range(2):
        missed = (0.5 * math.erfc(x / math.sqrt(2.0)) - tail) * math.sqrt(2 * math.pi) * math.exp(0.5 * x * x)
        x += missed / (1 - 0.5 * x * missed)
    return -x if u < 0.5 else x


@jit
def _choose(net: Net, batch: Batch, row: int) -> float:
    """Draw the row's action, or take the mode, from its logits; returns the log-probability. See distributions.py."""
    logits, log_prob = batch.logits[row], 0.0
    greedy, seed, index = batch.deterministic[row], batch.seeds[row], batch.step_indices[row]
    at = 0
    for a in range(net.categories.size):
        part = logits[at : at + net.categories[a]]
        at += part.size
        best = 0
        for k in range(1, part.size):
            if part[k] > part[best]:
                best = k
        total = np.float32(0)
        for k in range(part.size):
            total += np.float32(math.exp(part[k] - part[best]))
        chosen = best
        if not greedy:
            u, below = np.float32(uniform(seed, index, a)), np.float32(0)
            # The last class takes what rounding leaves, so it is not compared.
            chosen = 0
            while chosen < part.size - 1:
                below += np.float32(math.exp(part[chosen] - part[best])) / total
                if u < below:
                    break
                chosen += 1
        log_prob += (part[chosen] - part[best]) - math.log(total)
        batch.actions[row, a] = chosen + net.shift[a]
    if not net.categories.size:
        size = net.shift.size
        for a in range(size):
            z = 0.0 if greedy else _quantile(np.float64(uniform(seed, index, a)))
            raw = np.float32(logits[a] + math.exp(logits[size + a]) * z)
            log_prob += -0.5 * z * z - logits[size + a] - 0.5 * math.log(2 * math.pi)
            batch.actions[row, a] = raw * net.scale[a] + net.shift[a]
    return log_prob


@jit
def _heads(net: Net, batch: Batch, first: int, rows: int, work: Array, at: int, stride: int, free: int) -> None:
    """Postprocessor, actor and critic, and the actions."""
    at, stride, free = _through(net, net.post, net.actor, work, at, stride, rows, free, 1 - free)
    # A third buffer, so that the heads' input stays for the second of them.
    logits_at, logits_stride, _ = _through(net, net.actor, net.critic, work, at, stride, rows, 2, free)
    for r in range(rows):
        for k in range(batch.logits.shape[1]):
            batch.logits[first + r, k] = work[logits_at + r * logits_stride + k]
    values_at, values_stride, _ = _through(net, net.critic, len(net.layers), work, at, stride, rows, 2, free)
    for r in range(rows):
        row = first + r
        value = work[values_at + r * values_stride]
        log_prob = np.float32(_choose(net, batch, row))
        batch.values[row], batch.log_probs[row] = value, log_prob
        finite = abs(value + log_prob) <= _LARGEST
        for k in range(batch.logits.shape[1]):
            finite = finite and abs(batch.logits[row, k]) <= _LARGEST
        batch.finite[row] = finite


@jit
def _gather(batch: Batch, first: int, rows: int, state: Array, counters: Array, steps: Array, work: Array, at: int):
    size = state.shape[1]
    for r in range(rows):
        slot = batch.slots[first + r]
        before = work[at + r * size : at + (r + 1) * size]
        if batch.episode_starts[first + r]:
            before[:] = 0
            steps[r] = 0
        else:
            before[:] = state[slot]
            steps[r] = counters[slot]


@jit
def _scatter(batch: Batch, first: int, rows: int, state: Array, counters: Array, steps: Array, work: Array, at: int):
    size = state.shape[1]
    for r in range(rows):
        if batch.finite[first + r]:
            slot = batch.slots[first + r]
            state[slot] = work[at + r * size : at + (r + 1) * size]
            counters[slot] = steps[r] + 1


@cache
def _step_for(*, is_dnc: bool) -> Kernel:
    """The kernel for policies with a DNC, or a Frameconv: one of each for all sizes, since compiling takes long."""
    called = _CALLED

    def step(
        net: Net, batch: Batch, first: int, last: int, state: Array, counters: Array, work: Array, spent: Array
    ) -> None:
        """Advance rows ``first`` to ``last`` of a batch, a block at a time.

        ``state [C, S]`` and ``counters [C]``: what is advanced, in place. ``work``: scratch. ``spent [3]``: to which
        the nanoseconds are added that gathering, computing and scattering took.
        """
        _ = called
        clock, steps = np.empty(2, np.int64), np.empty(BLOCK, np.int64)
        while first < last:
            rows, size = min(BLOCK, last - first), state.shape[1]
            began = _nanoseconds(clock)
            _gather(batch, first, rows, state, counters, steps, work, net.before)
            gathered = _nanoseconds(clock)
            at, stride, free = _features(net, batch, first, rows, steps, work)
            # Only one of the two is compiled.
            if is_dnc:
                at, stride, free = _dnc(net, work, at, stride, rows, size, free)
            else:
                at, stride, free = _frameconv(net, work, at, stride, rows, size, free)
            _heads(net, batch, first, rows, work, at, stride, free)
            ran = _nanoseconds(clock)
            _scatter(batch, first, rows, state, counters, steps, work, net.after)
            spent[0] += gathered - began
            spent[1] += ran - gathered
            spent[2] += _nanoseconds(clock) - ran
            first += rows

    return Kernel(step, "the DNC's step" if is_dnc else "the Frameconv's step")


class Chosen(NamedTuple):
    """What a step came to; n rows."""

    actions: Array
    """``[n, *action shape]`` in the action space's dtype and units."""
    values: NDArray[np.float32]
    log_probs: NDArray[np.float32]
    logits: NDArray[np.float32]
    """``[n, K]``"""
    finite: NDArray[np.bool_]
    """Rows whose logits, value and log-probability are finite; the state of the others is as it was."""
    seconds: tuple[float, float, float]
    """Spent on gathering, computing and scattering."""


class CompiledStep:
    """The step of one policy, whose weights it copies. Used by one thread at a time; with ``threads`` above 1 it
    computes large batches with the help of others.
    """

    def __init__(self, policy: Policy, threads: int = 1) -> None:
        layers = _Layers()
        layers.add(policy.feature_map)
        layers.add_all(policy.pre)
        core_layer = len(layers)
        core: Any = policy.core
        if isinstance(core, DNCCore):
            dnc = core.sizes
            layers.add(core.gates)
            layers.add(core.access.interface)
            layers.add(core.output)
            widths = (
                padded(4 * dnc.hidden),
                dnc.features,
                2 * padded(dnc.interface),
                (4 * dnc.heads + 2) * dnc.cells,
            )
        elif isinstance(core, FrameconvCore):
            dnc, widths = Sizes(0, 0, 0, 0), ()
            layers.add(core.conv)
        else:
            raise ConfigError(f"memory: got {type(core).__name__}, expected a DNCCore or a FrameconvCore")
        post = len(layers)
        layers.add_all(policy.post)
        actor = len(layers)
        layers.add_all(policy.actor)
        critic = len(layers)
        layers.add_all(policy.critic)

        state_size = sum(spec.num_elements for spec in core.state_spec)
        # The DNC's first two layers write elsewhere.
        elsewhere = {core_layer, core_layer + 1} if isinstance(core, DNCCore) else set[int]()
        width = max(padded(o) for i, (_, o, _) in enumerate(layers.shapes) if i not in elsewhere)
        core_inputs = layers.shapes[core_layer][0]
        regions = np.cumsum([3 * width, core_inputs, state_size, state_size, sum(widths)]) * BLOCK
        inputs_at, before, after, rest, product = (int(end) for end in regions)
        work_size = product + max(scratch_size(BLOCK, inputs) for inputs, _, _ in layers.shapes)
        embedding = policy.embedding
        distribution = policy.distribution
        assert isinstance(distribution, (Categoricals, Gaussian))
        categories = distribution.sizes if isinstance(distribution, Categoricals) else []
        scale, shift = distribution.scale_and_shift()
        self._net = Net(
            layers.packed(), np.array(layers.shapes, np.int64), np.array(layers.slopes, np.float32),
            np.empty(0) if embedding is None else embedding.turns.double().cpu().numpy(),
            0.0 if embedding is None else float(policy.embedding_strength.detach().clamp(0, 1)),
            core_layer, post, actor, critic, width, inputs_at, before, after, rest, product, dnc,
            np.array(categories, np.int64), scale.numpy(), shift.numpy(),
        )  # fmt: skip
        self._step, self._state_size = _step_for(is_dnc=isinstance(core, DNCCore)), state_size
        self._distribution = distribution
        self._num_logits, self._num_actions = distribution.num_logits, scale.shape[0]
        self._work = [_aligned(work_size) for _ in range(threads)]
        self._helpers = ThreadPoolExecutor(threads - 1, "compute", name_thread, ("compute",)) if threads > 1 else None

    def advance(
        self, state: Array, counters: Array, slots: Array, episode_starts: Array, observations: Array, seeds: Array,
        step_indices: Array, deterministic: Array,
    ) -> Chosen:  # fmt: skip
        """Advance n rows by one step; the rows of ``state`` and ``counters`` that ``slots`` name are changed in place.

        ``state``: float32 ``[C, S]``, the tensors of the core's state spec side by side; ``counters``: int64 ``[C]``,
        steps of the episode so far. ``slots``: int64 ``[n]``, none twice; ``episode_starts``: bool ``[n]``, where the
        state begins at zero; ``observations``: float32 ``[n, O]``; ``seeds`` and ``step_indices``: uint64 ``[n]``, for
        the draws; ``deterministic``: bool ``[n]``, where the mode is taken instead.

        Raises TornError where it fails after rows may have changed.
        """
        n = len(slots)
        values, log_probs, finite = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.bool_)
        actions, logits = np.empty((n, self._num_actions)), np.empty((n, self._num_logits), np.float32)
        batch = Batch(
            _plain(slots), _plain(episode_starts), _plain(observations), _plain(seeds), _plain(step_indices),
            _plain(deterministic), actions, values, log_probs, logits, finite,
        )  # fmt: skip
        parts = min(len(self._work), n // _MIN_ROWS_OF_A_THREAD)
        try:
            if parts <= 1:
                spent = np.zeros(3, np.int64)
                self._step(self._net, batch, 0, n, state, counters, self._work[0], spent)
            else:
                spent = self._in_parts(parts, batch, n, state, counters)
            gather_ns, run_ns, scatter_ns = spent.tolist()
            seconds = 1e-9 * gather_ns, 1e-9 * run_ns, 1e-9 * scatter_ns
            return Chosen(self._distribution.in_space(actions), values, log_probs, logits, finite, seconds)
        except Exception as error:
            raise TornError(f"a step of {n} rows failed in the middle") from error

    def _in_parts(self, parts: int, batch: Batch, n: int, state: Array, counters: Array) -> NDArray[np.int64]:
        """Share the rows among threads; returns what the slowest of them spent, see :func:`_step_for`."""
        spent, bounds = np.zeros((parts, 3), np.int64), [n * part // parts for part in range(parts + 1)]

        def run(part: int) -> None:
            first, last = bounds[part], bounds[part + 1]
            self._step(self._net, batch, first, last, state, counters, self._work[part], spent[part])

        helping = [cast(ThreadPoolExecutor, self._helpers).submit(run, part) for part in range(1, parts)]
        run(0)
        for help_ in helping:
            help_.result()
        return spent.max(axis=0)

    def try_out(self) -> None:
        """Advance a row of nobody's: what has to be compiled on this machine is compiled now."""
        nothing = np.zeros(1, np.uint64)
        size = int(self._net.layers[0, 0])
        self.advance(
            np.zeros((1, self._state_size), np.float32), np.zeros(1, np.int64), np.zeros(1, np.int64),
            np.ones(1, np.bool_), np.zeros((1, size), np.float32), nothing, nothing, np.ones(1, np.bool_),
        )  # fmt: skip


def _plain(column: Array) -> Array:
    """Return a column as the kernel takes it; for one that is read-only or strided it would be compiled once more."""
    return column if column.flags.carray else column.copy()


def _aligned(size: int) -> NDArray[np.float32]:
    """Return room for floats that begins with a cache line: what is read of lines by halves is read twice."""
    room = np.empty(size + 16, np.float32)
    skipped = -(room.ctypes.data // 4) % 16
    return room[skipped : skipped + size]


class _Layers:
    """Linear layers in the order in which they are used."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int, int]] = []
        self.slopes: list[float] = []
        self._parts: list[NDArray[np.float32]] = []
        self._size = 0

    def __len__(self) -> int:
        return len(self.shapes)

    def add(self, layer: Any) -> None:
        """Append a Linear."""
        part = pack(layer.weight.detach().cpu().numpy(), layer.bias.detach().cpu().numpy())
        self.shapes.append((layer.in_features, layer.out_features, self._size))
        self.slopes.append(1.0)
        self._parts.append(part)
        self._size += len(part)

    def add_all(self, layers: Sequence[nn.Module] | nn.Sequential) -> None:
        """Append Linears, each perhaps with a LeakyReLU after it."""
        for layer in layers:
            if isinstance(layer, nn.LeakyReLU):
                self.slopes[-1] = layer.negative_slope
            else:
                self.add(layer)

    def packed(self) -> NDArray[np.float32]:
        """All weights and biases."""
        return np.concatenate(self._parts, out=_aligned(self._size))
