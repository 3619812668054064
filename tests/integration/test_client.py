"""The client against a real server: the same actions by every way, exactly once over a bad network, typed refusals."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from gymnasium.vector.utils import concatenate, create_empty_array

from serving import ACTIONS, OBSERVATIONS, ServerProcess, publish, small_policy, wait_until
from tenuto_client import (
    AsyncRemotePolicy,
    AsyncRemoteVectorPolicy,
    CapacityError,
    ClientClosedError,
    DrainingError,
    MessageTooLargeError,
    ObservationError,
    PolicyUnknownError,
    RemotePolicy,
    RemoteVectorPolicy,
    RowsError,
    ServerUnavailableError,
    SessionClosedError,
    SessionExpiredError,
    SessionLostError,
    StepIndexError,
    TenutoError,
    VersionUnknownError,
)
from tenuto_proto.v1 import policy_pb2 as pb

NUM_ENVS, NUM_STEPS, SEED = 5, 24, 41
TRANSPORTS = ("batch", "stream")
SESSION_TRANSPORTS = ("unary", "stream")


def samples(n: int, seed: int = 0) -> list[Any]:
    OBSERVATIONS.seed(seed)
    return [OBSERVATIONS.sample() for _ in range(n)]


def stacked(observations: list[Any]) -> Any:
    return concatenate(OBSERVATIONS, observations, create_empty_array(OBSERVATIONS, len(observations)))


BATCHES = [samples(NUM_ENVS, step) for step in range(NUM_STEPS)]
STARTS = np.random.default_rng(3).random((NUM_STEPS, NUM_ENVS)) < 0.2


def play_rows(policy: RemoteVectorPolicy) -> list[list[int]]:
    steps = zip(BATCHES, STARTS, strict=True)
    return [policy.step(stacked(batch), episode_starts=starts).actions.tolist() for batch, starts in steps]


@pytest.fixture(scope="module")
def expected(server: ServerProcess) -> list[list[int]]:
    """Actions of every step and row, over an undisturbed connection."""
    with RemoteVectorPolicy(server.address, NUM_ENVS, "dnc", seed=SEED) as policy:
        return play_rows(policy)


def test_five_lines_are_enough(server: ServerProcess) -> None:
    [observation] = samples(1)
    with RemotePolicy(server.address, "dnc") as policy:
        action = policy.step(observation, episode_start=True).action
    assert type(action) is int and ACTIONS.contains(action)


def test_policy_tells_its_spaces_and_versions(server: ServerProcess) -> None:
    with RemotePolicy(server.address, "frameconv") as policy:
        assert policy.observation_space == OBSERVATIONS and policy.action_space == ACTIONS
        assert (policy.served.policy_name, policy.served.version, policy.served.versions) == ("frameconv", 1, (1,))
        assert policy.served.max_batch_rows > 0 and policy.served.idle_timeout_s > 0


@pytest.mark.parametrize("transport", SESSION_TRANSPORTS)
def test_outputs_come_where_they_were_asked_for(server: ServerProcess, transport: Any) -> None:
    observations = samples(NUM_ENVS)
    outputs = ("value", "log_prob", "logits")
    with RemotePolicy(server.address, "dnc", seed=SEED, outputs=outputs, transport=transport) as policy:
        one = policy.step(observations[0])
    with RemoteVectorPolicy(server.address, NUM_ENVS, "dnc", seed=SEED, outputs=outputs) as policy:
        many = policy.step(stacked(observations))
    assert many.values is not None and many.log_probs is not None and many.logits is not None
    assert one.value == many.values[0] and one.log_prob == many.log_probs[0] and one.logits is not None
    np.testing.assert_array_equal(one.logits, many.logits[0])
    log_softmax = one.logits - np.log(np.exp(one.logits).sum())
    assert one.log_prob == pytest.approx(log_softmax[one.action], abs=1e-5)
    assert one.timings.batch_size == 1 and many.timings.batch_size == NUM_ENVS and many.timings.compute_us > 0
    with RemotePolicy(server.address, "dnc", outputs=(), transport=transport) as policy:
        bare = policy.step(observations[0])
    assert bare.value is bare.log_prob is bare.logits is None


def test_deterministic_actions_are_the_most_probable_ones(server: ServerProcess) -> None:
    with RemoteVectorPolicy(server.address, NUM_ENVS, "dnc", deterministic=True, outputs=("logits",)) as policy:
        result = policy.step(stacked(samples(NUM_ENVS)))
    assert result.logits is not None
    assert result.actions.tolist() == result.logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("transport", SESSION_TRANSPORTS)
@pytest.mark.parametrize("row", range(NUM_ENVS))
def test_a_lone_session_acts_as_its_row_in_a_batch(
    server: ServerProcess, expected: list[list[int]], row: int, transport: Any
) -> None:
    with RemotePolicy(server.address, "dnc", seed=SEED + row, transport=transport) as policy:
        for t in range(NUM_STEPS):
            assert policy.step(BATCHES[t][row], episode_start=bool(STARTS[t, row])).action == expected[t][row]


def test_the_stream_gives_the_actions_of_the_batch(server: ServerProcess, expected: list[list[int]]) -> None:
    with RemoteVectorPolicy(server.address, NUM_ENVS, "dnc", seed=SEED, transport="stream") as policy:
        assert play_rows(policy) == expected


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_async_policies_give_the_actions_of_the_sync_ones(
    server: ServerProcess, expected: list[list[int]], transport: Any
) -> None:
    async def lone(row: int) -> list[int]:
        async with AsyncRemotePolicy(server.address, "dnc", seed=SEED + row) as policy:
            return [
                (await policy.step(BATCHES[t][row], episode_start=bool(STARTS[t, row]))).action
                for t in range(NUM_STEPS)
            ]

    async with AsyncRemoteVectorPolicy(server.address, NUM_ENVS, "dnc", seed=SEED, transport=transport) as policy:
        steps = zip(BATCHES, STARTS, strict=True)
        got = [(await policy.step(stacked(b), episode_starts=starts)).actions.tolist() for b, starts in steps]
    assert got == expected
    lone_rows = await asyncio.gather(*map(lone, range(NUM_ENVS)))
    assert np.array(lone_rows).T.tolist() == expected


def test_rows_may_step_in_their_own_time(server: ServerProcess, expected: list[list[int]]) -> None:
    got = np.zeros((NUM_STEPS, NUM_ENVS), np.int64)
    at = np.zeros(NUM_ENVS, np.int64)
    rng = np.random.default_rng(5)
    with RemoteVectorPolicy(server.address, NUM_ENVS, "dnc", seed=SEED) as policy:
        while (mask := (rng.random(NUM_ENVS) < 0.6) & (at < NUM_STEPS)).any() or (at < NUM_STEPS).any():
            t = np.minimum(at, NUM_STEPS - 1)
            rows = range(NUM_ENVS)
            actions = policy.step(
                stacked([BATCHES[t[row]][row] for row in rows]), episode_starts=STARTS[t, rows], mask=mask
            ).actions
            got[t[mask], np.flatnonzero(mask)] = actions[mask]
            at[mask] += 1
    assert got.tolist() == expected


def test_a_vector_step_larger_than_a_batch_of_the_server_is_cut(server: ServerProcess) -> None:
    n = 2 * 256 + 7
    with RemoteVectorPolicy(server.address, n, "frameconv", deterministic=True) as policy:
        assert policy.served.max_batch_rows == 256
        result = policy.step(stacked((samples(7) * n)[:n]))
    assert result.actions.tolist() == (result.actions[:7].tolist() * n)[:n]


# ------------------------------------------------------------------------------------------------ a bad network


class BadNetwork:
    """A TCP proxy that now and then cuts a connection in place of forwarding what the server answered."""

    def __init__(self, target: str, cut_every: int) -> None:
        host, port = target.rsplit(":", 1)
        self._target, self._cut_every = (host, int(port)), cut_every
        self._lock = threading.Lock()
        self._num_answers = 0
        self.num_cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._sockets += [client, server]
            for source, sink, is_answer in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._forward, args=(source, sink, is_answer), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if is_answer and self._cut_now():
                    break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            # Wakes the thread that forwards the other way, which close alone does not.
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _cut_now(self) -> bool:
        with self._lock:
            self._num_answers += 1
            cut = self._num_answers % self._cut_every == 0
            self.num_cuts += cut
            return cut

    def __enter__(self) -> BadNetwork:
        return self

    def __exit__(self, *_: object) -> None:
        for end in (self._listener, *self._sockets):
            end.close()


def next_index(server: ServerProcess, session_id: int) -> int:
    return server.stub.InspectSession(pb.InspectSessionRequest(session_id=session_id)).session.next_step_index


@pytest.mark.parametrize("transport", SESSION_TRANSPORTS)
def test_a_lone_session_steps_exactly_once_over_a_bad_network(
    server: ServerProcess, expected: list[list[int]], transport: Any
) -> None:
    with (
        BadNetwork(server.address, 7) as network,
        RemotePolicy(network.address, "dnc", seed=SEED, transport=transport) as policy,
    ):
        for t in range(NUM_STEPS):
            assert policy.step(BATCHES[t][0], episode_start=bool(STARTS[t, 0])).action == expected[t][0]
        assert next_index(server, policy.session_id) == NUM_STEPS
        assert network.num_cuts > 0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rows_step_exactly_once_over_a_bad_network(
    server: ServerProcess, expected: list[list[int]], transport: Any
) -> None:
    with (
        BadNetwork(server.address, 9) as network,
        RemoteVectorPolicy(network.address, NUM_ENVS, "dnc", seed=SEED, transport=transport) as policy,
    ):
        assert play_rows(policy) == expected
        assert {next_index(server, session_id) for session_id in policy.session_ids} == {NUM_STEPS}
        assert network.num_cuts > 0


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_async_rows_step_exactly_once_over_a_bad_network(
    server: ServerProcess, expected: list[list[int]], transport: Any
) -> None:
    with BadNetwork(server.address, 9) as network:
        async with AsyncRemoteVectorPolicy(network.address, NUM_ENVS, "dnc", seed=SEED, transport=transport) as policy:
            steps = zip(BATCHES, STARTS, strict=True)
            got = [(await policy.step(stacked(b), episode_starts=starts)).actions.tolist() for b, starts in steps]
    assert got == expected and network.num_cuts > 0


async def test_sessions_that_share_a_stream_step_exactly_once_over_a_bad_network(
    server: ServerProcess, expected: list[list[int]]
) -> None:
    async def play(row: int) -> list[int]:
        async with AsyncRemotePolicy(network.address, "dnc", seed=SEED + row, transport="stream") as policy:
            steps = [(BATCHES[t][row], bool(STARTS[t, row])) for t in range(NUM_STEPS)]
            actions = [(await policy.step(o, episode_start=starts)).action for o, starts in steps]
            assert await asyncio.to_thread(next_index, server, policy.session_id) == NUM_STEPS
            return actions

    with BadNetwork(server.address, 9) as network:
        got = await asyncio.gather(*map(play, range(NUM_ENVS)))
    assert np.array(got).T.tolist() == expected and network.num_cuts > 0


@pytest.mark.parametrize("transport", SESSION_TRANSPORTS)
async def test_a_cancelled_step_is_completed_by_the_next_call(
    server: ServerProcess, expected: list[list[int]], transport: Any
) -> None:
    async with AsyncRemotePolicy(server.address, "dnc", seed=SEED, transport=transport) as policy:
        for t in range(NUM_STEPS):
            starts = bool(STARTS[t, 0])
            task = asyncio.create_task(policy.step(BATCHES[t][0], episode_start=starts))
            # Wherever the step is by then: not begun, sent, or answered.
            for _ in range(t):
                await asyncio.sleep(0)
            task.cancel()
            [outcome] = await asyncio.gather(task, return_exceptions=True)
            if isinstance(outcome, asyncio.CancelledError):
                outcome = await policy.step(BATCHES[t][0], episode_start=starts)
            assert not isinstance(outcome, BaseException) and outcome.action == expected[t][0]
        assert next_index(server, policy.session_id) == NUM_STEPS


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("transport", SESSION_TRANSPORTS)
@pytest.mark.parametrize(
    ("observation", "reason"),
    [
        ((np.zeros(3, np.float32),), "OBSERVATION_FIELDS"),
        ((np.zeros(4, np.float32), 0), "OBSERVATION_SHAPE"),
        ((np.zeros(3, np.float32), 0.5), "OBSERVATION_DTYPE"),
        ((np.full(3, 2, np.float32), 0), "OBSERVATION_OUT_OF_SPACE"),
        ((np.zeros(3, np.float32), 4), "OBSERVATION_OUT_OF_SPACE"),
        ((np.full(3, np.nan, np.float32), 0), "OBSERVATION_NOT_FINITE"),
        ((np.full(3, np.inf, np.float32), 0), "OBSERVATION_NOT_FINITE"),
    ],
)
def test_bad_observations_are_refused_and_harm_nothing(
    server: ServerProcess, expected: list[list[int]], observation: Any, reason: str, transport: Any
) -> None:
    with RemotePolicy(server.address, "dnc", seed=SEED, transport=transport) as policy:
        assert policy.step(BATCHES[0][0]).action == expected[0][0]
        with pytest.raises(ObservationError) as caught:
            policy.step(observation)
        assert caught.value.reason == reason
        assert policy.step(BATCHES[1][0], episode_start=bool(STARTS[1, 0])).action == expected[1][0]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_bad_row_fails_alone(server: ServerProcess, transport: Any) -> None:
    rows = samples(NUM_ENVS)
    rows[2] = (np.full(3, np.nan, np.float32), rows[2][1])
    with RemoteVectorPolicy(server.address, NUM_ENVS, "dnc", transport=transport) as policy:
        with pytest.raises(RowsError) as caught:
            policy.step(stacked(rows))
        assert {row: error.reason for row, error in caught.value.errors.items()} == {2: "OBSERVATION_NOT_FINITE"}
        assert caught.value.result.versions.tolist() == [1, 1, 0, 1, 1]
        assert policy.step(stacked(samples(NUM_ENVS))).step_indices.tolist() == [1, 1, 0, 1, 1]


def test_unknown_policies_and_versions_are_told_apart(server: ServerProcess) -> None:
    for arguments, kind in (
        ({"policy_name": "nobody"}, PolicyUnknownError),
        ({}, PolicyUnknownError),
        ({"policy_name": "dnc", "version": 99}, VersionUnknownError),
    ):
        with pytest.raises(PolicyUnknownError) as caught:
            RemotePolicy(server.address, **arguments).connect()  # type: ignore[arg-type]
        assert type(caught.value) is kind and caught.value.code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("transport", SESSION_TRANSPORTS)
def test_somebody_elses_steps_and_closes_are_noticed(server: ServerProcess, transport: Any) -> None:
    [observation] = samples(1)
    with RemotePolicy(server.address, "dnc", transport=transport) as policy:
        policy.step(observation)
        mine = RemotePolicy(server.address, "dnc", transport=transport)
        mine.connect()
        server.stub.CloseSession(pb.CloseSessionRequest(session_id=mine.session_id))
        other: Any = mine
        other._session.session_id, other._session.step_index = policy.session_id, 1
        other._session._begins_next = False
        mine.step(observation)
        mine.step(observation)
        with pytest.raises(StepIndexError) as caught:
            policy.step(observation)
        assert caught.value.expected == 3
        mine.close()
        with pytest.raises(SessionClosedError):
            policy.step(observation)
        assert policy.step(observation, episode_start=True).step_index == 0


@pytest.mark.parametrize("transport", SESSION_TRANSPORTS)
def test_use_after_close_is_refused(server: ServerProcess, transport: Any) -> None:
    [observation] = samples(1)
    policy = RemotePolicy(server.address, "dnc", transport=transport)
    policy.step(observation)
    policy.close()
    policy.close()
    with pytest.raises(ClientClosedError):
        policy.step(observation)


async def test_async_use_after_close_is_refused(server: ServerProcess) -> None:
    policy = AsyncRemoteVectorPolicy(server.address, 1, "dnc", transport="stream")
    with pytest.raises(TenutoError, match="not connected yet"):
        _ = policy.action_space
    await policy.step(stacked(samples(1)))
    await policy.close()
    with pytest.raises(ClientClosedError):
        await policy.step(stacked(samples(1)))


def test_leaving_closes_the_sessions_and_credits_the_last_rewards(server: ServerProcess) -> None:
    policy = RemoteVectorPolicy(server.address, 2, "dnc")
    policy.step(stacked(samples(2)))
    ids = policy.session_ids
    policy.close([1.0, 2.0])
    for session_id in ids:
        reply = server.stub.CloseSession(pb.CloseSessionRequest(session_id=session_id))
        assert (reply.num_steps, reply.num_episodes) == (1, 1)


def test_nobody_at_the_address_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ServerUnavailableError), RemotePolicy(address, timeout_s=0.3):
        pass


# ------------------------------------------------------------------------------------------------ servers of their own


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    publish(tmp_path, small_policy("dnc"), "dnc")
    return tmp_path


@pytest.mark.parametrize("transport", SESSION_TRANSPORTS)
def test_limits_of_a_small_server_arrive_as_typed_errors(repository: Path, transport: Any) -> None:
    observations = samples(3)
    flags = ("--capacity", "2", "--max-message-bytes", "1024", "--idle-timeout-s", "1")
    with ServerProcess(repository, *flags) as server:
        policy = RemotePolicy(server.address, transport=transport)
        policy.step(observations[0])
        with pytest.raises(CapacityError):
            RemoteVectorPolicy(server.address, 2).connect()
        # None of the rows kept the slot that was left.
        with RemotePolicy(server.address) as second:
            second.step(observations[0])
        with pytest.raises(MessageTooLargeError, match="1024"):
            RemotePolicy(server.address, "x" * 2000).connect()
        with RemoteVectorPolicy(server.address, 1) as row, pytest.raises(MessageTooLargeError):
            row.served.refuse_too_large(pb.GetPolicyRequest(policy_name="x" * 2000))
        wait_until(lambda: not server.stub.ListSessions(pb.ListSessionsRequest()).sessions, "the session to expire")
        with pytest.raises(SessionExpiredError):
            policy.step(observations[1])
        assert policy.step(observations[2], episode_start=True).step_index == 0
        policy.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_restart_loses_running_episodes_only(repository: Path, transport: Any) -> None:
    first = ServerProcess(repository)
    port = first.port
    policy = RemotePolicy(first.address, timeout_s=20.0, transport="stream" if transport == "stream" else "unary")
    rows = RemoteVectorPolicy(first.address, 2, timeout_s=20.0, transport=transport)
    policy.step(samples(1)[0])
    rows.step(stacked(samples(2)))
    first.close()
    with ServerProcess(repository, "--port", str(port)):
        with pytest.raises(SessionLostError, match="restarted"):
            policy.step(samples(1)[0])
        assert policy.step(samples(1)[0], episode_start=True).step_index == 0
        result = rows.step(stacked(samples(2)), episode_starts=[True, False], raise_errors=False)
        assert result.versions.tolist() == [1, 0]
        assert isinstance(result.errors[1], SessionLostError)
        rows.reset([1])
        assert rows.step(stacked(samples(2))).step_indices.tolist() == [1, 0]
        policy.close()
        rows.close()


@pytest.mark.parametrize("transport", SESSION_TRANSPORTS)
def test_a_draining_server_finishes_episodes_and_begins_none(repository: Path, transport: Any) -> None:
    with ServerProcess(repository, "--drain-timeout-s", "30") as server:
        policy = RemotePolicy(server.address, timeout_s=2.0, transport=transport)
        policy.step(samples(1)[0])
        server.terminate()
        wait_until(lambda: any("draining" in line for line in server.log), "the server to drain")
        assert policy.step(samples(1)[0]).step_index == 1
        with pytest.raises((DrainingError, ServerUnavailableError)):
            policy.step(samples(1)[0], episode_start=True, reward=1.0)
        # The client gave the session back, so that the server need not wait for it.
        assert server.wait() == 0
        policy.close()


def test_a_policy_that_is_published_later_is_waited_for(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, wait=False) as server:
        policy = RemotePolicy(server.address, wait_for_policy_s=30.0)
        publisher = threading.Timer(0.3, publish, (tmp_path, small_policy("dnc"), "late"))
        publisher.start()
        assert policy.connect().policy_name == "late"
        publisher.join()
        policy.close()


def test_a_new_version_is_taken_with_the_next_episode(repository: Path) -> None:
    with ServerProcess(repository) as server, RemotePolicy(server.address) as policy:
        assert policy.step(samples(1)[0]).version == 1
        publish(repository, small_policy("dnc", seed=1), "dnc")
        described = pb.GetPolicyRequest()
        wait_until(lambda: server.stub.GetPolicy(described).version == 2, "version 2 to be served")
        assert policy.step(samples(1)[0]).version == 1
        assert policy.step(samples(1)[0], episode_start=True).version == 2


@pytest.fixture(autouse=True)
def no_session_is_left_open(request: pytest.FixtureRequest) -> Iterator[None]:
    if "server" not in request.fixturenames:
        yield
        return
    server: ServerProcess = request.getfixturevalue("server")
    before = open_sessions(server)
    yield
    assert open_sessions(server) == before


def open_sessions(server: ServerProcess) -> set[int]:
    page = server.stub.ListSessions(pb.ListSessionsRequest(page_size=1000))
    return {session.session_id for session in page.sessions}
