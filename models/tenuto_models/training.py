"""Where training stands: what a manifest says of the run that made its version."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tenuto_models.errors import ConfigError


@dataclass(frozen=True)
class Evaluation:
    """Returns of whole episodes that the published policy played with greedy actions on held-out seeds."""

    episodes: int
    """Episodes played."""
    return_mean: float
    """Mean of their undiscounted returns."""
    return_std: float
    """Standard deviation of the returns over the episodes, not of their mean."""
    return_min: float
    """Return of the worst episode."""
    return_max: float
    """Return of the best episode."""
    episodes_cut: int = 0
    """Those of the episodes that were ended by the evaluation's limit of steps, not by the environment."""

    def __post_init__(self) -> None:
        for name, least, most in (("episodes", 1, 2**63 - 1), ("episodes_cut", 0, self.episodes)):
            _require_whole(f"evaluation.{name}", getattr(self, name), least, most)
        for name in ("return_mean", "return_std", "return_min", "return_max"):
            _require_finite(f"evaluation.{name}", getattr(self, name))
        if self.return_std < 0:
            raise ConfigError(f"evaluation.return_std: got {self.return_std!r}, expected a number >= 0")
        if self.return_min > self.return_max:
            raise ConfigError(f"evaluation.return_min: got {self.return_min!r}, above return_max {self.return_max!r}")


@dataclass(frozen=True)
class TrainingProgress:
    """Where training stood when a version was published; all counts go on over restarts."""

    env_steps: int = 0
    """Environment steps taken so far."""
    iteration: int = 0
    """Training iterations finished so far."""
    return_mean: float | None = None
    """Mean episode return of the last iteration; None before an episode ended."""
    best_return: float | None = None
    """Best return_mean of the run so far, this version included."""
    seconds: float = 0.0
    """Seconds of training so far, start-up not included."""
    evaluation: Evaluation | None = None
    """How this very version did on held-out seeds; None where nobody looked."""

    def __post_init__(self) -> None:
        for name in ("env_steps", "iteration"):
            _require_whole(f"training.{name}", getattr(self, name), 0, 2**63 - 1)
        for name in ("return_mean", "best_return"):
            if getattr(self, name) is not None:
                _require_finite(f"training.{name}", getattr(self, name))
        _require_finite("training.seconds", self.seconds)
        if self.seconds < 0:
            raise ConfigError(f"training.seconds: got {self.seconds!r}, expected a number >= 0")
        if self.evaluation is not None and not isinstance(self.evaluation, Evaluation):
            raise ConfigError(f"training.evaluation: got {self.evaluation!r}, expected an Evaluation or null")

    def to_json(self) -> dict[str, Any]:
        """Describe the progress with plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainingProgress:
        """Rebuild from :meth:`to_json`; keys of later versions may be missing. Raises ConfigError for anything else."""
        arguments = _known_keys("training", cls, data)
        if arguments.get("evaluation") is not None:
            arguments["evaluation"] = Evaluation(**_known_keys("evaluation", Evaluation, arguments["evaluation"]))
        return cls(**arguments)


def _known_keys(what: str, cls: type[Any], data: Any) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{what}: got {data!r}, expected an object")
    names = {f.name for f in fields(cls)}
    required = {"episodes", "return_mean", "return_std", "return_min", "return_max"} if cls is Evaluation else set()
    if not required <= set(data) <= names:
        raise ConfigError(f"{what} keys: got {sorted(map(str, data))}, expected {sorted(names)}")
    return dict(data)


def _require_whole(what: str, value: Any, least: int, most: int) -> None:
    # bool is an int to Python, but not to the people who read a manifest.
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"{what}: got {value!r}, expected a whole number from {least} to {most}")


def _require_finite(what: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise ConfigError(f"{what}: got {value!r}, expected a finite number")
