"""One environment's session: each observation is applied exactly once, whatever the network does."""

import itertools
from typing import Any

import grpc
import numpy as np
import pytest

from scripted import (
    LOST_REPLY,
    NEW_EPOCH,
    Outside,
    draining,
    observation,
    queue_full,
    refusal,
    session_unknown,
    timed_out,
    unavailable,
)
from tenuto_client import (
    CapacityError,
    ComputeError,
    DeadlineError,
    DrainingError,
    MessageTooLargeError,
    ObservationError,
    OverloadedError,
    PolicyUnknownError,
    ServerUnavailableError,
    SessionExpiredError,
    SessionLostError,
    SessionUnknownError,
    SpaceMismatchError,
    StepIndexError,
    StepResult,
    TenutoError,
    UnexpectedReplyError,
)
from tenuto_client.effects import Program
from tenuto_client.errors import error_from_reason
from tenuto_client.session import Session
from tenuto_client.step import Step
from tenuto_proto import array_to_wire
from tenuto_proto.v1 import policy_pb2 as pb


@pytest.fixture
def outside() -> Outside:
    return Outside()


def started(outside: Outside, **options: object) -> Session:
    """A session that has taken step 0."""
    session = Session(outside.options(**options))
    outside.drive(session.step(observation(), False, None))
    outside.calls.clear()
    return session


def test_first_step_opens_a_session_and_begins_an_episode(outside: Outside) -> None:
    session = Session(outside.options(seed=5, deterministic=True, version=2))
    result = outside.drive(session.step(observation(mode=2), False, None))
    assert [call.method for call in outside.calls] == ["GetPolicy", "OpenSession", "Step"]
    _, opened, step = (call.request for call in outside.calls)
    assert isinstance(opened, pb.OpenSessionRequest) and isinstance(step, pb.StepRequest)
    assert opened.session_id == session.session_id != 0
    assert (opened.policy_name, opened.version, opened.seed, opened.deterministic) == ("walker", 2, 5, True)
    assert (step.session_id, step.step_index, step.episode_start) == (session.session_id, 0, True)
    assert not step.HasField("reward")
    assert (result.action, type(result.action), result.version, result.step_index) == (2, int, 3, 0)
    assert [call.session_id for call in outside.calls] == [0, session.session_id, session.session_id]


def test_steps_count_up_and_carry_rewards_and_episode_starts(outside: Outside) -> None:
    session = started(outside)
    outside.drive(session.step(observation(), False, 0.5))
    session.reset()
    outside.drive(session.step(observation(), False, -1.0))
    outside.drive(session.step(observation(), True, None))
    seen = [(s.step_index, s.episode_start, s.reward if s.HasField("reward") else None) for s in outside.sent("Step")]
    assert seen == [(1, False, 0.5), (2, True, -1.0), (3, True, None)]


def test_transient_failures_are_retried_with_the_same_request_and_growing_pauses(outside: Outside) -> None:
    session = started(outside)
    in_flight = refusal(pb.STEP_IN_FLIGHT, grpc.StatusCode.ABORTED)
    late = refusal(pb.QUEUE_TIMEOUT, grpc.StatusCode.DEADLINE_EXCEEDED)
    outside.script = [unavailable(), queue_full(), late, in_flight, unavailable()]
    assert outside.drive(session.step(observation(mode=1), False, 1.0)).action == 1
    steps = outside.sent("Step")
    assert len(steps) == 6 and all(step == steps[0] for step in steps)
    for number, pause_s in enumerate(outside.pauses_s):
        assert 0.5 <= pause_s / (0.02 * 2**number) <= 1


def test_an_attempt_leaves_time_for_another_one_and_all_end_at_the_deadline(outside: Outside) -> None:
    session = started(outside, timeout_s=4.0)
    outside.script = [LOST_REPLY] * 50
    began_s = outside.now_s
    with pytest.raises(DeadlineError, match=r"gave up after \d+ attempts in 4 s") as caught:
        outside.drive(session.step(observation(), False, None))
    assert caught.value.outcome_unknown
    assert outside.now_s - began_s <= 4.0 + 1e-6
    timeouts = [call.timeout_s for call in outside.calls]
    assert timeouts[0] == 2.0 and all(later < earlier for earlier, later in itertools.pairwise(timeouts))


