"""Many environments that step together: each row keeps the promises of a lone session."""

from typing import Any

import grpc
import numpy as np
import pytest

from scripted import (
    LOST_REPLY,
    NEW_EPOCH,
    Outside,
    batch_reply,
    draining,
    observation,
    queue_full,
    refusal,
    rows_fail,
    session_unknown,
    unavailable,
)
from tenuto_client import (
    CapacityError,
    DeadlineError,
    DrainingError,
    MessageTooLargeError,
    ObservationError,
    OverloadedError,
    RowsError,
    ServerUnavailableError,
    SessionExpiredError,
    SessionLostError,
    UnexpectedReplyError,
    VectorStepResult,
)
from tenuto_client.errors import error_from_reason
from tenuto_client.session_rows import SessionRows
from tenuto_proto.v1 import policy_pb2 as pb

NOT_FINITE = refusal(pb.OBSERVATION_NOT_FINITE, grpc.StatusCode.INVALID_ARGUMENT)
EXPIRED = refusal(pb.SESSION_EXPIRED, grpc.StatusCode.FAILED_PRECONDITION)


@pytest.fixture
def outside() -> Outside:
    return Outside()


def batch(*modes: int) -> dict[str, Any]:
    """One observation per mode, in the layout of gymnasium's vector environments."""
    rows = [observation(mode=mode) for mode in modes]
    return {"camera": np.stack([row["camera"] for row in rows]), "mode": np.array(modes, np.int64)}


def step(outside: Outside, rows: SessionRows, *modes: int, **arguments: Any) -> VectorStepResult:
    given = {"episode_starts": None, "rewards": None, "mask": None, "raise_errors": True, **arguments}
    return outside.drive(rows.step(batch(*modes), **given))


def started(outside: Outside, num_envs: int = 3, **options: Any) -> SessionRows:
    """Rows that have taken step 0."""
    rows = SessionRows(outside.options(**options), num_envs)
    step(outside, rows, *[0] * num_envs)
    outside.calls.clear()
    return rows


def sent(outside: Outside) -> list[tuple[list[int], list[bool]]]:
    """Step indices and episode starts of every StepBatch."""
    return [(list(r.step_indices), list(r.episode_starts)) for r in outside.sent("StepBatch")]


def test_first_step_opens_a_session_per_row_with_seeds_that_count_up(outside: Outside) -> None:
    rows = SessionRows(outside.options(seed=2**64 - 1), 3)
    result = step(outside, rows, 2, 0, 1)
    opened = outside.sent("OpenSession")
    assert [request.seed for request in opened] == [2**64 - 1, 0, 1]
    assert [request.session_id for request in opened] == rows.session_ids.tolist()
    assert sent(outside) == [([0, 0, 0], [True, True, True])]
    assert result.actions.tolist() == [2, 0, 1]
    assert result.versions.tolist() == [3, 3, 3] and not result.errors


def test_steps_carry_starts_and_rewards_only_where_there_are_some(outside: Outside) -> None:
    rows = started(outside)
    step(outside, rows, 0, 0, 0)
    step(outside, rows, 0, 0, 0, episode_starts=[False, True, False], rewards=[1.0, np.nan, 0.0])
    rows.reset([2])
    step(outside, rows, 0, 0, 0)
    assert sent(outside) == [([1, 1, 1], []), ([2, 2, 2], [False, True, False]), ([3, 3, 3], [False, False, True])]
    rewards = [list(request.rewards) for request in outside.sent("StepBatch")]
    np.testing.assert_equal(rewards[1], [1.0, np.nan, 0.0])
    assert rewards[0] == rewards[2] == []


