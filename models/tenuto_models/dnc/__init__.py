"""The Differentiable Neural Computer (Graves et al. 2016), as package ``dnc`` 1.1.0 computes it one step at a time.

The ladder of the paper: ``addressing`` (weightings) <- ``access`` (one access) <- ``core`` (controller and access).
"""

from tenuto_models.dnc.core import DNCConfig, DNCCore

__all__ = ["DNCConfig", "DNCCore"]
