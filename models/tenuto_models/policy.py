"""The policy: feature map, positional embedding, memory core, actor and critic heads, as in POPGym's baselines.

Legend: B rows, T time steps, O flattened observation, F features, D core output, K logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import torch
from gymnasium import spaces as gym_spaces
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto_models import spaces
from tenuto_models.distributions import ActionDistribution, distribution_for
from tenuto_models.dnc import DNCConfig
from tenuto_models.embedding import SineEmbedding
from tenuto_models.errors import ConfigError
from tenuto_models.frameconv import FrameconvConfig
from tenuto_models.linear import Linear
from tenuto_models.memory import MemoryCore, State, StateSpec, TensorSpec, initial_state, state_fingerprint

MEMORIES: dict[str, type[DNCConfig] | type[FrameconvConfig]] = {
    "dnc": DNCConfig,
    "frameconv": FrameconvConfig,
}
STEP_COUNTER = TensorSpec("t", (1,), torch.int64)
"""Steps of the episode so far; the first step of an episode sees 0."""


@dataclass(frozen=True)
class PolicyConfig:
    """Everything that shapes a policy besides its spaces. The defaults are those of POPGym's ``BaseModel``."""

    memory: DNCConfig | FrameconvConfig = field(default_factory=DNCConfig)
    """The memory core and its sizes."""
    feature_size: int = 256
    """F: width of the feature map."""
    preprocessor_widths: tuple[int, ...] = ()
    """Linear + LeakyReLU layers between feature map and core; empty: none."""
    postprocessor_widths: tuple[int, ...] = ()
    """The same between core and heads."""
    actor_widths: tuple[int, ...] = (256,)
    """Hidden layers of the actor before its final Linear."""
    critic_widths: tuple[int, ...] = (256,)
    """Hidden layers of the critic before its final Linear."""
    embedding_period: int | None = None
    """Longest wave of the sine positional embedding, in steps / 2π; None: no embedding."""

    def __post_init__(self) -> None:
        for name in ("preprocessor_widths", "postprocessor_widths", "actor_widths", "critic_widths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        checked = {"feature_size": (self.feature_size,), "embedding_period": (self.embedding_period or 1,)}
        for f in fields(self):
            if f.name.endswith("_widths"):
                checked[f.name] = getattr(self, f.name)
        for name, values in checked.items():
            for value in values:
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ConfigError(f"PolicyConfig.{name}: got {value!r}, expected an integer >= 1")

    @classmethod
    def for_memory(cls, memory: str, **overrides: Any) -> PolicyConfig:
        """Return POPGym's defaults for ``"dnc"`` (no embedding) or ``"frameconv"`` (sine embedding), with overrides."""
        if memory not in MEMORIES:
            raise ConfigError(f"memory: got {memory!r}, expected one of {sorted(MEMORIES)}")
        defaults: dict[str, Any] = {"memory": MEMORIES[memory]()}
        if memory == "frameconv":
            defaults["embedding_period"] = 1024
        arguments: dict[str, Any] = defaults | overrides
        return cls(**arguments)

    def to_json(self) -> dict[str, Any]:
        """Describe the configuration with plain JSON values."""
        kind = next(name for name, cls in MEMORIES.items() if isinstance(self.memory, cls))
        return {**asdict(self), "memory": {"type": kind, **asdict(self.memory)}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PolicyConfig:
        """Rebuild from :meth:`to_json`. Raises ConfigError for unknown or missing keys and bad values."""
        try:
            memory = dict(data["memory"])
            kind = memory.pop("type")
            if kind not in MEMORIES:
                raise ConfigError(f"memory.type: got {kind!r}, expected one of {sorted(MEMORIES)}")
            _require_keys("memory", memory, {f.name for f in fields(MEMORIES[kind])})
            _require_keys("config", data, {f.name for f in fields(cls)})
            arguments: dict[str, Any] = dict(data) | {"memory": MEMORIES[kind](**memory)}
            return cls(**arguments)
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"policy config: got {data!r}, which is not a valid description ({error})") from error


def _require_keys(what: str, data: Mapping[str, Any], expected: set[str]) -> None:
    if set(data) != expected:
        raise ConfigError(f"{what} keys: got {sorted(data)}, expected {sorted(expected)}")


class PolicyOutput(NamedTuple):
    """What a policy says about a step: leading dimensions [B] (step) or [B, T] (unroll)."""

    logits: Tensor
    """Inputs of the action distribution ``[..., K]``."""
    value: Tensor
    """The critic's estimate of the return ``[...]``."""
    core: Tensor
    """Features after the core and the postprocessor ``[..., D]``."""


class Policy(nn.Module):
    """A policy that remembers. All parameters exist from construction; no call modifies an argument or the module."""

    def __init__(
        self,
        observation_space: gym_spaces.Space[Any],
        action_space: gym_spaces.Space[Any],
        config: PolicyConfig,
    ) -> None:
        super().__init__()
        self.observation_space, self.action_space, self.config = observation_space, action_space, config
        self.observation_size = spaces.flat_size(observation_space)
        self.distribution: ActionDistribution = distribution_for(action_space)

        self.feature_map = Linear(self.observation_size, config.feature_size)
        self.pre, core_input = _mlp(config.feature_size, config.preprocessor_widths)
        core = config.memory.build(core_input)
        self.core: MemoryCore = core
        self.post, head_input = _mlp(core.output_size, config.postprocessor_widths)
        self.actor = _head(head_input, config.actor_widths, self.distribution.num_logits)
        self.critic = _head(head_input, config.critic_widths, 1)
        if config.embedding_period is None:
            self.embedding = None
        else:
            self.embedding = SineEmbedding(config.feature_size, config.embedding_period)
            self.embedding_strength = nn.Parameter(torch.tensor([0.5]))
        nn.init.orthogonal_(self.feature_map.weight)

        self.state_spec: StateSpec = (*core.state_spec, STEP_COUNTER)

    @property
    def state_fingerprint(self) -> str:
        """Hash of the state spec: two policies may share a session's state storage exactly when it is equal."""
        return state_fingerprint(self.state_spec)

    def initial_state(self, batch: int, device: torch.device | None = None) -> dict[str, Tensor]:
        """Return the state of ``batch`` fresh episodes: all zero."""
        return initial_state(self.state_spec, batch, device)

    def step(self, observation: Tensor, state: State) -> tuple[PolicyOutput, dict[str, Tensor]]:
        """Advance one step: flattened observation ``[B, O]`` and state -> ``(output, state after it)``."""
        t = state["t"]
        core, after = self.core.step(self.pre(self._features(observation, t[:, 0])), state)
        return self._heads(self.post(core)), {**after, "t": t + 1}

    def unroll(
        self, observation: Tensor, state: State, seq_lens: Tensor | None = None
    ) -> tuple[PolicyOutput, dict[str, Tensor]]:
        """Advance padded sequences: ``[B, T, O]`` -> ``(output [B, T, ...], state after seq_lens [B])``."""
        t, length = state["t"], observation.shape[1]
        steps = t + torch.arange(length, device=t.device)
        core, after = self.core.unroll(self.pre(self._features(observation, steps)), state, seq_lens)
        taken = length if seq_lens is None else seq_lens.to(t.dtype).unsqueeze(1)
        return self._heads(self.post(core)), {**after, "t": t + taken}

    forward = unroll

    def _features(self, observation: Tensor, t: Tensor) -> Tensor:
        """``x = LayerNorm(Linear(obs))``, then ``x = (1-s) x + s PE[t]`` where the policy has an embedding."""
        x = F.layer_norm(self.feature_map(observation), (self.config.feature_size,), eps=1e-5)
        if self.embedding is not None:
            strength = self.embedding_strength.clamp(0, 1)
            x = (1 - strength) * x + strength * self.embedding(t)
        return x

    def _heads(self, core: Tensor) -> PolicyOutput:
        return PolicyOutput(self.actor(core), self.critic(core).squeeze(-1), core)


def _mlp(input_size: int, widths: tuple[int, ...]) -> tuple[nn.Sequential, int]:
    """Linear + LeakyReLU(0.01) layers, orthogonal weights; returns the stack and the width that leaves it."""
    layers: list[nn.Module] = []
    for width in widths:
        linear = Linear(input_size, width)
        nn.init.orthogonal_(linear.weight)
        layers += [linear, nn.LeakyReLU()]
        input_size = width
    return nn.Sequential(*layers), input_size


def _head(input_size: int, widths: tuple[int, ...], output_size: int) -> nn.Sequential:
    """A trunk as :func:`_mlp`, then a Linear drawn from N(0, 0.01²) so that a fresh policy is close to uniform."""
    trunk, width = _mlp(input_size, widths)
    final = Linear(width, output_size)
    nn.init.normal_(final.weight, std=0.01)
    return nn.Sequential(*trunk, final)
