"""A checkpoint appears whole or not at all, and nothing that was changed, cut or mixed up is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium import spaces
from safetensors.torch import load_file, save_file

from serving import edit_manifest, small_policy
from tenuto_models import CheckpointError, Evaluation, TrainingProgress, checkpoint
from tenuto_models.errors import ConfigError
from tenuto_models.signing import Signer, Verifier, main, make_key_pair


@pytest.fixture
def version(tmp_path: Path) -> Path:
    progress = TrainingProgress(1000, 3, 0.25, 0.5)
    return checkpoint.write(tmp_path, "policy", small_policy(), progress)


def test_what_is_read_is_what_was_written(version: Path) -> None:
    loaded, policy = checkpoint.read(version), small_policy()
    assert (loaded.policy_name, loaded.version) == ("policy", 1)
    assert loaded.training == TrainingProgress(1000, 3, 0.25, 0.5)
    assert loaded.policy.config == policy.config
    assert loaded.policy.observation_space == policy.observation_space
    observation = torch.randn(2, policy.observation_size)
    ours, theirs = (p.step(observation, p.initial_state(2))[0] for p in (policy, loaded.policy))
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.value, theirs.value)


def test_evaluation_survives_and_manifests_from_before_it_still_load(version: Path) -> None:
    progress = TrainingProgress(2000, 4, 0.5, 0.5, 12.5, Evaluation(32, 0.75, 0.125, -1.0, 1.0, 2))
    second = checkpoint.write(version.parent.parent, "policy", small_policy(), progress)
    assert checkpoint.read(second).training == progress
    edit_manifest(version, training=PROGRESS)
    assert checkpoint.read(version).training == TrainingProgress(1, 1)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 1, (2,)),
        spaces.Box(-float("inf"), float("inf"), (2, 3)),
        spaces.Box(0, 255, (2, 2), "uint8"),
        spaces.Discrete(3, start=-1),
        spaces.MultiDiscrete([[2, 3], [4, 5]]),
        spaces.MultiBinary(4),
        spaces.Dict({"b": spaces.Discrete(2), "a": spaces.Tuple([spaces.Box(0, 1), spaces.MultiBinary([2, 2])])}),
    ],
)
def test_every_observation_space_survives(tmp_path: Path, space: spaces.Space[Any]) -> None:
    folder = checkpoint.write(tmp_path, "p", small_policy(observation_space=space), TrainingProgress())
    assert str(checkpoint.read(folder).policy.observation_space) == str(space)


def test_versions_count_up_and_are_never_overwritten(tmp_path: Path, version: Path) -> None:
    second = checkpoint.write(tmp_path, "policy", small_policy(seed=1), TrainingProgress())
    assert checkpoint.versions(tmp_path / "policy") == [1, 2] and second.name == "2"
    with pytest.raises(CheckpointError, match="never overwritten"):
        checkpoint.write(tmp_path, "policy", small_policy(), TrainingProgress(), version=1)
    assert sorted(p.name for p in (tmp_path / "policy").iterdir()) == ["1", "2"]


def test_unfinished_writes_are_no_versions(tmp_path: Path, version: Path) -> None:
    (tmp_path / "policy" / ".2-abc").mkdir()
    (tmp_path / "policy" / "notes").mkdir()
    assert checkpoint.versions(tmp_path / "policy") == [1]
    assert checkpoint.policies(tmp_path) == ["policy"] and checkpoint.policies(tmp_path / "nowhere") == []


def test_a_weight_that_is_not_finite_is_not_published(tmp_path: Path) -> None:
    policy = small_policy()
    with torch.no_grad():
        policy.get_parameter("actor.0.weight")[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"actor\.0\.weight: got NaN"):
        checkpoint.write(tmp_path, "policy", policy, TrainingProgress())
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("name", ["", "../up", ".hidden", "a/b", "x" * 200])
def test_a_policy_name_that_is_no_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="policy name: got"):
        checkpoint.write(tmp_path, name, small_policy(), TrainingProgress())


def test_the_best_return_is_that_of_the_readable_manifests(tmp_path: Path, version: Path) -> None:
    for best in (0.75, None):
        checkpoint.write(tmp_path, "policy", small_policy(), TrainingProgress(best_return=best))
    assert checkpoint.best_return(tmp_path, "policy") == 0.75
    (tmp_path / "policy" / "2" / "manifest.json").write_text("{")
    assert checkpoint.best_return(tmp_path, "policy") == 0.5
    assert checkpoint.best_return(tmp_path, "nobody") is None


# ------------------------------------------------------------------------------------------ refused


def edit_weights(version: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(version / "weights.safetensors")
    change(weights)
    save_file(weights, version / "weights.safetensors")
    edit_manifest(version, weights_sha256=hashlib.sha256((version / "weights.safetensors").read_bytes()).hexdigest())


def truncate(version: Path) -> None:
    path = version / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_one_bit(version: Path) -> None:
    path = version / "weights.safetensors"
    payload = bytearray(path.read_bytes())
    payload[-5] ^= 1
    path.write_bytes(payload)


def pickled(version: Path) -> None:
    payload = pickle.dumps({"actor.0.weight": 1})
    (version / "weights.safetensors").write_bytes(payload)
    edit_manifest(version, weights_sha256=hashlib.sha256(payload).hexdigest())


def set_nan(weights: dict[str, torch.Tensor]) -> None:
    weights["core.output.bias"][0] = torch.inf


def config_with(version: Path, **changes: Any) -> dict[str, Any]:
    return json.loads((version / "manifest.json").read_text())["config"] | changes


def edit_evaluation(version: Path, **changes: Any) -> None:
    known = Evaluation(8, 0.5, 0.25, 0.0, 1.0).__dict__
    edit_manifest(version, training={**PROGRESS, "evaluation": known | changes})


PROGRESS = {"env_steps": 1, "iteration": 1, "return_mean": None, "best_return": None}
SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda v: (v / "weights.safetensors").unlink(), "cannot be read"),
    "no manifest": (lambda v: (v / "manifest.json").unlink(), "cannot be read"),
    "manifest cut": (lambda v: (v / "manifest.json").write_text('{"format'), "is not JSON"),
    "manifest a list": (lambda v: (v / "manifest.json").write_text("[]"), "format_version: got 'list'"),
    "weights truncated": (truncate, "sha256: got"),
    "one bit flipped": (flip_one_bit, "sha256: got"),
    "manifest edited": (
        lambda v: (v / "manifest.json").write_text((v / "manifest.json").read_text().replace("1000", "2000")),
        "manifest_sha256",
    ),
    "future format": (lambda v: edit_manifest(v, format_version=2), "format_version: got 2"),
    "unknown key": (lambda v: edit_manifest(v, surprise=1), "manifest keys"),
    "renamed folder": (lambda v: v.rename(v.parent / "7"), "version: got 1, expected '7'"),
    "another policy": (lambda v: edit_manifest(v, policy_name="other"), "policy_name: got 'other'"),
    "pickle": (pickled, "not a safetensors file"),
    "missing tensor": (lambda v: edit_weights(v, lambda w: w.pop("core.gates.bias")), r"missing tensors.*gates\.bias"),
    "extra tensor": (lambda v: edit_weights(v, lambda w: w.update(x=torch.ones(1))), r"unexpected tensors: \['x'\]"),
    "wrong shape": (lambda v: edit_weights(v, lambda w: w.update({"actor.0.bias": torch.ones(3)})), "actor.0.bias"),
    "wrong dtype": (lambda v: edit_weights(v, lambda w: w.update({"actor.0.bias": torch.ones(16).half()})), "float16"),
    "not finite": (lambda v: edit_weights(v, set_nan), "core.output.bias: got NaN"),
    "other config": (lambda v: edit_manifest(v, config=config_with(v, feature_size=17)), "actor|tensor|state_spec"),
    "absurd size": (lambda v: edit_manifest(v, config=config_with(v, feature_size=10**9)), "feature_map|tensor"),
    "impossible size": (lambda v: edit_manifest(v, config=config_with(v, feature_size=10**30)), "got|overflow|int"),
    "bad config": (lambda v: edit_manifest(v, config=config_with(v, feature_size=0)), "feature_size: got 0"),
    "other state": (lambda v: edit_manifest(v, state_fingerprint="0" * 64), "state_spec: got"),
    "other flattening": (lambda v: edit_manifest(v, flattening="mine"), "flattening: got 'mine'"),
    "bad space": (lambda v: edit_manifest(v, action_space={"type": "Text"}), "space type: got 'Text'"),
    "negative progress": (lambda v: edit_manifest(v, training={**PROGRESS, "env_steps": -1}), "env_steps: got -1"),
    "text progress": (
        lambda v: edit_manifest(v, training={**PROGRESS, "return_mean": "high"}),
        "return_mean: got 'high'",
    ),
    "progress a list": (lambda v: edit_manifest(v, training=[]), "training: got"),
    "true progress": (lambda v: edit_manifest(v, training={**PROGRESS, "return_mean": True}), "return_mean: got True"),
    "no time": (lambda v: edit_manifest(v, training={**PROGRESS, "seconds": -1.0}), "seconds: got -1.0"),
    "evaluation a word": (lambda v: edit_manifest(v, training={**PROGRESS, "evaluation": "good"}), "got 'good'"),
    "nothing evaluated": (lambda v: edit_evaluation(v, episodes=0), "evaluation.episodes: got 0"),
    "huge return": (lambda v: edit_evaluation(v, return_mean=10**400), "evaluation.return_mean: got 1000"),
    "negative spread": (lambda v: edit_evaluation(v, return_std=-0.5), "evaluation.return_std: got -0.5"),
    "worst above best": (lambda v: edit_evaluation(v, return_min=2.0), "evaluation.return_min: got 2.0"),
    "too many cut": (lambda v: edit_evaluation(v, episodes_cut=9), "evaluation.episodes_cut: got 9"),
    "odd evaluation": (lambda v: edit_evaluation(v, median=0.5), "evaluation keys: got"),
    "space a word": (lambda v: edit_manifest(v, observation_space="abc"), "space: got 'abc'"),
    "deep manifest": (lambda v: (v / "manifest.json").write_text("[" * 100_000), "is not JSON"),
    "manifest a folder": (lambda v: ((v / "manifest.json").unlink(), (v / "manifest.json").mkdir()), "cannot be read"),
    "bad progress": (lambda v: edit_manifest(v, training={"steps": 1}), "steps"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_checkpoint_is_refused(version: Path, case: str) -> None:
    spoil, message = SPOILED[case]
    spoil(version)
    folder = version if version.exists() else version.parent / "7"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(folder)


# ------------------------------------------------------------------------------------------ links and odd files


def linked(path: Path, target: Path | None = None) -> None:
    """Put a link in a file's or folder's place, to the same content or to a target."""
    moved = path.parent / f".moved-{path.name}"
    path.rename(moved)
    path.symlink_to(target or moved)


ODD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights a link": (lambda v: linked(v / "weights.safetensors"), "weights.safetensors cannot be read .*link"),
    "manifest a link": (lambda v: linked(v / "manifest.json"), "manifest.json cannot be read .*link"),
    "manifest a link to a secret": (lambda v: linked(v / "manifest.json", Path("/etc/passwd")), "cannot be read"),
    "manifest a link into nothing": (lambda v: linked(v / "manifest.json", Path("/nothing")), "cannot be read"),
    "version a link": (linked, "a symbolic link"),
    "policy a link": (lambda v: linked(v.parent), "a symbolic link"),
    "weights a device": (lambda v: replaced(v, lambda p: p.symlink_to("/dev/zero")), "cannot be read"),
    "weights a pipe": (lambda v: replaced(v, lambda p: os.mkfifo(p)), "not a regular file"),
    "weights huge": (lambda v: os.truncate(v / "weights.safetensors", 2**40), "expected at most"),
    "manifest huge": (lambda v: os.truncate(v / "manifest.json", 2**30), "expected at most"),
}


def replaced(version: Path, make: Callable[[Path], Any]) -> None:
    (version / "weights.safetensors").unlink()
    make(version / "weights.safetensors")


@pytest.mark.parametrize("case", ODD)
def test_what_is_no_plain_file_in_its_own_folder_is_refused_at_once(version: Path, case: str) -> None:
    spoil, message = ODD[case]
    spoil(version)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.read(version)
    assert "root:" not in str(caught.value)


def test_a_link_among_versions_is_listed_so_that_it_is_refused_aloud_and_one_of_a_policy_is_not_followed(
    version: Path,
) -> None:
    linked(version)
    assert checkpoint.versions(version.parent) == [1]
    linked(version.parent)
    with pytest.raises(OSError, match="a symbolic link"):
        checkpoint.versions(version.parent)


@pytest.mark.parametrize("name", ["..", "../other", "a/b", "/etc", ".hidden", ""])
def test_no_name_leads_out_of_the_repository(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="policy name: got"):
        checkpoint.write(tmp_path / "repository", name, small_policy(), TrainingProgress())
    assert not (tmp_path / "repository").exists()


# ------------------------------------------------------------------------------------------ signatures


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Signer, Verifier]:
    make_key_pair(tmp_path / "secret.pem", tmp_path / "public.pem")
    return Signer.from_file(tmp_path / "secret.pem"), Verifier.from_file(tmp_path / "public.pem")


def signed_versions(repository: Path, signer: Signer) -> tuple[Path, Path]:
    first = checkpoint.write(repository, "policy", small_policy(seed=1), TrainingProgress(), signer=signer)
    return first, checkpoint.write(repository, "policy", small_policy(seed=2), TrainingProgress(), signer=signer)


def test_a_signed_version_is_read_with_its_key_and_without_any(tmp_path: Path, keys: tuple[Signer, Verifier]) -> None:
    for version in signed_versions(tmp_path / "repository", keys[0]):
        assert checkpoint.read(version, keys[1]).version == checkpoint.read(version).version == int(version.name)


def renamed(first: Path, second: Path) -> Path:
    """The old version as a newer one, its manifest made to fit."""
    newer = first.parent / "3"
    shutil.copytree(first, newer)
    edit_manifest(newer, version=3)
    return newer


def copied_from(first: Path, second: Path, *names: str) -> Path:
    for name in names:
        shutil.copy(first / name, second / name)
    return second


def edited(first: Path, second: Path) -> Path:
    manifest = json.loads((second / "manifest.json").read_text())
    edit_manifest(second, training=manifest["training"] | {"env_steps": 7})
    return second


def other_policy(first: Path, second: Path) -> Path:
    folder = first.parent.parent / "other"
    shutil.copytree(first.parent, folder)
    edit_manifest(folder / "1", policy_name="other")
    return folder / "1"


FORGED: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "no signature": (lambda a, b: [(b / "manifest.sig").unlink(), b][1], "manifest.sig cannot be read"),
    "a signature cut": (lambda a, b: [os.truncate(b / "manifest.sig", 63), b][1], "not the signature"),
    "a signature with more": (lambda a, b: [os.truncate(b / "manifest.sig", 65), b][1], "not the signature"),
    "a signature without end": (lambda a, b: [os.truncate(b / "manifest.sig", 10**9), b][1], "cannot be read"),
    "the signature of another version": (lambda a, b: copied_from(a, b, "manifest.sig"), "not the signature"),
    "weights of another version": (lambda a, b: copied_from(a, b, "weights.safetensors"), "sha256: got"),
    "all files of another version": (lambda a, b: copied_from(a, b, *FILES), "version: got 1, expected '2'"),
    "an old version as a new one": (renamed, "not the signature"),
    "as another policy's": (other_policy, "not the signature"),
    "one figure in the manifest": (edited, "not the signature"),
}
FILES = ("manifest.json", "manifest.sig", "weights.safetensors")


@pytest.mark.parametrize("case", FORGED)
def test_what_the_key_has_not_signed_as_this_very_version_is_refused(
    tmp_path: Path, keys: tuple[Signer, Verifier], case: str
) -> None:
    forge, message = FORGED[case]
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(forge(*signed_versions(tmp_path / "repository", keys[0])), keys[1])


def test_one_of_several_public_keys_will_do_and_none_of_somebody_else(
    tmp_path: Path, keys: tuple[Signer, Verifier]
) -> None:
    version, _ = signed_versions(tmp_path / "repository", keys[0])
    make_key_pair(tmp_path / "new.pem", tmp_path / "new-public.pem")
    with pytest.raises(CheckpointError, match="not the signature"):
        checkpoint.read(version, Verifier.from_file(tmp_path / "new-public.pem"))
    both = tmp_path / "both.pem"
    both.write_bytes((tmp_path / "new-public.pem").read_bytes() + (tmp_path / "public.pem").read_bytes())
    assert checkpoint.read(version, Verifier.from_file(both)).version == 1


def test_the_command_makes_a_pair_whose_secret_is_its_owners_and_overwrites_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret, public = tmp_path / "secret.pem", tmp_path / "public.pem"
    main(["make-keys", str(secret), str(public)])
    assert secret.stat().st_mode & 0o777 == 0o600 and "PRIVATE" not in public.read_text()
    before = secret.read_bytes()
    with pytest.raises(SystemExit, match="cannot be made"):
        main(["make-keys", str(secret), str(public)])
    assert secret.read_bytes() == before and capsys.readouterr().out == ""


def test_a_version_that_lies_there_already_can_be_signed_by_a_command(version: Path, tmp_path: Path) -> None:
    secret, public = tmp_path / "secret.pem", tmp_path / "public.pem"
    main(["make-keys", str(secret), str(public)])
    verifier = Verifier.from_file(public)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read(version, verifier)
    main(["sign", str(secret), str(version)])
    assert checkpoint.read(version, verifier).version == 1
    truncate(version)
    with pytest.raises(SystemExit, match="sha256: got"):
        main(["sign", str(secret), str(version)])


@pytest.mark.parametrize(
    "text", [b"", b"secret words", b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----"]
)
def test_a_file_that_is_no_key_is_refused_without_quoting_it(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "key.pem"
    file.write_bytes(text)
    for kind in (Signer, Verifier):
        with pytest.raises(ConfigError, match="key") as caught:
            kind.from_file(file)
        assert "c2VjcmV0" not in str(caught.value) and "secret words" not in str(caught.value)
