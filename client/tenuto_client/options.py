"""What a policy object was asked for: which policy, how to sample, how long to wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tenuto_client.errors import TenutoError
from tenuto_client.retry import Timing
from tenuto_proto.v1 import policy_pb2 as pb

OnWait = Callable[[TenutoError], None] | None
"""Is told each error that a first connection waits out."""
OUTPUTS = frozenset({"value", "log_prob", "logits"})


@dataclass(frozen=True)
class PolicyOptions:
    """The arguments of RemotePolicy and its siblings, checked."""

    policy_name: str = ""
    """Empty: the only policy that the server serves."""
    version: int = 0
    """0: each episode begins with the newest version; else all episodes use this one."""
    seed: int | None = None
    """Of the session's actions; row i of a vector policy has seed + i. None: the server derives one."""
    deterministic: bool = False
    """True: the most probable action; false: a sample."""
    outputs: frozenset[str] = frozenset({"value", "log_prob"})
    """What comes with an action."""
    timeout_s: float = 5.0
    """Seconds that one method may take, with all its attempts."""
    wait_for_policy_s: float = 0.0
    """Seconds to wait at first for the server to come up and serve the policy; 0: ``timeout_s`` for the server only."""
    timing: Timing = field(default_factory=Timing)

    def __post_init__(self) -> None:
        """Raise ValueError for a value that makes no sense."""
        if self.version < 0:
            raise ValueError(f"version: got {self.version}, expected 0 (newest) or a version number")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: got {self.seed}, expected 0 .. 2**64 - 1")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s: got {self.timeout_s}, expected more than 0 seconds")
        if not self.wait_for_policy_s >= 0:
            raise ValueError(f"wait_for_policy_s: got {self.wait_for_policy_s}, expected 0 or more seconds")
        if unknown := self.outputs - OUTPUTS:
            raise ValueError(f"outputs: got {sorted(unknown)}, expected some of {sorted(OUTPUTS)}")

    def outputs_to_wire(self) -> pb.Outputs:
        """Return the message of a step."""
        return pb.Outputs(**dict.fromkeys(self.outputs, True))

    @classmethod
    def build(
        cls,
        policy_name: str,
        version: int,
        seed: int | None,
        deterministic: bool,
        outputs: Iterable[str],
        timeout_s: float,
        wait_for_policy_s: float,
    ) -> PolicyOptions:
        """Gather a constructor's arguments."""
        # A lone name would else be taken for the set of its letters.
        names = {outputs} if isinstance(outputs, str) else outputs
        return cls(policy_name, version, seed, deterministic, frozenset(names), timeout_s, wait_for_policy_s)
