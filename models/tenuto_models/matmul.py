"""The matrix product of compiled steps, ``y = act(x Wᵀ + b)`` of float32: on the CPU's tile unit where this process may
use it, else on its vector registers. Chosen once and for all sizes: either way a row's bits are its own.
"""

from tenuto_models import amx, vectors
from tenuto_models.jit import digest

KIND = amx if amx.is_allowed() else vectors
BLOCK, LANES = KIND.BLOCK, KIND.LANES
linear, pack, padded, scratch_size = KIND.linear, KIND.pack, KIND.padded, KIND.scratch_size
DIGEST = KIND.__name__ + digest(KIND)
"""For kernels kept on disk: where the unit may not be used, what uses it is not found there."""
