"""A policy is trained by one process at a time, and a killed one does not stand in the way."""

import subprocess
import sys
from pathlib import Path

import pytest

from tenuto_trainer import TrainConfig, TrainConfigError
from tenuto_trainer.lock import only_training

HOLDER = """
import sys
from pathlib import Path
from tenuto_trainer import TrainConfig
from tenuto_trainer.lock import only_training
with only_training(TrainConfig("CartPole-v1", "dnc", Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_training_of_a_policy_is_refused_until_the_first_one_is_gone(tmp_path: Path) -> None:
    config = TrainConfig("CartPole-v1", "dnc", tmp_path)
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(TrainConfigError, match=r"^policy: got 'CartPole-v1', which another process is training"),
            only_training(config),
        ):
            pass
        with only_training(TrainConfig("CartPole-v1", "dnc", tmp_path, policy="another")):
            pass
        holder.kill()
    with only_training(config):
        pass
