"""Who may import whom: models, proto and envs stand on the ground; no arrow points back up."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "tenuto_proto": ("proto", set()),
    "tenuto_envs": ("envs", set()),
    "tenuto_models": ("models", set()),
    "tenuto_client": ("client", {"tenuto_proto", "tenuto_envs"}),
    "tenuto_server": ("server", {"tenuto_proto", "tenuto_models"}),
    "tenuto_trainer": ("trainer", {"tenuto_models", "tenuto_envs", "tenuto_proto"}),
    "tenuto_bench": ("bench", {"tenuto_client", "tenuto_models", "tenuto_proto"}),
}
FORBIDDEN = {
    "tenuto_proto": {"torch", "ray"},
    "tenuto_envs": {"torch", "ray", "grpc"},
    "tenuto_models": {"ray", "grpc"},
    "tenuto_client": {"torch", "ray"},
    "tenuto_server": {"ray"},
    "tenuto_trainer": set(),
    "tenuto_bench": {"ray"},
}


def imported(path: Path) -> set[str]:
    """The top-level names that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_stands_below_it(package: str) -> None:
    folder, allowed = PACKAGES[package]
    files = [p for p in (ROOT / folder / package).rglob("*.py") if p.name != "generate.py"]
    assert files
    for path in files:
        ours = {n for n in imported(path) if n.startswith("tenuto_")} - {package}
        assert ours <= allowed, f"{path} imports {ours - allowed}"
        assert not imported(path) & FORBIDDEN[package], f"{path} imports {imported(path) & FORBIDDEN[package]}"


def test_everything_but_the_fused_kernels_works_without_triton() -> None:
    names = [
        ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
        for folder, _ in PACKAGES.values()
        for path in sorted((ROOT / folder).glob("tenuto_*/**/*.py"))
        if path.name not in ("__init__.py", "generate.py") and "fused" not in path.parts
    ]
    assert "tenuto_server.device_step" in names
    script = "import sys\nsys.modules['triton'] = None\n" + "".join(f"import {name}\n" for name in names)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr


def test_nobody_reads_pickles_but_the_reader_that_runs_nothing() -> None:
    for folder, _ in PACKAGES.values():
        for path in (ROOT / folder).rglob("*.py"):
            allowed = {"pickle"} if path.name == "inert_pickle.py" else set[str]()
            assert not imported(path) & {"pickle", "cloudpickle", "dill", "joblib"} - allowed, path
            assert "torch.load(" not in path.read_text(), path
