"""How good a policy is: whole episodes with greedy actions, on seeds that no training run uses.

The seeds are the same for every version and every run, so that figures may be compared. The environments are those
that RLlib trains on, the forward pass is ``Policy.step``, as on the server.

Legend: B episodes in play, O flattened observation, A action dimensions.
"""

from __future__ import annotations

import random

import numpy as np
import torch

from tenuto_envs import make
from tenuto_models import Evaluation, Policy
from tenuto_trainer.config import MAX_SEED
from tenuto_trainer.envs import Env, for_rllib

FIRST_SEED = 2_000_000_000
"""Seed of the first evaluated episode; training draws its seeds below MAX_SEED and counts up from there by little."""
_AT_ONCE = 32
assert FIRST_SEED > 1.5 * MAX_SEED


def evaluate(policy: Policy, env_id: str, episodes: int, max_steps: int) -> Evaluation:
    """Play ``episodes`` episodes of at most ``max_steps`` steps each. Does not modify the policy.

    Leaves Python's and numpy's global random numbers as they were: an environment that seeds them (POPGym's mazes do)
    would bring the same training episodes back after every evaluation.
    Raises EnvError where the environment cannot be built or breaks its word.
    """
    envs: list[Env] = []
    python_random, numpy_random = random.getstate(), np.random.get_state()
    try:
        envs.extend(for_rllib(make(env_id)) for _ in range(min(episodes, _AT_ONCE)))
        seeds = range(FIRST_SEED, FIRST_SEED + episodes)
        played = [
            result
            for first in range(0, episodes, _AT_ONCE)
            for result in _play(policy, envs, seeds[first : first + _AT_ONCE], max_steps)
        ]
    finally:
        for env in envs:
            env.close()
        random.setstate(python_random)
        np.random.set_state(numpy_random)
    returns = np.array([total for total, _ in played], np.float64)
    return Evaluation(
        episodes=episodes,
        return_mean=float(returns.mean()),
        return_std=float(returns.std()),
        return_min=float(returns.min()),
        return_max=float(returns.max()),
        episodes_cut=sum(cut for _, cut in played),
    )


@torch.inference_mode()
def _play(policy: Policy, envs: list[Env], seeds: range, max_steps: int) -> list[tuple[float, bool]]:
    """Play one episode per seed, all at once -> the return of each, and whether it was cut."""
    returns, cut = [0.0] * len(seeds), [True] * len(seeds)
    # [B, O], and [B, ...] per tensor of the state; row i belongs to episode playing[i].
    playing = list(range(len(seeds)))
    observation = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=False)]
    state = policy.initial_state(len(seeds))
    for _ in range(max_steps):
        output, state = policy.step(torch.as_tensor(np.stack(observation)), state)
        actions = policy.distribution.greedy(output.logits).numpy()  # [B, A], raw
        kept: list[int] = []
        observation = []
        for row, episode in enumerate(playing):
            seen, reward, terminated, truncated, _ = envs[episode].step(actions[row])
            returns[episode] += float(reward)
            if terminated or truncated:
                cut[episode] = False
            else:
                kept.append(row)
                observation.append(seen)
        if not kept:
            break
        if len(kept) < len(playing):
            playing = [playing[row] for row in kept]
            state = {name: tensor[kept] for name, tensor in state.items()}
    return list(zip(returns, cut, strict=True))
