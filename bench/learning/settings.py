"""What the runs of the study are set to. One place, so that the tables can say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tenuto_trainer import TrainConfig


def settings_for(env_id: str, algorithm: str, memory: str, seed: int, **overrides: Any) -> TrainConfig:
    """Return the trainer's defaults, which are the study's, but for two algorithms that need others.

    RLlib's own networks get twice the width. POPGym's Frameconv fails beyond step ``max_seq_len`` of an episode.
    """
    chosen: dict[str, Any] = {"seed": seed, "hidden_size": 128 if algorithm in ("lstm", "mlp") else 64}
    if algorithm == "seed-frameconv":
        chosen["max_seq_len"] = 256
    return TrainConfig(env_id, memory, Path("unused"), **{**chosen, **overrides})
