"""Trains policies with memory by RLlib's PPO and publishes their checkpoints.

What needs Ray is imported from its own module, since Ray takes seconds to import: ``tenuto_trainer.loop.train``,
``tenuto_trainer.rl_module.PolicyModule``, ``tenuto_trainer.publish.CheckpointPublisher``.
"""

from tenuto_trainer.config import TrainConfig
from tenuto_trainer.errors import DivergedError, TrainConfigError, TrainerError

__all__ = ["DivergedError", "TrainConfig", "TrainConfigError", "TrainerError"]
