"""The engine measured by itself: everything it is told to measure, with goals that tell what was not."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "bench" / "engine.py"


def test_every_size_is_measured_beside_plain_torch(tmp_path: Path) -> None:
    file = tmp_path / "engine.json"
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--rounds", "1", "--seconds", "0", "--rows", "1", "5"]
    done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    told = json.loads(file.read_text())
    found = {(memory, rows, who): us for memory, rows, who, us in told["rows"]}
    expected = {(m, n, who) for m in ("dnc", "frameconv") for n in (1, 5) for who in ("engine", "Policy.step")}
    assert expected <= found.keys() and all(us > 0 for us in found.values())
    lone, full = told["goals"]
    assert (lone["held"] is None) == (find_spec("dnc") is None), "one row was measured, where there is a package"
    assert full["got"] is None and "not measured" in done.stdout
