"""Sessions outlive their server process: what the store holds goes on, bit for bit, whatever ends the process."""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
import sqlite3
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from redis_process import RedisProcess
from serving import ServerProcess, hanging_while_exists, publish, small_policy, wait_until
from tenuto_proto import array_to_wire
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server import tokens
from tenuto_server.principals import Principal
from tenuto_server.snapshots import seal
from wire import CODEC, WireSession, observations, refused

N = 12
OBSERVED = observations(2 * N, seed=5)


@pytest.fixture(params=["dnc", "frameconv"])
def memory(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    publish(tmp_path / "repository", small_policy("frameconv"))
    return tmp_path / "repository"


def told(reply: pb.StepResponse) -> tuple[Any, ...]:
    """What the environment and the trainer see of a reply."""
    return reply.action.data, reply.value, reply.log_prob, reply.logits.data, reply.version, reply.step_index


def durable_step(server: ServerProcess, session_id: int) -> int:
    return server.stub.InspectSession(pb.InspectSessionRequest(session_id=session_id)).session.durable_step


def kill(server: ServerProcess) -> None:
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()


def at(server: ServerProcess, session: WireSession) -> WireSession:
    """The same session, spoken to at another server."""
    session.stub = server.stub
    return session


def test_a_session_goes_on_after_sigkill_where_the_store_has_it_and_replays_the_rest(
    tmp_path: Path, memory: str
) -> None:
    publish(tmp_path / "repository", small_policy(memory))
    flags = ("--durability", f"sqlite:{tmp_path / 'sessions.db'}", "--snapshot-interval-s", "0.05")
    with ServerProcess(tmp_path / "repository", *flags) as server:
        undisturbed = WireSession(server, "policy", seed=9)
        expected = [told(undisturbed.step(o)) for o in OBSERVED]
        opened = server.stub.OpenSession(pb.OpenSessionRequest(session_id=77, policy_name="policy", seed=9))
        assert opened.durable
        session = WireSession(server, "policy", session_id=77, seed=9)
        replies = [session.step(o) for o in OBSERVED[:N]]
        wait_until(lambda: durable_step(server, 77) == N, "all steps to be durable")
        # What comes now may be lost; with the store's disk gone it surely is.
        assert session.step(OBSERVED[N - 1], index=N - 1).durable_step == N
        assert [r.durable_step for r in replies] == sorted(r.durable_step for r in replies)
        kill(server)
    with ServerProcess(tmp_path / "repository", *flags, "--snapshot-interval-s", "1000") as server:
        assert server.metric("tenuto_sessions_restored_total") == 2
        at(server, session)
        # The step before is answered from its stored reply, the next ones go on.
        assert told(session.step(OBSERVED[N - 1], index=N - 1)) == expected[N - 1]
        session.index = N
        assert [told(session.step(o)) for o in OBSERVED[N : N + 5]] == expected[N : N + 5]
        kill(server)
    with ServerProcess(tmp_path / "repository", *flags) as server:
        at(server, session)
        code, reason, metadata = refused(session.step, OBSERVED[N + 5], index=N + 5)
        assert (code, reason, metadata["expected"]) == (grpc.StatusCode.ABORTED, "STEP_INDEX_MISMATCH", str(N))
        session.index = N
        again = [told(session.step(o, replayed_version=1)) for o in OBSERVED[N : N + 5]]
        assert again + [told(session.step(o)) for o in OBSERVED[N + 5 :]] == expected[N:]


def test_a_stopped_server_saves_every_session_and_the_next_goes_on(tmp_path: Path, repository: Path) -> None:
    flags = ("--durability", f"sqlite:{tmp_path / 'sessions.db'}", "--snapshot-interval-s", "1000")
    with ServerProcess(repository, *flags) as server:
        undisturbed = WireSession(server, "policy", seed=3)
        expected = [told(undisturbed.step(o)) for o in OBSERVED]
        sessions = [WireSession(server, "policy", seed=3) for _ in range(300)]
        for session in sessions:
            session.step(OBSERVED[0])
        unused = WireSession(server, "policy", seed=3)
        server.terminate()
        assert server.wait() == 0
    assert not any("not saved" in line for line in server.log)
    with ServerProcess(repository, *flags) as server:
        assert server.metric("tenuto_sessions_restored_total") == 302
        for session in (*sessions[:3], sessions[-1]):
            assert [told(at(server, session).step(o)) for o in OBSERVED[1:]] == expected[1:]
        assert [told(at(server, unused).step(o)) for o in OBSERVED] == expected


def test_a_draining_server_lets_no_step_in_but_answers_the_last(tmp_path: Path, repository: Path) -> None:
    hang = tmp_path / "hang"

    with ServerProcess(
        repository, "--durability", f"sqlite:{tmp_path / 's.db'}", fault=hanging_while_exists(hang)
    ) as server:
        session, other = WireSession(server, "policy"), WireSession(server, "policy")
        other.step(OBSERVED[0])
        hang.touch()
        under_way = server.stub.Step.future(session.request(OBSERVED[0]), timeout=20)
        wait_until(lambda: server.metric("tenuto_sessions{state=stepping}") == 1, "the step to run")
        server.terminate()
        wait_until(lambda: server.http("/readyz")[0] == 503, "the drain")
        code, reason, _ = refused(other.step, OBSERVED[1])
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        hang.unlink()
        assert under_way.result().step_index == 0
        assert server.wait() == 0
    database = sqlite3.connect(tmp_path / "s.db")
    assert database.execute("SELECT num_steps FROM session").fetchall() == [(1,), (1,)]
    database.close()


def test_closed_and_expired_sessions_do_not_come_back(tmp_path: Path, repository: Path) -> None:
    flags = ("--durability", f"sqlite:{tmp_path / 'sessions.db'}", "--snapshot-interval-s", "0.05")
    with ServerProcess(repository, *flags, "--idle-timeout-s", "1.5") as server:
        closed, expired = WireSession(server, "policy"), WireSession(server, "policy")
        for session in (closed, expired):
            session.step(OBSERVED[0])
            wait_until(lambda s=session: durable_step(server, s.id) == 1, "the session to be saved")
        server.stub.CloseSession(pb.CloseSessionRequest(session_id=closed.id))
        wait_until(lambda: server.metric("tenuto_sessions_ended_total{reason=expired}") == 1, "the session to expire")
        server.terminate()
        assert server.wait() == 0
    with ServerProcess(repository, *flags) as server:
        assert server.metric("tenuto_sessions_restored_total") == 0


def test_a_version_that_only_an_old_episode_needs_is_loaded_again(tmp_path: Path, repository: Path) -> None:
    flags = ("--durability", f"sqlite:{tmp_path / 'sessions.db'}", "--snapshot-interval-s", "0.05")
    with ServerProcess(repository, *flags) as server:
        old = WireSession(server, "policy", seed=1)
        expected = [told(old.step(o)) for o in OBSERVED]
        old, late = WireSession(server, "policy", seed=1), WireSession(server, "policy", seed=1, session_id=5)
        assert [told(old.step(o)) for o in OBSERVED[:N]] == expected[:N]
        wait_until(lambda: durable_step(server, old.id) == N, "the session to be saved")
        publish(repository, small_policy("frameconv", seed=1))
        wait_until(lambda: server.metric("tenuto_newest_version") == 2, "version 2")
        kill(server)
    with ServerProcess(repository, *flags) as server:
        assert [told(at(server, old).step(o)) for o in OBSERVED[N:]] == expected[N:]
        # A step that version 1 answered before is sent again as an episode's start, which else begins with version 2.
        at(server, late)
        assert [told(late.step(o, replayed_version=1)) for o in OBSERVED] == expected
        assert late.step(OBSERVED[0], episode_start=True).version == 2
        code, reason, _ = refused(late.step, OBSERVED[1], replayed_version=1)
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "VERSION_UNKNOWN")
        code, reason, _ = refused(late.step, OBSERVED[1], episode_start=True, replayed_version=7)
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "VERSION_UNKNOWN")


