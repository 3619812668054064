"""A checkpoint: ``<repository>/<policy>/<version>/`` with ``weights.safetensors`` and ``manifest.json``.

The only thing that the trainer and the server share. :func:`write` makes a version appear whole or not at all;
:func:`read` verifies every byte of it before anything is used. There is no pickle in it. ``manifest.sig``, where there
is one, is the ed25519 signature of the manifest, which names the version and holds the digest of its weights.

Below the repository no link is followed: a version is what lies in its own folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from tenuto_models import spaces
from tenuto_models.errors import CheckpointError, ConfigError
from tenuto_models.memory import StateSpec
from tenuto_models.policy import Policy, PolicyConfig
from tenuto_models.safe_files import open_folder, read_regular
from tenuto_models.training import TrainingProgress

if TYPE_CHECKING:
    # Who neither signs nor checks needs no cryptography.
    from tenuto_models.signing import Signer, Verifier

FORMAT_VERSION = 1
WEIGHTS, MANIFEST, SIGNATURE = "weights.safetensors", "manifest.json", "manifest.sig"
MAX_WEIGHTS_BYTES, MAX_MANIFEST_BYTES = 4 * 1024**3, 16 * 1024**2
FLATTENING = "gymnasium.spaces.flatten"
_POLICY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_MANIFEST_KEYS = {
    "format_version", "policy_name", "version", "config", "observation_space", "action_space", "flattening",
    "state_spec", "state_fingerprint", "training", "created_unix_s", "weights_sha256", "manifest_sha256",
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    policy_name: str
    version: int
    policy: Policy
    training: TrainingProgress
    created_unix_s: float
    weights_sha256: str
    """In hexadecimal."""


def write(
    repository: Path,
    policy_name: str,
    policy: Policy,
    training: TrainingProgress,
    version: int | None = None,
    signer: Signer | None = None,
) -> Path:
    """Publish a version and return its folder. Without ``version`` it is the highest present + 1.

    ``signer``: for servers that take signed versions only. The folder appears by one rename after everything in it is
    on disk. Raises CheckpointError if the name is not usable, the version exists, or a weight is not finite.
    """
    if not _POLICY_NAME.fullmatch(policy_name):
        raise CheckpointError(f"policy name: got {policy_name!r}, expected {_POLICY_NAME.pattern}")
    weights = {k: v.detach().cpu().contiguous() for k, v in policy.state_dict().items()}
    _require_finite(weights)
    payload = save_safetensors(weights)
    folder = repository / policy_name
    folder.mkdir(parents=True, exist_ok=True)
    version = version if version is not None else max(versions(folder), default=0) + 1
    if not _VERSION.fullmatch(str(version)):
        raise CheckpointError(f"version: got {version}, expected a number from 1 to 18 digits")
    target = folder / str(version)
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "policy_name": policy_name,
        "version": version,
        "config": policy.config.to_json(),
        "observation_space": spaces.to_json(policy.observation_space),
        "action_space": spaces.to_json(policy.action_space),
        "flattening": FLATTENING,
        "state_spec": _spec_to_json(policy.state_spec),
        "state_fingerprint": policy.state_fingerprint,
        "training": training.to_json(),
        "created_unix_s": time.time(),
        "weights_sha256": hashlib.sha256(payload).hexdigest(),
    }
    manifest["manifest_sha256"] = _manifest_sha256(manifest)
    temporary = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=folder))
    try:
        _write_synced(temporary / WEIGHTS, payload)
        text = json.dumps(manifest, indent=2).encode()
        _write_synced(temporary / MANIFEST, text)
        if signer is not None:
            _write_synced(temporary / SIGNATURE, signer.sign(text))
        temporary.chmod(0o755)
        _sync_folder(temporary)
        if target.exists():
            raise CheckpointError(f"{target}: version {version} exists already; versions are never overwritten")
        # Renaming onto a non-empty folder fails, so a version that appears meanwhile is not overwritten either.
        temporary.rename(target)
        _sync_folder(folder)
    except OSError as error:
        raise CheckpointError(f"{target}: could not be published ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def read(folder: Path, verifier: Verifier | None = None) -> Checkpoint:
    """Load one version strictly. Raises CheckpointError naming the first thing that is wrong; executes nothing.

    ``verifier``: what it has not signed is refused.
    """
    with _opened(folder) as files:
        manifest = _read_manifest(folder, files, verifier)
        payload = _read_file(folder, files, WEIGHTS, MAX_WEIGHTS_BYTES)
    digest = hashlib.sha256(payload).hexdigest()
    if digest != manifest["weights_sha256"]:
        raise CheckpointError(
            f"{folder}: {WEIGHTS} sha256: got {digest}, expected {manifest['weights_sha256']} (truncated or changed)"
        )
    try:
        weights = load_safetensors(payload)
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: {WEIGHTS} is not a safetensors file ({error})") from error
    try:
        training = TrainingProgress.from_json(manifest["training"])
        # First without memory: a manifest may claim any size, its weights show whether it is true.
        with torch.device("meta"):
            outline = _build(manifest, len(payload))
        _require_fit(folder, outline.state_dict(), weights)
        policy = _build(manifest, len(payload))
    except (ConfigError, TypeError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    spec = _spec_to_json(policy.state_spec)
    if manifest["state_spec"] != spec or manifest["state_fingerprint"] != policy.state_fingerprint:
        raise CheckpointError(f"{folder}: state_spec: got {manifest['state_spec']}, expected {spec} for this config")
    policy.load_state_dict(weights)
    return Checkpoint(
        manifest["policy_name"], manifest["version"], policy, training, manifest["created_unix_s"], digest
    )


def sign(folder: Path, signer: Signer) -> None:
    """Sign a version that is published, in place of any signature that it has. Raises CheckpointError."""
    read(folder)
    with _opened(folder) as files:
        text = _read_file(folder, files, MANIFEST, MAX_MANIFEST_BYTES)
    temporary = folder / f".{SIGNATURE}-{os.getpid()}"
    try:
        _write_synced(temporary, signer.sign(text))
        temporary.rename(folder / SIGNATURE)
    except OSError as error:
        raise CheckpointError(f"{folder}: {SIGNATURE} cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


def versions(folder: Path) -> list[int]:
    """Return the version numbers below ``<repository>/<policy>``, ascending; unfinished writes are not among them.

    One that is a link is: :func:`read` says what is wrong with it. Raises OSError where the folder cannot be read, or
    is a link itself.
    """
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "a symbolic link")
    if not folder.is_dir():
        return []
    named = (p for p in folder.iterdir() if _VERSION.fullmatch(p.name))
    return sorted(int(p.name) for p in named if p.is_dir() or p.is_symlink())


def policies(repository: Path) -> list[str]:
    """Return the names of the policies that have at least one version in the repository, sorted.

    Those whose folder cannot be read are among them: :func:`versions` says why.
    """
    if not repository.is_dir():
        return []
    return sorted(p.name for p in repository.iterdir() if _POLICY_NAME.fullmatch(p.name) and _may_have_versions(p))


def _may_have_versions(folder: Path) -> bool:
    try:
        return bool(versions(folder))
    except OSError:
        return True


def best_return(repository: Path, policy_name: str) -> float | None:
    """Return the best training return that any readable manifest of the policy knows."""
    known = [progress.best_return for progress in _progress_of_versions(repository / policy_name)]
    return max((r for r in known if r is not None), default=None)


def _progress_of_versions(folder: Path) -> Iterator[TrainingProgress]:
    for version in versions(folder):
        try:
            one = folder / str(version)
            with _opened(one) as files:
                yield TrainingProgress.from_json(_read_manifest(one, files)["training"])
        except (CheckpointError, ConfigError):
            continue  # A version that no server would load has no say in what is best.


def _read_manifest(folder: Path, files: int, verifier: Verifier | None = None) -> dict[str, Any]:
    text = _read_file(folder, files, MANIFEST, MAX_MANIFEST_BYTES)
    if verifier is not None:
        # One byte more, to see that there is no more.
        signature = _read_file(folder, files, SIGNATURE, 65)
        if not verifier.accepts(text, signature):
            raise CheckpointError(f"{folder}: {SIGNATURE} is not the signature of {MANIFEST} by a key that counts here")
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} is not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        got = manifest.get("format_version") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointError(f"{folder}: format_version: got {got!r}, expected {FORMAT_VERSION}")
    if set(manifest) != _MANIFEST_KEYS:
        raise CheckpointError(f"{folder}: manifest keys: got {sorted(manifest)}, expected {sorted(_MANIFEST_KEYS)}")
    if manifest["manifest_sha256"] != _manifest_sha256(manifest):
        raise CheckpointError(f"{folder}: {MANIFEST} does not match its own manifest_sha256 (changed by hand?)")
    for key, kind, value in (("version", int, folder.name), ("policy_name", str, folder.parent.name)):
        if type(manifest[key]) is not kind or str(manifest[key]) != value:
            raise CheckpointError(f"{folder}: {key}: got {manifest[key]!r}, expected {value!r}, the folder's name")
    created = manifest["created_unix_s"]
    if type(created) not in (int, float) or not 0 <= created < 2**53:
        raise CheckpointError(f"{folder}: created_unix_s: got {created!r}, expected seconds since 1970")
    if manifest["flattening"] != FLATTENING:
        raise CheckpointError(f"{folder}: flattening: got {manifest['flattening']!r}, expected {FLATTENING!r}")
    return manifest


def _build(manifest: dict[str, Any], num_bytes: int) -> Policy:
    """``num_bytes``: of the weights, among which there is a float for each element of a space."""
    return Policy(
        spaces.from_json(manifest["observation_space"], 2 * num_bytes),
        spaces.from_json(manifest["action_space"], 2 * num_bytes),
        PolicyConfig.from_json(manifest["config"]),
    )


def _require_fit(folder: Path, own: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
    """Raise CheckpointError unless the weights have exactly the policy's names, shapes and dtypes, and are finite."""
    if missing := sorted(own.keys() - weights.keys()):
        raise CheckpointError(f"{folder}: missing tensors: {missing}")
    if extra := sorted(weights.keys() - own.keys()):
        raise CheckpointError(f"{folder}: unexpected tensors: {extra}")
    for name, tensor in weights.items():
        got, expected = (tuple(tensor.shape), tensor.dtype), (tuple(own[name].shape), own[name].dtype)
        if got != expected:
            raise CheckpointError(f"{folder}: tensor {name}: got {got}, expected {expected}")
    _require_finite(weights)


def _require_finite(weights: dict[str, torch.Tensor]) -> None:
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"tensor {name}: got NaN or infinity, expected finite weights")


def _spec_to_json(spec: StateSpec) -> list[dict[str, Any]]:
    return [{"name": t.name, "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for t in spec]


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    rest = {k: v for k, v in manifest.items() if k != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@contextmanager
def _opened(folder: Path) -> Generator[int]:
    """Hold a version's folder open, so that all files are of one folder whatever is renamed meanwhile."""
    try:
        parent = open_folder(folder.parent)
        try:
            files = open_folder(folder.name, parent)
        finally:
            os.close(parent)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from error
    try:
        yield files
    finally:
        os.close(files)


def _read_file(folder: Path, files: int, name: str, max_bytes: int) -> bytes:
    try:
        return read_regular(name, max_bytes, folder=files)
    except OSError as error:
        raise CheckpointError(f"{folder}: {name} cannot be read ({error.strerror})") from error


def _write_synced(path: Path, payload: bytes) -> None:
    with path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
