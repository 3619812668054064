"""How a kernel is started."""

from __future__ import annotations

from typing import Any


def launch(kernel: Any, grid: tuple[Any, ...], *arguments: Any, **constants: Any) -> None:
    """Start the programs of a Triton kernel, whose parameters no annotation describes, on the current stream."""
    kernel[grid](*arguments, **constants)
