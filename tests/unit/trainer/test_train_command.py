import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import tenuto_trainer
import tiny_training
from tenuto_models import TrainingProgress, checkpoint
from tenuto_trainer import TrainConfig, TrainConfigError
from tenuto_trainer.train import main, parse

NEEDED = ["--env", tiny_training.REPEAT, "--memory", "dnc", "--repository", "r"]


def test_every_setting_has_a_flag_and_its_default():
    assert parse(NEEDED) == TrainConfig(tiny_training.REPEAT, "dnc", Path("r"))
    given: dict[str, Any] = {
        "env_id": "e", "memory": "frameconv", "policy": "q", "repository": Path("s"), "log_dir": Path("l"),
        "learner_device": "auto", "server": "localhost:50051",
    }  # fmt: skip
    for field in fields(TrainConfig):
        of_kind = {"Path | None": Path("f")}.get(str(field.type), 64 if "int" in str(field.type) else 0.5)
        given.setdefault(field.name, of_kind)
    flags = {name: f"--{name.replace('_', '-')}" for name in given} | {"env_id": "--env"}
    assert parse([word for name, value in given.items() for word in (flags[name], str(value))]) == TrainConfig(**given)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("memory", "lstm"), ("policy", "../p"), ("lr", 0.0), ("lr", float("nan")), ("clip", -1.0), ("seed", -1),
        ("entropy", -0.1), ("gamma", 1.5), ("iterations", 0), ("num_envs", 2.5), ("stack_size", 1),
        ("publish_every", 0), ("stop_seconds", 0.0), ("minibatch_size", 8), ("minibatch_size", 8192),
        ("publish_gain", "much"),
    ],
)  # fmt: skip
def test_bad_setting_is_refused_with_its_name_and_value(setting: str, value: Any):
    with pytest.raises(TrainConfigError) as caught:
        TrainConfig(**{"env_id": "e", "memory": "dnc", "repository": Path("r"), setting: value})
    assert str(caught.value).startswith(f"{setting}: got {value!r}, expected")


def test_policy_is_named_after_the_environment():
    assert TrainConfig("my.module:make_env", "dnc", Path("r")).policy == "my.module-make_env"
    assert TrainConfig(tiny_training.REPEAT, "dnc", Path("r"), policy="p").policy == "p"


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--env", "popgym-RepeatPreviusEasy-v0"], "did you mean 'popgym-RepeatPreviousEasy-v0'"),
        (["--env", "tiny_training:dict_actions"], "action space: got Dict"),
        (["--env", "tiny_training:text_observations"], "space: got Text"),
    ],
)
def test_run_that_cannot_start_says_so_in_one_line(
    flags: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*NEEDED, "--repository", str(tmp_path / "r"), "--log-dir", str(tmp_path), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert part in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("flag", ["--repository", "--log-dir"])
@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/tenuto"])
def test_folder_that_cannot_be_written_to_is_refused_in_one_line(
    flag: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    folders = ["--repository", str(tmp_path / "r"), "--log-dir", str(tmp_path / "log"), flag, str(tmp_path / folder)]
    assert main([*NEEDED, *folders]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tenuto-train: {flag[2:].replace('-', '_')}: got {str(tmp_path / folder)!r}, expected")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_folders_are_tried_and_packages_missed_without_torch_and_ray(tmp_path: Path):
    """As in the base install: neither package can be imported, and so neither is waited for."""
    code = (
        "import sys; sys.modules.update(torch=None, ray=None); from tenuto_trainer.train import main; sys.exit(main())"
    )
    (tmp_path / "file").touch()
    for repository, code_expected, part in (
        (tmp_path / "file", 2, "repository: got"),
        (tmp_path / "r", 1, "is not installed; pip install 'tenuto[trainer]', or pip install '.[trainer]' in a clone"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *NEEDED, "--repository", str(repository), "--log-dir", str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr.count("\n")) == (code_expected, 1)
        assert part in done.stderr


@pytest.mark.filterwarnings("ignore:.*Overriding environment rllib-single-agent-env-v0")
def test_repository_of_another_policy_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint.write(tmp_path, "p", tiny_training.Training(tiny_training.config()).module.policy, TrainingProgress())
    assert main([*NEEDED, "--repository", str(tmp_path), "--policy", "p", "--log-dir", str(tmp_path / "log")]) == 2
    assert "choose another policy name" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--memory", "lstm"], ["--lr", "-1"], ["--lr", "fast"], ["--unknown", "1"]])
def test_bad_command_line_exits_with_2(flags: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        parse([*NEEDED, *flags])
    assert caught.value.code == 2
    assert "tenuto-train: " in capsys.readouterr().err.splitlines()[-1]


def test_public_names_are_pinned():
    assert tenuto_trainer.__all__ == ["DivergedError", "TrainConfig", "TrainConfigError", "TrainerError"]