def test_last_error_is_raised_when_the_time_is_up(outside: Outside) -> None:
    session = started(outside, timeout_s=1.0)
    outside.script = [queue_full()] * 50
    with pytest.raises(OverloadedError) as caught:
        outside.drive(session.step(observation(), False, None))
    assert caught.value.reason == "QUEUE_FULL" and not caught.value.outcome_unknown


def test_after_a_timeout_the_same_observation_repeats_the_same_step(outside: Outside) -> None:
    session = started(outside, timeout_s=1.0)
    outside.script = [LOST_REPLY] * 10
    with pytest.raises(DeadlineError):
        outside.drive(session.step(observation(0.5), False, 1.0))
    outside.script.clear()
    sent = outside.sent("Step")[0]
    assert outside.drive(session.step(observation(0.5), False, 1.0)).step_index == 1
    assert outside.sent("Step")[-1] == sent
    assert session.step_index == 2


def test_after_a_timeout_another_observation_first_completes_the_pending_step(outside: Outside) -> None:
    session = started(outside, timeout_s=1.0)
    outside.script = [LOST_REPLY] * 10
    with pytest.raises(DeadlineError):
        outside.drive(session.step(observation(mode=1), False, None))
    outside.script.clear()
    outside.calls.clear()
    assert outside.drive(session.step(observation(mode=2), False, None)).action == 2
    settled, wanted = outside.sent("Step")
    assert (settled.step_index, wanted.step_index) == (1, 2)
    assert settled.observation != wanted.observation


def test_a_pending_first_step_is_not_begun_twice(outside: Outside) -> None:
    session = started(outside, timeout_s=1.0)
    outside.script = [LOST_REPLY] * 10
    with pytest.raises(DeadlineError):
        outside.drive(session.step(observation(mode=1), True, None))
    outside.script.clear()
    outside.calls.clear()
    outside.drive(session.step(observation(mode=2), False, None))
    assert [(s.step_index, s.episode_start) for s in outside.sent("Step")] == [(1, True), (2, False)]


def test_a_refusal_after_a_lost_reply_leaves_the_outcome_unknown(outside: Outside) -> None:
    session = started(outside, timeout_s=1.0)
    outside.script = [LOST_REPLY, *[queue_full()] * 50]
    with pytest.raises(OverloadedError) as caught:
        outside.drive(session.step(observation(mode=1), False, None))
    assert caught.value.outcome_unknown
    outside.script.clear()
    outside.calls.clear()
    outside.drive(session.step(observation(mode=2), False, None))
    assert [s.step_index for s in outside.sent("Step")] == [1, 2]


def test_a_step_that_can_never_be_settled_does_not_outlive_its_episode(outside: Outside) -> None:
    """A server that answers one step with INTERNAL for ever: nobody knows whether it was applied."""
    session = Session(outside.options())
    outside.drive(session.step(observation(mode=0), True, None))
    failure = error_from_reason(grpc.StatusCode.INTERNAL, 0, "internal error", {})
    for _ in range(2):
        outside.script = [failure]
        with pytest.raises(TenutoError) as caught:
            outside.drive(session.step(observation(mode=1), False, None))
        assert caught.value.outcome_unknown
    first_id = session.session_id
    outside.script = [failure]
    result = outside.drive(session.step(observation(mode=2), True, None))
    assert (result.action, result.step_index) == (2, 0) and session.session_id != first_id
    assert [request.session_id for request in outside.sent("CloseSession")] == [first_id]


def test_an_interrupted_step_stays_pending(outside: Outside) -> None:
    session = started(outside)
    program = session.step(observation(mode=1), False, None)
    next(program)
    program.close()
    outside.drive(session.step(observation(mode=2), False, None))
    assert [s.step_index for s in outside.sent("Step")] == [1, 2]


@pytest.mark.parametrize(
    ("reason", "code", "kind"),
    [
        (pb.OBSERVATION_OUT_OF_SPACE, grpc.StatusCode.INVALID_ARGUMENT, ObservationError),
        (pb.COMPUTE_FAILED, grpc.StatusCode.INTERNAL, ComputeError),
    ],
)
def test_a_refused_step_is_not_retried_and_leaves_the_session_where_it_was(
    outside: Outside, reason: pb.ErrorReason, code: grpc.StatusCode, kind: type[Exception]
) -> None:
    session = started(outside)
    outside.script = [refusal(reason, code)]
    with pytest.raises(kind):
        outside.drive(session.step(observation(mode=1), True, None))
    assert outside.drive(session.step(observation(mode=2), False, None)).action == 2
    # The refused first step began no episode, so the next one does.
    assert [(s.step_index, s.episode_start) for s in outside.sent("Step")] == [(1, True), (1, True)]


