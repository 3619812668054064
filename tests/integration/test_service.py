"""The contract as a client sees it: steps, retries, refusals, sessions, health and reflection, over a socket."""

from __future__ import annotations

import itertools
import secrets
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from gymnasium import spaces

from serving import OBSERVATIONS, ServerProcess, small_policy
from tenuto_proto import array_from_wire, space_from_wire
from tenuto_proto.v1 import policy_pb2 as pb
from wire import CODEC, WireSession, batch, observations, refused, replay


@pytest.fixture(params=["dnc", "frameconv"])
def memory(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def session(server: ServerProcess) -> WireSession:
    return WireSession(server)


# ---------------------------------------------------------------------------------------------- steps


def test_actions_and_values_are_those_of_the_policy_alone(server: ServerProcess, memory: str) -> None:
    session = WireSession(server, memory, seed=7)
    observed = observations(40, seed=1)
    policy = small_policy(memory)
    expected = replay([(observation, index == 25, policy) for index, observation in enumerate(observed)], seed=7)
    for index, (observation, (action, value)) in enumerate(zip(observed, expected, strict=True)):
        response = session.step(observation, episode_start=index == 25)
        assert int(array_from_wire(response.action)) == action
        assert response.value == pytest.approx(value, abs=1e-6)
        assert response.version == 1 and response.step_index == index


def test_state_seen_by_inspect_is_that_of_the_policy(server: ServerProcess, memory: str) -> None:
    session, policy = WireSession(server, memory), small_policy(memory)
    assert all(not tensor.any() for tensor in session.state().values())
    state = policy.initial_state(1)
    for observation in observations(5):
        session.step(observation)
        flat = torch.from_numpy(np.asarray(spaces.flatten(OBSERVATIONS, observation), np.float32))[None]
        state = {k: v.detach() for k, v in policy.step(flat, state)[1].items()}
    served = session.state()
    assert served.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_allclose(served[name], tensor[0].numpy(), atol=1e-5)


def test_a_repeated_step_returns_the_stored_reply_and_applies_nothing(session: WireSession) -> None:
    first, second, other = observations(3)
    session.step(first)
    reply = session.step(second)
    before = session.state()
    again = session.stub.Step(session.request(second, index=1))
    with_other_observation = session.stub.Step(session.request(other, index=1))
    assert again.SerializeToString() == reply.SerializeToString() == with_other_observation.SerializeToString()
    after = session.state()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("index", [0, 3, 2**40])
def test_any_other_step_index_is_refused_with_the_expected_one(session: WireSession, index: int) -> None:
    for observation in observations(2):
        session.step(observation)
    code, reason, metadata = refused(session.stub.Step, session.request(observations(1)[0], index=index))
    assert (code, reason, metadata) == (grpc.StatusCode.ABORTED, "STEP_INDEX_MISMATCH", {"expected": "2"})


def test_same_seed_gives_same_actions_and_another_seed_others(server: ServerProcess) -> None:
    observed = observations(30)
    played = [
        [array_from_wire(s.step(o).action).item() for o in observed]
        for s in (WireSession(server, seed=1), WireSession(server, seed=1), WireSession(server, seed=2))
    ]
    assert played[0] == played[1] != played[2]


def test_deterministic_session_takes_the_most_probable_action(server: ServerProcess) -> None:
    session = WireSession(server, deterministic=True)
    for observation in observations(10):
        response = session.step(observation)
        assert array_from_wire(response.action) == array_from_wire(response.logits).argmax()


def test_log_prob_is_that_of_the_action(session: WireSession) -> None:
    response = session.step(observations(1)[0])
    logits = torch.from_numpy(array_from_wire(response.logits).copy())
    expected = torch.log_softmax(logits, 0)[int(array_from_wire(response.action))]
    assert response.log_prob == pytest.approx(float(expected), abs=1e-6)


# ---------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("rpc", ["StepBatch", "StepStream"])
def test_a_batch_gives_each_row_what_a_lone_session_gets(server: ServerProcess, memory: str, rpc: str) -> None:
    n, length = 7, 12
    together = [WireSession(server, memory, seed=100 + i) for i in range(n)]
    alone = [WireSession(server, memory, seed=100 + i) for i in range(n)]
    observed = [observations(n, seed=t) for t in range(length)]
    for t in range(length):
        request = batch(together, observed[t], request_id=t)
        if rpc == "StepBatch":
            response = server.stub.StepBatch(request)
        else:
            (response,) = server.stub.StepStream(iter([request]))
        assert response.request_id == t and not response.errors
        actions, values = array_from_wire(response.actions), array_from_wire(response.values)
        for i, session in enumerate(together):
            session.index += 1
            lone = alone[i].step(observed[t][i])
            assert actions[i] == array_from_wire(lone.action)
            assert values[i] == pytest.approx(lone.value, abs=1e-6)


def test_a_step_sent_right_behind_a_batch_does_not_change_the_batchs_answer(server: ServerProcess) -> None:
    many, twin = [WireSession(server, seed=i) for i in range(200)], WireSession(server, seed=0)
    observed = observations(len(many))
    for _ in range(8):
        whole = batch(many, observed, request_id=1)
        behind = batch(many[:1], observed[:1], request_id=2, step_indices=[many[0].index + 1])
        answers = {answer.request_id: answer for answer in server.stub.StepStream(iter([whole, behind]))}
        assert not answers[1].errors
        assert array_from_wire(answers[1].values)[0] == pytest.approx(twin.step(observed[0]).value, abs=1e-6)
        for session in many:
            session.index += 1
        # It may have come too early, and is then refused.
        if not answers[2].errors:
            assert array_from_wire(answers[2].values)[0] == pytest.approx(twin.step(observed[0]).value, abs=1e-6)
            many[0].index += 1
    for session in (*many, twin):
        server.stub.CloseSession(pb.CloseSessionRequest(session_id=session.id))


def test_one_bad_row_never_fails_the_others(server: ServerProcess) -> None:
    good, closed, nan, gap, outside, last = (WireSession(server) for _ in range(6))
    server.stub.CloseSession(pb.CloseSessionRequest(session_id=closed.id))
    gap.index = 5
    observed = observations(6)
    observed[2] = (np.array([0, np.nan, 0], np.float32), 0)
    observed[4] = (np.zeros(3, np.float32), 4)
    response = server.stub.StepBatch(batch([good, closed, nan, gap, outside, last], observed))
    assert {e.row: (e.error.code, pb.ErrorReason.Name(e.error.reason)) for e in response.errors} == {
        1: (grpc.StatusCode.FAILED_PRECONDITION.value[0], "SESSION_CLOSED"),
        2: (grpc.StatusCode.INVALID_ARGUMENT.value[0], "OBSERVATION_NOT_FINITE"),
        3: (grpc.StatusCode.ABORTED.value[0], "STEP_INDEX_MISMATCH"),
        4: (grpc.StatusCode.INVALID_ARGUMENT.value[0], "OBSERVATION_OUT_OF_SPACE"),
    }
    assert list(response.versions) == [1, 0, 0, 0, 0, 1]
    for session, steps in ((good, 1), (nan, 0), (gap, 0), (outside, 0), (last, 1)):
        info = server.stub.InspectSession(pb.InspectSessionRequest(session_id=session.id)).session
        assert info.next_step_index == steps


def test_a_repeated_batch_returns_the_stored_replies(server: ServerProcess) -> None:
    sessions, observed = [WireSession(server) for _ in range(3)], observations(3)
    request = batch(sessions, observed)
    assert server.stub.StepBatch(request).SerializeToString() == server.stub.StepBatch(request).SerializeToString()


def test_the_same_session_twice_in_a_batch_is_refused_in_both_rows(server: ServerProcess) -> None:
    one, other = WireSession(server), WireSession(server)
    response = server.stub.StepBatch(batch([one, other, one], observations(3)))
    assert [(e.row, e.error.reason) for e in response.errors] == [(0, pb.SESSION_REPEATED), (2, pb.SESSION_REPEATED)]
    assert one.step(observations(1)[0]).step_index == 0


def test_sessions_of_another_policy_are_refused_row_by_row(server: ServerProcess) -> None:
    dnc, frameconv = WireSession(server, "dnc"), WireSession(server, "frameconv")
    response = server.stub.StepBatch(batch([dnc, frameconv], observations(2)))
    assert [(e.row, e.error.reason) for e in response.errors] == [(1, pb.POLICY_MISMATCH)]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"session_ids": [], "step_indices": [], "observations": []}, "BATCH_EMPTY"),
        ({"session_ids": [1] * 257}, "BATCH_TOO_LARGE"),
        ({"step_indices": [0]}, "BATCH_COLUMNS"),
        ({"episode_starts": [True]}, "BATCH_COLUMNS"),
        ({"rewards": [1.0, 2.0, 3.0]}, "BATCH_COLUMNS"),
        ({"observations": []}, "OBSERVATION_FIELDS"),
        ({"observations": CODEC.pack((np.zeros((3, 3)), np.zeros(3, int)), 3)}, "OBSERVATION_SHAPE"),
    ],
)
def test_a_malformed_batch_is_refused_whole_and_a_stream_survives_it(
    server: ServerProcess, fields: dict[str, Any], reason: str
) -> None:
    sessions = [WireSession(server), WireSession(server)]
    bad = batch(sessions, observations(2), request_id=1, **fields)
    assert refused(server.stub.StepBatch, bad)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    good = batch(sessions, observations(2), request_id=2)
    answers = {r.request_id: r for r in server.stub.StepStream(iter([bad, good]))}
    assert pb.ErrorReason.Name(answers[1].error.reason) == reason
    assert not answers[2].errors and not answers[2].HasField("error")


