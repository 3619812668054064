"""Everything that a training run can be told, checked before anything starts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from tenuto_trainer.errors import TrainConfigError

if TYPE_CHECKING:
    from tenuto_models import PolicyConfig

MEMORIES = ("dnc", "frameconv")
LEARNER_DEVICES = ("cpu", "cuda", "auto")
MAX_SEED = 2**30
"""Seeds of training are below it; those of evaluation lie far above."""
_POLICY_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_HOST_PORT = r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/@\[\]]+):[1-9][0-9]{0,4}"


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults learn POPGym's Easy environments within minutes on two CPU cores."""

    env_id: str
    """Environment: popgym-…-v0, an id of gymnasium, or module:callable for your own."""
    memory: str
    """Memory core: "dnc" or "frameconv"."""
    repository: Path
    """Folder that versions are published to, as ``<repository>/<policy>/<version>/``."""
    policy: str = ""
    """Policy name in the repository; empty: the environment's id with other characters as dashes."""

    iterations: int | None = None
    """Training iterations after which to stop, those before a restart included; None: no limit."""
    stop_return: float | None = None
    """Mean episode return at which to stop; None: no limit."""
    stop_seconds: float | None = None
    """Seconds of training after which to stop, those before a restart included, start-up not; None: no limit."""
    publish_every: int = 5
    """Iterations between two publications, whatever the return."""
    publish_gain: float = 0.05
    """Rise of the mean episode return over the best published one that is worth a version at once."""
    server: str | None = None
    """Server of this repository, as host:port, which is asked whether it serves what is published; None: nobody is."""
    server_token_file: Path | None = None
    """File whose first line is the token to ask that server with; None: none is shown."""
    server_ca_certificate: Path | None = None
    """PEM file of whom to trust to be that server; None: it is asked without encryption."""
    server_client_certificate: Path | None = None
    """PEM file of the certificate to show that server; None: none is shown."""
    server_client_key: Path | None = None
    """PEM file of this certificate's key."""
    signing_key: Path | None = None
    """PEM file of the secret ed25519 key that versions are signed with; None: they are not signed."""
    log_dir: Path = Path("runs")
    """Folder for TensorBoard event files and the effective configuration, one folder per policy below it."""
    seed: int | None = None
    """Seed of weights, actions and environments, below 2**30; None: drawn anew, and to be found beside the logs."""
    evaluation_episodes: int = 32
    """Episodes that are played with greedy actions on held-out seeds before every publication; 0: none."""
    evaluation_max_steps: int = 2048
    """Steps after which an evaluated episode is cut, so that no policy can play for ever."""

    num_envs: int = 32
    """Environments stepped together in one process."""
    num_env_runners: int = 0
    """Processes beside the trainer that step environments; 0: the trainer does it, best on few cores."""
    batch_size: int = 4096
    """Environment steps per iteration."""
    minibatch_size: int = 2048
    """Environment steps per gradient step; at least max_seq_len, which RLlib fails below."""
    num_epochs: int = 6
    """Passes over the batch per iteration."""
    max_seq_len: int = 32
    """Steps that gradients reach back, and the length of a training row."""
    lr: float = 2e-3
    """Adam's learning rate."""
    gamma: float = 0.99
    """Discount per step."""
    gae_lambda: float = 0.95
    """Weight of longer returns in the advantage estimate."""
    clip: float = 0.2
    """Farthest that PPO trusts a probability ratio to move from 1."""
    entropy: float = 0.001
    """Weight of the entropy bonus."""
    grad_clip: float = 0.5
    """Largest norm of a gradient."""
    torch_threads: int = 1
    """Threads of torch in the trainer; more than 1 slows networks of this size down."""
    learner_device: str = "cpu"
    """Where gradients are computed: "cpu", "cuda", or "auto", the GPU where there is one. Sampling stays on the CPU."""

    hidden_size: int = 64
    """Width of feature map, memory core and heads, in units."""
    num_cells: int = 8
    """Cells of the DNC's memory."""
    cell_size: int = 8
    """Floats in one cell of the DNC's memory."""
    num_read_heads: int = 2
    """Read heads of the DNC."""
    stack_size: int = 4
    """Frames that the Frameconv sees, the current one included."""

    def __post_init__(self) -> None:
        if not self.policy:
            object.__setattr__(self, "policy", re.sub(r"[^A-Za-z0-9._-]+", "-", self.env_id))
        if not re.fullmatch(_POLICY_NAME, self.policy):
            raise TrainConfigError(
                f"policy: got {self.policy!r}, expected letters, digits, '.', '_' or '-', at most 128"
            )
        if self.server is not None and not re.fullmatch(_HOST_PORT, self.server):
            raise TrainConfigError(f"server: got {self.server!r}, expected host:port")
        if (self.server_client_certificate is None) != (self.server_client_key is None):
            raise TrainConfigError("server_client_key: got a certificate or a key alone, expected both or neither")
        if self.server_client_key is not None and self.server_ca_certificate is None:
            raise TrainConfigError("server_ca_certificate: got none, expected one, since there is a server_client_key")
        if self.memory not in MEMORIES:
            raise TrainConfigError(f"memory: got {self.memory!r}, expected one of {', '.join(MEMORIES)}")
        if self.learner_device not in LEARNER_DEVICES:
            raise TrainConfigError(
                f"learner_device: got {self.learner_device!r}, expected one of {', '.join(LEARNER_DEVICES)}"
            )
        for field in fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if value is None and kind.endswith("None"):
                continue
            if kind.startswith("int"):
                least = {"num_env_runners": 0, "seed": 0, "stack_size": 2, "evaluation_episodes": 0}.get(field.name, 1)
                if not isinstance(value, int) or isinstance(value, bool) or value < least:
                    raise TrainConfigError(f"{field.name}: got {value!r}, expected an integer >= {least}")
            elif kind.startswith("float") and not (isinstance(value, int | float) and math.isfinite(value)):
                raise TrainConfigError(f"{field.name}: got {value!r}, expected a finite number")
        if self.seed is not None and self.seed >= MAX_SEED:
            raise TrainConfigError(f"seed: got {self.seed!r}, expected an integer below {MAX_SEED}")
        for name in ("lr", "clip", "grad_clip", "stop_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise TrainConfigError(f"{name}: got {value!r}, expected a number > 0")
        for name in ("entropy", "publish_gain"):
            if getattr(self, name) < 0:
                raise TrainConfigError(f"{name}: got {getattr(self, name)!r}, expected a number >= 0")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainConfigError(f"{name}: got {getattr(self, name)!r}, expected a number from 0 to 1")
        if not self.max_seq_len <= self.minibatch_size <= self.batch_size:
            raise TrainConfigError(
                f"minibatch_size: got {self.minibatch_size}, expected from max_seq_len ({self.max_seq_len}) "
                f"to batch_size ({self.batch_size})"
            )

    def policy_config(self) -> PolicyConfig:
        """Return the configuration of the policy to train."""
        # Torch takes seconds to import, and settings are checked without it.
        from tenuto_models import DNCConfig, FrameconvConfig, PolicyConfig

        width = self.hidden_size
        memory = (
            DNCConfig(width, self.num_cells, self.cell_size, self.num_read_heads)
            if self.memory == "dnc"
            else FrameconvConfig(width, self.stack_size)
        )
        return PolicyConfig(
            memory=memory,
            feature_size=width,
            actor_widths=(width,),
            critic_widths=(width,),
            embedding_period=PolicyConfig.for_memory(self.memory).embedding_period,
        )
