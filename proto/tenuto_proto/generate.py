"""Generates ``v1/policy_pb2.py``, its type stub and ``v1/policy_pb2_grpc.py`` from ``v1/policy.proto``.

Run by ``make proto`` in an environment of its own with the oldest grpcio-tools we support, since generated code refuses
older runtimes. With ``--check`` it writes nothing and fails when the committed files differ.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc  # pyright: ignore

ROOT = Path(__file__).resolve().parents[1]
PROTO = "tenuto_proto/v1/policy.proto"
GENERATED = [f"tenuto_proto/v1/policy_{suffix}" for suffix in ("pb2.py", "pb2.pyi", "pb2_grpc.py")]


def generate(target: Path) -> None:
    """Write the three generated files below ``target``."""
    arguments = [
        f"-I{ROOT}",
        f"--python_out={target}",
        f"--pyi_out={target}",
        f"--grpc_python_out={target}",
        PROTO,
    ]
    if protoc.main(["protoc", *arguments]) != 0:
        raise SystemExit("protoc failed")


def main() -> None:
    """Generate in place, or compare with ``--check``."""
    if "--check" not in sys.argv[1:]:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        drifted = [f for f in GENERATED if (Path(folder) / f).read_bytes() != (ROOT / f).read_bytes()]
    if drifted:
        raise SystemExit(f"generated code differs from {PROTO}: {drifted}; run 'make proto'")
    print(f"generated code matches {PROTO}")


if __name__ == "__main__":
    main()
