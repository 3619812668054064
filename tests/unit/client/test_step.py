"""Steps joined into one message, and its answer cut into theirs."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest
from gymnasium import spaces

from scripted import EPOCH, NEW_EPOCH, Outside, batch_reply, observation, queue_full, refusal
from tenuto_client import OverloadedError, ServedPolicy, SessionLostError, StepResult, TenutoError, UnexpectedReplyError
from tenuto_client.step import Step, StepForm
from tenuto_proto import array_to_wire, space_to_wire
from tenuto_proto.v1 import policy_pb2 as pb


def form(outputs: tuple[str, ...] = (), action_space: Any = None, epoch: int = EPOCH) -> StepForm:
    outside = Outside()
    if action_space is not None:
        outside.policy.action_space.CopyFrom(space_to_wire(action_space))
    return StepForm(ServedPolicy.from_wire(outside.policy), epoch, outside.options(outputs=frozenset(outputs)))


def steps(of: StepForm, n: int) -> list[Step]:
    """Session 100 + i is at step i, sees mode i and a camera of i / 10, and begins an episode where i is 1."""
    packed = [of.served.pack_row(observation(i / 10, i)) for i in range(n)]
    return [Step(of, 100 + i, i, i == 1, None if i == 0 else i / 2, packed[i]) for i in range(n)]


def tensor(*numbers: Any, dtype: Any = np.float32) -> pb.Tensor:
    return array_to_wire(np.array(numbers, dtype))


def test_a_message_has_the_rows_of_its_steps() -> None:
    three = form(("value",))
    request = three.join(steps(three, 3), 0.25)
    assert list(request.session_ids) == [100, 101, 102] and list(request.step_indices) == [0, 1, 2]
    assert list(request.episode_starts) == [False, True, False]
    np.testing.assert_array_equal(request.rewards, np.array([np.nan, 0.5, 1.0]))
    assert (request.outputs.value, request.outputs.logits, request.queue_timeout_ms) == (True, False, 250)
    rows = three.served.codec.unpack(request.observations, 3)
    np.testing.assert_array_equal(rows["camera"], np.array([[0, 0], [0.1, 0.1], [0.2, 0.2]], np.float32))
    assert rows["mode"].tolist() == [0, 1, 2]


def test_a_message_equals_the_unary_call_of_its_step() -> None:
    one = form(("logits",))
    [step] = steps(one, 1)
    request, joined = step.request(), one.join([step], 1.0)
    assert (request.session_id, request.step_index, request.outputs) == (100, 0, joined.outputs)
    assert [o.tensor.data for o in request.observation] == [o.tensor.data for o in joined.observations]
    assert not request.HasField("reward") and not joined.episode_starts


def test_only_steps_of_one_policy_server_and_outputs_may_share_a_message() -> None:
    assert form().key == form().key
    assert len({form().key, form(("value",)).key, form(epoch=NEW_EPOCH).key}) == 3


def test_a_reward_that_is_no_number_is_refused_before_it_can_spoil_a_message() -> None:
    any_form = form()
    with pytest.raises(TypeError):
        Step(any_form, 1, 0, False, [1.0], ())  # pyright: ignore[reportArgumentType]


def test_each_step_gets_its_row_of_the_answer() -> None:
    two = form(("value", "log_prob", "logits"))
    reply = pb.StepBatchResponse(
        versions=[3, 4],
        actions=tensor(2, 1, dtype=np.int64),
        values=tensor(0.5, -1.5),
        log_probs=tensor(-1, -2),
        logits=tensor([1, 2, 3], [4, 5, 6]),
        timings=pb.Timings(queue_us=7, compute_us=8, batch_size=2),
    )
    first, second = two.cut(steps(two, 2), reply)
    assert isinstance(first, StepResult) and isinstance(second, StepResult)
    assert (first.action, type(first.action), first.value, first.log_prob) == (2, int, 0.5, -1.0)
    assert (first.version, first.step_index, first.timings.queue_us) == (3, 0, 7)
    assert (second.action, second.value, second.version, second.step_index) == (1, -1.5, 4, 1)
    assert first.logits is not None and second.logits is not None
    first.logits[:] = 0
    assert second.logits.tolist() == [4, 5, 6]


def test_actions_that_are_arrays_are_each_callers_own() -> None:
    two = form(action_space=spaces.Box(-1, 1, (2,)))
    first, second = two.cut(steps(two, 2), pb.StepBatchResponse(versions=[1, 1], actions=tensor([1, 2], [3, 4])))
    assert isinstance(first, StepResult) and isinstance(second, StepResult) and first.value is None
    first.action[:] = 0
    assert second.action.tolist() == [3, 4] and second.action.dtype == np.float32


def test_a_row_that_failed_has_its_own_error_and_the_others_their_actions() -> None:
    three = form()
    asked = steps(three, 3)
    first, second, third = three.cut(asked, batch_reply(three.join(asked, 1.0), {1: queue_full()}))
    assert isinstance(first, StepResult) and isinstance(third, StepResult)
    assert (first.action, third.action) == (0, 2) and isinstance(second, OverloadedError)


def test_all_rows_may_fail_without_any_columns() -> None:
    two = form()
    lost = refusal(pb.SESSION_UNKNOWN, grpc.StatusCode.NOT_FOUND)
    wire = pb.Error(code=5, reason=pb.SESSION_UNKNOWN, message=str(lost), metadata={"server_epoch": str(NEW_EPOCH)})
    reply = pb.StepBatchResponse(versions=[0, 0], errors=[pb.RowError(row=row, error=wire) for row in (0, 1)])
    assert [type(answer) for answer in two.cut(steps(two, 2), reply)] == [SessionLostError] * 2


def test_a_refused_message_fails_each_step_with_an_error_of_its_own() -> None:
    two = form()
    wire = pb.Error(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], reason=pb.QUEUE_FULL, message="full")
    first, second = two.cut(steps(two, 2), pb.StepBatchResponse(error=wire))
    assert isinstance(first, OverloadedError) and isinstance(second, OverloadedError) and first is not second


GOOD = pb.StepBatchResponse(versions=[1, 1], actions=tensor(0, 1, dtype=np.int64))


@pytest.mark.parametrize(
    "change",
    [
        {"versions": [1]},
        {"actions": tensor(0, dtype=np.int64)},
        {"actions": pb.Tensor()},
        {"values": tensor(1, 2, 3)},
        {"log_probs": tensor([1], [2])},
        {"logits": tensor(1, 2)},
        {"errors": [pb.RowError(row=2)]},
    ],
)
def test_an_answer_that_cannot_be_cut_is_named_so_to_every_step(change: dict[str, Any]) -> None:
    two = form()
    reply = pb.StepBatchResponse()
    reply.CopyFrom(GOOD)
    assert all(isinstance(answer, StepResult) for answer in two.cut(steps(two, 2), reply))
    for name in change:
        reply.ClearField(name)
    reply.MergeFrom(pb.StepBatchResponse(**change))
    first, second = two.cut(steps(two, 2), reply)
    assert isinstance(first, UnexpectedReplyError) and isinstance(second, TenutoError) and first is not second
