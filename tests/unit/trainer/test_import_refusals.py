"""What cannot be imported is refused in the words of the checkpoint and of the command line, before it is published."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from old_checkpoints import DATA, assert_refused, dnc_of, import_from, imported, write, write_model
from old_stack import MODELS, SMALL, build
from tenuto_models import checkpoint
from tenuto_trainer import train
from tenuto_trainer.errors import ImportedError
from tenuto_trainer.importing import rllib_checkpoint
from tenuto_trainer.modelv2 import BaseModel, DiffNC, Frameconv


def test_another_kind_of_policy_under_the_same_name_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert import_from(DATA / "DiffNC", tmp_path) == 0
    capfd.readouterr()
    assert import_from(DATA / "Frameconv", tmp_path) == 2
    error = capfd.readouterr().err
    assert error.startswith("tenuto-train: memory: got frameconv, but version 1 has dnc ")
    assert error.endswith("choose another policy name to begin a new policy\n")
    assert checkpoint.versions(tmp_path / "r" / "p") == [1]


def test_the_same_kind_of_policy_becomes_the_next_version(tmp_path: Path) -> None:
    assert import_from(DATA / "DiffNC", tmp_path) == 0
    assert import_from(DATA / "DiffNC", tmp_path) == 0
    assert checkpoint.versions(tmp_path / "r" / "p") == [1, 2]


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (DiffNC, {"core.gates.weight": np.ones((64, 30))},
         r"tensor core.gates.weight: got shape \(64, 30\), expected \(64, 36\)"),
        (DiffNC, {"core.gates.bias": np.ones(5)}, r"tensor core.gates.bias: got shape \(5,\), expected \(64,\)"),
        (DiffNC, {"core.gates.bias": None}, r"tensors: missing \['core.gates.bias'\], got \["),
        (DiffNC, {"core.output.weight": None}, r"tensors: missing \['core.output.weight'\]"),
        (DiffNC, {"actor.1.weight": np.ones((0, 16))}, "n_act: got 0, expected an integer >= 1"),
        (DiffNC, {"core.output.bias": None}, r"tensors: missing \['core.output.bias'\]"),
        (DiffNC, {"core.access.interface.weight": np.ones((33, 7))},
         r"tensor core.access.interface.weight: got shape \(33, 7\), expected \(33, 16\)"),
        (DiffNC, {"core.access.interface.bias": np.ones((33, 1))},
         r"tensor core.access.interface.bias: got shape \(33, 1\), expected 1 dimensions"),
        (Frameconv, {"core.conv.bias": np.ones(3)}, r"tensor core.conv.bias: got shape \(3,\), expected \(16,\)"),
        (Frameconv, {"core.conv.bias": None}, r"tensors: missing \['core.conv.bias'\]"),
        (Frameconv, {"core.conv.weight": np.ones((16, 37))},
         r"tensor core.conv.weight: got shape \(16, 37\), expected columns in multiples of 12"),
    ],
)  # fmt: skip
def test_errors_about_our_own_classes_name_the_tensors_that_the_file_holds(
    cls: type[BaseModel], changes: Any, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert import_from(write_model(tmp_path, build(cls), SMALL[cls], **changes), tmp_path) == 1
    assert_refused(f"tenuto-train: {message}", tmp_path, capfd)


@pytest.mark.parametrize("name", ["actor.1.bias", "feature_map.0.weight", "critic.0.0.weight"])
@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("value", [np.nan, 1e300])
def test_tensors_that_are_not_finite_are_named_as_in_the_file(
    value: float, cls: type[BaseModel], name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = build(cls)
    broken = {name: np.full(model.state_dict()[name].shape, value)}
    assert import_from(write_model(tmp_path, model, SMALL[cls], **broken), tmp_path) == 1
    assert_refused(f"tensor {name}: got NaN or infinity", tmp_path, capfd)


def test_a_folder_of_many_files_is_not_listed_whole(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"file{i:02}").touch()
    with pytest.raises(ImportedError, match=r"found \['file00', .*'file07'\] and 22 more$"):
        rllib_checkpoint.read(tmp_path)


@pytest.mark.parametrize("flags", [["--cell-size", "4"], ["--read-heads", "2"]])
def test_sizes_of_a_dnc_are_refused_with_a_frameconv(
    flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert import_from(DATA / "Frameconv", tmp_path, *flags) == 1
    assert_refused(f"{' '.join(flags)}: got a checkpoint of a Frameconv, which has neither", tmp_path, capfd)


def test_a_wrong_size_of_a_dnc_is_refused_with_the_only_one_that_there_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert import_from(DATA / "DiffNC", tmp_path, "--read-heads", "4", "--cell-size", "4") == 1
    message = "^tenuto-train: --read-heads 4 --cell-size 4: the tensors only allow --read-heads 2 --cell-size 4$"
    assert_refused(message, tmp_path, capfd)
    assert import_from(DATA / "DiffNC", tmp_path, "--read-heads", "2", "--cell-size", "4") == 0
    assert imported(tmp_path).policy.config.memory.num_read_heads == 2  # type: ignore[union-attr]


def test_a_dnc_whose_tensors_fit_no_sizes_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changes = {**dnc_of(2, 4), "core.rnn_layer_memory_shared.interface_weights.bias": np.ones(34, np.float32)}
    assert import_from(write(tmp_path, **changes), tmp_path) == 1
    assert_refused("an interface of 34: there are no read heads and cell size that make these", tmp_path, capfd)


def test_the_help_of_the_trainer_mentions_the_import(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert "tenuto-train import-popgym --help" in " ".join(capsys.readouterr().out.split())
