# pyright: reportMissingParameterType=false
# Of kernels: pointers, which no annotation describes.

"""How a kernel is started, and whether one can be."""

from __future__ import annotations

from subprocess import SubprocessError
from typing import Any

import torch
import triton
import triton.language as tl


def launch(kernel: Any, grid: tuple[Any, ...], *arguments: Any, **constants: Any) -> None:
    """Start the programs of a Triton kernel, whose parameters no annotation describes, on the current stream."""
    kernel[grid](*arguments, **constants)


def obstacle_on(device: torch.device) -> str | None:
    """Try a kernel on a device; return what keeps it from running, None if nothing does.

    Triton compiles a little C for each kernel: it wants a compiler, and a folder from which code may be loaded.
    """
    try:
        launch(_nothing, (1,), torch.zeros(1, device=device))
    except (RuntimeError, OSError, ImportError, SubprocessError) as error:
        return f"{type(error).__name__}: {error}"
    return None


@triton.jit
def _nothing(x):
    tl.store(x, tl.load(x))
