"""``tenuto-train`` as a process of its own, as people and containers run it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tenuto_models import TrainingProgress, checkpoint

ENV = "popgym-RepeatPreviousEasy-v0"
SMALL = [
    *("--batch-size", "512", "--minibatch-size", "256", "--num-epochs", "1", "--num-envs", "8"),
    *("--max-seq-len", "16", "--hidden-size", "16", "--num-cells", "4", "--cell-size", "4", "--seed", "0"),
]


def _command(repository: Path, *flags: str) -> list[str]:
    own = ["--env", ENV, "--memory", "dnc", "--repository", str(repository / "r"), "--log-dir", str(repository / "log")]
    return [str(Path(sys.executable).with_name("tenuto-train")), *own, *SMALL, *flags]


def _environment(home: Path) -> dict[str, str]:
    """A user's environment, with an empty home."""
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "HOME": str(home)}


@pytest.fixture
def temporary() -> Iterator[Path]:
    """An empty folder for temporary files; that of pytest is too long a path for Ray's sockets."""
    with TemporaryDirectory(prefix="t") as folder:
        yield Path(folder)


def test_two_iterations_publish_loadable_versions_and_leave_nothing_else(tmp_path: Path, temporary: Path):
    done = subprocess.run(
        _command(tmp_path, "--iterations", "2", "--policy", "p"),
        env=_environment(tmp_path / "home") | {"TMPDIR": str(temporary)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    folder = tmp_path / "r" / "p"
    versions = checkpoint.versions(folder)
    assert len(versions) >= 2
    found = [checkpoint.read(folder / str(version)) for version in versions]
    assert found[0].training == TrainingProgress(evaluation=found[0].training.evaluation)
    assert [c.training.evaluation.episodes for c in found if c.training.evaluation] == [32] * len(versions)
    assert (found[-1].training.iteration, found[-1].training.env_steps) == (2, 1024)
    lines = done.stdout.splitlines()
    assert lines[0] == "starting Ray, which takes some seconds"
    assert lines[1] == "p starts from scratch; newest version is 1"
    assert "  512 steps  " in lines[2]
    assert lines[-3].startswith(f"iteration    2  v{versions[-1]}  ")
    assert lines[-2] == f"stopped: 2 iterations done; newest version is {versions[-1]}"
    assert lines[-1] == f"serve it: tenuto-serve --repository {tmp_path / 'r'}"
    assert {path.name for path in tmp_path.iterdir()} == {"home", "log", "r"}
    assert list((tmp_path / "home").iterdir()) == []
    # Torch makes a folder for its compiler's cache.
    assert [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")] == []
    assert list((tmp_path / "log" / "p").glob("events.out.tfevents.*"))


def test_sigterm_publishes_what_was_learned_and_exits_with_0(tmp_path: Path):
    process = subprocess.Popen(
        _command(tmp_path, "--publish-every", "1000", "--publish-gain", "1000"),
        env=_environment(tmp_path / "home"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("iteration    2"):
            break
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    *_, last = checkpoint.versions(tmp_path / "r" / ENV)
    assert output.splitlines()[-2] == f"stopped: received SIGTERM; newest version is {last}"
    # Version 1 is the untrained policy; the one at the signal is the second.
    assert last == 2
    assert checkpoint.read(tmp_path / "r" / ENV / "2").training.iteration >= 2