# ---------------------------------------------------------------------------------------------- bad input


def test_unknown_policies_and_versions_are_refused(server: ServerProcess) -> None:
    for call, request in (
        (server.stub.GetPolicy, pb.GetPolicyRequest),
        (server.stub.OpenSession, pb.OpenSessionRequest),
    ):
        for name in ("nobody", ""):
            assert refused(call, request(policy_name=name))[:2] == (grpc.StatusCode.NOT_FOUND, "POLICY_UNKNOWN")
        code, reason, metadata = refused(call, request(policy_name="dnc", version=9))
        assert (code, reason, metadata) == (grpc.StatusCode.NOT_FOUND, "VERSION_UNKNOWN", {"versions": "1"})


def tensors(image: pb.Tensor | None = None, mode: pb.Tensor | None = None) -> list[pb.NamedTensor]:
    good = {t.name: t.tensor for t in CODEC.pack((np.zeros(3), 0))}
    return [
        pb.NamedTensor(name="0", tensor=image or good["0"]),
        pb.NamedTensor(name="1", tensor=mode or good["1"]),
    ]


F32, F64 = pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_FLOAT64


@pytest.mark.parametrize(
    ("observation", "reason"),
    [
        ([], "OBSERVATION_FIELDS"),
        (tensors() + tensors(), "OBSERVATION_FIELDS"),
        ([*tensors(), pb.NamedTensor(name="2")], "OBSERVATION_FIELDS"),
        (tensors(pb.Tensor(dtype=F64, shape=[3], data=bytes(24))), "OBSERVATION_DTYPE"),
        (tensors(pb.Tensor(shape=[3], data=bytes(12))), "OBSERVATION_DTYPE"),
        (tensors(pb.Tensor(dtype=F32, shape=[4], data=bytes(16))), "OBSERVATION_SHAPE"),
        (tensors(pb.Tensor(dtype=F32, shape=[3], data=bytes(11))), "OBSERVATION_SHAPE"),
        (tensors(pb.Tensor(dtype=F32, shape=[3], data=np.float32([0, 0, np.nan]).tobytes())), "OBSERVATION_NOT_FINITE"),
        (
            tensors(pb.Tensor(dtype=F32, shape=[3], data=np.float32([0, -np.inf, 0]).tobytes())),
            "OBSERVATION_NOT_FINITE",
        ),
        (tensors(pb.Tensor(dtype=F32, shape=[3], data=np.float32([0, 0, 1.1]).tobytes())), "OBSERVATION_OUT_OF_SPACE"),
        (tensors(mode=pb.Tensor(dtype=pb.DATA_TYPE_INT64, data=np.int64(-1).tobytes())), "OBSERVATION_OUT_OF_SPACE"),
    ],
)
def test_a_bad_observation_is_refused_and_leaves_the_session_where_it_was(
    session: WireSession, observation: list[pb.NamedTensor], reason: str
) -> None:
    session.step(observations(1)[0])
    before = session.state()
    request = pb.StepRequest(session_id=session.id, step_index=1, observation=observation)
    assert refused(session.stub.Step, request)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    after = session.state()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert session.step(observations(1)[0]).step_index == 1


