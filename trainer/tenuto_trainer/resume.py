"""Where a run begins: at the state of the last iteration, at the newest good version of its policy, or from scratch.

A trainer that is restarted goes on from what it left behind, so that the newest version is never an untrained one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gymnasium import spaces

from tenuto_models import Checkpoint, CheckpointError, PolicyConfig, TrainingProgress, checkpoint
from tenuto_trainer import state as training_state
from tenuto_trainer.errors import StateError, TrainConfigError
from tenuto_trainer.learner import require_fit
from tenuto_trainer.state import TrainingState


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    folder: Path | None = None
    """The newest version that can be read; None: there is none, so fresh weights are taken."""
    published: TrainingProgress | None = None
    """Where training stood when it was published; None with fresh weights."""
    state: TrainingState | None = None
    """The learner to go on with, newer than that version or as new; None: the version's weights, a fresh optimizer."""
    refused: str = ""
    """Why a state that lies there is not taken; empty: it is, or there is none."""

    @property
    def progress(self) -> TrainingProgress:
        """Where training stands, as far as it was kept."""
        return self.state.progress if self.state else self.published or TrainingProgress()

    def without_tensors(self) -> Start:
        """Return a copy that is cheap to hand to other processes."""
        return replace(self, state=self.state and replace(self.state, tensors={}))

    def __str__(self) -> str:
        if self.state:
            return f"goes on after iteration {self.progress.iteration}"
        return f"goes on from the weights of {self.folder}" if self.folder else "starts from scratch"


def find_start(
    repository: Path,
    policy_name: str,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    config: PolicyConfig,
) -> Start:
    """Return what is newest and can be used. Raises TrainConfigError if the version is another kind of policy."""
    training_state.require_replaceable(repository / policy_name)
    found = require_same_policy(repository / policy_name, observation_space, action_space, config)
    if found is None:
        alone = (repository / policy_name / training_state.FILE).exists()
        return Start(refused="there is no version beside the state that can be read" if alone else "")
    folder = repository / policy_name / str(found.version)
    try:
        state = training_state.read(repository / policy_name)
        if state is not None:
            _require_successor(state, found)
    except StateError as error:
        return Start(folder, found.training, refused=str(error))
    return Start(folder, found.training, state)


def require_same_policy(
    folder: Path, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], config: PolicyConfig
) -> Checkpoint | None:
    """Return the newest version of a policy's folder that can be read; None: there is none.

    Raises TrainConfigError if it is another kind of policy: one name stands for one kind, as for its sessions.
    """
    found = _newest_version(folder)
    if found is None:
        return None
    differences = [
        f"{what}: got {got}, but version {found.version} has {has}"
        for what, got, has in (
            *_config_differences(config, found.policy.config),
            ("observation space", observation_space, found.policy.observation_space),
            ("action space", action_space, found.policy.action_space),
        )
        if got != has
    ]
    if differences:
        raise TrainConfigError(
            f"{'; '.join(differences)} ({folder / str(found.version)}); choose another policy name to begin a new "
            "policy"
        )
    return found


def _newest_version(folder: Path) -> Checkpoint | None:
    for version in reversed(checkpoint.versions(folder)):
        try:
            return checkpoint.read(folder / str(version))
        except CheckpointError:
            continue  # No server loads it either; an older one may be whole.
    return None


def _require_successor(state: TrainingState, newest: Checkpoint) -> None:
    """Raise StateError unless the state is of the same policy and as new as its newest version, or newer."""
    if state.policy != training_state.describe(newest.policy):
        raise StateError("the state is of a policy with other spaces or sizes")
    require_fit(newest.policy, state.tensors)
    at, published = state.progress.iteration, newest.training.iteration
    if at < published:
        raise StateError(f"the state is of iteration {at}, version {newest.version} of iteration {published}")
    # Every iteration writes the state first and then, perhaps, one version.
    if newest.version > state.version and at != published:
        raise StateError(f"version {newest.version} was not published by the run that left the state")


def _config_differences(got: PolicyConfig, has: PolicyConfig) -> list[tuple[str, Any, Any]]:
    """Name the fields that differ, with both values; of two kinds of memory only the kinds."""
    ours, theirs = _flat(got), _flat(has)
    names = ["memory"] if ours["memory"] != theirs["memory"] else list(ours)
    return [(name, ours[name], theirs[name]) for name in names if ours[name] != theirs[name]]


def _flat(config: PolicyConfig) -> dict[str, Any]:
    fields = config.to_json()
    memory = fields.pop("memory")
    return {"memory": memory.pop("type"), **{f"memory.{name}": value for name, value in memory.items()}, **fields}
