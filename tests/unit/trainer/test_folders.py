import os
import time
from pathlib import Path

from tenuto_trainer.folders import sweep


def _make(path: Path, age_s: float, *, is_folder: bool) -> None:
    if is_folder:
        path.mkdir()
        (path / "weights.safetensors").touch()
    else:
        path.touch()
    os.utime(path, (time.time() - age_s,) * 2)


def test_only_old_unfinished_writes_are_swept_away(tmp_path: Path):
    for name in (".7-abcd_123", ".12-x", "3", ".hidden", ".7", ".3-a.b", "7-abc", ".git-x"):
        _make(tmp_path / name, 3600, is_folder=True)
    for name in (".training_state-0f3a", "training_state.safetensors", ".training_state.safetensors"):
        _make(tmp_path / name, 3600, is_folder=False)
    _make(tmp_path / ".8-beingwritten", 1, is_folder=True)
    _make(tmp_path / ".training_state-new", 1, is_folder=False)
    (tmp_path / ".9-link").symlink_to(tmp_path / "3")
    os.utime(tmp_path / ".9-link", (0, 0), follow_symlinks=False)
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "3", ".hidden", ".7", ".3-a.b", "7-abc", ".git-x", "training_state.safetensors", ".training_state.safetensors",
        ".8-beingwritten", ".training_state-new",
    }  # fmt: skip
    assert (tmp_path / "3" / "weights.safetensors").exists()
