"""Fuzzes the reader of checkpoints: whatever lies in the folder, it is a sound policy or a CheckpointError.

An input is a manifest and the weights' file, with flags that say which of the digests is made right again: without that
no change would be read further than to there.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import struct
from collections import Counter
from pathlib import Path

import torch
from gymnasium import spaces

from fuzz.mutation import blob, mutate_json
from tenuto_models import (
    CheckpointError,
    DNCConfig,
    FrameconvConfig,
    Policy,
    PolicyConfig,
    TrainingProgress,
    checkpoint,
)

_RIGHT_WEIGHTS, _RIGHT_MANIFEST, _LINK, _FOLDER, _ABSENT = 1, 2, 4, 8, 16
_MEMORY_BYTES = 3 << 30
"""Beyond what the process has; a reader that asks for more has believed a manifest."""


class CheckpointTarget:
    """Reads one version after another from a folder in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "policy" / "1"
        self._folder.mkdir(parents=True)
        self._elsewhere = folder / "elsewhere"
        self.outcomes: Counter[str] = Counter()
        self.num_inputs = 0

    def limit_memory(self) -> None:
        """Have whatever takes too much fail. For the whole process."""
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY_BYTES, resource.RLIM_INFINITY))

    def __call__(self, data: bytes) -> None:
        """Read one input. Lets every error through but CheckpointError."""
        self.num_inputs += 1
        flags, manifest, weights = unpack(data)
        if flags & _RIGHT_WEIGHTS or flags & _RIGHT_MANIFEST:
            manifest = _made_right(flags, manifest, weights)
        paths = self._folder / checkpoint.MANIFEST, self._folder / checkpoint.WEIGHTS
        self._elsewhere.write_bytes(weights)
        for path, content in zip(paths, (manifest, weights), strict=True):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            path.unlink(missing_ok=True)
            path.write_bytes(content)
        if flags & (_LINK | _FOLDER | _ABSENT):
            odd = paths[flags >> 5 & 1]
            odd.unlink()
            if flags & _LINK:
                odd.symlink_to(self._elsewhere if flags & 64 else odd)
            elif flags & _FOLDER:
                odd.mkdir()
        try:
            loaded = checkpoint.read(self._folder)
        except CheckpointError as error:
            text = str(error).removeprefix(f"{self._folder}: ")
            self.outcomes[" ".join(text.split()[:2])[:40]] += 1
            return
        assert (loaded.policy_name, loaded.version) == ("policy", 1) and type(loaded.version) is int
        assert 0 <= loaded.created_unix_s + loaded.training.env_steps < 2**65
        assert all(torch.isfinite(p).all() for p in loaded.policy.parameters())
        self.outcomes["OK"] += 1

    def look(self) -> None:
        """Nothing is kept between two inputs."""

    def num_objects(self) -> int:
        return 0

    def close(self) -> None:
        shutil.rmtree(self._folder.parent.parent, ignore_errors=True)


def pack(flags: int, manifest: bytes, weights: bytes) -> bytes:
    return struct.pack("<BI", flags, len(manifest)) + manifest + weights


def unpack(data: bytes) -> tuple[int, bytes, bytes]:
    """Read an input; any bytes are one."""
    if len(data) < 5:
        return 0, data, b""
    flags, length = struct.unpack_from("<BI", data)
    return flags, data[5 : 5 + length], data[5 + length :]


def _made_right(flags: int, manifest: bytes, weights: bytes) -> bytes:
    try:
        content = json.loads(manifest)
        if not isinstance(content, dict):
            return manifest
        if flags & _RIGHT_WEIGHTS:
            content["weights_sha256"] = hashlib.sha256(weights).hexdigest()
        if flags & _RIGHT_MANIFEST:
            rest = {k: v for k, v in content.items() if k != "manifest_sha256"}
            content["manifest_sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
        return json.dumps(content).encode()
    except (ValueError, RecursionError):
        return manifest


# ---------------------------------------------------------------------------------------------- inputs


def seeds(folder: Path) -> list[bytes]:
    """Sound checkpoints of tiny policies, of every kind of memory, space and action."""
    found = list[bytes]()
    observation = spaces.Dict({"a": spaces.Tuple((spaces.Box(-1, 1, (2,)), spaces.Discrete(3))),
                               "b": spaces.MultiDiscrete([2, 3]), "c": spaces.MultiBinary(2)})  # fmt: skip
    kinds = (
        (DNCConfig(3, 2, 2, 1), spaces.Box(-1, 1, (2,)), spaces.Discrete(2)),
        (FrameconvConfig(4), observation, spaces.MultiDiscrete([2, 3])),
        (FrameconvConfig(3), spaces.Discrete(3), spaces.Box(-1, 1, (2,))),
    )
    for number, (core, observations, actions) in enumerate(kinds):
        policy = Policy(
            observations, actions, PolicyConfig(core, 4, actor_widths=(4,), critic_widths=(4,), embedding_period=4)
        )
        written = checkpoint.write(folder / str(number), "policy", policy, TrainingProgress(), 1)
        content = [(written / name).read_bytes() for name in (checkpoint.MANIFEST, checkpoint.WEIGHTS)]
        found.append(pack(_RIGHT_WEIGHTS | _RIGHT_MANIFEST, *content))
    return found


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Return an input that differs a little: in the manifest, in the header of the tensors, or in its bytes."""
    flags, manifest, weights = unpack(data)
    flags |= _RIGHT_WEIGHTS | _RIGHT_MANIFEST
    for _ in range(1 + rng.randrange(2)):
        kind = rng.randrange(12)
        if kind == 0:
            flags ^= rng.choice((_RIGHT_WEIGHTS, _RIGHT_MANIFEST))
        elif kind == 1:
            flags ^= rng.choice((_LINK, _LINK | 64, _FOLDER, _ABSENT)) | rng.choice((0, 32))
        elif kind == 2:
            manifest = blob(rng, manifest)
        elif kind == 3:
            weights = blob(rng, weights)
        elif kind < 7:
            weights = _mutate_header(weights, rng)
        else:
            try:
                manifest = json.dumps(mutate_json(json.loads(manifest), rng)).encode()
            except (ValueError, RecursionError):
                manifest = blob(rng, manifest)
    return pack(flags & 0xFF, manifest[:30_000], weights[:60_000])


def _mutate_header(weights: bytes, rng: random.Random) -> bytes:
    try:
        (length,) = struct.unpack_from("<Q", weights)
        header = json.dumps(mutate_json(json.loads(weights[8 : 8 + length]), rng)).encode()
    except (ValueError, RecursionError, struct.error, OverflowError):
        return blob(rng, weights)
    return struct.pack("<Q", len(header)) + header + weights[8 + length :]


def memory_folder() -> Path:
    """Where files cost no disk, if there is such a place."""
    return Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path("/tmp")
