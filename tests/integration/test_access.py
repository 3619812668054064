"""Who may call, and what a session of somebody else looks like: over the wire, against the real server."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import status_pb2

from serving import ServerProcess, publish, small_policy, wait_until
from tenuto_client import (
    AsyncRemotePolicy,
    AsyncRemoteVectorPolicy,
    AuthenticationError,
    RemotePolicy,
    RemoteVectorPolicy,
)
from tenuto_models.signing import Verifier
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server import tokens
from tenuto_server.principals import Principal, parse
from tenuto_server.service import PolicyService
from wire import CODEC, failure, observations, reason

OBSERVED = observations(1)[0]
NEVER = 7_000_000_019
"""An id that no session has."""


class Caller:
    """Somebody with a token: the calls of the service, made as him."""

    def __init__(self, server: ServerProcess, token: str | None) -> None:
        self.metadata = (("authorization", f"Bearer {token}"),) if token is not None else ()
        self.stub, self.token = server.stub, token

    def __call__(self, rpc: str, request: Any, timeout: float = 20) -> Any:
        return getattr(self.stub, rpc)(request, metadata=self.metadata, timeout=timeout)

    def open(self, session_id: int = 0, policy: str = "a", **fields: Any) -> int:
        request = pb.OpenSessionRequest(session_id=session_id, policy_name=policy, **fields)
        return self("OpenSession", request).session_id

    def step(self, session_id: int, index: int = 0) -> pb.StepResponse:
        return self("Step", step(session_id, index))

    def stream(self, *requests: pb.StepBatchRequest) -> list[pb.StepBatchResponse]:
        return list(self.stub.StepStream(iter(requests), metadata=self.metadata, timeout=20))


def step(session_id: int, index: int = 0, observation: Any = OBSERVED) -> pb.StepRequest:
    return pb.StepRequest(session_id=session_id, step_index=index, observation=CODEC.pack(observation))


def rows(session_ids: list[int], index: int = 0) -> pb.StepBatchRequest:
    n = len(session_ids)
    stacked = tuple(np.stack([leaf] * n) for leaf in OBSERVED)
    return pb.StepBatchRequest(
        session_ids=session_ids, step_indices=[index] * n, observations=CODEC.pack(stacked, n), request_id=1
    )


def nameless(seen: Any, session_id: int) -> str:
    """What was seen, with the session's id taken out of it."""
    return repr(seen).replace(str(session_id), "<id>")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("access")
    publish(folder, small_policy(), "a")
    publish(folder, small_policy("frameconv"), "b")
    return folder


@pytest.fixture(scope="module")
def tokens_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens") / "tokens.json"


@pytest.fixture(scope="module")
def server(repository: Path, tokens_file: Path) -> Iterator[ServerProcess]:
    tokens.add(tokens_file, Principal("nobody-yet"))
    with ServerProcess(repository, "--tokens", str(tokens_file)) as process:
        yield process


def named(server: ServerProcess, file: Path, name: str, **fields: Any) -> Caller:
    """A principal whom the server knows by now."""
    caller = Caller(server, tokens.add(file, Principal(name, **fields)))

    def is_known() -> bool:
        try:
            return bool(caller("GetPolicy", pb.GetPolicyRequest(policy_name="a")))
        except grpc.RpcError:
            return False

    wait_until(is_known, f"the server to know {name}")
    return caller


@pytest.fixture(scope="module")
def alice(server: ServerProcess, tokens_file: Path) -> Caller:
    return named(server, tokens_file, "alice")


@pytest.fixture(scope="module")
def bob(server: ServerProcess, tokens_file: Path) -> Caller:
    return named(server, tokens_file, "bob")


@pytest.fixture(scope="module")
def admin(server: ServerProcess, tokens_file: Path) -> Caller:
    return named(server, tokens_file, "admin", is_admin=True)


# ------------------------------------------------------------------ what the page says


