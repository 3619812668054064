"""What a release is: an sdist, the wheel that is built from it, and installations of that wheel: the client
alone, which is what a robot gets, and the server.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from gymnasium import spaces

from serving import ServerProcess, publish, small_policy

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


STEPS = """
import numpy as np
from tenuto_client import RemotePolicy

with RemotePolicy({address!r}) as policy:
    for _ in range(3):
        policy.step(np.int64(1))
    print("3 steps")
"""


def run(*command: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=170, check=False, cwd=folder
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the unpacked sdist: so nothing is missing from it."""
    folder = tmp_path_factory.mktemp("release")
    build = (sys.executable, "-m", "hatchling", "build", "-d", folder)
    built = run(*build, "-t", "sdist", folder=ROOT)
    assert built.returncode == 0, built.stderr
    (sdist,) = folder.glob("tenuto-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    built = run(*build, "-t", "wheel", folder=folder / sdist.name.removesuffix(".tar.gz"))
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("tenuto-*.whl")
    return wheel


def install(folder: Path, *what: str | Path) -> Path:
    """Install into a new environment; returns its interpreter."""
    assert run(sys.executable, "-m", "venv", folder).returncode == 0
    python = folder / "bin" / "python"
    installed = run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what)
    assert installed.returncode == 0, installed.stderr
    return python


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel without extras."""
    return install(tmp_path_factory.mktemp("base") / "venv", wheel)


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


def test_wheel_holds_every_package_typed_licensed_and_of_the_version_in_pyproject(wheel: Path) -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"tenuto-{version[1]}.dist-info/METADATA").decode()
    packages = {name.split("/")[0] for name in names if not name.startswith("tenuto-")}
    assert packages == {
        f"tenuto_{part}" for part in ("bench", "client", "envs", "models", "proto", "server", "trainer")
    }
    assert {f"{package}/py.typed" for package in packages} <= set(names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not [name for name in names if name.endswith((".nbi", ".nbc", ".pyc"))]
    assert "License-Expression: Apache-2.0" in metadata and "Classifier: Typing :: Typed" in metadata
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text()


def test_an_installed_server_serves_an_installed_client(wheel: Path, python: Path, tmp_path: Path) -> None:
    server_python = install(tmp_path / "venv", "--constraint", ROOT / "constraints.txt", f"{wheel}[server]")
    publish(tmp_path / "repository", small_policy(observation_space=spaces.Discrete(3)))
    with ServerProcess(tmp_path / "repository", python=server_python) as server:
        played = run(python, "-W", "error", "-I", "-c", STEPS.format(address=server.address))
        assert (played.returncode, played.stdout) == (0, "3 steps\n"), played.stderr
        server.terminate()
        assert server.wait() == 0
