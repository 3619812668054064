"""What goes wrong inside a server is survived or ends the process: no step is ever answered wrongly."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving import ServerProcess, failing_while_exists, hanging_while_exists, publish, small_policy, wait_until
from tenuto_client import RemotePolicy
from tenuto_proto import array_from_wire
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_proto.v1 import policy_pb2_grpc
from wire import CODEC, WireSession, observations, refused, replay

OBSERVED = observations(24)
SEED = 11


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    publish(tmp_path / "repository", small_policy())
    return tmp_path / "repository"


def undisturbed(num_steps: int) -> list[int]:
    """The actions of a session whose server has no faults."""
    return [action for action, _ in replay([(o, False, small_policy()) for o in OBSERVED[:num_steps]], SEED)]


def action_of(response: pb.StepResponse) -> int:
    return int(array_from_wire(response.action))


def is_serving(server: ServerProcess) -> bool:
    status = health_pb2_grpc.HealthStub(server.channel).Check(health_pb2.HealthCheckRequest()).status
    return status == health_pb2.HealthCheckResponse.SERVING


# ---------------------------------------------------------------------------------------------- batches that fail


def test_batches_that_fail_change_nothing_and_many_in_a_row_make_the_server_not_ready(
    repository: Path, tmp_path: Path
) -> None:
    fault = tmp_path / "fault"
    with ServerProcess(repository, fault=failing_while_exists(fault)) as server:
        session, actions = WireSession(server, "policy", seed=SEED), list[int]()
        for error, reason in (
            ("RuntimeError('a bug')", "error"),
            ("torch.OutOfMemoryError('CUDA out of memory')", "out_of_memory"),
            ("MemoryError()", "out_of_memory"),
        ):
            actions.append(action_of(session.step(OBSERVED[session.index])))
            failed = f'tenuto_failed_batches_total{{reason="{reason}"}}'
            before = server.metric(failed)
            fault.write_text(error)
            request = session.request(OBSERVED[session.index])
            for _ in range(4):
                assert refused(server.stub.Step, request)[:2] == (grpc.StatusCode.INTERNAL, "COMPUTE_FAILED")
            assert server.http("/readyz")[0] == 200, "a few may be chance"
            refused(server.stub.Step, request)
            assert server.metric(failed) == before + 5
            assert server.http("/readyz")[0] == 503 and server.http("/readyz")[1].startswith("failing")
            assert server.metric('tenuto_state{tenuto_state="failing"}') == 1
            wait_until(lambda: not is_serving(server), "gRPC health to say so too")
            fault.unlink()
            # Nobody sends a step to a server that is not ready: it has to find out itself.
            wait_until(lambda: server.http("/readyz")[0] == 200, "readiness")
            wait_until(lambda: is_serving(server), "gRPC health to say so too")
        while session.index < len(OBSERVED):
            actions.append(action_of(session.step(OBSERVED[session.index])))
        assert actions == undisturbed(len(OBSERVED))
        assert server.metric('tenuto_failed_steps_total{policy="policy"}') == 15
        assert any("the device computes again" in line for line in server.log)


# ---------------------------------------------------------------------------------------------- the end of the process

_FATAL = {
    "a lost device": """
from tenuto_server.host_step import HostStep
def advance(self, rows, sound=HostStep.advance):
    if fatal.exists():
        raise RuntimeError("CUDA error: device-side assert triggered\\nCUDA kernel errors might be reported later")
    return sound(self, rows)
HostStep.advance = advance
""",
    "a torn step": """
from tenuto_models.distributions import Categoricals
def in_space(self, actions, sound=Categoricals.in_space):
    if fatal.exists():
        raise MemoryError("after the state has moved")
    return sound(self, actions)
Categoricals.in_space = in_space
""",
    "a step that is not recorded": """
from tenuto_server.sessions import SessionTable
def commit(self, *arguments, sound=SessionTable.commit):
    if fatal.exists():
        raise IndexError("a bug")
    return sound(self, *arguments)