def test_unknown_and_closed_sessions_are_told_apart(server: ServerProcess, session: WireSession) -> None:
    request = session.request(observations(1)[0])
    epoch = server.stub.GetPolicy(pb.GetPolicyRequest(policy_name="dnc")).server_epoch
    server.stub.CloseSession(pb.CloseSessionRequest(session_id=session.id))
    unknown = pb.StepRequest(session_id=12345, observation=tensors())
    assert refused(server.stub.Step, request)[:2] == (grpc.StatusCode.FAILED_PRECONDITION, "SESSION_CLOSED")
    assert refused(server.stub.Step, unknown) == (
        grpc.StatusCode.NOT_FOUND,
        "SESSION_UNKNOWN",
        {"server_epoch": str(epoch)},
    )
    for call, kind in (
        (server.stub.CloseSession, pb.CloseSessionRequest),
        (server.stub.InspectSession, pb.InspectSessionRequest),
    ):
        assert refused(call, kind(session_id=12345))[:2] == (grpc.StatusCode.NOT_FOUND, "SESSION_UNKNOWN")


def test_a_message_over_the_limit_is_refused_and_the_connection_goes_on(
    server: ServerProcess, session: WireSession
) -> None:
    huge = pb.NamedTensor(name="0", tensor=pb.Tensor(dtype=F32, shape=[3], data=bytes(17 * 2**20)))
    request = pb.StepRequest(session_id=session.id, observation=[huge])
    assert refused(session.stub.Step, request)[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert session.step(observations(1)[0]).step_index == 0


# ---------------------------------------------------------------------------------------------- sessions


def test_opening_twice_with_the_clients_id_is_safe_until_the_first_step(server: ServerProcess) -> None:
    session_id = secrets.randbits(64)
    request = pb.OpenSessionRequest(session_id=session_id, policy_name="dnc", seed=3)
    assert server.stub.OpenSession(request) == server.stub.OpenSession(request)
    other = pb.OpenSessionRequest(session_id=session_id, policy_name="dnc", seed=4)
    assert refused(server.stub.OpenSession, other)[:2] == (grpc.StatusCode.ALREADY_EXISTS, "SESSION_EXISTS")
    elsewhere = pb.OpenSessionRequest(session_id=session_id, policy_name="frameconv", seed=3)
    assert refused(server.stub.OpenSession, elsewhere)[:2] == (grpc.StatusCode.ALREADY_EXISTS, "SESSION_EXISTS")
    server.stub.Step(pb.StepRequest(session_id=session_id, observation=tensors()))
    assert refused(server.stub.OpenSession, request)[:2] == (grpc.StatusCode.ALREADY_EXISTS, "SESSION_EXISTS")


def test_closing_twice_returns_the_first_reply(session: WireSession) -> None:
    for observation in observations(3):
        session.step(observation, episode_start=True)
    request = pb.CloseSessionRequest(session_id=session.id)
    first = session.stub.CloseSession(request)
    assert (first.num_steps, first.num_episodes) == (3, 3)
    assert session.stub.CloseSession(request) == first


def test_sessions_are_listed_in_pages(server: ServerProcess) -> None:
    opened = sorted(WireSession(server, "frameconv").id for _ in range(5))
    listed: list[int] = []
    after = 0
    for _ in itertools.count():
        request = pb.ListSessionsRequest(policy_name="frameconv", page_size=2, after_session_id=after)
        page = server.stub.ListSessions(request)
        listed += [s.session_id for s in page.sessions]
        if not page.more:
            break
        after = listed[-1]
    assert listed == sorted(listed) and set(opened) <= set(listed)


def test_returns_of_finished_episodes_are_counted_once_under_their_version(server: ServerProcess) -> None:
    labels = '{policy="frameconv",version="1"}'
    count, total = (server.metric(f"tenuto_episode_return_{k}{labels}") for k in ("count", "sum"))
    session = WireSession(server, "frameconv")
    observation = observations(1)[0]
    for index, (start, reward) in enumerate([(True, None), (False, 0.5), (True, 0.25), (False, 1.0)]):
        fields = {} if reward is None else {"reward": reward}
        session.step(observation, episode_start=start, **fields)
        session.stub.Step(session.request(observation, index=index, episode_start=start, **fields))
    server.stub.CloseSession(pb.CloseSessionRequest(session_id=session.id, reward=2.0))
    assert server.metric(f"tenuto_episode_return_count{labels}") == count + 2
    assert server.metric(f"tenuto_episode_return_sum{labels}") == pytest.approx(total + 0.75 + 3.0)


# ---------------------------------------------------------------------------------------------- the rest


def test_get_policy_describes_spaces_state_and_limits(server: ServerProcess) -> None:
    described = server.stub.GetPolicy(pb.GetPolicyRequest(policy_name="dnc"))
    policy = small_policy("dnc")
    assert space_from_wire(described.observation_space) == policy.observation_space
    assert space_from_wire(described.action_space) == policy.action_space
    assert [(t.name, tuple(t.shape)) for t in described.state] == [(t.name, t.shape) for t in policy.state_spec]
    assert described.state_fingerprint == policy.state_fingerprint
    assert [t.name for t in described.observation] == ["0", "1"]
    assert described.limits.max_batch_rows == 256


def test_health_and_reflection_are_on(server: ServerProcess) -> None:
    health = health_pb2_grpc.HealthStub(server.channel)
    for name in ("", "tenuto.v1.PolicyService"):
        status = health.Check(health_pb2.HealthCheckRequest(service=name)).status
        assert status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    (answer,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    assert "tenuto.v1.PolicyService" in {s.name for s in answer.list_services_response.service}


def test_http_face_answers_probes_and_prometheus(server: ServerProcess) -> None:
    assert server.http("/healthz")[0] == server.http("/readyz")[0] == 200
    assert server.http("/nothing")[0] == 404
    before = server.metric('tenuto_refusals_total{reason="POLICY_UNKNOWN"}')
    refused(server.stub.GetPolicy, pb.GetPolicyRequest(policy_name="nobody"))
    assert server.metric('tenuto_refusals_total{reason="POLICY_UNKNOWN"}') == before + 1
    for station in ("check", "admit", "submit", "gather", "run", "scatter", "reply"):
        assert server.metric(f'tenuto_station_seconds_count{{station="{station}"}}') > 0
    assert server.metric('tenuto_batch_invariant{policy="dnc"}') == 1
    assert server.stub.GetPolicy(pb.GetPolicyRequest(policy_name="dnc")).batch_invariant


@pytest.mark.parametrize("before", [0, 1])
def test_a_message_that_is_none_ends_its_stream_and_says_so(
    server: ServerProcess, session: WireSession, before: int
) -> None:
    messages = [batch([session], observations(1)).SerializeToString()] * before + [b"\xff\xff\xff"]
    call = server.channel.stream_stream("/tenuto.v1.PolicyService/StepStream")(iter(messages), timeout=20)
    answers: list[bytes] = []
    with pytest.raises(grpc.RpcError) as failure:
        answers.extend(call)
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    described = server.stub.InspectSession(pb.InspectSessionRequest(session_id=session.id))
    assert described.session.next_step_index == before