def test_only_rows_that_a_retry_can_mend_are_sent_again(outside: Outside) -> None:
    rows = started(outside, outputs=frozenset({"value"}))
    outside.script = [rows_fail({0: queue_full(), 1: NOT_FINITE}), unavailable()]
    result = step(outside, rows, 1, 2, 0, raise_errors=False)
    assert [len(request.session_ids) for request in outside.sent("StepBatch")] == [3, 1, 1]
    assert result.actions.tolist() == [1, 0, 0]
    assert result.versions.tolist() == [3, 0, 3]
    assert result.values is not None
    np.testing.assert_equal(result.values, np.array([10, np.nan, 10], np.float32))
    assert list(result.errors) == [1] and isinstance(result.errors[1], ObservationError)
    step(outside, rows, 1, 2, 0)
    assert sent(outside)[-1][0] == [2, 1, 2]


def test_a_step_with_failed_rows_raises_and_keeps_the_other_actions(outside: Outside) -> None:
    rows = started(outside)
    outside.script = [rows_fail({2: NOT_FINITE})]
    with pytest.raises(RowsError, match="1 of 3 rows failed, row 2 first: OBSERVATION_NOT_FINITE") as caught:
        step(outside, rows, 1, 2, 0)
    assert caught.value.result.actions.tolist() == [1, 2, 0]
    assert list(caught.value.errors) == [2]
    assert (caught.value.reason, caught.value.code) == ("OBSERVATION_NOT_FINITE", grpc.StatusCode.INVALID_ARGUMENT)


def test_one_error_of_all_rows_is_raised_itself(outside: Outside) -> None:
    rows = started(outside, timeout_s=1.0)
    outside.script = [unavailable() for _ in range(50)]
    with pytest.raises(ServerUnavailableError, match="gave up after") as caught:
        step(outside, rows, 1, 2, 0)
    assert caught.value.outcome_unknown
    assert str(caught.value).count("gave up") == 1


def test_overload_until_the_deadline_leaves_rows_where_they_were(outside: Outside) -> None:
    rows = started(outside, timeout_s=1.0)
    outside.script = [rows_fail({0: queue_full()}), *[rows_fail({0: queue_full()})] * 50]
    result = step(outside, rows, 1, 2, 0, raise_errors=False)
    assert isinstance(result.errors[0], OverloadedError) and not result.errors[0].outcome_unknown
    outside.script.clear()
    outside.calls.clear()
    step(outside, rows, 2, 2, 2)
    assert sent(outside) == [([1, 2, 2], [])]


def test_a_refused_first_step_begins_no_episode_so_the_next_one_does(outside: Outside) -> None:
    rows = started(outside)
    outside.script = [rows_fail({1: NOT_FINITE})]
    step(outside, rows, 0, 0, 0, episode_starts=[True, True, False], raise_errors=False)
    step(outside, rows, 0, 0, 0)
    assert sent(outside)[-1] == ([2, 1, 2], [False, True, False])


def test_masked_rows_rest(outside: Outside) -> None:
    rows = started(outside)
    result = step(outside, rows, 1, 2, 0, mask=[True, False, True])
    assert result.versions.tolist() == [3, 0, 3] and result.actions.tolist() == [1, 0, 0]
    step(outside, rows, 0, 0, 0)
    assert sent(outside) == [([1, 1], []), ([2, 1, 2], [])]
    assert step(outside, rows, 0, 0, 0, mask=[False] * 3).versions.tolist() == [0, 0, 0]


def test_after_a_timeout_each_row_repeats_or_first_completes_its_pending_step(outside: Outside) -> None:
    rows = started(outside, timeout_s=1.0)
    outside.script = [LOST_REPLY] * 50
    with pytest.raises(DeadlineError):
        step(outside, rows, 0, 1, 2, rewards=[5.0, 6.0, 7.0])
    outside.script.clear()
    outside.calls.clear()
    # Row 0 rests, row 1 comes with another observation, row 2 with the same one.
    result = step(outside, rows, 2, 2, 2, mask=[False, True, True])
    settled, wanted = outside.sent("StepBatch")
    assert (list(settled.step_indices), list(settled.rewards)) == ([1], [6.0])
    assert list(wanted.step_indices) == [2, 1]
    np.testing.assert_equal(list(wanted.rewards), [np.nan, 7.0])
    assert result.actions.tolist() == [0, 2, 2] and result.step_indices.tolist() == [0, 2, 1]
    outside.calls.clear()
    # Row 0 has not forgotten its pending step meanwhile.
    step(outside, rows, 1, 0, 0)
    assert [indices for indices, _ in sent(outside)] == [[1], [2, 3, 2]]
    assert outside.sent("StepBatch")[0].rewards == [5.0]


