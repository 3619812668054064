"""What a server does over its life: start, reload, refuse, expire, overflow, drain, and clients that vanish."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from gymnasium import spaces

from serving import (
    WITHOUT_CAPABILITIES,
    ServerProcess,
    edit_manifest,
    hanging_while_exists,
    overflowing_policy,
    publish,
    small_policy,
    wait_until,
)
from tenuto_models import TrainingProgress, checkpoint
from tenuto_proto import array_from_wire
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.stream import MAX_STREAM_REQUESTS
from wire import WireSession, batch, observations, refused, replay

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    publish(tmp_path, small_policy())
    return tmp_path


@pytest.fixture
def own_server(repository: Path, request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    """A server of the test's own, with the flags of its ``flags`` marker parameter."""
    with ServerProcess(repository, *getattr(request, "param", ())) as running:
        yield running


def with_flags(*flags: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("own_server", [flags], indirect=True, ids=[" ".join(flags)])


def health(server: ServerProcess) -> int:
    return health_pb2_grpc.HealthStub(server.channel).Check(health_pb2.HealthCheckRequest()).status


def newest(server: ServerProcess) -> float:
    return server.metric('tenuto_newest_version{policy="policy"}')


def session(server: ServerProcess, **options: Any) -> WireSession:
    return WireSession(server, "policy", **options)


def steps_taken(server: ServerProcess, session_id: int) -> int:
    return server.stub.InspectSession(pb.InspectSessionRequest(session_id=session_id)).session.next_step_index


# ---------------------------------------------------------------------------------------------- reload


def test_an_empty_repository_is_not_ready_until_a_version_appears(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "new", wait=False) as server:
        assert server.http("/healthz")[0] == 200
        wait_until(lambda: server.http("/readyz") == (503, "no policy is served yet\n"), "the first look")
        assert health(server) == NOT_SERVING
        publish(tmp_path / "new", small_policy())
        wait_until(lambda: server.http("/readyz")[0] == 200, "readiness")
        wait_until(lambda: health(server) == SERVING, "health")
        session(server).step(observations(1)[0])


def test_a_new_version_is_loaded_while_episodes_keep_theirs(own_server: ServerProcess, repository: Path) -> None:
    old, new = small_policy(), small_policy(seed=1)
    running, pinned = session(own_server, seed=5), session(own_server, seed=5, version=1)
    observed = observations(12)
    responses = [running.step(o) for o in observed[:4]]
    publish(repository, new)
    wait_until(lambda: newest(own_server) == 2, "version 2")
    responses += [running.step(o, episode_start=i == 4) for i, o in enumerate(observed[4:])]
    expected = list(replay([(o, i == 8, old if i < 8 else new) for i, o in enumerate(observed)], seed=5))
    assert [r.version for r in responses] == [1] * 8 + [2] * 4
    assert [int(array_from_wire(r.action)) for r in responses] == [action for action, _ in expected]
    np.testing.assert_allclose([r.value for r in responses], [value for _, value in expected], atol=1e-5)
    for i, observation in enumerate(observed):
        assert pinned.step(observation, episode_start=i % 3 == 0).version == 1
    held = own_server.stub.GetPolicy(pb.GetPolicyRequest()).versions
    assert list(held) == [1, 2]
    own_server.stub.CloseSession(pb.CloseSessionRequest(session_id=pinned.id))
    wait_until(lambda: list(own_server.stub.GetPolicy(pb.GetPolicyRequest()).versions) == [2], "version 1 to leave")
    assert refused(own_server.stub.GetPolicy, pb.GetPolicyRequest(version=1))[1] == "VERSION_UNKNOWN"


def overwrite(path: Path, start: int, payload: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(payload)


@pytest.mark.parametrize(
    "kind",
    ["truncated", "tampered", "incomplete", "other spaces", "other state", "dangling link", "pipe", "negative steps"],
)
def test_a_bad_version_is_refused_counted_named_and_the_old_one_goes_on(
    own_server: ServerProcess, repository: Path, tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    policy = {
        "other spaces": lambda: small_policy(action_space=spaces.Discrete(6)),
        "other state": lambda: small_policy("frameconv"),
    }.get(kind, small_policy)()
    folder = publish(tmp_path_factory.mktemp("elsewhere"), policy, version=2)
    weights = folder / "weights.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif kind == "tampered":
        overwrite(weights, weights.stat().st_size - 8, b"\x01")
    elif kind == "incomplete":
        weights.unlink()
    elif kind == "dangling link":
        weights.unlink()
        weights.symlink_to("nowhere")
    elif kind == "pipe":
        (folder / "manifest.json").unlink()
        os.mkfifo(folder / "manifest.json")
    elif kind == "negative steps":
        edit_manifest(folder, training={"env_steps": -1, "iteration": 0, "return_mean": None, "best_return": None})
    running = session(own_server)
    running.step(observations(1)[0])
    folder.rename(repository / "policy" / "2")
    refusals = 'tenuto_versions_refused_total{policy="policy"}'
    wait_until(lambda: own_server.metric(refusals) == 1, "the refusal")
    assert any("refused version 2 of policy policy" in line for line in own_server.log)
    assert running.step(observations(1)[0]).version == 1 and session(own_server).step(observations(1)[0]).version == 1
    publish(repository, small_policy(seed=3), version=3)
    wait_until(lambda: newest(own_server) == 3, "the next good version")
    assert running.step(observations(1)[0], episode_start=True).version == 3
    assert own_server.metric(refusals) == 1, "a refused version is not tried again and again"


def test_at_start_the_newest_sound_version_is_served(repository: Path) -> None:
    publish(repository, small_policy(seed=1))
    broken = publish(repository, small_policy(seed=2))
    (broken / "manifest.json").write_text("{}")
    with ServerProcess(repository) as server:
        assert newest(server) == 2


def test_a_version_that_was_incomplete_is_loaded_once_it_is_complete(
    own_server: ServerProcess, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As when a folder is copied file by file instead of renamed into place."""
    whole = publish(tmp_path_factory.mktemp("elsewhere"), small_policy(seed=1), version=2)
    target = repository / "policy" / "2"
    target.mkdir()
    (target / "manifest.json").write_bytes((whole / "manifest.json").read_bytes())
    wait_until(lambda: own_server.metric('tenuto_versions_refused_total{policy="policy"}'), "a refusal")
    (target / "weights.safetensors").write_bytes((whole / "weights.safetensors").read_bytes())
    wait_until(lambda: newest(own_server) == 2, "version 2")


def test_a_first_dnc_compiles_beside_the_steps_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "empty"))
    repository = tmp_path / "repository"
    publish(repository, small_policy("frameconv"))
    with ServerProcess(repository) as server:
        playing = session(server)
        checkpoint.write(repository, "dnc", small_policy("dnc"), TrainingProgress())
        while not server.metric('tenuto_newest_version{policy="dnc"}'):
            # Compiling takes longer than this deadline.
            server.stub.Step(playing.request(observations(1)[0]), timeout=2)
            playing.index += 1
        assert any("compiled the DNC's step" in line for line in server.log)


def test_an_output_that_is_not_finite_fails_its_step_and_leaves_the_session(tmp_path: Path) -> None:
    publish(tmp_path, overflowing_policy())
    bad = (np.zeros(3, np.float32), 0)
    with ServerProcess(tmp_path) as server:
        running = session(server)
        code, reason, _ = refused(server.stub.Step, running.request(bad))
        assert (code, reason) == (grpc.StatusCode.INTERNAL, "COMPUTE_FAILED")
        assert steps_taken(server, running.id) == 0 and not any(t.any() for t in running.state().values())
        other = session(server)
        response = server.stub.StepBatch(batch([running, other], [bad, (bad[0], 1)]))
        assert [(e.row, e.error.reason) for e in response.errors] == [(0, pb.COMPUTE_FAILED)]
        assert server.metric('tenuto_failed_steps_total{policy="policy"}') == 2
        wait_until(lambda: any("1 of 1 steps of a batch gave no finite" in line for line in server.log), "the log")
        publish(tmp_path, small_policy())
        wait_until(lambda: newest(server) == 2, "the good version")
        assert running.step(observations(1)[0]).version == 2


def test_a_version_whose_output_is_never_finite_is_refused(repository: Path) -> None:
    policy = small_policy(seed=1)
    with torch.no_grad():
        policy.get_parameter("feature_map.weight").fill_(3.4e38)
    with ServerProcess(repository) as server:
        publish(repository, policy)
        wait_until(lambda: server.metric('tenuto_versions_refused_total{reason="broken"}') == 1, "the refusal")
        described = server.stub.GetPolicy(pb.GetPolicyRequest())
        assert described.version == 1 and "not finite" in described.refused[0].message


def test_a_folder_that_cannot_be_read_is_told_once_and_the_others_are_served(repository: Path) -> None:
    closed = repository / "closed"
    closed.mkdir(mode=0)
    with ServerProcess(repository, fault=WITHOUT_CAPABILITIES) as server:
        assert server.stub.GetPolicy(pb.GetPolicyRequest()).policy_name == "policy"
        publish(repository, small_policy(seed=1))
        wait_until(lambda: newest(server) == 2, "the next version")
        assert len([line for line in server.log if "cannot read the versions of policy closed" in line]) == 1
        assert not any("Traceback" in line for line in server.log)
        closed.chmod(0o755)
        publish(repository, small_policy(), "closed")
        wait_until(lambda: server.metric('tenuto_newest_version{policy="closed"}') == 1, "the folder once it is open")


# ---------------------------------------------------------------------------------------------- limits


@with_flags("--capacity", "3")
def test_capacity_is_refused_and_comes_back_when_sessions_close(own_server: ServerProcess) -> None:
    opened = [session(own_server) for _ in range(3)]
    code, reason, _ = refused(own_server.stub.OpenSession, pb.OpenSessionRequest())
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CAPACITY_REACHED")
    own_server.stub.CloseSession(pb.CloseSessionRequest(session_id=opened[0].id))
    session(own_server).step(observations(1)[0])
    wait_until(lambda: own_server.metric('tenuto_sessions{policy="policy"}') == 3, "the gauge to follow")


@with_flags("--idle-timeout-s", "0.4")
def test_an_idle_session_expires_with_its_own_reason(own_server: ServerProcess) -> None:
    idle = session(own_server)
    idle.step(observations(1)[0])
    expired = 'tenuto_sessions_ended_total{policy="policy",reason="expired"}'
    wait_until(lambda: own_server.metric(expired) == 1, "the expiry")
    code, reason, _ = refused(own_server.stub.Step, idle.request(observations(1)[0]))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SESSION_EXPIRED")
    for call, kind in (
        (own_server.stub.CloseSession, pb.CloseSessionRequest),
        (own_server.stub.InspectSession, pb.InspectSessionRequest),
    ):
        assert refused(call, kind(session_id=idle.id))[1] == "SESSION_EXPIRED"


# A batch of two rows runs at once; a lone row waits for company for a minute: what is queued stays queued.
WAITING = ("--max-batch", "2", "--max-wait-ms", "600000", "--queue-timeout-s", "600")


@with_flags(*WAITING)
def test_a_deadline_that_passes_in_the_queue_leaves_the_session_where_it_was(own_server: ServerProcess) -> None:
    one, other = session(own_server), session(own_server)
    first, second = observations(2)
    code, _, _ = refused(own_server.stub.Step, one.request(first), timeout=0.3)
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    lone = batch([one], [first], queue_timeout_ms=1)
    (error,) = own_server.stub.StepBatch(lone).errors
    assert (error.error.code, error.error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED.value[0], pb.QUEUE_TIMEOUT)
    assert steps_taken(own_server, one.id) == 0
    response = own_server.stub.StepBatch(batch([one, other], [first, second]))
    assert not response.errors and list(response.versions) == [1, 1]


@with_flags(*WAITING)
def test_a_client_that_vanishes_in_mid_step_frees_its_session_and_disturbs_nobody(
    own_server: ServerProcess,
) -> None:
    ours, gone = session(own_server), session(own_server)
    request = gone.request(observations(1)[0]).SerializeToString().hex()
    program = (
        "import grpc; from tenuto_proto.v1 import policy_pb2 as pb, policy_pb2_grpc as rpc;"
        f"stub = rpc.PolicyServiceStub(grpc.insecure_channel('{own_server.address}'));"
        f"stub.Step(pb.StepRequest.FromString(bytes.fromhex('{request}')), wait_for_ready=True)"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as client:
        wait_until(lambda: own_server.metric("tenuto_queued_rows") == 1, "the step to wait")
        client.send_signal(signal.SIGKILL)
    wait_until(
        lambda: own_server.metric('tenuto_requests_total{rpc="Step",code="CANCELLED"}') == 1, "the step to be dropped"
    )
    response = own_server.stub.StepBatch(batch([ours, gone], observations(2)))
    assert not response.errors
    assert steps_taken(own_server, ours.id) == steps_taken(own_server, gone.id) == 1


@with_flags(*WAITING)
def test_a_retry_joins_the_step_that_is_already_under_way(own_server: ServerProcess) -> None:
    one, other = session(own_server), session(own_server)
    request = one.request(observations(1)[0])
    first = own_server.stub.Step.future(request)
    wait_until(lambda: own_server.metric("tenuto_queued_rows") == 1, "the step to wait")
    again = own_server.stub.Step.future(request)
    code, reason, _ = refused(own_server.stub.Step, one.request(observations(1)[0], index=1))
    assert (code, reason) == (grpc.StatusCode.ABORTED, "STEP_IN_FLIGHT")
    other.step(observations(1)[0])
    assert first.result(10) == again.result(10) and steps_taken(own_server, one.id) == 1


@with_flags("--max-batch", "4", "--max-wait-ms", "60000", "--max-queued", "4")
def test_a_full_queue_refuses_and_loses_nothing_that_waits(own_server: ServerProcess) -> None:
    waiting_sessions, others = [session(own_server) for _ in range(3)], [session(own_server) for _ in range(2)]
    observation = observations(1)[0]
    waiting = [own_server.stub.Step.future(s.request(observation)) for s in waiting_sessions]
    wait_until(lambda: own_server.metric("tenuto_queued_rows") == 3, "the steps to wait")
    code, reason, _ = refused(own_server.stub.StepBatch, batch(others, observations(2)))
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    others[0].step(observation)
    assert [call.result(10).version for call in waiting] == [1, 1, 1]
    assert steps_taken(own_server, others[1].id) == 0


@with_flags(*WAITING)
def test_closing_a_session_with_a_waiting_step_answers_the_step_first(own_server: ServerProcess) -> None:
    one, other = session(own_server), session(own_server)
    waiting = own_server.stub.Step.future(one.request(observations(1)[0]))
    wait_until(lambda: own_server.metric("tenuto_queued_rows") == 1, "the step to wait")
    closing = own_server.stub.CloseSession.future(pb.CloseSessionRequest(session_id=one.id))
    wait_until(lambda: own_server.metric('tenuto_sessions{policy="policy",state="ending"}') == 1, "the session to end")
    assert refused(own_server.stub.Step, one.request(observations(1)[0]))[1] == "SESSION_CLOSED"
    assert not closing.done()
    other.step(observations(1)[0])
    assert waiting.result(10).version == 1
    closed = own_server.stub.CloseSession(pb.CloseSessionRequest(session_id=one.id))
    assert closing.result(10) == closed and (closed.num_steps, closed.num_episodes) == (1, 1)


@with_flags(*WAITING)
def test_a_request_that_joins_a_step_does_not_wait_longer_than_its_own_limit(own_server: ServerProcess) -> None:
    one = session(own_server)
    waiting = own_server.stub.Step.future(one.request(observations(1)[0]))
    wait_until(lambda: own_server.metric("tenuto_queued_rows") == 1, "the step to wait")
    (error,) = own_server.stub.StepBatch(batch([one], observations(1), queue_timeout_ms=50)).errors
    assert error.error.reason == pb.STEP_IN_FLIGHT and not waiting.done()
    waiting.cancel()


@with_flags(*WAITING)
def test_a_stream_that_is_left_drops_what_waits(own_server: ServerProcess) -> None:
    one, held = session(own_server), threading.Event()

    def requests() -> Iterator[pb.StepBatchRequest]:
        yield batch([one], observations(1))
        held.wait(60)

    call = own_server.stub.StepStream(requests())
    wait_until(lambda: own_server.metric("tenuto_queued_rows") == 1, "the step to wait")
    call.cancel()
    held.set()
    wait_until(lambda: own_server.metric("tenuto_queued_rows") == 0, "the step to be dropped")
    assert steps_taken(own_server, one.id) == 0


@with_flags("--max-batch", "256", "--max-wait-ms", "600000", "--queue-timeout-s", "600")
def test_a_stream_is_read_no_further_than_its_limit(own_server: ServerProcess) -> None:
    sessions, held = [session(own_server) for _ in range(MAX_STREAM_REQUESTS + 10)], threading.Event()

    def requests() -> Iterator[pb.StepBatchRequest]:
        yield from (batch([one], observations(1)) for one in sessions)
        held.wait(60)

    call = own_server.stub.StepStream(requests())
    wait_until(lambda: own_server.metric("tenuto_queued_rows") == MAX_STREAM_REQUESTS, "the stream to fill up")
    for one in sessions:  # Time enough for a server that would read on.
        own_server.stub.InspectSession(pb.InspectSessionRequest(session_id=one.id))
    assert own_server.metric("tenuto_queued_rows") == MAX_STREAM_REQUESTS
    call.cancel()
    held.set()


@with_flags("--capacity", "1")
def test_a_session_that_takes_over_a_slot_shows_nothing_of_the_one_before(own_server: ServerProcess) -> None:
    first = session(own_server)
    first.step(observations(1)[0])
    assert any(tensor.any() for tensor in first.state().values())
    own_server.stub.CloseSession(pb.CloseSessionRequest(session_id=first.id))
    assert not any(tensor.any() for tensor in session(own_server).state().values())


# ---------------------------------------------------------------------------------------------- drain


def test_drain_finishes_episodes_begins_none_and_exits_zero(own_server: ServerProcess) -> None:
    running, idle = session(own_server), session(own_server)
    running.step(observations(1)[0])
    own_server.terminate()
    wait_until(lambda: own_server.http("/readyz") == (503, "draining\n"), "the drain")
    assert health(own_server) == NOT_SERVING
    assert refused(own_server.stub.OpenSession, pb.OpenSessionRequest())[:2] == (
        grpc.StatusCode.UNAVAILABLE,
        "DRAINING",
    )
    running.step(observations(1)[0])
    request = running.request(observations(1)[0], episode_start=True)
    assert refused(own_server.stub.Step, request)[:2] == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    for one in (running, idle):
        own_server.stub.CloseSession(pb.CloseSessionRequest(session_id=one.id))
    assert own_server.wait() == 0


@with_flags("--drain-timeout-s", "0.2")
def test_drain_ends_although_sessions_stay_open(own_server: ServerProcess) -> None:
    session(own_server).step(observations(1)[0])
    own_server.terminate()
    assert own_server.wait() == 0
    assert any("1 sessions were still open" in line for line in own_server.log)


@with_flags("--drain-timeout-s", "600")
def test_a_session_that_never_stepped_does_not_hold_up_the_drain(own_server: ServerProcess) -> None:
    session(own_server)
    own_server.terminate()
    assert own_server.wait() == 0


@with_flags("--drain-timeout-s", "600")
def test_a_second_signal_ends_the_drain(own_server: ServerProcess) -> None:
    session(own_server).step(observations(1)[0])
    own_server.terminate()
    wait_until(lambda: own_server.http("/readyz")[0] == 503, "the drain")
    own_server.terminate()
    assert own_server.wait() == 0


@with_flags(*WAITING, "--drain-timeout-s", "0")
def test_a_step_that_waits_at_shutdown_is_answered(own_server: ServerProcess) -> None:
    waiting = own_server.stub.Step.future(session(own_server).request(observations(1)[0]))
    wait_until(lambda: own_server.metric("tenuto_queued_rows") == 1, "the step to wait")
    own_server.terminate()
    error = waiting.exception(10)
    assert isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.UNAVAILABLE
    assert own_server.wait() == 0


# ---------------------------------------------------------------------------------------------- start


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--capacity", "0"), "capacity: got 0"),
        (("--device", "tpu"), "device: got 'tpu'"),
        (("--port", "99999"), "port: got 99999"),
        (("--max-batch", "64", "--max-queued", "2"), "max_queued: got 2"),
        (("--host", "203.0.113.1"), "host: got '203.0.113.1', where others"),
        (("--host", "203.0.113.1", "--insecure"), "cannot be bound"),
        (("--tokens", "/nowhere"), "tokens: got /nowhere, which cannot be read"),
        (("--checkpoint-public-key", "/dev/null"), "checkpoint_public_key: "),
        (
            ("--repository", "/proc/nothing", "--port", "0", "--metrics-port", "0"),
            "repository: got /proc/nothing, which cannot be created",
        ),
        (("--log-level", "loud"), "expected DEBUG, INFO, WARNING or ERROR"),
        (("--unknown", "1"), "unrecognized arguments"),
    ],
)
def test_a_bad_setting_ends_the_process_with_one_clear_line(
    tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    command = [sys.executable, "-m", "tenuto_server.main", "--repository", str(tmp_path), *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0 and message in ended.stderr and "Traceback" not in ended.stderr


_BATCHES_MATTER = """
import dataclasses
from tenuto_server.host_step import HostStep
def advance(self, rows, sound=HostStep.advance):
    results = sound(self, rows)
    return dataclasses.replace(results, values=results.values + len(rows) * 1e-6)
HostStep.advance = advance
"""
"""A ``fault`` for ServerProcess: a device whose results depend on how many rows there are."""


def test_deterministic_does_not_start_on_a_device_whose_results_depend_on_the_batch(tmp_path: Path) -> None:
    publish(tmp_path, small_policy())
    program = f"{_BATCHES_MATTER}\nfrom tenuto_server.main import main\nmain()"
    flags = ["--repository", str(tmp_path), "--port", "0", "--metrics-port", "0", "--deterministic"]
    ended = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert re.search(
        r"deterministic: policy policy: results differ by up to \d.*e-.* between batches on cpu", ended.stderr
    )


def test_deterministic_refuses_a_later_policy_whose_results_depend_on_the_batch(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, "--deterministic", wait=False, fault=_BATCHES_MATTER) as server:
        publish(tmp_path, small_policy())
        wait_until(lambda: server.metric('tenuto_versions_refused_total{reason="failed"}'), "the refusal")
        _, reason, metadata = refused(server.stub.GetPolicy, pb.GetPolicyRequest(policy_name="policy"))
        assert reason == "POLICY_UNKNOWN" and "results differ" in metadata["refused_message"]


def test_without_deterministic_such_a_device_is_used_and_told_of(tmp_path: Path) -> None:
    publish(tmp_path, small_policy())
    with ServerProcess(tmp_path, fault=_BATCHES_MATTER) as server:
        assert not server.stub.GetPolicy(pb.GetPolicyRequest()).batch_invariant
        assert server.metric('tenuto_batch_invariant{policy="policy"}') == 0
        assert any("results differ" in line for line in server.log)


def test_a_port_that_is_taken_is_named(own_server: ServerProcess, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tenuto_server.main", "--repository", str(tmp_path)]
    for flags in (
        ("--port", str(own_server.port), "--metrics-port", "0"),
        ("--port", "0", "--metrics-port", str(own_server.metrics_port)),
    ):
        ended = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60)
        assert ended.returncode != 0 and "Traceback" not in ended.stderr
        assert "cannot be bound (Address already in use)" in ended.stderr


# ---------------------------------------------------------------------------------------------- metrics


def test_metrics_tell_how_requests_ended_and_where_sessions_are(own_server: ServerProcess) -> None:
    playing = session(own_server)
    playing.step(observations(1)[0])
    session(own_server)
    refused(own_server.stub.Step, pb.StepRequest(session_id=1))
    list(own_server.stub.StepStream(iter([batch([playing], observations(1)), pb.StepBatchRequest()])))

    ended = {
        (rpc, code): own_server.metric(f'tenuto_requests_total{{rpc="{rpc}",code="{code}"}}')
        for rpc, code in (
            ("OpenSession", "OK"), ("Step", "OK"), ("Step", "NOT_FOUND"), ("StepStream", "OK"),
            ("StepStream", "INVALID_ARGUMENT"),
        )
    }  # fmt: skip
    assert list(ended.values()) == [2, 1, 1, 1, 1], ended

    def states() -> dict[str, float]:
        names = ("opened", "waiting", "stepping", "ending")
        return {name: own_server.metric(f'tenuto_sessions{{policy="policy",state="{name}"}}') for name in names}

    expected = {"opened": 1, "waiting": 1, "stepping": 0, "ending": 0}
    wait_until(lambda: states() == expected, "the gauges to follow")
    assert own_server.metric('tenuto_version_sessions{policy="policy",version="1"}') == 1
    assert own_server.metric('tenuto_episodes_total{policy="policy",version="1"}') == 1
    assert own_server.metric("tenuto_engine_busy_seconds_total") > 0
    assert own_server.metric("tenuto_event_loop_lag_seconds_count") > 0
    assert own_server.metric('tenuto_build_info{device="cpu"}') == 1
    assert own_server.metric("process_resident_memory_bytes") > 1e7


def test_a_device_that_hangs_makes_the_server_not_ready_until_it_answers(repository: Path, tmp_path: Path) -> None:
    hang = tmp_path / "hang"
    flags = ("--queue-timeout-s", "0.3", "--stall-timeout-s", "0.3")
    with ServerProcess(repository, *flags, fault=hanging_while_exists(hang)) as server:
        first, second = session(server), session(server)
        hang.touch()
        hanging = server.stub.Step.future(first.request(observations(1)[0]))
        wait_until(lambda: server.http("/readyz")[0] == 503, "the device to be found hanging")
        assert server.http("/readyz")[1].startswith("stalled")
        assert server.metric('tenuto_state{tenuto_state="stalled"}') == 1
        wait_until(lambda: health(server) == NOT_SERVING, "gRPC health to say so too")
        assert refused(server.stub.Step, second.request(observations(1)[0]))[1] == "QUEUE_TIMEOUT"
        hang.unlink()
        assert hanging.result().step_index == 0
        wait_until(lambda: server.http("/readyz")[0] == 200, "readiness")
        assert second.step(observations(1)[0]).step_index == 0, "the refused step was not applied"
        wait_until(lambda: any("the device answers again" in line for line in server.log), "the log to say so")


def test_an_event_loop_that_hangs_is_seen_from_outside(repository: Path, tmp_path: Path) -> None:
    hang = tmp_path / "hang"
    fault = hanging_while_exists(hang, "tenuto_proto.ObservationCodec.flatten")
    with ServerProcess(repository, "--stall-timeout-s", "1", fault=fault) as server:
        step = session(server).request(observations(1)[0])
        hang.touch()
        hanging = server.stub.Step.future(step)
        wait_until(lambda: server.http("/readyz")[0] == 503, "the event loop to be found hanging")
        assert server.metric('tenuto_state{tenuto_state="stalled"}') == 1
        hang.unlink()
        assert hanging.result().step_index == 0
        wait_until(lambda: server.http("/readyz")[0] == 200, "readiness")


def test_a_server_that_drains_since_it_has_failed_says_so(repository: Path, tmp_path: Path) -> None:
    fault = f"""
import asyncio, pathlib
from tenuto_server.reload import Reloader
async def failing(self, poll_s, stop, sound=Reloader.watch):
    watching = asyncio.create_task(sound(self, poll_s, stop))
    while not pathlib.Path({str(tmp_path / "fail")!r}).exists():
        await asyncio.sleep(0.02)
    watching.cancel()
    raise LookupError("a bug of the reloader")
Reloader.watch = failing
"""
    with ServerProcess(repository, fault=fault) as server:
        running = session(server)
        running.step(observations(1)[0])
        (tmp_path / "fail").touch()
        wait_until(lambda: server.http("/readyz") == (503, "draining\n"), "the drain")
        assert health(server) == NOT_SERVING
        server.stub.CloseSession(pb.CloseSessionRequest(session_id=running.id))
        assert server.wait() == 1 and any("a bug of the reloader" in line for line in server.log)


def test_a_capacity_beyond_memory_is_one_line_and_the_process_waits_for_another_policy(repository: Path) -> None:
    publish(repository, small_policy())
    with ServerProcess(repository, "--capacity", "1000000000000", wait=False) as server:
        wait_until(lambda: server.http("/readyz") == (503, "no policy is served yet\n"), "the first look")
        wait_until(lambda: server.metric('tenuto_versions_refused_total{reason="failed"}') == 1, "the refusal")
        told = [line for line in server.log if "capacity: got" in line]
        assert len(told) == 1 and "which has less" in told[0]
        assert not any("Traceback" in line for line in server.log)
        reason = refused(server.stub.OpenSession, pb.OpenSessionRequest(policy_name="policy"))
        assert reason[1] == "POLICY_UNKNOWN" and "capacity" in reason[2]["refused_message"]


def test_the_metrics_port_has_an_address_of_its_own(repository: Path) -> None:
    with ServerProcess(repository, "--metrics-host", "127.0.0.2", wait=False) as server, pytest.raises(OSError):
        server.http("/healthz")
