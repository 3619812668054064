"""Where Triton's kernels can run: interpreted on the CPU, or compiled on a GPU, one of the two in a process."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="compiles its kernels; set TRITON_INTERPRET=1 for the CPU's")
needs_cuda = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])
DEVICES = [pytest.param("cpu", marks=interpreted), CUDA]