def edit_snapshot(path: Path, session_id: int, change: Any) -> None:
    """Change what a store holds of a session: ``change`` modifies the snapshot, or returns other bytes."""
    database = sqlite3.connect(path)
    [data] = database.execute("SELECT snapshot FROM session WHERE id = ?", (session_id,)).fetchone()
    snapshot = pb.SessionSnapshot.FromString(pb.SealedSnapshot.FromString(data).snapshot)
    data = change(snapshot, data)
    if not isinstance(data, bytes):
        payload = snapshot.SerializeToString()
        data = pb.SealedSnapshot(snapshot=payload, sha256=hashlib.sha256(payload).digest()).SerializeToString()
    with database:
        database.execute("UPDATE session SET snapshot = ? WHERE id = ?", (data, session_id))
    database.close()


def setting(**fields: Any) -> Any:
    def change(snapshot: pb.SessionSnapshot, data: bytes) -> None:
        for name, value in fields.items():
            setattr(snapshot, name, value)

    return change


def with_nan(snapshot: pb.SessionSnapshot, data: bytes) -> None:
    snapshot.state[0].data = b"\xff" * len(snapshot.state[0].data)


def with_less_state(snapshot: pb.SessionSnapshot, data: bytes) -> None:
    snapshot.state[0].data = snapshot.state[0].data[:-4]


