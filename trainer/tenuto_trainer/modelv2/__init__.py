"""POPGym's ``BaseModel``, ``DiffNC`` and ``Frameconv`` for RLlib's old API stack, over the cores that tenuto serves.

Same names and signatures as in ``popgym.baselines.ray_models``; register them with RLlib's ``ModelCatalog``.
"""

from tenuto_trainer.modelv2.base import BaseModel
from tenuto_trainer.modelv2.memories import DiffNC, Frameconv

__all__ = ["BaseModel", "DiffNC", "Frameconv"]
