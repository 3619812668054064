"""Memory models: the DNC and Frameconv cores, the policy around them, and the checkpoint format."""

from tenuto_models.checkpoint import Checkpoint
from tenuto_models.dnc import DNCConfig, DNCCore
from tenuto_models.errors import CheckpointError, ConfigError, ModelError
from tenuto_models.frameconv import FrameconvConfig, FrameconvCore
from tenuto_models.memory import MemoryCore, State, StateSpec, TensorSpec
from tenuto_models.policy import Policy, PolicyConfig, PolicyOutput
from tenuto_models.popgym import import_popgym
from tenuto_models.training import Evaluation, TrainingProgress

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "DNCConfig",
    "DNCCore",
    "Evaluation",
    "FrameconvConfig",
    "FrameconvCore",
    "MemoryCore",
    "ModelError",
    "Policy",
    "PolicyConfig",
    "PolicyOutput",
    "State",
    "StateSpec",
    "TensorSpec",
    "TrainingProgress",
    "import_popgym",
]
