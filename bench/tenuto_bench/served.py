"""The server that is measured: one of its own, with policies of random weights, or any address."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from gymnasium import spaces

from tenuto_models import Policy, PolicyConfig, TrainingProgress, checkpoint

OBSERVATIONS, ACTIONS = spaces.Box(-1, 1, (32,)), spaces.Discrete(6)
MEMORIES = ("dnc", "frameconv")
START_S = 120.0


class ServerError(Exception):
    """The server cannot be measured."""


@dataclass
class Served:
    """A server that answers, and what is known about it."""

    address: str
    metrics_url: str | None
    repository: Path | None
    """Where its policies lie, for the replay."""
    pid: int | None = None
    """Its process, where it is one of ours."""
    access_files: dict[str, str] = field(default_factory=dict[str, str])
    """By which clients say who they are: paths, by the names of AccessFiles' fields."""

    def metric(self, name: str, labels: str = "") -> float:
        """A metric's value, summed over its rows, those with ``labels`` (``station="run"``) where they are given.

        Raises ServerError where it cannot be asked.
        """
        assert self.metrics_url is not None
        try:
            with urllib.request.urlopen(self.metrics_url, timeout=10) as response:
                text = response.read().decode()
        except (urllib.error.URLError, OSError) as error:
            raise ServerError(f"{self.metrics_url}: {error}") from error
        return sum(float(v) for v in re.findall(rf"^{name}(?:{{[^}}]*{labels}[^}}]*}})? (\S+)$", text, re.MULTILINE))


def publish(repository: Path, memories: Sequence[str] = MEMORIES) -> None:
    """Write one policy of random weights for each memory, at POPGym's sizes and under the memory's name."""
    for memory in memories:
        torch.manual_seed(0)
        policy = Policy(OBSERVATIONS, ACTIONS, PolicyConfig.for_memory(memory))
        checkpoint.write(repository, memory, policy, TrainingProgress())


@contextmanager
def serve(
    repository: Path, program: Sequence[str] = ("-m", "tenuto_server.main"), flags: Sequence[str] = ()
) -> Generator[Served]:
    """Start tenuto-serve, or what Python is told to run instead, on free ports of loopback; ends when left.

    Yields when it serves every policy of the repository. Raises ServerError where it does not come to that.
    """
    flags = ("--repository", str(repository), "--port", "0", "--metrics-port", "0", *flags)
    with subprocess.Popen([sys.executable, *program, *flags], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said: list[str] = []
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"listening on (\S+:\d+), metrics on port (\d+)", line):
                    break
            else:
                raise ServerError(f"tenuto-serve ended: {said[-1].strip() if said else 'without a word'}")
            served = Served(found[1], f"http://127.0.0.1:{found[2]}/metrics", repository, process.pid)
            _wait_until_ready(served, sum(1 for _ in repository.iterdir()))
            yield served
        finally:
            process.kill()


@contextmanager
def own_server() -> Generator[Served]:
    """Serve one policy of each memory."""
    with tempfile.TemporaryDirectory() as folder:
        publish(Path(folder))
        with serve(Path(folder)) as served:
            yield served


def _wait_until_ready(served: Served, policies: int) -> None:
    deadline_s = time.monotonic() + START_S
    while served.metric("tenuto_newest_version") < policies:
        if time.monotonic() > deadline_s:
            raise ServerError(f"tenuto-serve is not ready after {START_S:g} s")
        time.sleep(0.1)