DAMAGES = {
    "torn": (lambda snapshot, data: data[: len(data) // 2], "sha256|SealedSnapshot"),
    "flipped": (lambda snapshot, data: data[:-40] + bytes(data[-40:][::-1]), "sha256|SealedSnapshot"),
    "garbage": (lambda snapshot, data: b"\x00\xff" * 50, "SealedSnapshot"),
    "of a later format": (setting(format_version=9), "format_version: got 9, expected 1"),
    "of other weights": (setting(weights_sha256="00"), "weights_sha256: got '00'"),
    "of another state": (setting(state_fingerprint="x"), "state_fingerprint: got 'x'"),
    "of a version that is gone": (setting(version=8), "version: got 8"),
    "with NaN": (with_nan, "NaN"),
    "with less state": (with_less_state, "data: got"),
    "without a reply": (lambda snapshot, data: snapshot.ClearField("reply"), "reply"),
    "with another index": (setting(next_step_index=99), "reply"),
}


def test_a_damaged_snapshot_is_refused_with_its_reason_and_harms_nobody(tmp_path: Path, repository: Path) -> None:
    path = tmp_path / "sessions.db"
    flags = ("--durability", f"sqlite:{path}")
    with ServerProcess(repository, *flags) as server:
        sessions = {name: WireSession(server, "policy", seed=2, session_id=i + 1) for i, name in enumerate(DAMAGES)}
        sound = WireSession(server, "policy", seed=2)
        expected = [told(sound.step(o)) for o in OBSERVED[:N]]
        for session in sessions.values():
            session.step(OBSERVED[0])
        server.terminate()
        server.wait()
    for name, session in sessions.items():
        edit_snapshot(path, session.id, DAMAGES[name][0])
    with ServerProcess(repository, *flags) as server:
        for name, session in sessions.items():
            at(server, session)
            code, reason, _ = refused(session.step, OBSERVED[1])
            assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_UNKNOWN"), name
            what = f"session {session.id} is not restored: snapshot.*({DAMAGES[name][1]})"
            assert any(re.search(what, line) for line in server.log), (name, server.log)
        assert server.metric("tenuto_snapshots_refused_total") == len(DAMAGES)
        assert server.metric("tenuto_sessions_restored_total") == 1
        fresh = WireSession(server, "policy", seed=2)
        assert [told(fresh.step(o)) for o in OBSERVED[:N]] == expected
        # The id may be used again, from the first step on.
        again = WireSession(server, "policy", seed=2, session_id=1)
        assert [told(again.step(o)) for o in OBSERVED[:N]] == expected
        server.terminate()
        server.wait()
    with ServerProcess(repository, *flags) as server:
        assert durable_step(server, 1) == N


def test_weights_that_were_exchanged_under_the_same_version_are_noticed(tmp_path: Path, repository: Path) -> None:
    flags = ("--durability", f"sqlite:{tmp_path / 'sessions.db'}")
    with ServerProcess(repository, *flags) as server:
        session = WireSession(server, "policy")
        session.step(OBSERVED[0])
        server.terminate()
        server.wait()
    shutil.rmtree(repository / "policy" / "1")
    publish(repository, small_policy("frameconv", seed=4), version=1)
    with ServerProcess(repository, *flags) as server:
        assert refused(at(server, session).step, OBSERVED[1])[1] == "SESSION_UNKNOWN"
        assert any("weights_sha256" in line for line in server.log)


def test_a_session_moves_to_another_server_and_stays_there(tmp_path: Path, memory: str) -> None:
    publish(tmp_path / "repository", small_policy(memory))
    with ServerProcess(tmp_path / "repository") as here, ServerProcess(tmp_path / "repository") as there:
        undisturbed = WireSession(here, "policy", seed=4)
        expected = [told(undisturbed.step(o)) for o in OBSERVED]
        session = WireSession(here, "policy", seed=4)
        assert [told(session.step(o)) for o in OBSERVED[:N]] == expected[:N]
        export = pb.ExportSessionRequest(session_id=session.id)
        exported = here.stub.ExportSession(export)
        assert here.stub.ExportSession(export) == exported
        code, reason, _ = refused(session.step, OBSERVED[N])
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SESSION_EXPORTED")
        moved = pb.ImportSessionRequest(snapshot=exported.snapshot)
        assert there.stub.ImportSession(moved).next_step_index == N
        assert there.stub.ImportSession(moved).next_step_index == N
        at(there, session)
        assert told(session.step(OBSERVED[N - 1], index=N - 1)) == expected[N - 1]
        session.index = N
        assert [told(session.step(o)) for o in OBSERVED[N:]] == expected[N:]
        assert refused(there.stub.ImportSession, moved)[1] == "SESSION_EXISTS"
        # It comes back to where its older copy still is, goes again, and comes back to where it was closed.
        for server, other in ((here, there), (there, here), (here, there)):
            moved = pb.ImportSessionRequest(snapshot=other.stub.ExportSession(export).snapshot)
            if session.index > 2 * N:
                server.stub.CloseSession(pb.CloseSessionRequest(session_id=session.id))
            assert server.stub.ImportSession(moved).next_step_index == session.index
            assert told(at(server, session).step(OBSERVED[0], episode_start=True))[-1] == session.index - 1


def test_an_export_that_leads_nowhere_is_taken_back(repository: Path) -> None:
    with ServerProcess(repository) as server:
        undisturbed = WireSession(server, "policy", seed=4)
        expected = [told(undisturbed.step(o)) for o in OBSERVED[:N]]
        session = WireSession(server, "policy", seed=4)
        session.step(OBSERVED[0])
        exported = server.stub.ExportSession(pb.ExportSessionRequest(session_id=session.id))
        server.stub.ImportSession(pb.ImportSessionRequest(snapshot=exported.snapshot))
        assert [told(session.step(o)) for o in OBSERVED[1:N]] == expected[1:]


def test_an_id_is_one_session_whatever_policy_a_snapshot_is_of(tmp_path: Path) -> None:
    for name in ("a", "b"):
        publish(tmp_path, small_policy("frameconv"), name)
    with ServerProcess(tmp_path) as here, ServerProcess(tmp_path) as there:
        snapshots: dict[str, pb.SealedSnapshot] = {}
        for server, name, num_steps in ((here, "a", 1), (there, "b", 2)):
            session = WireSession(server, name, session_id=7)
            for observed in OBSERVED[:num_steps]:
                session.step(observed)
            snapshots[name] = server.stub.ExportSession(pb.ExportSessionRequest(session_id=7)).snapshot
        # The one that is here was exported, and the other is further on; it is another session all the same.
        assert refused(here.stub.ImportSession, pb.ImportSessionRequest(snapshot=snapshots["b"]))[1] == "SESSION_EXISTS"
        assert [s.policy_name for s in here.stub.ListSessions(pb.ListSessionsRequest()).sessions] == ["a"]
        here.stub.CloseSession(pb.CloseSessionRequest(session_id=7))
        assert refused(here.stub.ImportSession, pb.ImportSessionRequest(snapshot=snapshots["b"]))[1] == "SESSION_EXISTS"


def test_an_import_that_fails_leaves_it_known_how_the_session_ended(tmp_path: Path, repository: Path) -> None:
    publish(tmp_path / "other", small_policy("frameconv", seed=8))
    with ServerProcess(repository) as here, ServerProcess(tmp_path / "other") as there:
        foreign = WireSession(there, "policy", session_id=7)
        foreign.step(OBSERVED[0])
        snapshot = there.stub.ExportSession(pb.ExportSessionRequest(session_id=7)).snapshot
        session = WireSession(here, "policy", session_id=7)
        session.step(OBSERVED[0])
        refusal = refused(here.stub.ImportSession, pb.ImportSessionRequest(snapshot=snapshot))
        assert refusal[1] == "SNAPSHOT_MISMATCH", "what is here has as many steps, and other weights"
        closed = here.stub.CloseSession(pb.CloseSessionRequest(session_id=7))
        assert refused(here.stub.ImportSession, pb.ImportSessionRequest(snapshot=snapshot))[1] == "SNAPSHOT_MISMATCH"
        assert here.stub.CloseSession(pb.CloseSessionRequest(session_id=7)) == closed


def test_imports_that_wait_for_a_version_together_keep_to_the_quota(tmp_path: Path) -> None:
    publish(tmp_path / "repository", small_policy("frameconv"))
    token = tokens.add(tmp_path / "tokens.json", Principal("robot", max_sessions=2))
    metadata = (("authorization", f"Bearer {token}"),)
    with ServerProcess(tmp_path / "repository", "--tokens", str(tmp_path / "tokens.json")) as server:
        stub, ask = server.stub, pb.GetPolicyRequest()
        session_id = stub.OpenSession(pb.OpenSessionRequest(), metadata=metadata).session_id
        step = pb.StepRequest(session_id=session_id, observation=CODEC.pack(OBSERVED[0]))
        stub.Step(step, metadata=metadata)
        exported = stub.ExportSession(pb.ExportSessionRequest(session_id=session_id), metadata=metadata).snapshot
        publish(tmp_path / "repository", small_policy("frameconv", seed=1))
        wait_until(lambda: stub.GetPolicy(ask, metadata=metadata).version == 2, "the next version")
        stub.CloseSession(pb.CloseSessionRequest(session_id=session_id), metadata=metadata)
        wait_until(lambda: list(stub.GetPolicy(ask, metadata=metadata).versions) == [2], "the first one to be dropped")
        snapshot, imports = pb.SessionSnapshot.FromString(exported.snapshot), list[Any]()
        for number in range(20):
            snapshot.session_id = 100 + number
            request = pb.ImportSessionRequest(snapshot=seal(snapshot))
            imports.append(stub.ImportSession.future(request, metadata=metadata, timeout=60))
        codes = [call.code() for call in imports]
        assert codes.count(grpc.StatusCode.OK) == 2 and codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 18
        assert len(stub.ListSessions(pb.ListSessionsRequest(), metadata=metadata).sessions) == 2


def test_a_snapshot_of_other_weights_is_not_imported(tmp_path: Path, repository: Path) -> None:
    publish(tmp_path / "other", small_policy("frameconv", seed=8))
    with ServerProcess(repository) as here, ServerProcess(tmp_path / "other") as there:
        session = WireSession(here, "policy")
        session.step(OBSERVED[0])
        exported = here.stub.ExportSession(pb.ExportSessionRequest(session_id=session.id)).snapshot
        code, reason, _ = refused(there.stub.ImportSession, pb.ImportSessionRequest(snapshot=exported))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SNAPSHOT_MISMATCH")
        torn = pb.SealedSnapshot(snapshot=exported.snapshot[:-1], sha256=exported.sha256)
        code, reason, _ = refused(there.stub.ImportSession, pb.ImportSessionRequest(snapshot=torn))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "SNAPSHOT_INVALID")
        assert there.metric("tenuto_sessions") == 0


def test_a_snapshot_whose_last_action_is_none_of_the_policys_is_not_imported(repository: Path) -> None:
    """Asked for the step again, the server would answer with it."""
    with ServerProcess(repository) as server:
        session = WireSession(server, "policy")
        session.step(OBSERVED[0])
        exported = server.stub.ExportSession(pb.ExportSessionRequest(session_id=session.id)).snapshot
        for action, taken in ((4, True), (5, False), (-1, False)):
            snapshot = pb.SessionSnapshot.FromString(exported.snapshot)
            snapshot.session_id += 1 + action % 7
            snapshot.reply.action.CopyFrom(array_to_wire(np.array(action)))
            request = pb.ImportSessionRequest(snapshot=seal(snapshot))
            if taken:
                assert server.stub.ImportSession(request).next_step_index == 1
            else:
                code, reason, _ = refused(server.stub.ImportSession, request)
                assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "SNAPSHOT_INVALID")


