"""Gymnasium spaces as JSON, for the manifest of a checkpoint.

An observation is flattened by ``gymnasium.spaces.flatten`` and by nothing else; ``flat_size`` is its width.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from gymnasium import spaces

from tenuto_models.errors import ConfigError

Json = dict[str, Any]


def to_json(space: spaces.Space[Any]) -> Json:
    """Describe a space. Raises ConfigError for a kind that has no fixed flat size (Text, Graph, Sequence, OneOf)."""
    if isinstance(space, spaces.Box):
        return {
            "type": "Box",
            "shape": list(space.shape),
            "dtype": str(space.dtype),
            "low": _bounds_to_json(space.low),
            "high": _bounds_to_json(space.high),
        }
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": str(space.dtype)}
    if isinstance(space, spaces.MultiDiscrete):
        return {
            "type": "MultiDiscrete",
            "nvec": space.nvec.tolist(),
            "start": space.start.tolist(),
            "dtype": str(space.dtype),
        }
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "shape": list(space.shape)}
    if isinstance(space, spaces.Tuple):
        return {"type": "Tuple", "spaces": [to_json(s) for s in space.spaces]}
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "spaces": {str(k): to_json(s) for k, s in space.spaces.items()}}
    raise ConfigError(
        f"space: got {type(space).__name__}, expected one of fixed size: "
        "Box, Discrete, MultiDiscrete, MultiBinary, Tuple, Dict"
    )


def from_json(data: Mapping[str, Any], max_bytes: int = 2**34) -> spaces.Space[Any]:
    """Rebuild a space from :func:`to_json`. Raises ConfigError where the description is not one, or claims that its
    bounds take more bytes, before there is memory for them.
    """
    try:
        _require_few(data, max_bytes)
        kind = data["type"]
        if kind == "Box":
            dtype = np.dtype(data["dtype"])
            low, high = (_bounds_from_json(data[k], data["shape"], dtype) for k in ("low", "high"))
            return spaces.Box(low, high, tuple(data["shape"]), dtype.type)
        if kind == "Discrete":
            return spaces.Discrete(data["n"], start=data["start"], dtype=np.dtype(data["dtype"]).type)
        if kind == "MultiDiscrete":
            return spaces.MultiDiscrete(data["nvec"], dtype=np.dtype(data["dtype"]).type, start=data["start"])
        if kind == "MultiBinary":
            shape = data["shape"]
            # A one-dimensional MultiBinary equals only one that was made from a number.
            return spaces.MultiBinary(shape[0] if len(shape) == 1 else shape)
        if kind == "Tuple":
            return spaces.Tuple([from_json(s, max_bytes) for s in data["spaces"]])
        if kind == "Dict":
            return spaces.Dict({k: from_json(s, max_bytes) for k, s in data["spaces"].items()})
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, IndexError, AssertionError) as error:
        raise ConfigError(f"space: got {data!r}, which is not a valid description ({error})") from error
    raise ConfigError(f"space type: got {kind!r}, expected Box, Discrete, MultiDiscrete, MultiBinary, Tuple or Dict")


def _require_few(data: Mapping[str, Any], max_bytes: int) -> None:
    """Raise ConfigError where the bounds of all Boxes in a description are larger, or of what is no number."""
    found, left = [data], max_bytes
    while found:
        space = found.pop()
        if space["type"] == "Box":
            if (dtype := np.dtype(space["dtype"])).kind not in "biuf":
                raise ConfigError(f"space dtype: got {space['dtype']!r}, expected one of numbers")
            left -= abs(prod(space["shape"])) * dtype.itemsize
            if not left >= 0:
                raise ConfigError(
                    f"space shape: got {space['shape']}, expected at most {max_bytes} bytes of bounds in all"
                )
        elif space["type"] in ("Tuple", "Dict"):
            inner = space["spaces"]
            found += inner.values() if isinstance(inner, dict) else inner


def flat_size(space: spaces.Space[Any]) -> int:
    """Width of a flattened sample. Raises ConfigError as :func:`to_json` does."""
    to_json(space)
    return spaces.flatdim(space)


def _bounds_to_json(bounds: np.ndarray) -> Any:
    """One number where all entries agree, else the flat list; infinities as strings, since JSON has none."""
    flat = [_number(x) for x in bounds.ravel().tolist()]
    return flat[0] if flat and all(x == flat[0] for x in flat) else flat


def _number(x: float) -> float | str:
    return x if np.isfinite(x) else repr(float(x))


def _bounds_from_json(data: Any, shape: list[int], dtype: np.dtype) -> np.ndarray:
    if isinstance(data, list):
        return np.array([float(x) if isinstance(x, str) else x for x in data], dtype=dtype).reshape(shape)
    return np.full(shape, float(data) if isinstance(data, str) else data, dtype=dtype)
