import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tenuto_models import Evaluation, TrainingProgress
from tenuto_trainer.progress import IterationReport, Progress


def _report(
    progress: TrainingProgress, version: int, seconds: float = 1.0, speed: float = 100.0, **more: Any
) -> IterationReport:
    return IterationReport(replace(progress, seconds=seconds), version, speed, {}, **more)


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (
            _report(TrainingProgress(2048, 1, None, None), 1, 2.2, 1265.4),
            "iteration    1  v1  return -, best -  2.05k steps  1.27k/s  2s",
        ),
        (
            _report(TrainingProgress(61_440, 15, -0.25, 12.345), 5, 725.0, 773.0),
            "iteration   15  v5  return -0.250, best 12.3  61.4k steps  773/s  12m05s",
        ),
        (
            _report(TrainingProgress(12_345_678, 99_999, -9.9991, -1234.5), 9999, 359_940.0, 12_345.6),
            "iteration 99999  v9999  return -9.999, best -1.23k  12.3M steps  12.3k/s  99h59m",
        ),
        (
            _report(
                TrainingProgress(61_440, 15, 0.25, 0.3), 5, 725.0, 773.0, evaluation=Evaluation(32, 0.9124, 0.041, 0, 1)
            ),
            "iteration   15  v5  return 0.250, eval 0.912±0.041  61.4k steps  773/s  12m05s",
        ),
        (
            _report(
                TrainingProgress(12_345_678, 99_999, -9.9991, 0.3),
                9999,
                359_940.0,
                12_345.6,
                evaluation=Evaluation(32, -1234.5, 1234.5, -4000, 0),
            ),
            "iteration 99999  v9999  return -9.999, eval -1.23k  12.3M steps  12.3k/s  99h59m",
        ),
    ],
)
def test_iteration_is_one_line_of_80_columns(report: IterationReport, line: str):
    assert report.line() == line
    assert len(line) <= 80


def test_last_words_stand_below_the_last_iteration_of_a_terminal(tmp_path: Path):
    screen = io.StringIO()
    with Progress(Console(file=screen, force_terminal=True, width=80), tmp_path) as progress:
        progress.iteration(_report(TrainingProgress(10, 1), 1))
        progress.iteration(_report(TrainingProgress(20, 2), 2))
        progress.end("stopped: enough")
    shown = screen.getvalue()
    assert shown.rindex("iteration    2  v2") < shown.index("stopped: enough")


def _curve(log_dir: Path, tag: str) -> list[tuple[int, float]]:
    """The curve as TensorBoard shows it."""
    events = EventAccumulator(str(log_dir))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_curves_of_a_restarted_run_do_not_overlap_those_before_it(tmp_path: Path):
    evaluation = Evaluation(4, 0.5, 0.25, 0.0, 1.0)
    for start, returns in ((0, (0.0, 0.25, 0.5)), (20, (0.75, 1.0))):
        with Progress(Console(file=io.StringIO()), tmp_path) as progress:
            progress.begin(TrainingProgress(start, start // 10, evaluation=None if start else evaluation))
            for n, return_mean in enumerate(returns, start=1 + start // 10):
                progress.iteration(_report(TrainingProgress(10 * n, n, return_mean, evaluation=evaluation), 1))
    assert _curve(tmp_path, "return/mean") == [(10, 0.0), (20, 0.25), (30, 0.75), (40, 1.0)]
    assert _curve(tmp_path, "evaluation/return_mean") == [(step, 0.5) for step in (0, 10, 20, 30, 40)]
    assert _curve(tmp_path, "evaluation/return_std")[-1] == (40, 0.25)


def test_iteration_is_on_disk_as_soon_as_it_was_shown(tmp_path: Path):
    with Progress(Console(file=io.StringIO()), tmp_path) as progress:
        progress.iteration(_report(TrainingProgress(10, 1, 0.5), 1))
        assert _curve(tmp_path, "return/mean") == [(10, 0.5)]  # A kill may come now.
