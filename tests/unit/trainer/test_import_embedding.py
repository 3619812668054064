"""An old model's embedding is published exactly, or refused by the name of the key that no server computes."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from old_checkpoints import DATA, assert_plays_as, assert_refused, import_from, imported, write, write_model
from old_stack import ACTIONS, MODELS, OBSERVATION, SMALL, build
from tenuto_models import import_popgym
from tenuto_trainer.modelv2 import BaseModel, DiffNC, Frameconv
from tenuto_trainer.modelv2.embeddings import EMBEDDINGS

with warnings.catch_warnings():  # Of torch, about a decorator of POPGym's.
    warnings.simplefilter("ignore", DeprecationWarning)
    from popgym.baselines.models.embeddings import positional_encoding
    from popgym.baselines.ray_models.ray_frameconv import Frameconv as PopgymFrameconv

OTHERS = sorted(EMBEDDINGS.keys() - {"sine"})
NOT_SERVED = [
    *(({"embedding": name}, f"embedding: got '{name}', expected 'sine' or None") for name in OTHERS),
    ({"embedding": "sine", "embedding_mode": "cat", "embedding_size": 12},
     "embedding_mode: got 'cat', expected 'add'"),
    ({"embedding": "sine", "embedding_size": 8}, "embedding_size: got 8, expected None or 12"),
    ({"embedding": "sine", "scale_embedding": False}, "scale_embedding: got False, expected True"),
]  # fmt: skip


def popgym_model(**config: Any) -> Any:
    """POPGym's own Frameconv, as small and lively as ours, with modules of its own."""
    modules = {key: nn.Sequential(nn.Linear(16, 16), nn.LeakyReLU()) for key in ("actor", "critic")}
    widths = {"preprocessor_output_size": 12, "postprocessor_output_size": 16, "stack_size": 4}
    custom = {**SMALL[Frameconv], **widths, **modules, **config}
    model = PopgymFrameconv(OBSERVATION, ACTIONS, 4, {"max_seq_len": 64, "custom_model_config": custom}, "model")
    with torch.no_grad():
        model.actor[1].weight.mul_(20)
    return model


def custom_of(cls: type[BaseModel], config: dict[str, Any]) -> dict[str, Any]:
    return {**SMALL[cls], **config}


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("config", "period"),
    [
        ({"embedding": None}, None),
        ({"embedding": None, "scale_embedding": False}, None),
        ({"embedding": "sine", "embedding_period": 50}, 50),
        ({"embedding": "sine", "embedding_size": 12}, 1024),
    ],
)
def test_a_sine_or_no_embedding_of_our_own_classes_is_published_exactly(
    cls: type[BaseModel], config: dict[str, Any], period: int | None, tmp_path: Path
) -> None:
    model = build(cls, **config)
    if period:
        model.embedding_strength.data.fill_(0.3)
    assert import_from(write_model(tmp_path, model, custom_of(cls, config)), tmp_path) == 0
    assert imported(tmp_path).policy.config.embedding_period == period
    assert_plays_as(model, tmp_path)


@pytest.mark.parametrize("config", [{}, {"embedding": None}, {"embedding": None, "scale_embedding": False}], ids=str)
def test_a_sine_or_no_embedding_of_popgym_is_published_exactly(config: dict[str, Any], tmp_path: Path) -> None:
    model = popgym_model(**config)
    assert import_from(write_model(tmp_path, model, {**model.cfg, **config}), tmp_path) == 0
    assert imported(tmp_path).policy.config.embedding_period == (None if config else 64)
    assert_plays_as(model, tmp_path)


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(("config", "message"), NOT_SERVED)
def test_other_embeddings_of_our_own_classes_are_refused_by_name(
    cls: type[BaseModel], config: dict[str, Any], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path, build(cls, **config), custom_of(cls, config))
    assert import_from(folder, tmp_path) == 1
    assert_refused(message, tmp_path, capfd)


