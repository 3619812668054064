"""A training that is killed again and again ends where the undisturbed one ends."""

import contextlib
import itertools
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tenuto_models import Checkpoint, checkpoint
from tenuto_trainer import state as training_state
from tenuto_trainer.state import TrainingState

ITERATIONS, STEPS = 16, 256
FLAGS = [
    *("--env", "popgym-RepeatPreviousEasy-v0", "--memory", "dnc", "--policy", "p", "--seed", "0"),
    *("--batch-size", str(STEPS), "--minibatch-size", "128", "--num-epochs", "1", "--num-envs", "4"),
    *("--max-seq-len", "16", "--hidden-size", "16", "--num-cells", "4", "--cell-size", "4", "--lr", "0.01"),
    *("--publish-every", "3", "--evaluation-episodes", "2", "--iterations", str(ITERATIONS)),
]


def _start(folder: Path) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).with_name("tenuto-train")), *FLAGS]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [*command, "--repository", str(folder / "r"), "--log-dir", str(folder / "log")],
        env=kept | {"HOME": str(folder)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _kill_at(process: subprocess.Popen[str], iteration: int, seconds: float) -> int | None:
    """Kill the process ``seconds`` after it showed the iteration; return the first one that it showed at all."""
    assert process.stdout is not None
    first: int | None = None
    for line in process.stdout:
        if line.startswith("iteration"):
            shown = int(line.split()[1])
            first = first or shown
            if shown >= iteration:
                break
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    process.communicate(timeout=30)
    return first


def _versions(folder: Path) -> list[Checkpoint]:
    policy = folder / "r" / "p"
    return [checkpoint.read(policy / str(version)) for version in checkpoint.versions(policy)]


def _curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    """The curve as TensorBoard shows it."""
    events = EventAccumulator(str(folder / "log" / "p"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def _steps_of_adam(state: TrainingState) -> int:
    (count,) = {int(tensor) for name, tensor in state.tensors.items() if name.startswith("step/")}
    return count


def test_killed_training_goes_on_with_its_curve_its_best_return_and_its_optimizer(tmp_path: Path):
    seed = random.randrange(1000)
    print(f"moments of the kills are drawn from seed {seed}")
    moments = random.Random(seed)
    iteration, steps_per_iteration = 0, 0.0
    for _ in range(2):
        iteration += moments.randrange(2, 6)
        first = _kill_at(_start(tmp_path), iteration, moments.uniform(0, 0.3))
        state = training_state.read(tmp_path / "r" / "p")
        assert state is not None
        assert first is not None
        # Nothing that was shown is lost.
        assert state.progress.iteration >= iteration >= first
        iteration = state.progress.iteration
        steps_per_iteration = steps_per_iteration or _steps_of_adam(state) / iteration
        assert _steps_of_adam(state) == iteration * steps_per_iteration
    last = _start(tmp_path)
    assert last.stdout is not None
    lines = [last.stdout.readline() for _ in range(3)]
    assert lines[0] == "starting Ray, which takes some seconds\n"
    assert lines[1].startswith(f"p goes on after iteration {iteration}; newest version is ")
    assert lines[2].startswith(f"iteration {iteration + 1:4d}  ")
    output, errors = last.communicate(timeout=120)
    assert (last.returncode, errors) == (0, "")
    assert f"stopped: {ITERATIONS} iterations done" in output

    end = training_state.read(tmp_path / "r" / "p")
    assert end is not None
    assert (end.progress.iteration, end.progress.env_steps) == (ITERATIONS, ITERATIONS * STEPS)
    assert _steps_of_adam(end) == ITERATIONS * steps_per_iteration

    versions = _versions(tmp_path)
    assert [found.version for found in versions] == list(range(1, len(versions) + 1))
    iterations = [found.training.iteration for found in versions]
    assert (iterations[0], iterations[-1]) == (0, ITERATIONS)
    assert all(before < after for before, after in itertools.pairwise(iterations))
    best = [found.training.best_return for found in versions[1:]]
    assert all(one is not None and other is not None and one <= other for one, other in itertools.pairwise(best))

    steps = [step for step, _ in _curve(tmp_path, "return/mean")]
    assert all(before < after for before, after in itertools.pairwise(steps))
    assert len(steps) >= ITERATIONS - 2  # A kill may fall between the state and the curve.
    best_curve = [value for _, value in _curve(tmp_path, "return/best")]
    assert best_curve == sorted(best_curve)
    assert best_curve[-1] == pytest.approx(end.progress.best_return)
    assert _curve(tmp_path, "evaluation/return_mean")[0][0] == 0

    # As if it had been killed for the last time between the state and the version that was due.
    shutil.rmtree(tmp_path / "r" / "p" / str(len(versions)))
    output, errors = _start(tmp_path).communicate(timeout=120)
    assert errors == ""
    assert output.splitlines()[-2] == f"stopped: {ITERATIONS} iterations done; newest version is {len(versions)}"
    again = _versions(tmp_path)[-1]
    assert again.training.iteration == ITERATIONS
    pairs = zip(again.policy.state_dict().values(), versions[-1].policy.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
