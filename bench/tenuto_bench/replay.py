"""Computes recorded sessions again, with the policy's weights and alone, and compares what their clients were told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tenuto_bench.cases import Recording, is_start, observation_number
from tenuto_bench.loops import observations, stacked
from tenuto_models import Policy, checkpoint
from tenuto_models.sampling import uniforms
from tenuto_proto import ObservationCodec, space_to_wire

VALUE_TOLERANCE = 1e-3
"""Of values, absolute and relative: the server may compute with other kernels, whose rounding a memory carries on."""


def count_wrong(recordings: Sequence[Recording], repository: Path, policy_name: str) -> tuple[int, int]:
    """Return how many steps were compared and how many of them differed, in the action or beyond the tolerance.

    Sessions that saw more than one version are compared up to the change.
    """
    checked = wrong = 0
    for version in sorted({r.versions[0] for r in recordings if r.versions}):
        of_version = [r for r in recordings if r.versions and r.versions[0] == version]
        steps = min(_steps_of(r, version) for r in of_version)
        actions, values = _replay(checkpoint.read(repository / policy_name / str(version)).policy, of_version, steps)
        for row, recording in enumerate(of_version):
            told = np.array(recording.actions[:steps])
            same = (told == actions[:steps, row]).reshape(steps, -1).all(axis=1)
            same &= np.isclose(recording.values[:steps], values[:, row], rtol=VALUE_TOLERANCE, atol=VALUE_TOLERANCE)
            checked += steps
            wrong += int((~same).sum())
    return checked, wrong


def _steps_of(recording: Recording, version: int) -> int:
    return next((i for i, v in enumerate(recording.versions) if v != version), len(recording.versions))


def _replay(policy: Policy, recordings: Sequence[Recording], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Actions ``[steps, n, ...]`` and values ``[steps, n]``."""
    n = len(recordings)
    space = policy.observation_space
    codec, sent = ObservationCodec(space_to_wire(space)), observations(space)
    seeds, actions, values = np.array([r.seed for r in recordings], np.uint64), [], []
    state = policy.initial_state(n)
    with torch.inference_mode():
        for step in range(steps):
            if is_start(step):
                state = policy.initial_state(n)
            batch = stacked(space, [sent[observation_number(r.number, step)] for r in recordings])
            flat = codec.flatten(codec.unpack(codec.pack(batch, n), n))
            output, state = policy.step(torch.from_numpy(flat), state)
            draws = uniforms(seeds, np.full(n, step, np.uint64), policy.distribution.num_uniforms)
            raw = policy.distribution.sample(output.logits, torch.from_numpy(draws))
            actions.append(policy.distribution.to_space(raw).numpy())
            values.append(output.value.numpy())
    return np.array(actions), np.array(values)
