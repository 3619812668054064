"""``python tests/fuzz/run.py rpcs --inputs 1000000``: fuzz one target, guided by coverage where atheris is installed.

Begins with the kept corpus, tells how many inputs came to what, and keeps an input that is a finding in --findings.
With --keep nothing is fuzzed: of what has grown, that which reaches what no smaller input does becomes the kept one.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import logging
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]
CORPUS = HERE / "corpus"
_INSTRUMENTED = {"rpcs": ["tenuto_server", "tenuto_proto"], "checkpoints": ["tenuto_models"]}
"""Packages whose coverage guides."""
_TOLD_EVERY = 20_000
_MAX_BYTES = 16_384
_MANY = 300
"""Inputs that mutation begins from, where nothing guides it."""


def make_target(name: str, folder: Path) -> tuple[Any, list[bytes], Any]:
    """Return the target, its seeds and its way to mutate an input."""
    module = importlib.import_module(f"fuzz.{name}")
    if name == "rpcs":
        target = module.RpcTarget(folder / "repository")
        return target, [*module.seeds(), *module.exported_seeds(target)], module.mutate
    target = module.CheckpointTarget(folder / "target")
    seeds = module.seeds(folder / "seeds")
    target.limit_memory()
    return target, seeds, module.mutate


def kept(name: str) -> list[bytes]:
    """The kept corpus of a target."""
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]


class Told:
    """Runs inputs and tells now and then what they came to."""

    def __init__(self, target: Any) -> None:
        self._target, self._began_s, self._objects = target, time.monotonic(), 0

    def __call__(self, data: bytes) -> None:
        self._target(data)
        if self._target.num_inputs % _TOLD_EVERY == 0:
            self.tell()

    def tell(self) -> None:
        target, objects = self._target, self._target.num_objects()
        rate = target.num_inputs / (time.monotonic() - self._began_s)
        calls = sum(target.outcomes.values())
        print(
            f"{target.num_inputs} inputs, {rate:.0f}/s, {calls} outcomes of {len(target.outcomes)} kinds,"
            f" {objects} objects, {_resident_mb():.0f} MB",
            flush=True,
        )


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def run_random(target: Any, seeds: list[bytes], mutate: Any, num_inputs: int, seed: int, findings: Path) -> None:
    """Mutate again and again what was mutated before, or a seed."""
    rng, told, inputs = random.Random(seed), Told(target), list(seeds)

    def mutated() -> Iterator[bytes]:
        while target.num_inputs < num_inputs:
            data = mutate(rng.choice(inputs if rng.random() < 0.6 else seeds), rng)
            if len(inputs) < len(seeds) + _MANY:
                inputs.append(data)
            elif rng.random() < 0.1:
                inputs[rng.randrange(len(seeds), len(inputs))] = data
            yield data

    for data in itertools.chain(seeds, mutated()):
        try:
            told(data)
        except BaseException:
            findings.mkdir(parents=True, exist_ok=True)
            path = findings / f"random-{seed}-{target.num_inputs}"
            path.write_bytes(data)
            print(f"a finding: {path}", flush=True)
            raise
    target.look()
    told.tell()


def keep(target: Any, name: str, inputs: Iterable[bytes]) -> None:
    """Write the kept corpus anew: the smallest inputs that reach all lines of ours, and all outcomes, that any does."""
    folder, reached = CORPUS / name, set[Any]()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for data in sorted(set(inputs), key=lambda data: (len(data), data)):
        seen = set[Any]()

        def trace(frame: Any, event: str, _: Any, seen: set[Any] = seen) -> Any:
            if "/tenuto_" not in frame.f_code.co_filename:
                return None
            seen.add((frame.f_code, frame.f_lineno))
            return trace

        before = target.outcomes.copy()
        sys.settrace(trace)
        try:
            target(data)
        finally:
            sys.settrace(None)
        seen |= (target.outcomes - before).keys()
        target.look()
        if not seen <= reached:
            reached |= seen
            (folder / sha256(data).hexdigest()[:16]).write_bytes(data)
    print(f"kept {len(kept(name))} inputs, {sum(map(len, kept(name)))} bytes")


def _guided(arguments: argparse.Namespace, folder: Path) -> None:
    import atheris

    if arguments.target == "rpcs":
        # What numba compiles must be Python's own bytecode.
        importlib.import_module("tenuto_models.compiled")
    with atheris.instrument_imports(include=_INSTRUMENTED[arguments.target], enable_loader_override=False):
        target, seeds, mutate = make_target(arguments.target, folder)
    told = Told(target)
    grown = arguments.grown / arguments.target
    for place in (grown, arguments.findings):
        place.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate([*seeds, *kept(arguments.target)]):
        (grown / f"seed-{number}").write_bytes(data)

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        return (atheris.Mutate(data, len(data)) if rng.random() < 0.1 and data else mutate(data, rng))[:max_size]

    flags = [
        f"-runs={arguments.inputs}", f"-seed={arguments.seed}", f"-max_len={_MAX_BYTES}", "-timeout=30",
        "-rss_limit_mb=6000", "-print_final_stats=1", "-len_control=0", f"-artifact_prefix={arguments.findings}/",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *flags, str(grown)], told, custom_mutator=mutator)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=("rpcs", "checkpoints"))
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--driver", choices=("atheris", "random"), default=None)
    parser.add_argument("--grown", type=Path, default=Path("runs/fuzz/corpus"), help="where the corpus grows")
    parser.add_argument("--findings", type=Path, default=Path("runs/fuzz/findings"))
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    logging.getLogger("tenuto_server").propagate = False
    warnings.simplefilter("ignore")
    driver = arguments.driver
    if driver is None:
        driver = "atheris" if importlib.util.find_spec("atheris") else "random"
    in_memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="tenuto-fuzz-", dir=in_memory if in_memory.is_dir() else None))
    try:
        if arguments.keep:
            target, seeds, _ = make_target(arguments.target, folder)
            grown = (path.read_bytes() for path in (arguments.grown / arguments.target).glob("*"))
            keep(target, arguments.target, [*seeds, *kept(arguments.target), *grown])
        elif driver == "atheris":
            _guided(arguments, folder)
        else:
            target, seeds, mutate = make_target(arguments.target, folder)
            seeds += kept(arguments.target)
            run_random(target, seeds, mutate, arguments.inputs, arguments.seed, arguments.findings / arguments.target)
            for outcome, count in sorted(target.outcomes.items(), key=lambda item: -item[1]):
                print(f"{count:10d}  {outcome}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
