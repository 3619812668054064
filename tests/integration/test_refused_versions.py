"""A version that the server refuses is named by the server, and so by the trainer that published it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from gymnasium import spaces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tenuto_envs
from serving import ServerProcess, publish, small_policy, wait_until
from tenuto_models.signing import Signer, make_key_pair
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_trainer import TrainConfigError, TrainerError
from tenuto_trainer.errors import RefusedError
from tenuto_trainer.served import ServerWatch
from tiny_training import REPEAT, config
from wire import refused

ITERATION = 0
"""Of the versions that the tests publish."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path, "--max-batch", "4", "--capacity", "8", wait=False) as running:
        yield running


def break_weights(version: Path) -> Path:
    weights = version / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    return version


def publish_broken(repository: Path, elsewhere: Path, version: int) -> Path:
    """A version that appears in the repository at once, as a published one does, but is not whole."""
    folder = break_weights(publish(elsewhere, small_policy(), version=version))
    (repository / "policy").mkdir(exist_ok=True)
    return folder.rename(repository / "policy" / str(version))


def described(server: ServerProcess) -> pb.GetPolicyResponse:
    return server.stub.GetPolicy(pb.GetPolicyRequest(policy_name="policy"))


def newest_is(server: ServerProcess, version: int) -> bool:
    return server.metric('tenuto_newest_version{policy="policy"}') == version


# ---------------------------------------------------------------------------------------------- the server says it


