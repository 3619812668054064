"""Compiles what numba compiles into NUMBA_CACHE_DIR, once when the image is made instead of at every start."""

import torch
from gymnasium.spaces import Box, Discrete

from tenuto_models import Policy, PolicyConfig
from tenuto_models.compiled import CompiledStep
from tenuto_models.sampling import uniforms

for memory in ("dnc", "frameconv"):
    policy = Policy(Box(-1, 1, (3,)), Discrete(2), PolicyConfig.for_memory(memory))
    CompiledStep(policy).try_out()
    with torch.inference_mode():
        policy.step(torch.zeros(4, 3), policy.initial_state(4))
    output, _ = policy.unroll(torch.zeros(4, 2, 3), policy.initial_state(4))
    (output.logits.sum() + output.value.sum()).backward()
uniforms(torch.zeros(1).numpy().astype("uint64"), torch.zeros(1).numpy().astype("uint64"), 1)