def test_the_documented_commands_make_tokens_and_keys_and_the_documented_file_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    blocks = re.findall(r"```sh\n(python.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for commands in blocks:
        done = subprocess.run(
            ["sh", "-ec", f'python() {{ {shlex.quote(sys.executable)} "$@"; }}\n{commands}'],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    entries = parse((tmp_path / "tokens.json").read_bytes())
    assert [entry.principal for entry in entries] == [Principal("robot-7", False, 8, 400.0), Principal("ops", True)]
    for entry, file in zip(entries, ("robot-7.token", "ops.token"), strict=True):
        assert entry.tokens_sha256 == (tokens.digest_of((tmp_path / file).read_text().strip()),)
    Verifier.from_file(tmp_path / "public.pem")
    (file,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    shown = parse(file.replace("<64 hexadecimal digits>", "0" * 64).encode())
    assert [entry.principal.name for entry in shown] == ["robot-7", "robot-8"]


# ------------------------------------------------------------------ whose session

STATES = ("opened", "stepped", "closed", "of policy b", "closed, of policy b")
CALLS: dict[str, Callable[[Caller, int], Any]] = {
    "its next step": lambda caller, i: caller.step(i, 1),
    "its last step again": lambda caller, i: caller.step(i, 0),
    "a step far ahead": lambda caller, i: caller.step(i, 7),
    "a step without its observation": lambda caller, i: caller("Step", pb.StepRequest(session_id=i)),
    "a step outside of its space": lambda caller, i: caller(
        "Step", step(i, 1, (np.full(3, 9, np.float32), OBSERVED[1]))
    ),
    "CloseSession": lambda caller, i: caller("CloseSession", pb.CloseSessionRequest(session_id=i)),
    "InspectSession": lambda caller, i: caller("InspectSession", pb.InspectSessionRequest(session_id=i)),
    "ExportSession": lambda caller, i: caller("ExportSession", pb.ExportSessionRequest(session_id=i)),
}


def in_state(owner: Caller, state: str) -> int:
    session_id = owner.open(policy="b" if "policy b" in state else "a")
    if state == "stepped":
        owner.step(session_id)
    if "closed" in state:
        owner("CloseSession", pb.CloseSessionRequest(session_id=session_id))
    return session_id


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("call", CALLS)
def test_a_session_of_somebody_else_is_told_of_as_one_that_never_was(
    alice: Caller, bob: Caller, call: str, state: str
) -> None:
    theirs = in_state(alice, state)
    seen, expected = (failure(partial(CALLS[call], bob, session_id)) for session_id in (theirs, NEVER))
    assert seen[0] == grpc.StatusCode.NOT_FOUND
    # The id stands also in the encoded details, whose length then differs.
    assert seen[1].replace(str(theirs), "<id>") == expected[1].replace(str(NEVER), "<id>")
    for (key, value), (key_never, value_never) in zip(seen[2], expected[2], strict=True):
        assert key == key_never
        if key == "grpc-status-details-bin":
            ours, nevers = status_pb2.Status.FromString(value), status_pb2.Status.FromString(value_never)
            assert ours.details == nevers.details and ours.code == nevers.code
            assert nameless(ours.message, theirs) == nameless(nevers.message, NEVER)
        else:
            assert value == value_never


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("rpc", ["StepBatch", "StepStream"])
@pytest.mark.parametrize("beside_own", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_a_row_of_somebody_else_is_answered_as_one_that_never_was(
    alice: Caller, bob: Caller, rpc: str, state: str, beside_own: bool, index: int
) -> None:
    def ask(session_id: int) -> pb.StepBatchResponse:
        ids = [session_id]
        if beside_own:
            ids.append(bob.open())
            if index:
                bob.step(ids[1])
        request = rows(ids, index)
        answer = bob("StepBatch", request) if rpc == "StepBatch" else bob.stream(request)[0]
        answer.ClearField("timings")
        if beside_own:
            assert answer.versions[1] == 1, "one's own row goes on"
            answer.ClearField("actions")
        return answer

    theirs = in_state(alice, state)
    seen, expected = ask(theirs), ask(NEVER)
    assert nameless(seen, theirs) == nameless(expected, NEVER)
    assert [error.error.reason for error in seen.errors] == [pb.SESSION_UNKNOWN]


def test_neither_a_stored_reply_nor_a_session_is_touched_by_somebody_else(alice: Caller, bob: Caller) -> None:
    session_id = alice.open()
    first = alice.step(session_id, 0)
    for call in CALLS.values():
        failure(lambda call=call: call(bob, session_id))
    assert alice.step(session_id, 0) == first
    assert alice.step(session_id, 1).step_index == 1


@pytest.mark.parametrize("state", [*STATES[:3], "of policy b"])
def test_an_id_of_somebody_else_is_taken_and_nothing_else_is_told(alice: Caller, bob: Caller, state: str) -> None:
    theirs, own = in_state(alice, state), bob.open()
    bob.step(own)
    seen, expected = failure(lambda: bob.open(theirs)), failure(lambda: bob.open(own))
    assert nameless(seen[:2], theirs) == nameless(expected[:2], own)
    assert reason(lambda: bob.open(theirs)) == (grpc.StatusCode.ALREADY_EXISTS, "SESSION_EXISTS")


def test_a_step_under_way_is_not_joined_by_somebody_else(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    alices, bobs = (tokens.add(file, Principal(name)) for name in ("alice", "bob"))
    stuck = tmp_path / "stuck"
    from serving import hanging_while_exists

    with ServerProcess(repository, "--tokens", str(file), fault=hanging_while_exists(stuck)) as server:
        alice, bob = Caller(server, alices), Caller(server, bobs)
        session_id = alice.open()
        stuck.touch()
        running = server.stub.Step.future(step(session_id), metadata=alice.metadata, timeout=30)
        wait_until(lambda: server.metric('tenuto_sessions{policy="a",state="stepping"}') == 1, "the step to run")
        assert reason(lambda: bob.step(session_id, 0)) == (grpc.StatusCode.NOT_FOUND, "SESSION_UNKNOWN")
        assert reason(lambda: bob.step(session_id, 1)) == (grpc.StatusCode.NOT_FOUND, "SESSION_UNKNOWN")
        assert reason(lambda: bob("CloseSession", pb.CloseSessionRequest(session_id=session_id)))[1] == (
            "SESSION_UNKNOWN"
        )
        stuck.unlink()
        assert running.result().step_index == 0


def test_one_lists_ones_own_sessions_and_an_admin_lists_all_and_looks_into_them(
    alice: Caller, bob: Caller, admin: Caller
) -> None:
    alices, bobs = alice.open(), bob.open(policy="b")

    def listed(caller: Caller) -> dict[int, str]:
        response = caller("ListSessions", pb.ListSessionsRequest(page_size=1000))
        return {session.session_id: session.principal for session in response.sessions}

    assert set(listed(alice).values()) == {"alice"} and alices in listed(alice)
    assert set(listed(bob).values()) == {"bob"} and bobs in listed(bob)
    assert listed(admin).items() >= {(alices, "alice"), (bobs, "bob")}
    inspect = pb.InspectSessionRequest(session_id=alices)
    assert admin("InspectSession", inspect).session.principal == "alice"
    assert alice("InspectSession", inspect).session.session_id == alices
    # To look is not to touch.
    assert reason(lambda: admin.step(alices)) == (grpc.StatusCode.NOT_FOUND, "SESSION_UNKNOWN")


def test_an_admin_exports_the_session_of_somebody_else_who_may_take_it_back(
    alice: Caller, bob: Caller, admin: Caller
) -> None:
    session_id = alice.open()
    alice.step(session_id)
    exported = admin("ExportSession", pb.ExportSessionRequest(session_id=session_id)).snapshot
    assert reason(lambda: alice.step(session_id, 1)) == (grpc.StatusCode.FAILED_PRECONDITION, "SESSION_EXPORTED")
    again = pb.ImportSessionRequest(snapshot=exported)
    # It stays hers, whoever has the snapshot.
    for other in (bob, admin):
        assert reason(lambda other=other: other("ImportSession", again))[1] == "SESSION_EXISTS"
    assert alice("ImportSession", again).next_step_index == 1
    assert alice.step(session_id, 1).step_index == 1


# ------------------------------------------------------------------ who calls


def test_every_rpc_refuses_who_has_no_token_or_a_wrong_one(server: ServerProcess) -> None:
    right = "tenuto_" + "a" * 43
    for token in (None, "", "wrong", right, "Bearer x"):
        stranger = Caller(server, token)
        for method in pb.DESCRIPTOR.services_by_name["PolicyService"].methods:
            request = getattr(pb, method.input_type.name)()
            if method.name not in vars(PolicyService):
                continue  # Answered by what was generated, which does nothing.
            call = (
                (lambda s=stranger, r=request: s.stream(r))
                if method.server_streaming
                else (lambda s=stranger, m=method.name, r=request: s(m, r))
            )
            assert reason(call) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"), (method.name, token)


def test_health_is_for_everybody_and_reflection_for_nobody(server: ServerProcess) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    reply = health_pb2_grpc.HealthStub(server.channel).Check(health_pb2.HealthCheckRequest())
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    code, *_ = failure(lambda: list(stub.ServerReflectionInfo(iter([ask]))))
    assert code == grpc.StatusCode.UNIMPLEMENTED


def test_a_token_that_is_removed_ends_its_streams_and_leaves_those_of_others(
    server: ServerProcess, tokens_file: Path, alice: Caller
) -> None:
    carol = named(server, tokens_file, "carol")
    second = tokens.add(tokens_file, Principal("carol"))
    digests = [
        d for e in json.loads(tokens_file.read_text())["principals"] if e["name"] == "carol" for d in e["tokens_sha256"]
    ]
    assert len(digests) == 2 and second != carol.token

    class Open:
        """A stream that stays open, with one message sent and answered."""

        def __init__(self, caller: Caller) -> None:
            self.more: Any = asyncio.Queue()
            import queue

            self.outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
            self.call = caller.stub.StepStream(iter(self.outbox.get, None), metadata=caller.metadata, timeout=60)
            self.session_id, self.index = caller.open(), 0
            self.step()

        def step(self) -> pb.StepBatchResponse:
            self.outbox.put(rows([self.session_id], self.index))
            self.index += 1
            answer = next(self.call)
            assert not answer.errors
            return answer

        def close(self) -> None:
            self.outbox.put(None)

    carols, alices = Open(carol), Open(alice)
    tokens.remove(tokens_file, "carol", digests[0][:10])
    assert reason(lambda: next(carols.call)) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    assert reason(lambda: carol.open()) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    alices.step()
    # Her other token is good, and the sessions are hers whichever she shows.
    renewed = Caller(server, second)
    wait_until(lambda: renewed.step(carols.session_id, 1), "the second token to do")
    for stream in (carols, alices):
        stream.close()


@pytest.mark.parametrize(
    "broken",
    [
        "{",
        "[]",
        '{"format_version": 2, "principals": []}',
        '{"format_version": 1, "principals": [{"name": "tenuto_leak"}, {"token": "tenuto_leak"}]}',
    ],
)
def test_a_broken_file_of_tokens_is_refused_and_the_one_before_goes_on(
    server: ServerProcess, tokens_file: Path, alice: Caller, broken: str
) -> None:
    good = tokens_file.read_bytes()
    selector = 'tenuto_credential_reloads_total{files="tokens",outcome="refused"}'
    before = server.metric(selector)
    tokens_file.write_text(broken)
    try:
        wait_until(lambda: server.metric(selector) == before + 1, "the file to be refused")
        assert alice.step(alice.open()).step_index == 0
        assert any("refused the changed files of tokens" in line for line in server.log)
        assert not any("tenuto_leak" in line for line in server.log)
    finally:
        tokens_file.write_bytes(good)


def test_clients_of_every_kind_show_their_token_and_learn_what_is_wrong_without_one(
    server: ServerProcess, alice: Caller
) -> None:
    token = alice.token
    for transport in ("unary", "stream"):
        with RemotePolicy(server.address, "a", transport=transport, token=token) as policy:
            policy.step(OBSERVED)
    stacked = tuple(np.stack([leaf] * 2) for leaf in OBSERVED)
    for transport in ("batch", "stream"):
        with RemoteVectorPolicy(server.address, 2, "a", transport=transport, token=token) as policy:
            policy.step(stacked)

    async def play() -> None:
        for transport in ("unary", "stream"):
            async with AsyncRemotePolicy(server.address, "a", transport=transport, token=token) as policy:
                await policy.step(OBSERVED)
        for transport in ("batch", "stream"):
            async with AsyncRemoteVectorPolicy(server.address, 2, "a", transport=transport, token=token) as policy:
                await policy.step(stacked)

    asyncio.run(play())
    for wrong in (None, "tenuto_wrong"):
        with pytest.raises(AuthenticationError) as caught, RemotePolicy(server.address, "a", token=wrong):
            pass
        assert caught.value.reason == "UNAUTHENTICATED" and "tenuto_wrong" not in str(caught.value)


async def test_policies_of_two_principals_do_not_share_a_stream(
    server: ServerProcess, alice: Caller, bob: Caller
) -> None:
    options: Any = {"transport": "stream"}
    async with (
        AsyncRemotePolicy(server.address, "a", token=alice.token, **options) as alices,
        AsyncRemotePolicy(server.address, "a", token=bob.token, **options) as bobs,
    ):
        await asyncio.gather(alices.step(OBSERVED), bobs.step(OBSERVED))
        for caller, own, other in ((alice, alices, bobs), (bob, bobs, alices)):
            listed = caller("ListSessions", pb.ListSessionsRequest(page_size=1000)).sessions
            ids = {session.session_id for session in listed}
            assert own.session_id in ids and other.session_id not in ids


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "ünicode", ""])
def test_a_token_that_cannot_travel_is_refused_without_being_quoted(token: str) -> None:
    for kind in (RemotePolicy, AsyncRemotePolicy):
        with pytest.raises(ValueError, match="token: got") as caught:
            kind("localhost:1", token=token)
        assert not token or token not in str(caught.value)
