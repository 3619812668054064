"""Where a run begins: at the newest good version of its policy, or from scratch.

A trainer that is restarted goes on from what it published, so that the newest version is never an untrained one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gymnasium import spaces

from tenuto_models import CheckpointError, PolicyConfig, TrainingProgress, checkpoint
from tenuto_trainer.errors import TrainConfigError


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    folder: Path | None = None
    """The version whose weights are taken; None: fresh weights."""
    progress: TrainingProgress | None = None
    """Where training stood then; None with fresh weights."""


def find_start(
    repository: Path,
    policy_name: str,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    config: PolicyConfig,
) -> Start:
    """Return the newest version that can be read. Raises TrainConfigError if it is another kind of policy."""
    for version in reversed(checkpoint.versions(repository / policy_name)):
        folder = repository / policy_name / str(version)
        try:
            found = checkpoint.read(folder)
        except CheckpointError:
            continue  # No server loads it either; an older one may be whole.
        differences = [
            f"{what}: got {got}, but version {version} has {has}"
            for what, got, has in (
                *_config_differences(config, found.policy.config),
                ("observation space", observation_space, found.policy.observation_space),
                ("action space", action_space, found.policy.action_space),
            )
            if got != has
        ]
        if differences:
            raise TrainConfigError(
                f"{'; '.join(differences)} ({folder}); choose another policy name to begin a new policy"
            )
        return Start(folder, found.training)
    return Start()


def _config_differences(got: PolicyConfig, has: PolicyConfig) -> list[tuple[str, Any, Any]]:
    """Name the fields that differ, with both values; of two kinds of memory only the kinds."""
    ours, theirs = _flat(got), _flat(has)
    names = ["memory"] if ours["memory"] != theirs["memory"] else list(ours)
    return [(name, ours[name], theirs[name]) for name in names if ours[name] != theirs[name]]


def _flat(config: PolicyConfig) -> dict[str, Any]:
    fields = config.to_json()
    memory = fields.pop("memory")
    return {"memory": memory.pop("type"), **{f"memory.{name}": value for name, value in memory.items()}, **fields}