def test_a_session_goes_on_at_whichever_server_shares_its_store(tmp_path: Path, repository: Path) -> None:
    with RedisProcess(tmp_path) as redis:
        flags = ("--durability", redis.url, "--snapshot-interval-s", "0.05")
        with ServerProcess(repository, *flags) as one, ServerProcess(repository, *flags) as two:
            undisturbed = WireSession(one, "policy", seed=6)
            expected = [told(undisturbed.step(o)) for o in OBSERVED]
            session = WireSession(one, "policy", seed=6)
            for index, observed in enumerate(OBSERVED):
                server = (one, two)[index // 5 % 2]
                assert told(at(server, session).step(observed)) == expected[index]
                wait_until(lambda n=index + 1, s=server: durable_step(s, session.id) == n, "the step to be saved")
            kill(one if server is one else two)
            other = two if server is one else one
            assert told(at(other, session).step(OBSERVED[-1], index=2 * N - 1)) == expected[-1]
            batch = pb.StepBatchRequest(
                session_ids=[session.id, 12345], step_indices=[2 * N, 0], episode_starts=[True, True],
                observations=[
                    pb.NamedTensor(
                        name=t.name,
                        tensor=pb.Tensor(dtype=t.tensor.dtype, shape=[2, *t.tensor.shape], data=2 * t.tensor.data),
                    )
                    for t in session.request(OBSERVED[0]).observation
                ],
            )  # fmt: skip
            reply = other.stub.StepBatch(batch)
            assert [e.row for e in reply.errors] == [1] and list(reply.durable_steps) == [2 * N, 0]


def test_steps_go_on_while_redis_is_away_and_are_saved_when_it_is_back(tmp_path: Path, repository: Path) -> None:
    with RedisProcess(tmp_path) as redis:
        flags = ("--durability", redis.url, "--snapshot-interval-s", "0.05")
        with ServerProcess(repository, *flags) as server:
            session = WireSession(server, "policy")
            session.step(OBSERVED[0])
            wait_until(lambda: durable_step(server, session.id) == 1, "the step to be saved")
            redis.kill()
            for observed in OBSERVED[1:N]:
                assert session.step(observed).durable_step <= 1
            wait_until(lambda: server.metric("tenuto_snapshot_failures_total") > 0, "a failure to be counted")
            assert server.http("/readyz")[0] == 200
            code, reason, _ = refused(server.stub.CloseSession, pb.CloseSessionRequest(session_id=1))
            assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
            redis.start()
            wait_until(lambda: durable_step(server, session.id) == N, "the steps to be saved")


def test_a_session_that_is_about_to_be_restored_is_not_unknown(tmp_path: Path, repository: Path) -> None:
    flags = ("--durability", f"sqlite:{tmp_path / 'sessions.db'}")
    with ServerProcess(repository, *flags) as server:
        session = WireSession(server, "policy")
        session.step(OBSERVED[0])
        server.terminate()
        server.wait()
    (repository / "policy").rename(tmp_path / "away")
    with ServerProcess(repository, *flags, wait=False) as server:
        at(server, session)
        code, reason, _ = refused(session.step, OBSERVED[1])
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
        assert refused(server.stub.CloseSession, pb.CloseSessionRequest(session_id=5))[1] == "SESSION_UNKNOWN"
        (tmp_path / "away").rename(repository / "policy")
        wait_until(lambda: server.metric("tenuto_sessions_restored_total") == 1, "the session to be restored")
        assert session.step(OBSERVED[1]).step_index == 1


def test_a_disk_that_is_full_stops_no_step_and_is_told_of(tmp_path: Path, repository: Path) -> None:
    full = tmp_path / "full"
    fault = f"""
import pathlib, resource, signal
from tenuto_server.store import SQLiteStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def write(self, sessions, ended, unharmed=SQLiteStore.write):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    soft = 4096 if pathlib.Path({str(full)!r}).exists() else hard
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return unharmed(self, sessions, ended)
SQLiteStore.write = write
"""
    flags = ("--durability", f"sqlite:{tmp_path / 'sessions.db'}", "--snapshot-interval-s", "0.05")
    with ServerProcess(repository, *flags, fault=fault) as server:
        session = WireSession(server, "policy")
        session.step(OBSERVED[0])
        wait_until(lambda: durable_step(server, session.id) == 1, "the step to be saved")
        full.touch()
        others = [WireSession(server, "policy") for _ in range(20)]
        wait_until(lambda: server.metric("tenuto_snapshot_failures_total") > 0, "a failure to be counted")
        for observed in OBSERVED[1:N]:
            session.step(observed)
        assert session.step(OBSERVED[N - 1], index=N - 1).durable_step < N
        wait_until(lambda: server.metric("tenuto_unsaved_seconds") > 0.5, "the time to be told")
        assert server.http("/readyz")[0] == 200 and sum("not saved" in line for line in server.log) == 1
        full.unlink()
        wait_until(lambda: durable_step(server, session.id) == N, "the steps to be saved")
        assert durable_step(server, others[-1].id) == 0 and any("saved again" in line for line in server.log)
