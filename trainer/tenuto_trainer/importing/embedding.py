"""Which embedding of the step counter an old model has, as its configuration says and its tensors confirm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tenuto_models.popgym import require_served_embedding
from tenuto_trainer.errors import ImportedError
from tenuto_trainer.importing.tensors import Tensors

_DEFAULT = {"DiffNC": None, "Frameconv": "sine"}
_PERIOD = 1024
"""modelv2's ``embedding_period`` where nothing is given."""


@dataclass(frozen=True)
class Embedding:
    """An embedding that a server computes, or none."""

    config: dict[str, Any]
    """The configuration's keys about it."""
    period: Any
    """Of the sine, as the checkpoint has it; None: there is no embedding."""
    notes: list[str]
    """What was assumed, for the user."""


def embedding_of(tensors: Tensors, features: int, custom: Mapping[str, Any] | None) -> Embedding:
    """Find the embedding of a model whose feature map is ``features`` wide.

    ``custom`` is the model's own configuration; None where the checkpoint holds none, and the tensors alone decide.
    Raises ConfigError for an embedding that no server computes, ImportedError where tensors and configuration differ.
    """
    # POPGym gives every model a strength, also one without an embedding, which never uses it.
    scaled = "embedding_strength" in tensors.arrays
    parts = {name for name in tensors.arrays if name.startswith("embedding.")}
    embedded = bool(parts) or (scaled and not tensors.is_popgym)
    if custom is None:
        given: dict[str, Any] = {"embedding": "sine" if embedded else None, "scale_embedding": scaled}
    else:
        given = dict(custom)
    kind = given.get("embedding", _DEFAULT[tensors.kind])
    config = {
        "embedding": kind,
        "embedding_mode": given.get("embedding_mode", "add"),
        "embedding_size": given.get("embedding_size"),
        "scale_embedding": given.get("scale_embedding", True),
    }
    if kind is None:
        expected: set[str] = set()
    else:
        require_served_embedding(config, features)
        # POPGym saves the table of its sine, ours is a formula.
        expected = {"embedding_strength", "embedding.weight"} if tensors.is_popgym else {"embedding_strength"}
    got = parts | ({"embedding_strength"} if scaled and not (tensors.is_popgym and kind is None) else set())
    if got != expected:
        origin = "" if custom is None else ", as the configuration says" if "embedding" in custom else ", the default"
        raise ImportedError(
            f"embedding: got the tensors {sorted(got)}, expected {sorted(expected)} for embedding={kind!r}{origin}"
        )
    if kind is None:
        # Of what modelv2 offers, an unscaled formula leaves no tensor either.
        assumed = None if tensors.is_popgym else "no embedding, as there are no tensors of one"
        return Embedding(config, None, _notes(custom, assumed))
    if tensors.is_popgym:
        period: Any = tensors.shape("embedding.weight", 2)[0]
        return Embedding(config, period, _notes(custom, "a sine that is added to all features"))
    period = given.get("embedding_period", _PERIOD)
    return Embedding(config, period, _notes(custom, f"a sine of period {period} that is added to all features"))


def _notes(custom: Mapping[str, Any] | None, assumed: str | None) -> list[str]:
    if custom is not None or assumed is None:
        return []
    return [f"the checkpoint does not say what the embedding is; taken to be {assumed}"]