def test_step_index_error_tells_the_expected_index(outside: Outside) -> None:
    session = started(outside)
    outside.script = [refusal(pb.STEP_INDEX_MISMATCH, grpc.StatusCode.ABORTED, expected="9")]
    with pytest.raises(StepIndexError) as caught:
        outside.drive(session.step(observation(), False, None))
    assert caught.value.expected == 9


def test_a_restarted_server_loses_the_episode_and_the_next_one_gets_a_new_session(outside: Outside) -> None:
    session = started(outside)
    old_id = session.session_id
    outside.epoch = NEW_EPOCH
    outside.script = [session_unknown(NEW_EPOCH)]
    with pytest.raises(SessionLostError, match="restarted"):
        outside.drive(session.step(observation(), False, None))
    with pytest.raises(SessionLostError):
        outside.drive(session.step(observation(), False, None))
    assert len(outside.sent("Step")) == 1
    outside.drive(session.step(observation(), True, 1.0))
    step = outside.sent("Step")[-1]
    assert session.session_id == step.session_id not in (0, old_id)
    assert (step.step_index, step.episode_start) == (0, True)


def test_a_session_that_the_same_server_forgot_is_unknown_not_lost(outside: Outside) -> None:
    session = started(outside)
    outside.script = [session_unknown(outside.epoch)]
    with pytest.raises(SessionUnknownError) as caught:
        outside.drive(session.step(observation(), False, None))
    assert type(caught.value) is SessionUnknownError


def test_an_episode_that_begins_in_an_expired_session_begins_in_a_new_one(outside: Outside) -> None:
    session = started(outside)
    outside.script = [refusal(pb.SESSION_EXPIRED, grpc.StatusCode.FAILED_PRECONDITION)]
    result = outside.drive(session.step(observation(mode=2), True, 1.0))
    assert (result.action, result.step_index) == (2, 0)
    assert not outside.sent("Step")[-1].HasField("reward")
    outside.script = [refusal(pb.SESSION_EXPIRED, grpc.StatusCode.FAILED_PRECONDITION)]
    with pytest.raises(SessionExpiredError):
        outside.drive(session.step(observation(), False, None))


def test_draining_ends_no_episode_but_moves_the_next_one(outside: Outside) -> None:
    session = started(outside)
    outside.script = [draining()]
    with pytest.raises(DrainingError):
        outside.drive(session.step(observation(), False, None))
    assert len(outside.sent("Step")) == 1
    outside.script = [draining()]
    outside.scripts["OpenSession"] = [draining(), draining()]
    outside.drive(session.step(observation(), True, 2.0))
    assert [call.method for call in outside.calls[1:]] == [
        "Step", "CloseSession", "GetPolicy", "OpenSession", "OpenSession", "OpenSession", "Step"
    ]  # fmt: skip
    assert outside.sent("CloseSession")[0].reward == 2.0


def test_opening_is_retried_with_the_same_session_id(outside: Outside) -> None:
    session = Session(outside.options())
    outside.scripts["OpenSession"] = [unavailable(), LOST_REPLY]
    outside.drive(session.connect())
    ids = [request.session_id for request in outside.sent("OpenSession")]
    assert len(ids) == 3 and set(ids) == {session.session_id}


def test_waits_for_a_policy_only_if_asked_to(outside: Outside) -> None:
    unknown = refusal(pb.POLICY_UNKNOWN, grpc.StatusCode.NOT_FOUND)
    outside.scripts["GetPolicy"] = [unavailable(), *[unknown] * 5]
    outside.drive(Session(outside.options(wait_for_policy_s=60.0)).connect())
    assert len(outside.sent("GetPolicy")) == 7
    outside.scripts["GetPolicy"] = [unknown]
    with pytest.raises(PolicyUnknownError):
        outside.drive(Session(outside.options()).connect())