def test_a_step_that_can_never_be_settled_does_not_outlive_its_episode(outside: Outside) -> None:
    rows = started(outside, num_envs=2)
    failure = error_from_reason(grpc.StatusCode.INTERNAL, 0, "internal error", {})
    outside.script = [rows_fail({1: failure})]
    result = step(outside, rows, 1, 2, raise_errors=False)
    assert result.errors[1].outcome_unknown and result.actions[0] == 1
    before = rows.session_ids.copy()
    outside.script = [rows_fail({0: failure})]
    result = step(outside, rows, 2, 1, episode_starts=[False, True])
    assert not result.errors and result.actions.tolist() == [2, 1]
    assert (rows.session_ids != before).tolist() == [False, True]
    assert rows.step_indices.tolist() == [3, 1]


def test_an_interrupted_step_stays_pending(outside: Outside) -> None:
    rows = started(outside)
    program = rows.step(batch(1, 1, 1), None, None, None, True)
    next(program)
    program.close()
    step(outside, rows, 1, 1, 2)
    assert [indices for indices, _ in sent(outside)] == [[1], [1, 1, 2]]


def test_the_observations_of_a_pending_step_are_a_copy(outside: Outside) -> None:
    rows = started(outside, timeout_s=1.0)
    outside.script = [LOST_REPLY] * 50
    observations = batch(1, 1, 1)
    with pytest.raises(DeadlineError):
        outside.drive(rows.step(observations, None, None, None, True))
    observations["mode"][:] = 2
    outside.script.clear()
    outside.calls.clear()
    outside.drive(rows.step(observations, None, None, None, True))
    assert [indices for indices, _ in sent(outside)] == [[1, 1, 1], [2, 2, 2]]


@pytest.mark.parametrize(
    ("limits", "sizes"), [({"max_batch_rows": 4}, [4, 4, 2]), ({"max_message_bytes": 1144}, [3, 3, 3, 1])]
)
def test_steps_are_cut_to_the_servers_limits_and_put_together_again(limits: dict[str, int], sizes: list[int]) -> None:
    outside = Outside(**limits)
    rows = SessionRows(outside.options(), 10)
    modes = [row % 3 for row in range(10)]
    assert step(outside, rows, *modes).actions.tolist() == modes
    assert [len(request.session_ids) for request in outside.sent("StepBatch")] == sizes


def test_a_row_over_the_limit_is_refused_before_it_is_sent() -> None:
    outside = Outside(max_message_bytes=40)
    rows = SessionRows(outside.options(), 2)
    with pytest.raises(MessageTooLargeError):
        step(outside, rows, 0, 0)
    assert not outside.sent("StepBatch")


def test_rows_that_begin_an_episode_in_a_lost_session_begin_it_in_a_new_one(outside: Outside) -> None:
    rows = started(outside)
    before = rows.session_ids.copy()
    outside.epoch = NEW_EPOCH

    def restarted(call: Any) -> pb.StepBatchResponse:
        return batch_reply(call.request, {row: session_unknown(NEW_EPOCH)(call) for row in range(3)})

    outside.script = [restarted]
    result = step(outside, rows, 1, 2, 1, episode_starts=[False, True, False], raise_errors=False)
    assert result.versions.tolist() == [0, 3, 0] and result.actions[1] == 2
    assert rows.step_indices[1] == 1 and result.step_indices[1] == 0
    assert {row: type(error) for row, error in result.errors.items()} == {0: SessionLostError, 2: SessionLostError}
    assert (rows.session_ids == 0).tolist() == [True, False, True] and rows.session_ids[1] != before[1]
    # The lost rows say so until an episode begins.
    with pytest.raises(RowsError):
        step(outside, rows, 1, 2, 1)
    result = step(outside, rows, 1, 2, 1, episode_starts=[True, False, True])
    assert result.step_indices.tolist() == [0, 2, 0]


