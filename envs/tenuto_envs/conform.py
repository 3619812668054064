"""Keeps an environment's word: every observation lies in the declared observation space, in its dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from tenuto_envs.errors import ObservationError

Env = gymnasium.Env[Any, Any]


class ConformObservation(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Casts observations to the space's dtype and clips Box entries to its bounds, where that is needed.

    Raises ObservationError for what remains outside: wrong shape or structure, NaN, an unknown class.
    """

    def observation(self, observation: Any) -> Any:
        """Return the observation itself where it conforms, else a conforming copy."""
        space = self.observation_space
        if space.contains(observation):
            return observation
        try:
            conformed = conform(space, observation)
        except (TypeError, ValueError, KeyError) as error:
            raise ObservationError(f"observation: got {observation!r}, expected {space} ({error})") from error
        if not space.contains(conformed):
            raise ObservationError(f"observation: got {observation!r}, expected an element of {space}")
        return conformed


def conform(space: spaces.Space[Any], observation: Any) -> Any:
    """Cast and clip towards the space, leaf by leaf. Does not modify the observation."""
    if isinstance(space, spaces.Box):
        bounds = np.asarray(space.low, space.dtype), np.asarray(space.high, space.dtype)
        return np.clip(np.asarray(observation), *bounds).astype(space.dtype)
    if isinstance(space, spaces.Tuple):
        return tuple(conform(s, o) for s, o in zip(space.spaces, observation, strict=True))
    if isinstance(space, spaces.Dict):
        if not isinstance(observation, Mapping) or observation.keys() != space.spaces.keys():
            raise KeyError(f"keys of {type(observation).__name__}, expected {sorted(map(str, space.spaces))}")
        return {k: conform(s, observation[k]) for k, s in space.spaces.items()}
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        array = np.asarray(observation)
        cast = array.astype(space.dtype)
        return cast[()] if np.array_equal(cast, array) else observation
    return observation
