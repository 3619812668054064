"""A real tenuto server in a process of its own, and small policies to serve."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import torch
from gymnasium import spaces
from prometheus_client.parser import text_string_to_metric_families

from tenuto_models import DNCConfig, FrameconvConfig, Policy, PolicyConfig, TrainingProgress, checkpoint
from tenuto_models.signing import Signer
from tenuto_proto.v1 import policy_pb2_grpc

OBSERVATIONS = spaces.Tuple((spaces.Box(-1, 1, (3,)), spaces.Discrete(4)))
ACTIONS = spaces.Discrete(5)


def small_policy(
    memory: str = "dnc",
    observation_space: spaces.Space[Any] = OBSERVATIONS,
    action_space: spaces.Space[Any] = ACTIONS,
    seed: int = 0,
) -> Policy:
    """A policy that takes a fraction of a millisecond, with a lively memory and far from uniform actions."""
    torch.manual_seed(seed)
    core = DNCConfig(24, 4, 6, 2) if memory == "dnc" else FrameconvConfig(24)
    policy = Policy(
        observation_space,
        action_space,
        PolicyConfig(core, 16, actor_widths=(16,), critic_widths=(16,), embedding_period=64),
    )
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return policy


def overflowing_policy() -> Policy:
    """A small policy whose output is not finite for observations of class 0."""
    policy = small_policy()
    with torch.no_grad():
        policy.get_parameter("feature_map.weight")[:, 3] = 3.4e38
    return policy


def publish(
    repository: Path, policy: Policy, name: str = "policy", version: int | None = None, signer: Signer | None = None
) -> Path:
    return checkpoint.write(repository, name, policy, TrainingProgress(), version, signer)


def edit_manifest(version: Path, /, **changes: Any) -> None:
    """Change a manifest and make its own checksum right again, as a careful forger would."""
    manifest = json.loads((version / "manifest.json").read_text()) | changes
    rest = {k: v for k, v in manifest.items() if k != "manifest_sha256"}
    manifest["manifest_sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (version / "manifest.json").write_text(json.dumps(manifest))


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
    """Return the condition's first true value; it is looked at again and again, since another process makes it true."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s for: {what}"
        pause.wait(0.02)
    return value


WITHOUT_CAPABILITIES = """
import ctypes
header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(header, none) == 0
"""
"""A ``fault`` for ServerProcess: not even root may read what its modes forbid."""


def hanging_while_exists(file: Path, where: str = "tenuto_server.engine.Engine.run") -> str:
    """A ``fault`` for ServerProcess: it hangs in a method, the forward pass of a device that is waited for on a
    thread, while the file exists.
    """
    package, owner, method = where.rsplit(".", 2)
    return f"""
import math, pathlib, time
from tenuto_server.host_step import HostStep
HostStep.expected_s = lambda self, num_rows: math.inf
from {package} import {owner}
def hanging(self, *arguments, unharmed={owner}.{method}):
    while pathlib.Path({str(file)!r}).exists():
        time.sleep(0.02)
    return unharmed(self, *arguments)
{owner}.{method} = hanging
"""


def failing_while_exists(file: Path) -> str:
    """A ``fault`` for ServerProcess: while the file exists, batches raise what is written in it."""
    return f"""
import pathlib, torch
from tenuto_server.host_step import HostStep
def advance(self, rows, sound=HostStep.advance):
    if pathlib.Path({str(file)!r}).exists():
        raise eval(pathlib.Path({str(file)!r}).read_text())
    return sound(self, rows)
HostStep.advance = advance
"""


class ServerProcess:
    """``tenuto-serve`` on free ports. Its log is kept in ``log``. ``fault`` is Python that runs before it."""

    def __init__(
        self,
        repository: Path,
        *flags: str,
        wait: bool = True,
        python: str | Path = sys.executable,
        fault: str | None = None,
    ) -> None:
        run = (
            ["-m", "tenuto_server.main"]
            if fault is None
            else ["-c", f"{fault}\nfrom tenuto_server.main import main\nmain()"]
        )
        self.repository = repository
        command = [str(python), *run, "--repository", str(repository)]
        command += ["--port", "0", "--metrics-port", "0", "--poll-s", "0.5", "--drain-timeout-s", "5", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        try:
            line = wait_until(self._listening, "the server to listen")
            self.port, self.metrics_port = int(line[1]), int(line[2])
            self.address = f"127.0.0.1:{self.port}"
            self.channel = grpc.insecure_channel(self.address)
            self.stub = policy_pb2_grpc.PolicyServiceStub(self.channel)
            if wait:
                # The first on a machine compiles.
                wait_until(lambda: self.http("/readyz")[0] == 200, "the server to be ready", 90)
        except BaseException:
            # Nobody could close it.
            self.process.kill()
            raise

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())

    def _listening(self) -> re.Match[str] | None:
        assert self.process.poll() is None, "\n".join(self.log)
        return re.search(r"listening on .*:(\d+), metrics on port (\d+)", "\n".join(self.log))

    def http(self, path: str) -> tuple[int, str]:
        """GET from the metrics port: (status, body)."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}{path}", timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, selector: str) -> float:
        """Sum of the samples that a selector names, ``name{label="x"}``; 0 where there is none."""
        name, _, labels = selector.rstrip("}").partition("{")
        wanted = dict(item.split("=", 1) for item in labels.split(",") if item)
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.http("/metrics")[1])
            for sample in family.samples
            if sample.name == name and all(sample.labels.get(k) == v.strip('"') for k, v in wanted.items())
        )

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = 30.0) -> int:
        return self.process.wait(timeout_s)

    def close(self) -> None:
        self.channel.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
        if error is not None:
            print("\n".join(self.log))
