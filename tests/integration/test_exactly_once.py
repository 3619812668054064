"""Each step of a session is applied exactly once, in order, whatever clients and connections do to it.

A state machine drives a real server and keeps a model of the law: the steps that each session must have taken, and at
most one whose fate is not known, since its call was cancelled, cut off or too late. In the end every session's replies
must be those of an undisturbed session of the same seed, bit for bit, and those of the policy computed by torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from link import Link
from serving import ServerProcess, publish, small_policy, wait_until
from tenuto_proto import array_from_wire
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_proto.v1 import policy_pb2_grpc
from wire import CODEC, refused, replay

POLICY = "policy"
OUTPUTS = pb.Outputs(value=True, log_prob=True, logits=True)
RPCS = ("Step", "StepBatch", "StepStream")
PATIENCE_S = 20.0
TWIN_ID = 1 << 40
CONTENTION = {"STEP_INDEX_MISMATCH", "STEP_IN_FLIGHT"}

HOLDING = """
import math, pathlib, time
from tenuto_server.engine import Engine
from tenuto_server.host_step import HostStep
gate = pathlib.Path({gate!r})
def expected_s(self, num_rows, usual=HostStep.expected_s):
    return math.inf if gate.exists() else usual(self, num_rows)
def run(self, version, rows, usual=Engine.run):
    while gate.exists():
        time.sleep(0.0005)
    return usual(self, version, rows)
HostStep.expected_s, Engine.run = expected_s, run
"""
"""A ``fault`` for ServerProcess: while the file exists the device takes no step, and those that come are in flight."""


class Observed(NamedTuple):
    """What a step carries."""

    number: int
    """The observation is made from it."""
    start: bool

    @property
    def observation(self) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng(self.number)
        return rng.uniform(-1, 1, 3).astype(np.float32), int(rng.integers(4))


class Reply(NamedTuple):
    """All that a step's reply says but its timings."""

    version: int
    action: int
    value: float
    log_prob: float
    logits: bytes


class Refused(NamedTuple):
    """Why a row was not carried out; no reason where the call failed without one."""

    code: grpc.StatusCode
    reason: str
    metadata: dict[str, str]


Outcome = Reply | Refused
Row = tuple["Life", int, Observed]


@dataclass(eq=False)
class Life:
    """What the model knows of one session."""

    id: int
    seed: int
    deterministic: bool
    applied: list[Observed] = field(default_factory=list[Observed])
    replies: list[Reply] = field(default_factory=list[Reply])
    pending: Observed | None = None
    """Sent as the next step, and perhaps applied."""
    closed: pb.CloseSessionResponse | None = None

    @property
    def next(self) -> int:
        return len(self.applied)

    def take(self, observed: Observed, reply: Outcome) -> None:
        assert isinstance(reply, Reply), reply
        self.applied.append(observed)
        self.replies.append(reply)
        self.pending = None


def _failure(error: grpc.RpcError) -> Refused:
    def fail() -> None:
        raise error

    return Refused(*refused(fail))


def _rows(response: pb.StepBatchResponse, num_rows: int) -> list[Outcome]:
    if response.HasField("error"):
        return [_refusal(response.error)] * num_rows
    failed = {e.row: _refusal(e.error) for e in response.errors}
    if len(failed) == num_rows:
        return [failed[row] for row in range(num_rows)]
    actions, values = array_from_wire(response.actions), array_from_wire(response.values)
    log_probs, logits = array_from_wire(response.log_probs), array_from_wire(response.logits)
    return [
        failed.get(row)
        or Reply(
            response.versions[row], int(actions[row]), float(values[row]), float(log_probs[row]), logits[row].tobytes()
        )
        for row in range(num_rows)
    ]


def _refusal(error: pb.Error) -> Refused:
    code = next(status for status in grpc.StatusCode if status.value[0] == error.code)
    return Refused(code, pb.ErrorReason.Name(error.reason), dict(error.metadata))


