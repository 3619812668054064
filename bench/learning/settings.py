"""What the runs of the study are set to. One place, so that the tables can say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tenuto_trainer import TrainConfig


def settings_for(env_id: str, algorithm: str, memory: str, seed: int, **overrides: Any) -> TrainConfig:
    """Return the trainer's defaults, which are the study's. RLlib's own networks get twice the width."""
    chosen: dict[str, Any] = {"seed": seed, "hidden_size": 128 if algorithm in ("lstm", "mlp") else 64}
    return TrainConfig(env_id, memory, Path("unused"), **{**chosen, **overrides})
