"""The folders that a run writes to: tried before the seconds that Ray takes to start, swept when it has started."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from tenuto_trainer.config import TrainConfig
from tenuto_trainer.errors import TrainConfigError

_UNFINISHED = re.compile(r"\.([1-9][0-9]*|training_state)-\w+")
_LEFT_BEHIND_S = 600.0
"""Age at which an unfinished write is one of a process that was killed; writes take milliseconds."""


def require_writable(config: TrainConfig) -> None:
    """Raise TrainConfigError unless a run could create its folders. Leaves nothing behind."""
    for setting, folder in (("repository", config.repository), ("log_dir", config.log_dir)):
        below = (folder / config.policy).absolute()
        nearest = next(path for path in (below, *below.parents) if os.path.lexists(path))
        try:
            # Only trying tells: of permissions, read-only disks and full ones there are too many kinds to ask for.
            tempfile.TemporaryDirectory(prefix=".tenuto-", dir=nearest).cleanup()
        except OSError as error:
            reason = f"{nearest}: {error.strerror}"
            raise TrainConfigError(
                f"{setting}: got {str(folder)!r}, expected a folder that can be written to ({reason})"
            ) from error


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left unfinished in a policy's folder; what somebody writes now stays."""
    now_s = time.time()
    for path in folder.iterdir():
        try:
            if not _UNFINISHED.fullmatch(path.name) or now_s - path.lstat().st_mtime < _LEFT_BEHIND_S:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError:
            continue  # Somebody else's, or gone by now; nothing depends on it.
