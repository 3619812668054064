"""Steps that share a turn: each has its own status, deadline and caller, and the device sees one batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from serving import OBSERVATIONS, small_policy
from tenuto_models import Checkpoint, TrainingProgress
from tenuto_proto import ObservationCodec, space_to_wire
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server import intake as intake_module
from tenuto_server.batch_queue import BatchQueue
from tenuto_server.calls import StepCall
from tenuto_server.engine import Engine
from tenuto_server.errors import Refusal
from tenuto_server.host_step import HostStep
from tenuto_server.intake import Intake
from tenuto_server.metrics import Metrics
from tenuto_server.policies import PolicyRegistry, ServedPolicy
from tenuto_server.sessions import SessionOptions
from tenuto_server.stepper import Stepper

CODEC = ObservationCodec(space_to_wire(OBSERVATIONS))
OBSERVATION = (np.zeros(3, np.float32), 1)


class HandEngine(Engine):
    """The real engine, whose jobs run when the test says so."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), (4, 8, 16, 32, 64))
        self.runs_brief = False
        """Whether brief jobs are over at once, as they are in the real one."""
        self.jobs: list[tuple[Callable[[], Any], Callable[[Any, Any], None]]] = []

    def submit(self, job: Callable[[], Any], done: Callable[[Any, Any], None], *, brief: bool = False) -> None:
        if brief and self.runs_brief:
            done(job(), None)
        else:
            self.jobs.append((job, done))

    def finish(self) -> None:
        job, done = self.jobs.pop(0)
        done(job(), None)


class Desk:
    """An intake with two policies, a clock that is a number, and the answers that were given."""

    def __init__(self, max_queued: int = 1000) -> None:
        self.now_s, self.engine, registry = 100.0, HandEngine(), PolicyRegistry()
        metrics = Metrics(torch.device("cpu"))
        self.metric = metrics.registry.get_sample_value
        queue = BatchQueue(64, 0.0, max_queued)
        self.stepper = Stepper(self.engine, registry, queue, metrics, lambda: self.now_s)
        self.intake = Intake(registry, self.stepper, metrics, lambda: self.now_s, 64, server_epoch=1)
        self.policies: dict[str, ServedPolicy] = {}
        for name in ("a", "b"):
            checkpoint = Checkpoint(name, 1, small_policy("frameconv"), TrainingProgress(), 0.0, "")
            policy = self.policies[name] = ServedPolicy(checkpoint, self.engine, 100, server_epoch=1)
            policy.versions[1] = policy.prepare(checkpoint, self.engine)
            registry.add(policy)
        self.answers: dict[StepCall, Any] = {}

    def open(self, *session_ids: int, policy: str = "a") -> None:
        for session_id in session_ids:
            self.policies[policy].sessions.open(session_id, SessionOptions(0, session_id, False), self.now_s - 1)

    def step(self, session_id: int, index: int = 0, deadline_s: float = 1e9, **fields: Any) -> StepCall:
        observation = CODEC.pack(fields.pop("observation", OBSERVATION))
        request = pb.StepRequest(session_id=session_id, step_index=index, observation=observation, **fields)
        return self.take("Step", request, deadline_s)

    def batch(self, session_ids: list[int], **fields: Any) -> StepCall:
        n = len(session_ids)
        observations = CODEC.pack((np.zeros((n, 3), np.float32), np.ones(n, np.int64)), n)
        request = pb.StepBatchRequest(
            session_ids=session_ids, step_indices=[0] * n, observations=observations, **fields
        )
        return self.take("StepBatch", request, 1e9, n)

    def take(self, rpc: str, request: Any, deadline_s: float, num_rows: int = 1) -> StepCall:
        answers: list[Any] = []
        call = StepCall(rpc, request, self.now_s, deadline_s, answers.append, num_rows)
        call.answer = partial(self._answer, call)
        self.intake.take(call)
        return call

    def _answer(self, call: StepCall, outcome: Any) -> None:
        assert call not in self.answers, "answered twice"
        self.answers[call] = outcome

    def reason(self, call: StepCall) -> int:
        outcome = self.answers[call]
        assert isinstance(outcome, Refusal), outcome
        return outcome.reason

    def applied(self, *calls: StepCall) -> bool:
        return all(isinstance(self.answers.get(call), pb.StepResponse | pb.StepBatchResponse) for call in calls)

    @property
    def batches(self) -> float | None:
        return self.metric("tenuto_batch_rows_count")