SessionTable.commit = commit
""",
}


@pytest.mark.parametrize("what", list(_FATAL))
def test_where_state_cannot_be_relied_upon_the_process_ends_and_sessions_go_on_from_the_store(
    repository: Path, tmp_path: Path, what: str
) -> None:
    fatal = tmp_path / "fatal"
    fault = f"import pathlib\nfatal = pathlib.Path({str(fatal)!r})\n{_FATAL[what]}"
    store = ("--durability", f"sqlite:{tmp_path / 'store'}", "--snapshot-interval-s", "0.02")
    actions = list[int]()
    with (
        ServerProcess(repository, *store, fault=fault) as server,
        RemotePolicy(server.address, "policy", seed=SEED, timeout_s=120) as policy,
    ):
        actions += [int(policy.step(observation).action) for observation in OBSERVED[:10]]
        fatal.touch()
        with pytest.raises(grpc.RpcError) as lost:
            server.stub.Step(
                pb.StepRequest(session_id=policy.session_id, step_index=10, observation=CODEC.pack(OBSERVED[10]))
            )
        assert lost.value.code() == grpc.StatusCode.UNAVAILABLE, (
            "nobody was told that the step was, or was not, applied"
        )
        assert server.wait() == 70
        wait_until(lambda: any("CRITICAL tenuto: ending:" in line for line in server.log), "the log to say why")
        with ServerProcess(repository, *store, "--port", str(server.port)):
            actions += [int(policy.step(observation).action) for observation in OBSERVED[10:]]
            assert actions == undisturbed(len(OBSERVED))


@pytest.mark.parametrize("where", ["tenuto_server.engine.Engine.run", "tenuto_proto.ObservationCodec.flatten"])
def test_what_hangs_for_too_long_ends_the_process_with_its_stacks(repository: Path, tmp_path: Path, where: str) -> None:
    hang, flags = tmp_path / "hang", ("--stall-timeout-s", "0.5", "--stall-exit-s", "1.5")
    with ServerProcess(repository, *flags, fault=hanging_while_exists(hang, where)) as server:
        request = WireSession(server, "policy").request(OBSERVED[0])
        hang.touch()
        hanging = server.stub.Step.future(request)
        assert server.wait() == 1
        assert isinstance(hanging.exception(10), grpc.RpcError)
        wait_until(lambda: any("Timeout (0:00:01.500000)!" in line for line in server.log), "the log to say why")
        wait_until(lambda: any(" in hanging" in line for line in server.log), "the stack of what hung")


# ---------------------------------------------------------------------------------------------- files


def test_a_repository_that_vanishes_is_told_of_and_used_again_when_it_is_back(repository: Path, tmp_path: Path) -> None:
    with ServerProcess(repository) as server:
        session, readable = WireSession(server, "policy", seed=SEED), "tenuto_repository_readable"
        actions = [action_of(session.step(observation)) for observation in OBSERVED[:5]]
        assert server.metric(readable) == 1
        for away in ("once", "and once more"):
            repository.rename(tmp_path / away)
            wait_until(lambda: server.metric(readable) == 0, "the repository to be missed")
            actions += [action_of(session.step(OBSERVED[session.index])) for _ in range(5)]
            assert WireSession(server, "policy").step(OBSERVED[0]).version >= 1
            assert server.http("/readyz")[0] == 200
            publish(repository, small_policy(seed=3), version=2 if away == "once" else 3)
            wait_until(lambda: server.metric(readable) == 1, "the repository to be seen")
            expected = 2 if away == "once" else 3
            wait_until(lambda e=expected: server.metric("tenuto_newest_version") == e, "the new version")
        assert actions == undisturbed(15)
        assert session.step(OBSERVED[15]).version == 1, "a running episode keeps its version"
        assert len([line for line in server.log if "cannot read the repository" in line]) == 2
        assert len([line for line in server.log if "can be read again" in line]) == 2
        assert not any("Traceback" in line for line in server.log)


UNWATCHABLE = """
import tenuto_server.reload
async def awatch(*paths, **options):
    raise OSError("OS file watch limit reached.")
    yield
