"""What a run shows: one live line in a terminal, plain lines elsewhere, and TensorBoard event files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from tenuto_models import Evaluation, TrainingProgress

_COLUMNS = 80


@dataclass(frozen=True)
class IterationReport:
    """One iteration as people and TensorBoard see it."""

    progress: TrainingProgress
    version: int | None
    """Newest published version."""
    steps_per_second: float
    """Environment steps of this iteration by its duration, learning included."""
    scalars: Mapping[str, float]
    """Further curves for TensorBoard, by tag."""
    evaluation: Evaluation | None = None
    """How that version did on held-out seeds."""

    def line(self) -> str:
        """Say it in one line that fits 80 columns; steps are environment steps.

        An evaluation takes the place of the best return, and names its spread where there is room for it.
        """
        p, evaluated = self.progress, self.evaluation
        head = f"iteration {p.iteration:4d}  v{self.version}  return {_number(p.return_mean)}, "
        tail = f"  {_count(p.env_steps)} steps  {_count(self.steps_per_second)}/s  {_duration(p.seconds)}"
        if evaluated is None:
            return f"{head}best {_number(p.best_return)}{tail}"
        mean, spread = _number(evaluated.return_mean), f"±{_number(evaluated.return_std)}"
        line = f"{head}eval {mean}{spread}{tail}"
        return line if len(line) <= _COLUMNS else f"{head}eval {mean}{tail}"


class Progress:
    """Owns the terminal line and the event file; a context manager, to be closed by leaving it.

    The event file begins with the first iteration, so that a run that cannot start leaves none.
    """

    def __init__(self, console: Console, log_dir: Path) -> None:
        self._console, self._log_dir = console, log_dir
        self._writer: SummaryWriter | None = None
        self._start = TrainingProgress()
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        if self._writer:
            self._writer.close()

    def note(self, text: str) -> None:
        """Say something that stays on the screen."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self, start: TrainingProgress) -> None:
        """Say where training stands; curves that a killed run wrote beyond it are hidden by those to come."""
        self._start = start

    def end(self, text: str) -> None:
        """Say something below the last iteration, whose line then stays as it is."""
        if self._live:
            self._live.stop()
        self.note(text)

    def iteration(self, report: IterationReport) -> None:
        """Show an iteration and write its curves over the environment steps."""
        if self._live:
            self._live.update(Text(report.line(), no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            self.note(report.line())
        if self._writer is None:
            self._writer = self._open()
        p = report.progress
        curves = dict(report.scalars) | {"speed/env_steps_per_s": report.steps_per_second}
        curves |= {"return/mean": _or_nan(p.return_mean), "return/best": _or_nan(p.best_return)}
        curves["checkpoint/version"] = float(report.version or 0)
        _write(self._writer, curves | _curves_of(p.evaluation), p.env_steps)

    def _open(self) -> SummaryWriter:
        start = self._start
        if start.env_steps > 0:
            return SummaryWriter(str(self._log_dir), purge_step=start.env_steps + 1)
        writer = SummaryWriter(str(self._log_dir))
        _write(writer, _curves_of(start.evaluation), 0)  # Of the untrained policy, to compare with.
        return writer


def _write(writer: SummaryWriter, curves: Mapping[str, float], env_steps: int) -> None:
    for tag, value in curves.items():
        if math.isfinite(value):
            writer.add_scalar(tag, value, global_step=env_steps)
    writer.flush()  # What a killed run did not write is missing in the curves for ever.


def _curves_of(evaluation: Evaluation | None) -> dict[str, float]:
    if evaluation is None:
        return {}
    return {
        f"evaluation/return_{name}": float(getattr(evaluation, f"return_{name}"))
        for name in ("mean", "std", "min", "max")
    }


def scalars_of(result: Mapping[str, Any], module_id: str) -> dict[str, float]:
    """Pick the curves worth plotting from RLlib's result of one iteration; those that are missing are left out."""
    learner = result.get("learners", {}).get(module_id, {})
    runners = result.get("env_runners", {})
    timers = result.get("timers", {})
    picked = {
        "return/min": runners.get("episode_return_min"),
        "return/max": runners.get("episode_return_max"),
        "episode/length_mean": runners.get("episode_len_mean"),
        "loss/policy": learner.get("policy_loss"),
        "loss/value": learner.get("vf_loss"),
        "loss/entropy": learner.get("entropy"),
        "loss/value_explained_variance": learner.get("vf_explained_var"),
        "gradient/norm": learner.get("gradients_default_optimizer_global_norm"),
        "seconds/sample": timers.get("env_runner_sampling_timer"),
        "seconds/learn": timers.get("learner_update_timer"),
    }
    return {tag: float(value) for tag, value in picked.items() if value is not None}


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _number(value: float | None) -> str:
    """Say a return in at most 6 characters, if it is nearer to 0 than a quadrillion."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 9.9995 else ("-" if value < 0 else "") + _count(abs(value))


def _count(value: float) -> str:
    """Say a number that is not negative in 3 digits, at most 5 characters: 512, 61.4k, 1.23M."""
    thousands = 0
    while value >= 999.5 and thousands < 4:
        value, thousands = value / 1000, thousands + 1
    return f"{value:.3g}{('', 'k', 'M', 'G', 'T')[thousands]}"


def _duration(seconds: float) -> str:
    """Say a duration by its two largest units: 59s, 12m05s, 3h25m."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"
