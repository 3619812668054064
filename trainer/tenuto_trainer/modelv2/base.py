"""``BaseModel``: everything around a memory in RLlib's old API stack; a subclass adds the memory.

Legend: B rows, T time steps, O flattened observation, F features, D memory's output, K logits. RLlib hands in
``[B T, O]``, rows padded on the right, one list of state tensors ``[B, ...]`` (as floats) and ``seq_lens [B]``.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import gymnasium
import torch
from ray.rllib.models.torch.torch_modelv2 import TorchModelV2
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto_models import ConfigError, ModelError
from tenuto_trainer.modelv2 import config as model_configs
from tenuto_trainer.modelv2.embeddings import EMBEDDINGS

States = list[Tensor]


class BaseModel(TorchModelV2, nn.Module):
    """Feature map, embedding, preprocessor, memory, postprocessor, heads. Every parameter exists from construction.

    A subclass names its own keys in MODEL_CONFIG, builds ``self.core`` in ``__init__`` and overrides
    :meth:`initial_state` and :meth:`forward_memory`. ``self.cfg`` holds the configuration, all widths filled in.
    No call modifies an argument, a parameter or the mode of the model.
    """

    BASE_CONFIG: ClassVar[dict[str, Any]] = model_configs.BASE_CONFIG
    MODEL_CONFIG: ClassVar[dict[str, Any]] = {}
    """Keys of the subclass, and defaults of its own for keys of the base."""

    def __init__(
        self,
        obs_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        num_outputs: int,
        model_config: dict[str, Any],
        name: str,
        **custom_model_kwargs: Any,
    ) -> None:
        """Raises ConfigError for an unknown key, a bad value, or modules and sizes that do not fit together."""
        nn.Module.__init__(self)
        super().__init__(obs_space, action_space, num_outputs, model_config, name)
        self.obs_dim = gymnasium.spaces.flatdim(obs_space)
        # RLlib passes the same keys twice, once by keyword.
        given: dict[str, Any] = custom_model_kwargs | (model_config.get("custom_model_config") or {})
        self.cfg = cfg = model_configs.checked(given, {**self.BASE_CONFIG, **self.MODEL_CONFIG})

        features = cfg["preprocessor_input_size"]
        linear = nn.Linear(self.obs_dim, features)
        nn.init.orthogonal_(linear.weight)
        self.feature_map = nn.Sequential(linear, nn.LayerNorm(features, elementwise_affine=False))
        self.embedding: nn.Module | None = None
        if cfg["embedding"] is not None:
            size: int = cfg["embedding_size"] or features
            self.embedding = EMBEDDINGS[cfg["embedding"]](size, cfg["embedding_period"])
            if cfg["scale_embedding"]:
                self.embedding_strength = nn.Parameter(torch.tensor([0.5]))
        self.pre = model_configs.fresh(cfg["preprocessor"])
        self.core: Any = nn.Identity()
        self.post = model_configs.fresh(cfg["postprocessor"])
        cfg["preprocessor_output_size"] = model_configs.width_after(
            "preprocessor", self.pre, features, ("preprocessor_output_size", cfg["preprocessor_output_size"])
        )
        head_input = model_configs.width_after("postprocessor", self.post, cfg["hidden_size"], ("hidden_size", None))
        self.actor = self._head("actor", head_input, num_outputs)
        self.critic = self._head("critic", head_input, 1)
        cfg["postprocessor_output_size"] = self.actor[1].in_features
        self.features: Tensor | None = None

    def _head(self, key: str, width: int, num_outputs: int) -> nn.Sequential:
        """The configured trunk or one Linear + LeakyReLU, then a Linear that starts close to zero."""
        size: int | None = self.cfg["postprocessor_output_size"]
        trunk = model_configs.fresh(self.cfg[key] or nn.Sequential(nn.Linear(width, size or width), nn.LeakyReLU()))
        final = nn.Linear(
            model_configs.width_after(key, trunk, width, ("postprocessor_output_size", size)), num_outputs
        )
        nn.init.normal_(final.weight, std=0.01)
        return nn.Sequential(trunk, final)

    def initial_state(self) -> States:
        """Return the memory's state at the start of an episode, tensors without a batch dimension."""
        raise NotImplementedError

    def get_initial_state(self) -> States:
        """Return :meth:`initial_state` and the step counter, the last of the list."""
        return [*self.initial_state(), torch.zeros(1, dtype=torch.int64)]

    def forward_memory(self, z: Tensor, state: States, t_starts: Tensor, seq_lens: Tensor) -> tuple[Tensor, States]:
        """Run the memory over ``z [B, T, F]``, row b of which begins ``t_starts[b]`` steps into its episode.

        Returns ``(output [B, T, D], state)``: the output with the padding kept, the state of row b after its step
        ``seq_lens[b]``, in exactly the given shapes.
        """
        raise NotImplementedError

    def __call__(self, input_dict: Any, state: Any = None, seq_lens: Any = None) -> tuple[Tensor, States]:
        """Run RLlib's wrapper around :meth:`forward`, which also wants ``obs``."""
        if "obs" not in input_dict:
            input_dict = {**input_dict, "obs": input_dict.get("obs_flat")}
        return super().__call__(input_dict, state, seq_lens)

    def forward(self, input_dict: Any, state: Any, seq_lens: Any) -> tuple[Tensor, States]:
        """Run a padded batch: ``obs_flat`` or ``obs [B T, O]`` -> ``(logits [B T, K], state after seq_lens)``.

        Keeps the features for :meth:`value_function`, as RLlib wants it; nothing else of this call stays.
        Raises ModelError for a state or lengths, ConfigError for observations, that do not fit.
        """
        if not state or not all(isinstance(tensor, Tensor) for tensor in state):
            raise ModelError("state: got none, expected the tensors of get_initial_state, each [B, ...]")
        *memory, t = state
        t_starts = t.reshape(-1).long()
        x = self._sequences(input_dict, len(t_starts))
        length = x.shape[1]
        lengths = self._lengths(seq_lens, t_starts, length)
        # RLlib pads to max_seq_len, also where no row is that long.
        longest = int(lengths.max())
        z = self.pre(self._embedded(self.feature_map(x[:, :longest]), t_starts))
        core, memory = self.forward_memory(z, memory, t_starts, lengths)
        self.features = F.pad(self.post(core), (0, 0, 0, length - longest))
        logits = self.actor(self.features)
        return logits.flatten(0, 1), [*memory, (t_starts + lengths).unsqueeze(1)]

    def __deepcopy__(self, memo: dict[int, Any]) -> BaseModel:
        """Copy the model, without the batch of its last forward: torch copies no tensor that has a graph."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        for name, value in vars(self).items():
            vars(made)[name] = None if name in ("features", "_last_output") else copy.deepcopy(value, memo)
        return made

    def value_function(self) -> Tensor:
        """Return the critic's estimates ``[B T]`` for the batch of the last forward."""
        if self.features is None:
            raise ModelError("value_function: got no batch, expected a forward before it")
        return self.critic(self.features).reshape(-1)

    def _sequences(self, input_dict: Any, rows: int) -> Tensor:
        obs = input_dict["obs_flat"] if "obs_flat" in input_dict else input_dict.get("obs")
        if not isinstance(obs, Tensor) or not obs.numel() or not rows or obs.numel() % (rows * self.obs_dim):
            shape = list(obs.shape) if isinstance(obs, Tensor) else "nothing" if obs is None else type(obs).__name__
            raise ConfigError(f"obs_flat: got {shape}, expected [{rows} T, {self.obs_dim}]")
        return obs.float().reshape(rows, -1, self.obs_dim)

    def _lengths(self, seq_lens: Any, t_starts: Tensor, length: int) -> Tensor:
        if seq_lens is None:
            return torch.full_like(t_starts, length)
        lengths = torch.as_tensor(seq_lens, device=t_starts.device).long()
        if lengths.shape != t_starts.shape or not bool(((lengths >= 0) & (lengths <= length)).all()):
            raise ModelError(f"seq_lens: got {lengths.tolist()}, expected {len(t_starts)} lengths from 0 to {length}")
        return lengths

    def _embedded(self, x: Tensor, t_starts: Tensor) -> Tensor:
        """``(1-s) x + s E[t]`` on the first embedded features, or there ``s E[t]`` alone; all others ``(1-s) x``."""
        if self.embedding is None:
            return x
        embedding: Tensor = self.embedding(t_starts.unsqueeze(1) + torch.arange(x.shape[1], device=x.device))
        if self.cfg["scale_embedding"]:
            strength = self.embedding_strength.clamp(0, 1)
            x, embedding = (1 - strength) * x, strength * embedding
        size = embedding.shape[-1]
        touched = x[..., :size] + embedding if self.cfg["embedding_mode"] == "add" else embedding
        return torch.cat([touched, x[..., size:]], dim=-1)