def test_get_policy_names_refused_versions_and_says_why(
    server: ServerProcess, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    publish(tmp_path, small_policy())
    wait_until(lambda: newest_is(server, 1), "version 1")
    assert list(described(server).refused) == []
    publish_broken(tmp_path, tmp_path_factory.mktemp("elsewhere"), 2)
    publish(tmp_path, small_policy(action_space=spaces.Discrete(6)), version=3)
    wait_until(lambda: len(described(server).refused) == 2, "two refusals")
    reply = described(server)
    assert (reply.version, list(reply.versions)) == (1, [1])
    assert [r.version for r in reply.refused] == [2, 3]
    assert reply.refused[0].message.startswith("weights.safetensors sha256: got ")
    assert (
        reply.refused[1].message
        == "action space: got Discrete(6), expected Discrete(5), as in the versions being served"
    )
    assert str(tmp_path) not in str(reply)


def test_a_refused_version_is_still_named_when_a_newer_one_is_served(
    server: ServerProcess, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    publish(tmp_path, small_policy())
    wait_until(lambda: newest_is(server, 1), "version 1")
    folder = publish_broken(tmp_path, tmp_path_factory.mktemp("elsewhere"), 2)
    wait_until(lambda: described(server).refused, "the refusal")
    publish(tmp_path, small_policy(), version=3)
    wait_until(lambda: newest_is(server, 3), "version 3")
    assert [r.version for r in described(server).refused] == [2]
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    wait_until(lambda: not described(server).refused, "the deleted version to be forgotten")


def test_a_policy_of_which_every_version_is_refused_is_unknown_with_the_reason(
    server: ServerProcess, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    request = pb.GetPolicyRequest(policy_name="policy")
    assert refused(server.stub.GetPolicy, request)[1:] == ("POLICY_UNKNOWN", {})
    publish_broken(tmp_path, tmp_path_factory.mktemp("elsewhere"), 1)
    wait_until(lambda: refused(server.stub.GetPolicy, request)[2], "the refusal")
    _, reason, metadata = refused(server.stub.GetPolicy, request)
    assert (reason, metadata["refused_version"]) == ("POLICY_UNKNOWN", "1")
    assert metadata["refused_message"].startswith("weights.safetensors sha256: got ")


def test_a_server_with_a_public_key_serves_what_is_signed_and_nothing_else(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    keys, elsewhere = tmp_path_factory.mktemp("keys"), tmp_path_factory.mktemp("elsewhere")
    for name in ("ours", "theirs"):
        make_key_pair(keys / name, keys / f"{name}.pub")
    ours, theirs = (Signer.from_file(keys / name) for name in ("ours", "theirs"))
    publish(tmp_path, small_policy(), signer=ours)
    with ServerProcess(tmp_path, "--checkpoint-public-key", str(keys / "ours.pub")) as server:
        publish(tmp_path, small_policy(seed=2), version=2)
        publish(tmp_path, small_policy(seed=3), version=3, signer=theirs)
        (tmp_path / "policy" / "4").symlink_to(publish(elsewhere, small_policy(seed=4), version=4, signer=ours))
        wait_until(lambda: len(described(server).refused) == 3, "three refusals")
        refusals = described(server).refused
        assert [r.version for r in refusals] == [2, 3, 4]
        expected = ("manifest.sig cannot be read", "not the signature", "a symbolic link")
        assert all(what in r.message for r, what in zip(refusals, expected, strict=True))
        assert described(server).version == 1
        assert server.metric('tenuto_versions_refused_total{reason="broken"}') == 3
        publish(tmp_path, small_policy(seed=5), version=5, signer=ours)
        wait_until(lambda: newest_is(server, 5), "a version that is signed")


# ---------------------------------------------------------------------------------------------- the trainer sees it


def next_news(watch: ServerWatch) -> str:
    """The next news, waited for; everything that is said at once."""
    return "\n".join(wait_until(watch.news, "news"))


def test_the_watch_tells_of_the_first_served_version_and_of_every_refused_one(
    server: ServerProcess, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with ServerWatch(server.address, "policy") as watch:
        publish(tmp_path, small_policy())
        watch.published(1, ITERATION)
        assert next_news(watch) == f"{server.address} serves version 1"
        assert watch.conclude() == f"{server.address} serves version 1"
        publish_broken(tmp_path, elsewhere, 2)
        watch.published(2, ITERATION)
        assert next_news(watch).startswith(f"{server.address} refuses version 2: weights.safetensors sha256")
        assert watch.scalars() == {"checkpoint/served_version": 1.0, "checkpoint/refused_versions": 1.0}
        with pytest.raises(RefusedError, match=r"refuses version 2: .*truncated or changed"):
            watch.conclude()
        publish(tmp_path, small_policy(), version=3)
        watch.published(3, ITERATION)
        assert watch.conclude() == f"{server.address} serves version 3"
        assert watch.scalars() == {"checkpoint/served_version": 3.0, "checkpoint/refused_versions": 1.0}
        assert watch.news() == [f"{server.address} serves version 3"]
        publish(tmp_path, small_policy(), version=4)
        watch.published(4, ITERATION)
        assert watch.conclude() == f"{server.address} serves version 4"
        assert watch.news() == []


def test_the_watch_tells_of_a_first_version_that_is_refused(
    server: ServerProcess, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    publish_broken(tmp_path, tmp_path_factory.mktemp("elsewhere"), 1)
    with ServerWatch(server.address, "policy") as watch:
        watch.published(1, ITERATION)
        assert next_news(watch).startswith(f"{server.address} refuses version 1: ")
        with pytest.raises(TrainerError, match="refuses version 1"):
            watch.conclude()


def test_a_server_that_is_down_is_news_and_no_error(tmp_path: Path) -> None:
    publish(tmp_path, small_policy())
    with ServerProcess(tmp_path) as server:
        address = server.address
    with ServerWatch(address, "policy") as watch:
        watch.published(1, ITERATION)
        assert next_news(watch) == f"{address} does not answer (UNAVAILABLE); training goes on"
        assert watch.conclude() == f"{address} does not answer (UNAVAILABLE): nobody knows if it serves v1"
        with ServerProcess(tmp_path, "--port", address.rpartition(":")[2]):
            assert f"{address} answers again" in next_news(watch)
            assert watch.conclude() == f"{address} serves version 1"


def test_a_server_of_another_repository_is_news_once_and_no_error(server: ServerProcess) -> None:
    text = f"{server.address} does not serve version 1; is this its repository?"
    with ServerWatch(server.address, "policy", patience_s=0.5) as watch:
        watch.published(1, ITERATION)
        assert next_news(watch) == text
        assert watch.conclude() == text
        assert watch.news() == []


@pytest.mark.parametrize("version", [1, 2])
def test_a_server_that_serves_another_trainings_version_does_not_reassure(
    server: ServerProcess, tmp_path: Path, version: int
) -> None:
    publish(tmp_path, small_policy(), version=version)
    wait_until(lambda: newest_is(server, version), "the other training's version")
    text = (
        f"{server.address} does not serve version 1, but version {version} of iteration {ITERATION}; "
        "is this its repository?"
    )
    with ServerWatch(server.address, "policy", patience_s=0.5) as watch:
        watch.published(1, ITERATION + 5)
        assert next_news(watch) == text
        assert watch.conclude() == text


def test_without_an_address_nothing_is_asked() -> None:
    with ServerWatch(None, "policy") as watch:
        watch.published(1, ITERATION)
        assert (watch.news(), watch.scalars(), watch.conclude()) == ([], {}, None)


@pytest.mark.parametrize(
    "server", ["localhost", "localhost:", ":50051", "localhost:http", "http://localhost:50051", ""]
)
def test_an_address_at_which_no_server_can_be_is_refused_at_once(server: str) -> None:
    with pytest.raises(TrainConfigError, match=r"^server: got .*, expected host:port$"):
        config(server=server)


def run_training(tmp_path: Path, server: ServerProcess, *flags: str) -> subprocess.CompletedProcess[str]:
    """``tenuto-train`` for an iteration, which publishes a version before and one after it."""
    command = [str(Path(sys.executable).with_name("tenuto-train")), "--env", REPEAT, "--memory", "dnc"]
    command += ["--repository", str(tmp_path), "--log-dir", str(tmp_path / "log"), "--server", server.address]
    command += [
        "--policy",
        "policy",
        "--iterations",
        "1",
        "--num-envs",
        "4",
        "--batch-size",
        "128",
        "--num-epochs",
        "1",
    ]
    command += ["--minibatch-size", "128", "--hidden-size", "16", "--seed", "0", "--evaluation-episodes", "0", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the trainer itself has said on standard error, where Ray may tell of a machine with much to do."""
    return [line for line in done.stderr.splitlines() if line.startswith(("tenuto-train: ", "Traceback"))]


def test_a_training_ends_with_the_version_that_the_server_serves(server: ServerProcess, tmp_path: Path) -> None:
    done = run_training(tmp_path, server)
    assert (done.returncode, complaints(done)) == (0, []), done.stderr
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["stopped: 1 iterations done; newest version is 2", f"{server.address} serves version 2"]
    events = EventAccumulator(str(tmp_path / "log" / "policy")).Reload()
    assert next(e.value for e in events.Scalars("checkpoint/served_version")) in (0, 1)
    assert [e.value for e in events.Scalars("checkpoint/refused_versions")] == [0]


def test_a_training_whose_newest_version_is_refused_says_so_and_fails(server: ServerProcess, tmp_path: Path) -> None:
    """Another kind of memory under a name that the server serves already."""
    env = tenuto_envs.make(REPEAT)
    publish(tmp_path, small_policy("frameconv", env.observation_space, env.action_space))
    wait_until(lambda: newest_is(server, 1), "version 1")
    shutil.rmtree(tmp_path / "policy")
    done = run_training(tmp_path, server)
    assert done.returncode == 1
    [error] = complaints(done)
    assert error.startswith(f"tenuto-train: {server.address} refuses version 2: state: got ")
    assert error.endswith("as in the versions being served")
    assert "stopped: 1 iterations done; newest version is 2" in done.stdout.splitlines()
