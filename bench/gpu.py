"""Measures one batch's step on a GPU beside the GPU's floors, and prints one table per memory.

Ways: the plain step called operation by operation; the same captured as a graph; the fused kernels in a graph; those
with matrix products in tiles of one size, whose rows are the same bits in every batch. Floors: the products' FLOPs, and
the bytes of weights, state and columns, at the GPU's peaks. Microseconds on the device, medians, the ways in turns;
*call* is the whole of the third: columns from numpy and back.

    python bench/gpu.py [--memory dnc|frameconv] [--tflops 67] [--tb-per-s 4.3]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from rich.console import Console
from rich.table import Table
from torch import nn

from tenuto_models import Policy, PolicyConfig
from tenuto_server.arena import StateArena
from tenuto_server.device_step import DeviceStep

OBSERVATIONS, ACTIONS = spaces.Box(-1, 1, (32,)), spaces.Discrete(8)
ROWS = (1, 16, 64, 256, 1024, 4096)
WAYS: dict[str, dict[str, Any]] = {
    "called": {"fused": False, "captured": False},
    "graph": {"fused": False, "captured": True},
    "fused": {"fused": True, "captured": True},
    "tiles": {"fused": True, "captured": True, "tiles": "ieee"},
    "tiles tf32x3": {"fused": True, "captured": True, "tiles": "tf32x3"},
}
CAPACITY = 4 * ROWS[-1]
ROUNDS, REPEATS = 5, 50


def columns(num_rows: int) -> dict[str, Any]:
    draw = np.random.default_rng(num_rows)
    return {
        "slots": draw.permutation(CAPACITY)[:num_rows],
        "episode_starts": np.zeros(num_rows, np.bool_),
        "observations": draw.uniform(-1, 1, (num_rows, 32)).astype(np.float32),
        "uniforms": draw.uniform(0.1, 0.9, (num_rows, 1)).astype(np.float32),
        "deterministic": np.zeros(num_rows, np.bool_),
    }


def device_us(call: Callable[[], object]) -> float:
    """Microseconds between two marks on the device, per call."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(REPEATS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1000 / REPEATS


def host_us(call: Callable[[], object]) -> float:
    """Microseconds of the host's clock per call."""
    began = time.perf_counter()
    for _ in range(REPEATS):
        call()
    return (time.perf_counter() - began) * 1e6 / REPEATS


def floors_us(policy: Policy, num_rows: int, tflops: float, tb_per_s: float) -> tuple[float, float]:
    """Microseconds that the products, and that the bytes, take at the least."""
    weights = sum(layer.weight.numel() for layer in policy.modules() if isinstance(layer, nn.Linear))
    state_bytes = sum(t.num_elements * t.dtype.itemsize for t in policy.state_spec)
    column_bytes = 4 * (32 + 1 + 2 + policy.distribution.num_logits) + 8 + 8 + 3
    num_bytes = 4 * weights + num_rows * (2 * state_bytes + column_bytes)
    return 2 * weights * num_rows / tflops / 1e6, num_bytes / tb_per_s / 1e6


def measured(policy: Policy, num_rows: int, device: torch.device) -> dict[str, float]:
    """Microseconds by way, and of the whole call of the fused one."""
    arena, rows = StateArena(policy.state_spec, CAPACITY, device), columns(num_rows)
    steps = {way: DeviceStep(policy, arena, (num_rows,), device, **options) for way, options in WAYS.items()}
    for step in steps.values():
        step.compute(**rows)
    took: dict[str, list[float]] = {way: [] for way in (*steps, "call")}
    for _ in range(ROUNDS):
        for way, step in steps.items():
            step.compute(**rows)
            took[way].append(device_us(step.repeat))
        took["call"].append(host_us(lambda: steps["fused"].compute(**rows)))
    return {way: statistics.median(times) for way, times in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", choices=["dnc", "frameconv"], action="append")
    parser.add_argument("--tflops", type=float, default=67.0, help="the GPU's float32 peak outside its tensor cores")
    parser.add_argument("--tb-per-s", type=float, default=4.3, help="its memory's bandwidth")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "bench/gpu.py needs a CUDA device and torch's CUDA build; this machine has none, so nothing is measured"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    console = Console(width=140)
    console.print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for memory in arguments.memory or ["dnc", "frameconv"]:
        torch.manual_seed(0)
        policy = Policy(OBSERVATIONS, ACTIONS, PolicyConfig.for_memory(memory)).to(device).eval().requires_grad_(False)
        table = Table(
            "rows", *WAYS, "call", "FLOP floor", "byte floor", "fused / floor", title=f"{memory}: µs per step"
        )
        for num_rows in ROWS:
            took = measured(policy, num_rows, device)
            floors = floors_us(policy, num_rows, arguments.tflops, arguments.tb_per_s)
            ratio = took["fused"] / max(floors)
            table.add_row(f"{num_rows:,}", *(f"{us:,.1f}" for us in (*took.values(), *floors)), f"{ratio:.1f}")
        console.print(table)


if __name__ == "__main__":
    main()