@pytest.mark.parametrize(("config", "message"), NOT_SERVED)
def test_other_embeddings_of_popgym_are_refused_by_name(
    config: dict[str, Any], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if config["embedding"] == "base2":
        config = {**config, "preprocessor_input_size": 32, "preprocessor_output_size": 32}  # It fails below 17.
    model = popgym_model(**config)
    assert import_from(write_model(tmp_path, model, model.cfg), tmp_path) == 1
    assert_refused(message, tmp_path, capfd)


def test_unscaled_embedding_that_only_the_default_asks_for_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = {"scale_embedding": False}
    assert import_from(write_model(tmp_path, build(Frameconv, **config), custom_of(Frameconv, config)), tmp_path) == 1
    assert_refused("scale_embedding: got False, expected True", tmp_path, capfd)


@pytest.mark.parametrize(
    ("made", "said", "message"),
    [
        ({"embedding": None}, {"embedding": "sine"}, r"got the tensors \[\], expected \['embedding_strength'\]"),
        ({"embedding": "sine"}, {"embedding": None}, r"got the tensors \['embedding_strength'\], expected \[\]"),
        ({"embedding": "time2vec"}, {"embedding": "sine"}, r"got the tensors \['embedding.linear.bias', "),
        ({"embedding": None}, {"embedding": "learned"}, "embedding: got 'learned', expected 'sine' or None"),
    ],
)
@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_tensors_that_contradict_the_configuration_are_refused(
    cls: type[BaseModel], made: Any, said: Any, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert import_from(write_model(tmp_path, build(cls, **made), custom_of(cls, said)), tmp_path) == 1
    assert_refused(message, tmp_path, capfd)


@pytest.mark.parametrize(
    ("cls", "said", "changes"),
    [
        ("Frameconv", {}, {"embedding.weight": None}),
        ("Frameconv", {"embedding": None}, {}),
        ("Frameconv", {}, {"embedding_strength": None}),
        ("DiffNC", {"embedding": "sine"}, {}),
        ("DiffNC", {}, {"embedding.weight": positional_encoding(64, 16).numpy()}),
    ],
)
def test_popgyms_tensors_that_contradict_its_configuration_are_refused(
    cls: str, said: Any, changes: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path, cls, {"model": {"custom_model_config": said}}, **changes)
    assert import_from(folder, tmp_path) == 1
    assert_refused("embedding: got the tensors .*, expected .* for embedding=.*(default|says)", tmp_path, capfd)


@pytest.mark.parametrize("period", [None, 0, "long"])
def test_a_period_that_is_no_number_of_steps_is_refused(
    period: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path, build(Frameconv), custom_of(Frameconv, {"embedding_period": period}))
    assert import_from(folder, tmp_path) == 1
    assert_refused("embedding_period: got .*, expected an integer >= 1", tmp_path, capfd)


@pytest.mark.parametrize(
    ("cls", "made", "note"),
    [
        (DiffNC, {}, "taken to be no embedding, as there are no tensors of one"),
        (DiffNC, {"embedding": "sine"}, "taken to be a sine of period 1024 that is added to all features"),
        (Frameconv, {}, "taken to be a sine of period 1024 that is added to all features"),
    ],
)
def test_without_a_configuration_what_was_assumed_is_noted(
    cls: type[BaseModel], made: Any, note: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = build(cls, **made)
    assert import_from(write_model(tmp_path, model, None), tmp_path) == 0
    assert note in capfd.readouterr().err
    assert_plays_as(model, tmp_path)


@pytest.mark.parametrize("name", ["learned", "perceptron"])
def test_without_a_configuration_tensors_of_another_embedding_are_refused(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert import_from(write_model(tmp_path, build(DiffNC, embedding=name), None), tmp_path) == 1
    assert_refused(r"embedding: got the tensors \['embedding\.", tmp_path, capfd)


@pytest.mark.parametrize(("cls", "is_noted"), [("DiffNC", False), ("Frameconv", True)])
def test_popgyms_own_tensors_say_whether_there_is_an_embedding(
    cls: str, is_noted: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert import_from(write(tmp_path, cls, {"model": {}}), tmp_path) == 0
    assert ("the embedding is; taken to be a sine that is added" in capfd.readouterr().err) == is_noted
    assert import_from(DATA / cls, tmp_path / "original") == 0
    assert imported(tmp_path).policy.config == imported(tmp_path / "original").policy.config


@pytest.mark.parametrize("steps", [4096, 65000])
def test_the_table_of_a_long_sine_is_recognised_in_spite_of_its_rounding(steps: int) -> None:
    model = popgym_model()
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tensors["embedding.weight"] = positional_encoding(steps, 12).numpy()
    config = {"cls": "Frameconv", "obs_dim": 10, "n_act": 4, "max_seq_len": steps, "cfg": model.cfg}
    assert import_popgym(config, tensors).config.embedding_period == steps
    assert np.abs(tensors["embedding.weight"]).max() <= 1
