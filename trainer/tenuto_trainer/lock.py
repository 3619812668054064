"""One training at a time per policy: two would overwrite each other's state, and publish an untrained version last."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from tenuto_trainer.config import TrainConfig
from tenuto_trainer.errors import TrainConfigError

FILE = ".training.lock"
"""In a policy's folder; it stays there, empty."""


@contextmanager
def only_training(config: TrainConfig) -> Generator[None]:
    """Hold the policy's lock, which also ends with the process. Raises TrainConfigError if another one holds it."""
    folder = config.repository / config.policy
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise TrainConfigError(
            f"policy: got {config.policy!r}, which another process is training ({folder}); choose another policy name"
        ) from error
    try:
        yield
    finally:
        lock.release()
