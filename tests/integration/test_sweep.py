"""The example of a hyperparameter sweep runs in one command, publishes its best trial and leaves nothing else."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tenuto_models import DNCConfig, checkpoint

SWEEP = Path(__file__).resolve().parents[2] / "examples" / "sweep" / "sweep.py"

FRAGILE = """
import os
from pathlib import Path
import gymnasium

OWNER = Path(__file__).with_suffix(".pid")

class Fragile(gymnasium.Wrapper):
    def step(self, action):
        if not OWNER.exists():
            OWNER.write_text(str(os.getpid()))
        if OWNER.read_text() != str(os.getpid()):
            raise RuntimeError("only the first trial can step this")
        return super().step(action)

def make():
    return Fragile(gymnasium.make("CartPole-v1"))
"""


def _sweep(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run the sweep in an empty folder, with an empty home and an own folder for temporary files."""
    (folder / "home").mkdir()
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TUNE_"))}
    with TemporaryDirectory(prefix="t") as temporary:  # That of pytest is too long a path for Ray's sockets.
        done = subprocess.run(
            [sys.executable, str(SWEEP), *flags],
            env=kept | {"HOME": str(folder / "home"), "TMPDIR": temporary, "PYTHONPATH": path},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=170,
            check=False,
        )
        # Torch makes a folder for its compiler's cache.
        assert [p.name for p in Path(temporary).iterdir() if not p.name.startswith("torchinductor_")] == []
    assert list((folder / "home").iterdir()) == []
    return done


def test_a_sweep_prints_its_trials_by_return_and_publishes_the_best(tmp_path: Path) -> None:
    done = _sweep(tmp_path, "--smoke", "--policy", "swept", "--repository", "r")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.strip("│").split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    returns = [float(row[0].split("±")[0]) for row in rows]
    assert len(rows) == 2 and returns == sorted(returns, reverse=True)
    _, memory, _, hidden_size, env_steps, _ = (cell.strip() for cell in rows[0])
    best = checkpoint.read(tmp_path / "r" / f"swept-{memory}-{hidden_size}" / "1")
    assert isinstance(best.policy.config.memory, DNCConfig) == (memory == "dnc")
    assert best.policy.config.feature_size == int(hidden_size)
    assert (best.training.iteration, best.training.env_steps) == (1, int(env_steps))
    assert best.training.evaluation is not None
    assert f"{best.training.evaluation.return_mean:.3f}" == f"{returns[0]:.3f}"
    *_, published, advice = done.stdout.splitlines()
    assert published.endswith(f"{tmp_path}/r/swept-{memory}-{hidden_size}/1")
    assert advice == f"serve it: tenuto-serve --repository {tmp_path / 'r'}"
    assert {path.name for path in tmp_path.iterdir()} == {"home", "r"}
    assert len(list((tmp_path / "r").iterdir())) == 1


@pytest.mark.parametrize(
    ("flags", "code", "error"),
    [
        (("--evaluation-episodes", "0"), 1, "sweep: evaluation_episodes: got 0, expected at least 1"),
        (("--env", "popgym-Nope-v0"), 1, "sweep: environment: got 'popgym-Nope-v0', which is not registered"),
        (("--clip", "-1"), 2, "tenuto-train: clip: got -1.0"),
        (("--lr=1e-3",), 2, "sweep.py: error: --lr: drawn for every trial"),
    ],
)
def test_settings_that_no_sweep_can_use_are_refused_at_once(
    tmp_path: Path, flags: tuple[str, ...], code: int, error: str
) -> None:
    done = _sweep(tmp_path, "--smoke", *flags)
    assert done.returncode == code
    assert error in done.stderr and done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_trial_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "fragile.py").write_text(FRAGILE)
    done = _sweep(tmp_path, "--smoke", "--env", "fragile:make", "--repository", "r", "--parallel", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.endswith(": failed") for line in lines) == 1
    assert "failed: RuntimeError: only the first trial can step this" in lines
    assert sum(line.startswith("│") for line in lines) == 1
    assert len(list((tmp_path / "r").iterdir())) == 1