class Wire:
    """Calls over one channel. Each returns at once; what it returns waits for the outcomes."""

    def __init__(self, address: str) -> None:
        # A channel of its own connection, however alike others are.
        self._channel = grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        self.stub = policy_pb2_grpc.PolicyServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def send(self, rpc: str, rows: Sequence[Row], timeout_s: float = PATIENCE_S, queue_timeout_ms: int = 0) -> Sent:
        if rpc == "Step":
            [(life, index, observed)] = rows
            request = pb.StepRequest(
                session_id=life.id, step_index=index, episode_start=observed.start,
                observation=CODEC.pack(observed.observation), outputs=OUTPUTS,
            )  # fmt: skip
            return Sent(self.stub.Step.future(request, timeout=timeout_s), 1)
        request = _batch(rows, queue_timeout_ms)
        if rpc == "StepBatch":
            return Sent(self.stub.StepBatch.future(request, timeout=timeout_s), len(rows))
        return Sent(self.stub.StepStream(iter([request]), timeout=timeout_s), len(rows), is_stream=True)


def _batch(rows: Sequence[Row], queue_timeout_ms: int = 0, request_id: int = 0) -> pb.StepBatchRequest:
    stacked = tuple(np.stack(column) for column in zip(*(o.observation for _, _, o in rows), strict=True))
    return pb.StepBatchRequest(
        session_ids=[life.id for life, _, _ in rows], step_indices=[index for _, index, _ in rows],
        episode_starts=[o.start for _, _, o in rows], observations=CODEC.pack(stacked, len(rows)), outputs=OUTPUTS,
        queue_timeout_ms=queue_timeout_ms, request_id=request_id,
    )  # fmt: skip


@dataclass
class Sent:
    """A call under way."""

    call: Any
    num_rows: int
    is_stream: bool = False

    def outcomes(self) -> list[Outcome]:
        try:
            reply = next(self.call) if self.is_stream else self.call.result()
        except grpc.RpcError as error:
            return [_failure(error)] * self.num_rows
        except grpc.FutureCancelledError:
            return [Refused(grpc.StatusCode.CANCELLED, "", {})] * self.num_rows
        if isinstance(reply, pb.StepResponse):
            logits = array_from_wire(reply.logits).tobytes()
            return [Reply(reply.version, int(array_from_wire(reply.action)), reply.value, reply.log_prob, logits)]
        return _rows(reply, self.num_rows)

    def outcome(self) -> Outcome:
        [outcome] = self.outcomes()
        return outcome


observeds = st.builds(Observed, st.integers(0, 999), st.sampled_from([False, False, False, True]))
rpcs = st.sampled_from(RPCS)
distances = st.sampled_from([0, 0, 1, 1, 2, 3, -1, -2])
"""From the index that is expected."""


