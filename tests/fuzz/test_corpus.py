"""The short form of ``make fuzz``: the kept corpus, and some thousand inputs made from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


# In a process of its own, since a target turns the server's clock.
@pytest.mark.parametrize(("target", "num_inputs"), [("rpcs", 5000), ("checkpoints", 1500)])
def test_no_input_of_the_corpus_and_none_that_is_made_from_it_is_a_finding(
    tmp_path: Path, target: str, num_inputs: int
) -> None:
    assert list((HERE / "corpus" / target).iterdir()), "a corpus is kept"
    command = [sys.executable, str(HERE / "run.py"), target, "--driver", "random", "--inputs", str(num_inputs)]
    done = subprocess.run(
        [*command, "--findings", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{num_inputs} inputs" in done.stdout and not list(tmp_path.iterdir())
