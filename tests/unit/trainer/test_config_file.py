from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import tiny_training
from tenuto_trainer import TrainConfig, TrainConfigError, config_file
from tenuto_trainer.settings import settings
from tenuto_trainer.train import parse


def _file(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_run_is_repeated_by_the_file_that_it_leaves(tmp_path: Path):
    config = tiny_training.config(iterations=3, stop_return=0.5, lr=1e-4, policy="p", log_dir=tmp_path, repository="r")
    config_file.write(tmp_path / "p" / config_file.FILE, replace(config, repository=Path("a 'quoted' ünïque folder")))
    again = parse(["--config", str(tmp_path / "p" / config_file.FILE), "--repository", "r"])
    assert replace(again, repository="r") == config
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["config.toml"]


def test_flags_go_before_the_file_and_the_file_before_the_defaults(tmp_path: Path):
    path = _file(tmp_path, 'env_id = "e"\nmemory = "dnc"\nrepository = "r"\nlr = 1\niterations = 7\n')
    expected = TrainConfig("e", "frameconv", Path("r"), lr=1.0, iterations=9)
    assert parse(["--config", str(path), "--memory", "frameconv", "--iterations", "9"]) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rates = 1", "'learning_rates' is not a setting; see tenuto-train --help"),
        ("num_env = 1", "'num_env' is not a setting; did you mean 'num_envs' or 'num_env_runners'"),
        ("[memory]\ncells = 1", "memory: got {'cells': 1} (dict), expected a text"),
        ('lr = "1e-3"', "lr: got '1e-3' (str), expected a number"),
        ("num_envs = 8.0", "num_envs: got 8.0 (float), expected a whole number"),
        ("seed = true", "seed: got True (bool), expected a whole number"),
        ("repository = 1979-05-27", "repository: got datetime.date(1979, 5, 27) (date), expected a path"),
        ("env_id = 5", "env_id: got 5 (int), expected a text"),
        ("lr = 1\nlr = 2", "not a TOML file (Key \"lr\" already exists"),
        ("lr", "not a TOML file ("),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_said_with_its_name(text: str, message: str, tmp_path: Path):
    path = _file(tmp_path, text)
    with pytest.raises(TrainConfigError) as caught:
        config_file.read(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_values_of_a_file_are_checked_as_flags_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = _file(tmp_path, 'env_id = "e"\nmemory = "dnc"\nrepository = "r"\nlr = nan\n')
    for flags in (["--config", str(path)], ["--config", str(tmp_path)], ["--config", str(tmp_path / "none.toml")]):
        with pytest.raises(SystemExit) as caught:
            parse(flags)
        assert caught.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "tenuto-train: lr: got nan, expected a finite number"
    assert errors[1].endswith("expected a file to read (Is a directory)")
    assert errors[2].endswith("expected a file to read (No such file or directory)")


def test_every_field_is_a_setting_with_a_text():
    found: dict[str, Any] = {setting.name: setting for setting in settings()}
    assert list(found) == [field.name for field in fields(TrainConfig)]
    assert all(setting.help.endswith(".") for setting in found.values())
    assert (found["lr"].kind, found["lr"].flag, found["lr"].help) == (float, "--lr", "Adam's learning rate.")
    assert (found["seed"].kind, found["repository"].kind, found["env_id"].flag) == (int, Path, "--env")