async def turn() -> None:
    """Let the loop run what is ready."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_steps_of_a_turn_share_a_batch_and_each_gets_what_it_asked_for() -> None:
    desk = Desk()
    desk.open(1, 2, 3)
    plain, valued, whole = (
        desk.step(i, outputs=o) for i, o in ((1, None), (2, pb.Outputs(value=True)), (3, pb.Outputs(logits=True)))
    )
    await turn()
    assert desk.answers == {} and len(desk.engine.jobs) == 1
    desk.engine.finish()
    assert desk.applied(plain, valued, whole) and desk.batches == 1
    replies = [desk.answers[c] for c in (plain, valued, whole)]
    assert [r.HasField("value") for r in replies] == [False, True, False]
    assert [r.HasField("logits") for r in replies] == [False, False, True]
    assert all(r.timings.batch_size == 3 and r.version == 1 for r in replies)


async def test_rows_of_messages_and_lone_steps_share_a_batch() -> None:
    desk = Desk()
    desk.open(1, 2, 3, 4)
    lone, rows, other = desk.step(1), desk.batch([2, 3], outputs=pb.Outputs(value=True)), desk.step(4)
    await turn()
    desk.engine.finish()
    assert desk.applied(lone, rows, other) and desk.batches == 1
    reply = desk.answers[rows]
    assert list(reply.versions) == [1, 1] and list(reply.actions.shape) == [2] and list(reply.values.shape) == [2]
    stored = desk.policies["a"].replies
    assert reply.actions.data == stored.action[[1, 2]].tobytes() and reply.values.data == stored.value[[1, 2]].tobytes()
    assert desk.answers[lone].action.data == stored.action[[0]].tobytes()
    assert desk.answers[other].action.data == stored.action[[3]].tobytes()


async def test_a_refused_step_does_not_touch_its_neighbours() -> None:
    desk = Desk()
    desk.open(1, 2, 3)
    outside = (np.full(3, 2, np.float32), 1)
    good, bad, late = desk.step(1), desk.step(2, observation=outside), desk.step(3, index=7)
    unknown, formless = desk.step(99), desk.take("Step", pb.StepRequest(session_id=1), 1e9)
    await turn()
    desk.engine.finish()
    assert desk.applied(good)
    assert [desk.reason(c) for c in (bad, late, unknown, formless)] == [
        pb.OBSERVATION_OUT_OF_SPACE, pb.STEP_INDEX_MISMATCH, pb.SESSION_UNKNOWN, pb.OBSERVATION_FIELDS,
    ]  # fmt: skip
    again = desk.step(2)
    await turn()
    desk.engine.finish()
    assert desk.applied(again)


async def test_a_refused_row_of_a_message_keeps_its_place_among_the_turns_rows() -> None:
    desk = Desk()
    desk.open(1, 2)
    lone, rows = desk.step(1), desk.batch([2, 99])
    await turn()
    desk.engine.finish()
    assert desk.applied(lone, rows)
    (error,) = desk.answers[rows].errors
    assert error.row == 1 and error.error.reason == pb.SESSION_UNKNOWN
    assert list(desk.answers[rows].versions) == [1, 0]


async def test_steps_of_two_policies_go_in_two_batches() -> None:
    desk = Desk()
    desk.open(1)
    desk.open(2, policy="b")
    calls = [desk.step(1), desk.step(2)]
    await turn()
    desk.engine.finish()
    assert desk.applied(calls[0]) and calls[1] not in desk.answers
    desk.engine.finish()
    assert desk.applied(*calls) and desk.batches == 2


async def test_a_caller_that_leaves_takes_only_its_own_step_with_it() -> None:
    desk = Desk()
    desk.open(1, 2, 3, 4)
    running = desk.step(1)
    await turn()
    stays, leaves = desk.step(2), desk.step(3)
    desk.intake.end_turn()
    early = desk.step(4)
    for call in (leaves, early):
        desk.stepper.leave(call)
    desk.engine.finish()
    desk.engine.finish()
    await turn()
    assert desk.applied(running, stays) and set(desk.answers) == {running, stays} and desk.engine.jobs == []
    next_index = desk.policies["a"].sessions.next_index[:4].tolist()
    assert next_index == [1, 1, 0, 0]


async def test_each_step_of_a_turn_has_its_own_deadline() -> None:
    desk = Desk()
    desk.open(1, 2, 3)
    desk.step(1)
    await turn()
    hasty, patient = desk.step(2, deadline_s=101.0), desk.step(3, deadline_s=103.0)
    desk.intake.end_turn()
    desk.now_s = 102.0
    desk.stepper.batcher.expire()
    assert desk.reason(hasty) == pb.QUEUE_TIMEOUT and patient not in desk.answers
    desk.engine.finish()
    desk.engine.finish()
    assert desk.applied(patient)


async def test_a_step_sent_twice_in_a_turn_is_applied_once_and_answered_twice() -> None:
    desk = Desk()
    desk.open(1, 2)
    first, again, ahead, other = desk.step(1), desk.step(1), desk.step(1, index=1), desk.step(2)
    await turn()
    while desk.engine.jobs:
        desk.engine.finish()
    assert desk.applied(first, again, other) and desk.reason(ahead) == pb.STEP_IN_FLIGHT
    assert desk.answers[first] == desk.answers[again]
    assert desk.policies["a"].sessions.next_index[0] == 1


async def test_a_turn_for_which_there_is_no_room_refuses_only_those_beyond_it() -> None:
    desk = Desk(max_queued=64)
    desk.open(*range(1, 71))
    desk.step(70)
    await turn()
    calls = [desk.step(i) for i in range(1, 70)]
    desk.intake.end_turn()
    refused = [call for call in calls if call in desk.answers]
    assert refused == calls[64:] and {desk.reason(c) for c in refused} == {pb.QUEUE_FULL}
    desk.engine.finish()
    desk.engine.finish()
    assert desk.applied(*calls[:64])


async def test_few_rows_wait_for_a_busy_device_and_many_are_checked_beside_it() -> None:
    desk = Desk()
    desk.open(*range(1, 70))
    desk.step(1)
    await turn()
    few = [desk.step(i) for i in range(2, 5)]
    await turn()
    assert desk.stepper.batcher.queue.num_rows == 0
    desk.engine.finish()
    assert len(desk.engine.jobs) == 1, "they are in the next batch"
    desk.engine.finish()
    assert desk.applied(*few)
    desk.now_s += 1
    desk.step(1, index=1)
    await turn()
    for i in range(5, 60):
        desk.step(i)
    await turn()
    assert desk.stepper.batcher.queue.num_rows == 55


async def test_sessions_that_step_at_once_wait_for_each_other_but_not_for_long() -> None:
    desk = Desk()
    desk.open(*range(1, 6))
    calls = [desk.step(i) for i in range(1, 6)]
    await turn()
    desk.engine.finish()
    assert desk.applied(*calls)
    early = [desk.step(i, index=1) for i in range(1, 5)]
    await turn()
    assert desk.engine.jobs == []
    last = desk.step(5, index=1)
    await turn()
    desk.engine.finish()
    assert desk.applied(*early, last) and desk.batches == 2
    alone, deadline_s = desk.step(1, index=2), asyncio.get_running_loop().time() + 10
    while not desk.engine.jobs:
        assert asyncio.get_running_loop().time() < deadline_s, "the turn never ended"
        await asyncio.sleep(0)
    desk.engine.finish()
    assert desk.applied(alone)


async def test_a_call_that_has_all_the_sessions_that_step_goes_on_at_once() -> None:
    desk = Desk()
    desk.open(1, 2, 3)
    desk.step(1)
    await turn()
    desk.engine.finish()
    # Only session 1 has stepped a moment ago: nobody else is waited for, not even for a turn of the loop.
    desk.step(1, index=1)
    assert len(desk.engine.jobs) == 1
    desk.engine.finish()
    desk.batch([2, 3])
    await turn()
    desk.engine.finish()
    desk.step(1, index=2)
    assert not desk.engine.jobs, "others step, too"
    await turn()
    assert len(desk.engine.jobs) == 1


async def test_a_brief_step_behind_another_of_its_session_does_not_take_the_others_reply(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def desk_after_one_step() -> tuple[Desk, StepCall]:
        desk = Desk()
        desk.open(1)
        return desk, desk.step(1, outputs=pb.Outputs(value=True))

    alone, expected = desk_after_one_step()
    await turn()
    alone.engine.finish()
    desk, first = desk_after_one_step()
    await turn()
    # It has arrived, and waits until the device is free; then it is over as soon as it is admitted.
    second = desk.step(1, index=1, outputs=pb.Outputs(value=True))
    monkeypatch.setattr(HostStep, "expected_s", lambda *_: 0.0)
    desk.engine.runs_brief = True
    desk.engine.finish()
    assert desk.applied(first, second) and desk.batches == 2
    assert desk.answers[first].value == alone.answers[expected].value != desk.answers[second].value
    assert (desk.answers[first].step_index, desk.answers[second].step_index) == (0, 1)


async def test_a_caller_may_leave_after_its_wait_for_anothers_step_has_ended() -> None:
    desk = Desk()
    desk.open(1, 2)
    running = desk.step(1)
    await turn()
    both = desk.batch([1, 2])
    desk.intake.end_turn()
    desk.stepper._stop_joining(both)
    desk.stepper.leave(both)
    desk.engine.finish()
    assert desk.applied(running) and not desk.policies["a"].sessions.busy[:2].any()
    assert both not in desk.answers and desk.stepper.batcher.idle


async def test_a_lone_session_never_waits_for_company() -> None:
    desk = Desk()
    desk.open(1)
    for index in range(10):
        call = desk.step(1, index=index)
        await turn()
        desk.engine.finish()
        assert desk.applied(call)


async def test_large_observations_are_checked_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "_MAX_INLINE_FLOATS", 0)
    desk = Desk()
    desk.open(1, 2)
    stays, leaves = desk.step(1), desk.step(2)
    await turn()
    assert desk.engine.jobs == []
    desk.stepper.leave(leaves)
    deadline_s = asyncio.get_running_loop().time() + 10
    while not desk.engine.jobs:
        assert asyncio.get_running_loop().time() < deadline_s, "the check never ended"
        await asyncio.sleep(0)
    desk.engine.finish()
    assert desk.applied(stays) and leaves not in desk.answers
    assert desk.policies["a"].sessions.next_index[:2].tolist() == [1, 0]


async def test_a_fault_of_ours_is_told_to_every_caller_of_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    desk, fault = Desk(), RuntimeError("a fault of ours")
    desk.open(1, 2)

    def fails(self: ObservationCodec, rows: Any) -> Any:
        raise fault

    monkeypatch.setattr(ObservationCodec, "refused_rows", fails)
    calls = [desk.step(1), desk.step(2)]
    await turn()
    assert [desk.answers[call] for call in calls] == [fault, fault]


async def test_a_row_whose_session_moved_on_meanwhile_is_told_so() -> None:
    desk = Desk()
    desk.open(1, 2)
    first = desk.step(1)
    await turn()
    rows = desk.batch([1, 2])  # Joins the first step; its other row waits for the next batch,
    desk.intake.end_turn()
    ahead = desk.step(1, index=1)  # in which the session of the first takes its next step.
    desk.engine.finish()
    desk.engine.finish()
    assert desk.applied(first, rows, ahead) and desk.batches == 2
    (error,) = desk.answers[rows].errors
    assert error.row == 0 and error.error.reason == pb.STEP_INDEX_MISMATCH
    assert list(desk.answers[rows].versions) == [0, 1]
