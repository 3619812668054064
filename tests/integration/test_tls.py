"""TLS, client certificates and the limits of a connection, against the real server."""

from __future__ import annotations

import re
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest

from serving import ServerProcess, publish, small_policy, wait_until
from tenuto_client import AsyncRemotePolicy, RemotePolicy, ServerUnavailableError
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_proto.v1 import policy_pb2_grpc
from tenuto_server import tokens
from tenuto_server.principals import Entry, Principal, to_text
from wire import failure, observations, reason

OBSERVED = observations(1)[0]
UNKNOWN = pb.StepBatchRequest(session_ids=[1], step_indices=[0])
PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text()


def run(commands: str, folder: Path) -> None:
    done = subprocess.run(["sh", "-ec", commands], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the documented commands make."""
    folder = tmp_path_factory.mktemp("tls")
    (commands,) = re.findall(r"```sh\n(umask.*?)```", PAGE, re.DOTALL)
    run(commands, folder)
    return folder


@pytest.fixture
def files(made: Path, tmp_path: Path) -> Path:
    """A copy of them, to change."""
    return Path(shutil.copytree(made, tmp_path / "tls"))


def client_certificate(files: Path, subject: str, extensions: str = "") -> tuple[Path, Path]:
    """Another client's key and certificate."""
    (files / "more.ext").write_text(f"extendedKeyUsage = clientAuth\n{extensions}\n")
    run(
        f"openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout more.key -out more.csr "
        f'-subj "{subject}"\n'
        "openssl x509 -req -in more.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 1 -extfile more.ext "
        "-out more.pem",
        files,
    )
    return files / "more.key", files / "more.pem"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    publish(folder, small_policy(), "a")
    return folder


def flags(files: Path, *, client_ca: bool = False) -> list[str]:
    found = ["--tls-certificate", str(files / "server.pem"), "--tls-key", str(files / "server.key")]
    return found + (["--tls-client-ca", str(files / "ca.pem")] if client_ca else [])


def credentials(files: Path, key: Path | None = None, certificate: Path | None = None) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        (files / "ca.pem").read_bytes(),
        key.read_bytes() if key else None,
        certificate.read_bytes() if certificate else None,
    )


def at(server: ServerProcess) -> str:
    return f"localhost:{server.port}"


def listed(server: ServerProcess, own: grpc.ChannelCredentials, metadata: Any = ()) -> dict[int, str]:
    with grpc.secure_channel(at(server), own) as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        response = stub.ListSessions(pb.ListSessionsRequest(), metadata=metadata, timeout=20)
        return {session.session_id: session.principal for session in response.sessions}


async def test_the_documented_commands_give_an_encrypted_server_that_plain_clients_do_not_reach(
    repository: Path, made: Path
) -> None:
    with ServerProcess(repository, *flags(made)) as server:
        with RemotePolicy(at(server), credentials=credentials(made)) as policy:
            policy.step(OBSERVED)
        async with AsyncRemotePolicy(at(server), credentials=credentials(made), transport="stream") as asynchronous:
            await asynchronous.step(OBSERVED)
        for wrong in (None, grpc.ssl_channel_credentials()):
            with pytest.raises(ServerUnavailableError):
                RemotePolicy(at(server), credentials=wrong, timeout_s=1).connect()
        expires = server.metric("tenuto_tls_certificate_expiry_timestamp_seconds")
        assert 89 * 86400 < expires - time.time() < 91 * 86400


def test_a_client_certificate_says_whose_the_sessions_are(repository: Path, files: Path) -> None:
    robot = credentials(files, files / "robot-7.key", files / "robot-7.pem")
    other = credentials(files, *client_certificate(files, "/CN=ignored", "subjectAltName = URI:spiffe://lab/robot-8"))
    with ServerProcess(repository, *flags(files, client_ca=True)) as server:
        with pytest.raises(ServerUnavailableError):
            RemotePolicy(at(server), credentials=credentials(files), timeout_s=1).connect()
        with (
            RemotePolicy(at(server), credentials=robot) as policy,
            RemotePolicy(at(server), credentials=other, transport="stream") as others,
        ):
            policy.step(OBSERVED)
            others.step(OBSERVED)
            assert listed(server, robot) == {policy.session_id: "robot-7"}
            assert listed(server, other) == {others.session_id: "spiffe://lab/robot-8"}