def test_a_server_that_never_comes_up_is_unavailable(outside: Outside) -> None:
    outside.scripts["GetPolicy"] = [unavailable() for _ in range(200)]
    began_s = outside.now_s
    with pytest.raises(ServerUnavailableError, match="gave up after"):
        outside.drive(Session(outside.options(wait_for_policy_s=20.0)).connect())
    assert 15 < outside.now_s - began_s <= 20


def test_waiting_for_a_policy_ends_when_it_should_and_says_what_it_waits_for(outside: Outside) -> None:
    outside.scripts["GetPolicy"] = [unavailable()] * 3 + [refusal(pb.POLICY_UNKNOWN, grpc.StatusCode.NOT_FOUND)] * 1000
    waited: list[TenutoError] = []
    began_s = outside.now_s
    with pytest.raises(PolicyUnknownError):
        outside.drive(Session(outside.options(wait_for_policy_s=3.0, timeout_s=5.0)).connect(waited.append))
    assert outside.now_s - began_s <= 3.0
    assert [type(error) for error in waited[:4]] == [ServerUnavailableError] * 3 + [PolicyUnknownError]


def test_closing_ends_a_session_whose_opening_was_interrupted(outside: Outside) -> None:
    session = Session(outside.options())
    program = session.connect()
    program.send([outside.faultless(next(program).calls[0])])
    program.close()
    outside.drive(session.close(1.0))
    [request] = outside.sent("CloseSession")
    assert request.session_id and not request.HasField("reward")
    outside.drive(session.close(None))
    assert len(outside.sent("CloseSession")) == 1


def test_a_full_server_is_reported_at_once(outside: Outside) -> None:
    outside.scripts["OpenSession"] = [refusal(pb.CAPACITY_REACHED, grpc.StatusCode.RESOURCE_EXHAUSTED)]
    with pytest.raises(CapacityError):
        outside.drive(Session(outside.options()).connect())
    assert not outside.pauses_s


def test_spaces_that_changed_with_a_restart_are_refused(outside: Outside) -> None:
    session = started(outside)
    outside.policy.action_space.discrete.n = 9
    outside.script = [session_unknown(NEW_EPOCH)]
    with pytest.raises(SpaceMismatchError):
        outside.drive(session.step(observation(), True, None))


def test_an_observation_that_does_not_fit_is_refused_before_it_is_sent(outside: Outside) -> None:
    session = started(outside)
    with pytest.raises(ObservationError) as caught:
        outside.drive(session.step({"camera": np.zeros(3, np.float32), "mode": 0}, False, None))
    assert caught.value.reason == "OBSERVATION_SHAPE" and not outside.calls


def test_a_message_over_the_limit_is_refused_before_it_is_sent() -> None:
    outside = Outside(max_message_bytes=40)
    session = Session(outside.options())
    with pytest.raises(MessageTooLargeError, match="expected at most 40"):
        outside.drive(session.step(observation(), True, None))
    assert not outside.sent("Step")


def test_replies_that_break_the_contract_are_named_so(outside: Outside) -> None:
    session = started(outside)
    outside.script = [pb.StepResponse(step_index=8, action=array_to_wire(np.array(1)))]
    with pytest.raises(UnexpectedReplyError, match="step index 8"):
        outside.drive(session.step(observation(), False, None))
    outside.script = [lambda call: pb.StepResponse(step_index=1, action=array_to_wire(np.zeros(2)))]
    with pytest.raises(UnexpectedReplyError, match="shape"):
        outside.drive(session.step(observation(), False, None))


def test_closing_sends_the_last_reward_until_it_arrives(outside: Outside) -> None:
    session = started(outside)
    outside.scripts["CloseSession"] = [unavailable()]
    outside.drive(session.close(3.0))
    outside.drive(session.close(None))
    assert [request.reward for request in outside.sent("CloseSession")] == [3.0, 3.0]
    assert session.session_id == 0


def test_closing_survives_a_dead_server_and_does_not_wait_long(outside: Outside) -> None:
    session = started(outside)
    outside.scripts["CloseSession"] = [unavailable() for _ in range(100)]
    began_s = outside.now_s
    outside.drive(session.close(None))
    assert outside.now_s - began_s <= 2.0


def test_two_methods_at_once_are_refused(outside: Outside) -> None:
    session = started(outside)
    program = session.step(observation(), False, None)
    next(program)
    with pytest.raises(RuntimeError, match="under way"):
        outside.drive(session.step(observation(), False, None))
    program.close()
    outside.drive(session.step(observation(), False, None))