class Episodes(RuleBasedStateMachine):
    """The law of the step index, and everything that could break it."""

    server: ServerProcess
    link: Link
    gate: Path
    policy: Any
    num_examples = num_applied = num_lost = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).num_examples += 1
        self.lives: list[Life] = []
        self.direct = Wire(self.server.address)
        self.linked = Wire(self.link.address)

    # ------------------------------------------------------------------ what the rules are made of

    def alive(self, number: int) -> Life:
        """One of the open sessions, none of whose steps is in doubt."""
        alive = [life for life in self.lives if life.closed is None]
        life = alive[number % len(alive)]
        self.settle(life)
        return life

    def settle(self, life: Life) -> None:
        """Send the step in doubt again, as a client does: whichever arrives first is applied, both get its reply."""
        if life.pending is not None:
            observed = life.pending
            life.take(observed, self.direct.send("Step", [(life, life.next, observed)]).outcome())

    def doubt(self, life: Life, observed: Observed, outcome: Outcome) -> None:
        """A call has ended: with a reply, or so that nobody knows whether its step was, or will be, applied."""
        if isinstance(outcome, Reply):
            life.take(observed, outcome)
        else:
            assert outcome.reason in ("", "QUEUE_TIMEOUT"), outcome
            life.pending = observed
            type(self).num_lost += 1

    def next_index(self, life: Life) -> int:
        found = self.direct.stub.InspectSession(pb.InspectSessionRequest(session_id=life.id))
        return found.session.next_step_index

    def reconnect(self) -> None:
        self.link.cut()
        self.linked.close()
        self.linked = Wire(self.link.address)

    def held(self, blocker: Life, observed: Observed) -> Sent:
        """Keep the device busy with a session's step, until the gate is gone; others wait meanwhile."""
        self.gate.touch()
        return self.direct.send("Step", [(blocker, blocker.next, observed)])

    # ------------------------------------------------------------------ sessions

    @precondition(lambda self: len(self.lives) < 4)
    @rule(session_id=st.integers(1, 2**32), seed=st.integers(0, 2**64 - 1), deterministic=st.booleans())
    def open(self, session_id: int, seed: int, deterministic: bool) -> None:
        # Ids are never used twice: those of other examples are still remembered.
        life = Life((type(self).num_examples << 41) + session_id, seed, deterministic)
        if any(other.id == life.id for other in self.lives):
            return
        request = pb.OpenSessionRequest(session_id=life.id, policy_name=POLICY, seed=seed, deterministic=deterministic)
        first = self.direct.stub.OpenSession(request)
        assert self.linked.stub.OpenSession(request, timeout=PATIENCE_S, wait_for_ready=True) == first
        request.deterministic = not deterministic
        assert refused(self.direct.stub.OpenSession, request)[1] == "SESSION_EXISTS"
        self.lives.append(life)

    has_one = precondition(lambda self: any(life.closed is None for life in self.lives))

    @has_one
    @rule(number=st.integers(0, 3))
    def open_again_after_a_step(self, number: int) -> None:
        life = self.alive(number)
        request = pb.OpenSessionRequest(
            session_id=life.id, policy_name=POLICY, seed=life.seed, deterministic=life.deterministic
        )
        if life.applied:
            assert refused(self.direct.stub.OpenSession, request)[1] == "SESSION_EXISTS"
        else:
            assert self.direct.stub.OpenSession(request).session_id == life.id

    @precondition(lambda self: len([life for life in self.lives if life.closed is None]) > 1)
    @rule(number=st.integers(0, 3), observed=observeds, rpc=rpcs)
    def close(self, number: int, observed: Observed, rpc: str) -> None:
        life = self.alive(number)
        life.closed = self.direct.stub.CloseSession(pb.CloseSessionRequest(session_id=life.id))
        assert life.closed.num_steps == life.next
        assert life.closed.num_episodes == sum(o.start or i == 0 for i, o in enumerate(life.applied))
        for index in {life.next, max(life.next - 1, 0)}:
            outcome = self.linked.send(rpc, [(life, index, observed)]).outcome()
            assert isinstance(outcome, Refused) and outcome.reason == "SESSION_CLOSED"
        assert self.direct.stub.CloseSession(pb.CloseSessionRequest(session_id=life.id)) == life.closed

    @precondition(lambda self: len([life for life in self.lives if life.closed is None]) > 2)
    @rule(number=st.integers(0, 3), observed=observeds, rpc=rpcs)
    def close_under_a_step(self, number: int, observed: Observed, rpc: str) -> None:
        life = self.alive(number)
        self.gate.touch()
        step = self.direct.send(rpc, [(life, life.next, observed)])
        closing = self.direct.stub.CloseSession.future(pb.CloseSessionRequest(session_id=life.id))
        self.gate.unlink()
        life.closed, outcome = closing.result(PATIENCE_S), step.outcome()
        # gRPC may hand over the later call first.
        if isinstance(outcome, Reply):
            life.take(observed, outcome)
        else:
            assert outcome.reason == "SESSION_CLOSED"
        assert life.closed.num_steps == life.next

    # ------------------------------------------------------------------ steps that succeed or change nothing

    @has_one
    @rule(number=st.integers(0, 3), observed=observeds, rpc=rpcs)
    def step(self, number: int, observed: Observed, rpc: str) -> None:
        life = self.alive(number)
        life.take(observed, self.linked.send(rpc, [(life, life.next, observed)]).outcome())

    @has_one
    @rule(number=st.integers(0, 3), observed=observeds, rpc=rpcs)
    def repeat_the_last_step(self, number: int, observed: Observed, rpc: str) -> None:
        """With whatever observation: what was answered is what counts."""
        life = self.alive(number)
        if life.applied:
            assert self.linked.send(rpc, [(life, life.next - 1, observed)]).outcome() == life.replies[-1]

    @has_one
    @rule(number=st.integers(0, 3), observed=observeds)
    def repeat_the_last_step_bit_for_bit(self, number: int, observed: Observed) -> None:
        life = self.alive(number)
        if life.applied:
            calls = [self.linked.send("Step", [(life, life.next - 1, observed)]).call for _ in range(2)]
            first, second = (call.result() for call in calls)
            assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)

    @has_one
    @rule(number=st.integers(0, 3), observed=observeds, rpc=rpcs, distance=st.sampled_from([-9, -3, -2, 1, 2, 1 << 63]))
    def step_out_of_order(self, number: int, observed: Observed, rpc: str, distance: int) -> None:
        life = self.alive(number)
        if (index := life.next + distance) < 0:
            return
        outcome = self.linked.send(rpc, [(life, index, observed)]).outcome()
        expected = (grpc.StatusCode.ABORTED, "STEP_INDEX_MISMATCH", {"expected": str(life.next)})
        assert outcome == Refused(*expected)

    @has_one
    @rule(number=st.integers(0, 3), rpc=rpcs)
    def step_with_what_is_no_observation(self, number: int, rpc: str) -> None:
        life = self.alive(number)
        good = _batch([(life, life.next, Observed(0, False))])
        if rpc == "Step":
            request = pb.StepRequest(session_id=life.id, step_index=life.next)
            assert refused(self.linked.stub.Step, request)[1] == "OBSERVATION_FIELDS"
            return
        good.observations[0].tensor.data = np.full((1, 3), np.nan, "<f4").tobytes()
        if rpc == "StepBatch":
            response = self.linked.stub.StepBatch(good)
        else:
            response = next(self.linked.stub.StepStream(iter([good])))
        assert [e.error.reason for e in response.errors] == [pb.OBSERVATION_NOT_FINITE]

    @has_one
    @rule(kinds=st.lists(st.sampled_from(["next", "last", "gap", "stranger"]), min_size=4, max_size=4),
          observed=observeds, rpc=st.sampled_from(RPCS[1:]))  # fmt: skip
    def step_many(self, kinds: list[str], observed: Observed, rpc: str) -> None:
        """Rows of a batch fare each in its own way."""
        alive = [self.alive(n) for n in range(sum(life.closed is None for life in self.lives))]
        offset = {"next": 0, "last": -1, "gap": 3, "stranger": 0}
        rows, expected = list[Row](), list[tuple[str, Life]]()
        for life, kind in zip(alive, kinds, strict=False):
            if kind == "last" and not life.applied:
                kind = "next"
            who = Life(1, 0, False) if kind == "stranger" and len(rows) == 0 else life
            kind = "next" if kind == "stranger" and who is life else kind
            rows.append((who, life.next + offset[kind], observed._replace(number=observed.number + len(rows))))
            expected.append((kind, life))
        for (kind, life), (_, _, sent), outcome in zip(
            expected, rows, self.linked.send(rpc, rows).outcomes(), strict=True
        ):
            if kind == "next":
                life.take(sent, outcome)
            elif kind == "last":
                assert outcome == life.replies[-1]
            else:
                assert isinstance(outcome, Refused)
                assert outcome.reason == ("SESSION_UNKNOWN" if kind == "stranger" else "STEP_INDEX_MISMATCH")

    # ------------------------------------------------------------------ at once, and in any order

    @has_one
    @rule(number=st.integers(0, 3), observed=observeds, ways=st.lists(rpcs, min_size=2, max_size=5), hold=st.booleans())
    def send_a_step_several_times_at_once(self, number: int, observed: Observed, ways: list[str], hold: bool) -> None:
        life = self.alive(number)
        if hold:
            self.gate.touch()
        wires = (self.direct, self.linked)
        sent = [wires[i % 2].send(rpc, [(life, life.next, observed)]) for i, rpc in enumerate(ways)]
        self.gate.unlink(missing_ok=True)
        outcomes = {call.outcome() for call in sent}
        assert len(outcomes) == 1, outcomes
        life.take(observed, outcomes.pop())

    @has_one
    @rule(number=st.integers(0, 3), observed=observeds, steps=st.lists(distances, min_size=2, max_size=8),
          one_stream=st.booleans(), hold=st.booleans())  # fmt: skip
    def send_steps_in_any_order(
        self, number: int, observed: Observed, steps: list[int], one_stream: bool, hold: bool
    ) -> None:
        """Over one stream without waiting, or over many calls that overtake each other."""
        life = self.alive(number)
        began = life.next
        rows = [(life, began + d, observed._replace(number=observed.number + 2 + d)) for d in steps if began + d >= 0]
        if hold:
            self.gate.touch()
        if one_stream:
            requests = [_batch([row], request_id=i) for i, row in enumerate(rows)]
            call = self.linked.stub.StepStream(iter(requests), timeout=PATIENCE_S)
            self.gate.unlink(missing_ok=True)
            answers = {response.request_id: _rows(response, 1)[0] for response in call}
            assert sorted(answers) == list(range(len(rows))), "a message was not answered exactly once"
            outcomes = [answers[i] for i in range(len(rows))]
        else:
            sent = [self.linked.send(RPCS[i % 3], [row]) for i, row in enumerate(rows)]
            self.gate.unlink(missing_ok=True)
            outcomes = [call.outcome() for call in sent]
        replied: dict[int, tuple[Observed, Reply]] = {}
        for (_, index, seen), outcome in zip(rows, outcomes, strict=True):
            if isinstance(outcome, Refused):
                assert outcome.reason in CONTENTION, outcome
            elif index < began:
                assert index == began - 1 and outcome == life.replies[index]
            else:
                assert replied.setdefault(index, (seen, outcome))[1] == outcome, "a step has two replies"
        for index in sorted(replied):
            assert index == life.next, "a step was applied before the one before it"
            life.take(*replied[index])
        if any(index == began for _, index, _ in rows):
            assert life.next > began, "the next step was there, and nobody's was applied"
        assert self.next_index(life) == life.next, "a step was applied that nobody was told of"

    # ------------------------------------------------------------------ calls whose end nobody sees

    @has_one
    @rule(number=st.integers(0, 3), observed=observeds, rpc=rpcs, blocker=st.integers(0, 3), queued=st.booleans(),
          again=st.booleans())  # fmt: skip
    def cancel(self, number: int, observed: Observed, rpc: str, blocker: int, queued: bool, again: bool) -> None:
        """A step that waits behind another's, or that runs; perhaps while somebody else sends it, too."""
        life, other = self.alive(number), self.alive(blocker)
        self.gate.touch()
        held = None
        if queued and other is not life:
            held = self.direct.send("Step", [(other, other.next, observed)])
        first = self.linked.send(rpc, [(life, life.next, observed)])
        second = self.direct.send("Step", [(life, life.next, observed)]) if again else None
        first.call.cancel()
        self.gate.unlink()
        if held is not None:
            other.take(observed, held.outcome())
        self.doubt(life, observed, first.outcome())
        if second is not None:
            reply = second.outcome()
            # Both were dropped where this one came first, joined the other, and that one left: never; it must succeed.
            if life.pending is not None:
                life.take(observed, reply)
            assert reply == life.replies[-1]

    @has_one
    @rule(number=st.integers(0, 3), observed=observeds, rpc=rpcs, once_there=st.booleans())
    def cancel_while_it_waits_for_company(self, number: int, observed: Observed, rpc: str, once_there: bool) -> None:
        life = self.alive(number)
        sent = self.linked.send(rpc, [(life, life.next, observed)])
        if once_there:
            # On the same connection, and answered at once: the step has arrived, too.
            self.linked.stub.ListSessions(pb.ListSessionsRequest(page_size=1), timeout=PATIENCE_S, wait_for_ready=True)
        sent.call.cancel()
        self.doubt(life, observed, sent.outcome())

    @has_one
    @rule(number=st.integers(0, 3), observed=observeds, rpc=rpcs, timeout_s=st.sampled_from([0.0, 1e-4, 5e-4, 1e-3]),
          by_message=st.booleans())  # fmt: skip
    def have_no_time(self, number: int, observed: Observed, rpc: str, timeout_s: float, by_message: bool) -> None:
        life = self.alive(number)
        row = (life, life.next, observed)
        if by_message and rpc != "Step":
            self.gate.touch()
            sent = self.linked.send(rpc, [row], queue_timeout_ms=1)
            self.gate.unlink()
        else:
            sent = self.linked.send(rpc, [row], timeout_s=timeout_s)
        outcome = sent.outcome()
        assert isinstance(outcome, Reply) or outcome.code == grpc.StatusCode.DEADLINE_EXCEEDED, outcome
        self.doubt(life, observed, outcome)

    @has_one
    @rule(number=st.integers(0, 3), observed=observeds, rpc=rpcs)
    def lose_the_reply(self, number: int, observed: Observed, rpc: str) -> None:
        life = self.alive(number)
        self.linked.stub.GetPolicy(pb.GetPolicyRequest(), timeout=PATIENCE_S, wait_for_ready=True)
        self.link.lose_replies()
        sent = self.linked.send(rpc, [(life, life.next, observed)])
        wait_until(lambda: self.next_index(life) == life.next + 1, "the step to be applied")
        self.reconnect()
        assert isinstance(sent.outcome(), Refused)
        life.take(observed, self.linked.send("Step", [(life, life.next, observed)]).outcome())
        assert self.next_index(life) == life.next

    @has_one
    @rule(number=st.integers(0, 3), observed=observeds, rpc=rpcs)
    def lose_the_request(self, number: int, observed: Observed, rpc: str) -> None:
        life = self.alive(number)
        self.linked.stub.GetPolicy(pb.GetPolicyRequest(), timeout=PATIENCE_S, wait_for_ready=True)
        self.link.lose_requests()
        sent = self.linked.send(rpc, [(life, life.next, observed)])
        self.reconnect()
        outcome = sent.outcome()
        assert isinstance(outcome, Refused)
        assert self.next_index(life) == life.next

    @has_one
    @rule(number=st.integers(0, 3), observed=observeds, rpc=rpcs, hold=st.booleans())
    def cut_the_connection(self, number: int, observed: Observed, rpc: str, hold: bool) -> None:
        life = self.alive(number)
        if hold:
            self.gate.touch()
        sent = self.linked.send(rpc, [(life, life.next, observed)])
        self.reconnect()
        self.gate.unlink(missing_ok=True)
        self.doubt(life, observed, sent.outcome())

    # ------------------------------------------------------------------ what always holds

    @invariant()
    def every_session_is_where_the_model_says(self) -> None:
        listed = self.direct.stub.ListSessions(pb.ListSessionsRequest(page_size=1000)).sessions
        found = {session.session_id: session.next_step_index for session in listed}
        assert found.keys() == {life.id for life in self.lives if life.closed is None}
        for life in self.lives:
            if life.closed is None:
                legal = {life.next, life.next + 1} if life.pending is not None else {life.next}
                assert found[life.id] in legal, (found[life.id], legal)

    def teardown(self) -> None:
        try:
            for life in self.lives:
                if life.closed is None:
                    self.settle(life)
                self.compare_with_an_undisturbed_session(life)
                type(self).num_applied += life.next
        finally:
            self.gate.unlink(missing_ok=True)
            for session in self.direct.stub.ListSessions(pb.ListSessionsRequest(page_size=1000)).sessions:
                self.direct.stub.CloseSession(pb.CloseSessionRequest(session_id=session.session_id))
            self.direct.close()
            self.linked.close()

    def compare_with_an_undisturbed_session(self, life: Life) -> None:
        twin = Life(life.id + TWIN_ID, life.seed, life.deterministic)
        self.direct.stub.OpenSession(
            pb.OpenSessionRequest(session_id=twin.id, seed=twin.seed, deterministic=twin.deterministic)
        )
        for index, observed in enumerate(life.applied):
            twin.take(observed, self.direct.send("Step", [(twin, index, observed)]).outcome())
        assert twin.replies == life.replies
        if not life.deterministic:
            steps = [(o.observation, o.start, self.policy) for o in life.applied]
            expected = list(replay(steps, life.seed))
            assert [reply.action for reply in life.replies] == [action for action, _ in expected]
            np.testing.assert_allclose([r.value for r in life.replies], [v for _, v in expected], atol=1e-4)


@pytest.mark.parametrize("max_wait_ms", ["0", "5"], ids=["at once", "in company"])
def test_each_step_is_applied_exactly_once(tmp_path: Path, max_wait_ms: str) -> None:
    policy, gate = small_policy(), tmp_path / "gate"
    publish(tmp_path / "repository", policy, POLICY)
    fault = HOLDING.format(gate=str(gate))
    with (
        ServerProcess(tmp_path / "repository", "--max-wait-ms", max_wait_ms, fault=fault) as server,
        Link(server.address) as link,
    ):

        class machine(Episodes):
            pass

        machine.server, machine.link, machine.gate, machine.policy = server, link, gate, policy
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=20, stateful_step_count=40, deadline=None, derandomize="CI" in os.environ, print_blob=True
            ),
        )
        assert machine.num_applied > 100 and machine.num_lost > 10, "hardly anything happened"
        assert not any("Traceback" in line for line in server.log)