def test_with_a_file_of_principals_a_certificate_that_is_not_in_it_is_nobodys(
    repository: Path, files: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tokens.json"
    file.write_text(to_text([Entry(Principal("robot-7", is_admin=True))]))
    token = tokens.add(file, Principal("alice"))
    robot = credentials(files, files / "robot-7.key", files / "robot-7.pem")
    other = credentials(files, *client_certificate(files, "/CN=robot-8"))
    with ServerProcess(repository, *flags(files, client_ca=True), "--tokens", str(file)) as server:
        assert reason(lambda: listed(server, other)) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        with RemotePolicy(at(server), credentials=other, token=token) as alices:
            alices.step(OBSERVED)
            # The role of its name; and a token goes before a certificate.
            assert listed(server, robot) == {alices.session_id: "alice"}
        # A name that leaves the file is nobody's from then on, also on connections and streams that stand.
        with RemotePolicy(at(server), credentials=robot, transport="stream") as robots:
            robots.step(OBSERVED)
            tokens.remove(file, "robot-7")
            wait_until(lambda: "ended 1 streams" in "\n".join(server.log), "the stream to be ended")
        assert reason(lambda: listed(server, robot)) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")


async def test_a_session_that_moves_to_another_server_shows_its_certificate_and_token_there_too(
    repository: Path, files: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tokens.json"
    token = tokens.add(file, Principal("alice"))
    robot = credentials(files, files / "robot-7.key", files / "robot-7.pem")
    both = [*flags(files, client_ca=True), "--tokens", str(file)]
    with ServerProcess(repository, *both) as here, ServerProcess(repository, *both) as there:
        for transport in ("unary", "stream"):
            options: Any = {"credentials": robot, "token": token, "transport": transport}
            with RemotePolicy(at(here), **options) as policy:
                policy.step(OBSERVED)
                policy.move(at(there))
                assert policy.step(OBSERVED).step_index == 1
            async with AsyncRemotePolicy(at(here), **options) as moving:
                await moving.step(OBSERVED)
                await moving.move(at(there))
                assert (await moving.step(OBSERVED)).step_index == 1
                assert listed(there, robot, (("authorization", f"Bearer {token}"),)) == {moving.session_id: "alice"}


def test_a_renewed_certificate_is_taken_without_a_restart_and_a_broken_one_is_not(
    repository: Path, files: Path
) -> None:
    def shown() -> str:
        return ssl.get_server_certificate(("127.0.0.1", server.port))

    def reloads(outcome: str) -> float:
        return server.metric(f'tenuto_credential_reloads_total{{files="tls",outcome="{outcome}"}}')

    key = (files / "server.key").read_text()
    with (
        ServerProcess(repository, *flags(files)) as server,
        RemotePolicy(at(server), credentials=credentials(files)) as policy,
    ):
        policy.step(OBSERVED)
        assert shown() == (files / "server.pem").read_text()
        run(
            "openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout new.key -out new.csr "
            "-subj /CN=new\n"
            "openssl x509 -req -in new.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 9 -extfile server.ext "
            "-out new.pem\n"
            # The certificate of one key with the other, as between two copies.
            "cp new.pem server.pem",
            files,
        )
        wait_until(lambda: reloads("refused") == 1, "the half of a pair to be refused")
        run("cp new.key server.key", files)
        wait_until(lambda: reloads("taken") == 1, "the pair to be taken")
        assert shown() == (files / "new.pem").read_text()
        (files / "server.key").write_text("-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n")
        wait_until(lambda: reloads("refused") == 2, "no key to be refused")
        (files / "server.pem").unlink()
        wait_until(lambda: reloads("refused") == 3, "no file to be refused")
        assert shown() == (files / "new.pem").read_text()
        with RemotePolicy(at(server), credentials=credentials(files)) as another:
            another.step(OBSERVED)
        policy.step(OBSERVED)
        said = "\n".join(server.log)
        assert "c2VjcmV0" not in said and not any(line in said for line in key.splitlines()[1:-1])


# ------------------------------------------------------------------ limits of a connection


@pytest.fixture(scope="module")
def strict_server(repository: Path) -> Iterator[ServerProcess]:
    with ServerProcess(repository, "--max-streams", "2", "--max-message-bytes", "2048") as process:
        yield process


def test_a_connection_has_no_more_streams_than_it_may(strict_server: ServerProcess) -> None:
    """gRPC's client holds the third call back; a rude one would be reset."""
    stub, boxes = strict_server.stub, [SimpleQueue[Any]() for _ in range(2)]
    streams = [stub.StepStream(iter(box.get, None), timeout=60) for box in boxes]
    for box, stream in zip(boxes, streams, strict=True):
        box.put(UNKNOWN)
        assert next(stream).errors
    ask = pb.GetPolicyRequest()
    assert failure(lambda: stub.GetPolicy(ask, timeout=0.5))[0] == grpc.StatusCode.DEADLINE_EXCEEDED
    boxes[0].put(None)
    assert stub.GetPolicy(ask, timeout=20).policy_name == "a"
    boxes[1].put(None)


def test_a_message_over_the_limit_is_refused_before_it_is_read(strict_server: ServerProcess) -> None:
    code, text, _ = failure(lambda: strict_server.stub.GetPolicy(pb.GetPolicyRequest(policy_name="x" * 3000)))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED and "2048" in text


def test_a_client_that_pings_without_end_loses_its_connection(strict_server: ServerProcess) -> None:
    rude = [
        ("grpc.keepalive_time_ms", 100),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    with grpc.insecure_channel(strict_server.address, rude) as channel:
        box: SimpleQueue[Any] = SimpleQueue()
        stream = policy_pb2_grpc.PolicyServiceStub(channel).StepStream(iter(box.get, None), timeout=30)
        code, text, _ = failure(lambda: next(stream))
        assert code == grpc.StatusCode.UNAVAILABLE and "pings" in text.lower()
        box.put(None)
    assert strict_server.stub.GetPolicy(pb.GetPolicyRequest(), timeout=20).policy_name == "a"


def test_a_connection_that_is_too_old_is_ended_and_its_client_connects_anew(repository: Path) -> None:
    with ServerProcess(repository, "--max-connection-age-s", "0.5") as server:
        seen: list[grpc.ChannelConnectivity] = []
        server.channel.subscribe(seen.append)
        ask = pb.GetPolicyRequest()
        assert server.stub.GetPolicy(ask, timeout=20).policy_name == "a"
        wait_until(lambda: grpc.ChannelConnectivity.READY in seen, "the connection")
        wait_until(lambda: seen[-1] == grpc.ChannelConnectivity.IDLE, "the connection to be ended")
        assert server.stub.GetPolicy(ask, timeout=20).policy_name == "a"
        server.channel.unsubscribe(seen.append)
