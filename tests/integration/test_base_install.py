"""The base install is what a robot gets: a client without torch, ray or gymnasium, that imports and packs alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ABSENT = ("torch", "ray", "gymnasium", "popgym", "rich", "grpcio-health-checking", "prometheus-client")
CHECK = """
import sys
from importlib.metadata import PackageNotFoundError, distribution

import tenuto_client
from tenuto_client import AsyncRemoteVectorPolicy, MissingExtraError, RemotePolicy, ServedPolicy, ServerUnavailableError
from tenuto_proto.v1 import policy_pb2 as pb

for name in {absent!r}:
    try:
        distribution(name)
    except PackageNotFoundError:
        continue
    raise SystemExit(f"{{name}} is installed")
try:
    RemotePolicy("127.0.0.1:1", timeout_s=0.1).connect()
except ServerUnavailableError:
    pass
space = pb.Space(discrete=pb.DiscreteSpace(n=2, dtype=pb.DATA_TYPE_INT64))
policy = ServedPolicy.from_wire(pb.GetPolicyResponse(observation_space=space, action_space=space))
for read in (policy.observation_space, policy.action_space):
    try:
        read()
    except MissingExtraError as error:
        if "pip install 'tenuto[gym]', or pip install '.[gym]' in a clone" not in str(error):
            raise
    else:
        raise SystemExit("a space without gymnasium")
loaded = sorted(m for m in ("torch", "ray", "gymnasium", "tenuto_server", "tenuto_models") if m in sys.modules)
if loaded:
    raise SystemExit(f"imported: {{loaded}}")
print(distribution("tenuto").version, tenuto_client.__file__)
"""


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=170, check=False)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment in which only ``pip install .`` was run."""
    folder = tmp_path_factory.mktemp("base")
    assert run(sys.executable, "-m", "venv", folder / "venv").returncode == 0
    python = folder / "venv" / "bin" / "python"
    installed = run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", ROOT)
    assert installed.returncode == 0, installed.stderr
    return python


def test_base_install_gives_a_client_without_torch_ray_or_gymnasium(python: Path) -> None:
    checked = run(python, "-W", "error", "-I", "-c", CHECK.format(absent=ABSENT))
    assert checked.returncode == 0, checked.stderr
    assert str(ROOT) not in checked.stdout


def test_play_says_how_to_install_what_it_misses(python: Path) -> None:
    played = run(python.parent / "tenuto-play", "--env", "CartPole-v1")
    assert played.returncode == 1
    assert (
        played.stderr.count("\n") == 1
        and "pip install 'tenuto[gym]', or pip install '.[gym]' in a clone" in played.stderr
    )