tenuto_server.reload.awatch = awatch
"""
"""A ``fault`` for ServerProcess: other programs have taken all the watches that the system has."""


def test_a_repository_that_cannot_be_watched_is_looked_at_regularly(repository: Path, tmp_path: Path) -> None:
    with ServerProcess(repository, fault=UNWATCHABLE) as server:
        for version in (2, 3):
            publish(repository, small_policy(seed=version), version=version)
            wait_until(lambda v=version: server.metric("tenuto_newest_version") == v, "the new version")
        repository.rename(tmp_path / "away")
        wait_until(lambda: server.metric("tenuto_repository_readable") == 0, "the repository to be missed")
        (tmp_path / "away").rename(repository)
        wait_until(lambda: server.metric("tenuto_repository_readable") == 1, "the repository to be seen")
        assert len([line for line in server.log if "cannot watch the repository" in line]) == 1
        server.terminate()
        assert server.wait() == 0


def full_while_exists(file: Path) -> str:
    """A ``fault`` for ServerProcess: no file can grow while this one exists, as on a disk that is full."""
    return f"""
import pathlib, resource, threading, time
def fill():
    while True:
        free = 0 if pathlib.Path({str(file)!r}).exists() else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (free, resource.RLIM_INFINITY))
        time.sleep(0.01)
threading.Thread(target=fill, daemon=True).start()
"""


def test_a_full_disk_stops_no_step_and_sessions_are_saved_when_there_is_room_again(
    repository: Path, tmp_path: Path
) -> None:
    full, store = tmp_path / "full", tmp_path / "store"
    flags = ("--durability", f"sqlite:{store}", "--snapshot-interval-s", "0.05")
    with ServerProcess(repository, *flags, fault=full_while_exists(full)) as server:
        session = WireSession(server, "policy", seed=SEED)

        def durable_step() -> int:
            return server.stub.InspectSession(pb.InspectSessionRequest(session_id=session.id)).session.durable_step

        actions = [action_of(session.step(observation)) for observation in OBSERVED[:5]]
        wait_until(lambda: durable_step() == 5, "the session to be saved")
        full.touch()
        wait_until(
            lambda: (
                actions.append(action_of(session.step(OBSERVED[session.index])))
                or server.metric("tenuto_snapshot_failures_total") > 0
                or session.index >= len(OBSERVED) - 2
            ),
            "the store to fail",
        )
        wait_until(lambda: server.metric("tenuto_snapshot_failures_total") > 0, "the failure to be counted")
        assert server.http("/readyz")[0] == 200 and durable_step() < session.index
        full.unlink()
        wait_until(lambda: durable_step() == session.index, "the session to be saved")
        actions += [action_of(session.step(observation)) for observation in OBSERVED[session.index :]]
        assert actions == undisturbed(len(OBSERVED))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def deaf(repository: Path) -> Iterator[tuple[Any, int]]:
    """A server whose log goes to a full disk, and its metrics port."""
    port, metrics_port = _free_port(), _free_port()
    command = [sys.executable, "-m", "tenuto_server.main", "--repository", str(repository)]
    command += ["--port", str(port), "--metrics-port", str(metrics_port), "--log-level", "DEBUG"]
    with Path("/dev/full").open("w") as full, subprocess.Popen(command, stderr=full) as process:
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield policy_pb2_grpc.PolicyServiceStub(channel), metrics_port
        finally:
            process.kill()


def test_a_log_that_cannot_be_written_stops_no_step(deaf: tuple[Any, int]) -> None:
    stub, metrics_port = deaf

    def is_ready() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/readyz", timeout=10) as response:
                return response.status == 200
        except OSError:
            return False

    wait_until(is_ready, "the server to be ready", 90)
    opened = stub.OpenSession(pb.OpenSessionRequest(seed=SEED))
    actions = [
        action_of(
            stub.Step(pb.StepRequest(session_id=opened.session_id, step_index=i, observation=CODEC.pack(observation)))
        )
        for i, observation in enumerate(OBSERVED[:8])
    ]
    assert actions == undisturbed(8)
