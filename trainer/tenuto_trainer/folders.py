"""The folders that a run writes to, tried before the seconds that Ray takes to start."""

from __future__ import annotations

import os
import tempfile

from tenuto_trainer.config import TrainConfig
from tenuto_trainer.errors import TrainConfigError


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