# ------------------------------------------------------------------------------------- the usual step over a stream


def begun(session: Session, *arguments: Any) -> Step:
    step = session.begin(*arguments)
    assert step is not None
    return step


def settled(outside: Outside, session: Session, step: Step, answer: TenutoError) -> StepResult:
    """Drive settle() whose first effect, the step's first attempt, was answered so."""
    program = session.settle(step)
    assert [call.step for call in next(program).calls] == [step]

    def rest() -> Program[StepResult]:
        try:
            effect = program.send([answer])
        except StopIteration as stop:
            return stop.value
        while True:
            try:
                effect = program.send((yield effect))
            except StopIteration as stop:
                return stop.value

    return outside.drive(rest())


def test_the_usual_step_is_the_one_that_the_program_would_send(outside: Outside) -> None:
    session = started(outside)
    step = begun(session, observation(0.5, mode=2), True, 1.5)
    assert (step.session_id, step.step_index, step.begins, step.reward) == (session.session_id, 1, True, 1.5)
    result = step.read(outside.faultless(step.call(1.0)))
    session.applied(result)
    assert session.step_index == 2
    assert not begun(session, observation(), False, None).begins
    session.applied(result)
    session.reset()
    assert begun(session, observation(), False, None).begins


def test_no_step_is_usual_before_a_session_is_open_or_while_one_is_pending(outside: Outside) -> None:
    assert Session(outside.options()).begin(observation(), False, None) is None
    session = started(outside)
    begun(session, observation(mode=1), False, None)
    assert session.begin(observation(mode=2), False, None) is None
    result = outside.drive(session.step(observation(mode=2), False, None))
    assert [s.step_index for s in outside.sent("Step")] == [1, 2] and result.action == 2


def test_no_step_is_usual_where_a_message_could_be_too_large() -> None:
    outside = Outside(max_message_bytes=1000)
    assert started(outside).begin(observation(), False, None) is None


def test_an_observation_that_does_not_fit_leaves_nothing_pending(outside: Outside) -> None:
    session = started(outside)
    with pytest.raises(ObservationError):
        session.begin(2, False, None)
    assert begun(session, observation(), False, None).step_index == 1


def test_a_usual_step_that_failed_is_retried_as_it_was_within_its_time(outside: Outside) -> None:
    session = started(outside, timeout_s=4.0)
    assert session.first_attempt_s == 2.0
    step = begun(session, observation(mode=2), False, 0.5)
    outside.now_s += 2.0
    outside.script = [LOST_REPLY] * 50
    with pytest.raises(DeadlineError, match=r"gave up after \d+ attempts in 4 s") as caught:
        settled(outside, session, step, timed_out())
    assert caught.value.outcome_unknown and outside.now_s <= 104.0 + 1e-6
    assert {(s.step_index, s.reward) for s in outside.sent("Step")} == {(1, 0.5)}
    outside.script.clear()
    assert outside.drive(session.step(observation(mode=2), False, 0.5)).step_index == 1


def test_a_usual_step_that_was_refused_leaves_the_session_where_it_was(outside: Outside) -> None:
    session = started(outside)
    step = begun(session, observation(mode=1), True, None)
    with pytest.raises(ComputeError):
        settled(outside, session, step, refusal(pb.COMPUTE_FAILED, grpc.StatusCode.INTERNAL))
    again = begun(session, observation(mode=2), False, None)
    assert (again.step_index, again.begins) == (1, True)


def test_an_episode_that_begins_usually_in_a_lost_session_begins_in_a_new_one(outside: Outside) -> None:
    session = started(outside)
    lost = refusal(pb.SESSION_EXPIRED, grpc.StatusCode.FAILED_PRECONDITION)
    result = settled(outside, session, begun(session, observation(mode=2), True, 1.0), lost)
    assert (result.action, result.step_index) == (2, 0)
    step = begun(session, observation(), False, None)
    assert step.session_id == session.session_id and step.step_index == 1
    with pytest.raises(SessionExpiredError):
        settled(outside, session, step, lost)
    assert session.begin(observation(), False, None) is None
    with pytest.raises(SessionExpiredError):
        outside.drive(session.step(observation(), False, None))