def test_a_reply_without_columns_still_tells_why_its_rows_failed(outside: Outside) -> None:
    rows = started(outside, 1)
    error = pb.Error(code=5, reason=pb.SESSION_UNKNOWN, metadata={"server_epoch": str(NEW_EPOCH)})
    outside.script = [pb.StepBatchResponse(versions=[0], errors=[pb.RowError(row=0, error=error)])]
    with pytest.raises(SessionLostError):
        step(outside, rows, 0)


def test_a_draining_server_still_steps_the_rows_whose_episodes_run(outside: Outside) -> None:
    rows = started(outside)
    outside.script = [rows_fail({0: draining()})]
    outside.scripts["OpenSession"] = [draining()]
    result = step(outside, rows, 1, 1, 1, episode_starts=[True, False, False], rewards=[4, 5, 6], raise_errors=False)
    assert result.versions.tolist() == [0, 3, 3] and isinstance(result.errors[0], DrainingError)
    assert [request.reward for request in outside.sent("CloseSession")] == [4.0]
    assert not outside.pauses_s
    assert step(outside, rows, 2, 1, 1).step_indices.tolist() == [0, 2, 2]


def test_opening_all_sessions_or_none(outside: Outside) -> None:
    outside.scripts["OpenSession"] = [
        outside.faultless,
        refusal(pb.CAPACITY_REACHED, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ]
    rows = SessionRows(outside.options(), 3)
    with pytest.raises(CapacityError):
        outside.drive(rows.connect())
    assert len(outside.sent("CloseSession")) == 2 and not rows.session_ids.any()


def test_closing_ends_sessions_whose_opening_was_interrupted(outside: Outside) -> None:
    rows = SessionRows(outside.options(), 2)
    program = rows.connect()
    [call] = next(program).calls
    opening = program.send([outside.faultless(call)])
    program.close()
    outside.drive(rows.close(np.ones(2)))
    assert {r.session_id for r in outside.sent("CloseSession")} == {c.request.session_id for c in opening.calls}
    outside.drive(rows.close(None))
    assert len(outside.sent("CloseSession")) == 2


def test_closing_sends_the_rewards_that_are_known(outside: Outside) -> None:
    rows = started(outside)
    outside.drive(rows.close([1.0, np.nan, 3.0]))
    closed = outside.sent("CloseSession")
    assert [request.reward if request.HasField("reward") else None for request in closed] == [1.0, None, 3.0]


@pytest.mark.parametrize("broken", ["versions", "actions", "row"])
def test_replies_that_break_the_contract_are_named_so(outside: Outside, broken: str) -> None:
    rows = started(outside)

    def answer(call: Any) -> pb.StepBatchResponse:
        reply = batch_reply(call.request)
        if broken == "versions":
            reply.versions.append(3)
        elif broken == "actions":
            reply.actions.shape[:] = [1, 3]
        else:
            reply.errors.append(pb.RowError(row=3))
        return reply

    outside.script = [answer]
    with pytest.raises(UnexpectedReplyError):
        step(outside, rows, 0, 0, 0)


@pytest.mark.parametrize("name", ["episode_starts", "rewards", "mask"])
def test_columns_of_another_length_are_refused(outside: Outside, name: str) -> None:
    rows = SessionRows(outside.options(), 3)
    with pytest.raises(ValueError, match=rf"{name}: got shape \(2,\), expected \(3,\)"):
        step(outside, rows, 0, 0, 0, **{name: [1, 1]})


def test_an_expired_row_is_told_from_the_others(outside: Outside) -> None:
    rows = started(outside, 2)
    outside.script = [rows_fail({0: EXPIRED})]
    with pytest.raises(RowsError) as caught:
        step(outside, rows, 0, 0)
    assert isinstance(caught.value.errors[0], SessionExpiredError)
