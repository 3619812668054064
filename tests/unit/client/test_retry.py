"""When a call is made again: the server's hint, and the budget that keeps retries from feeding an overload."""

from __future__ import annotations

import grpc
import pytest

from scripted import Outside, observation, unavailable
from tenuto_client import OverloadedError, ServerUnavailableError
from tenuto_client.errors import TenutoError, error_from_reason
from tenuto_client.retry import RetryBudget
from tenuto_client.session import Session
from tenuto_client.session_rows import SessionRows
from tenuto_proto.v1 import policy_pb2 as pb


def overloaded(
    retry_after_s: float | None = None, reason: pb.ErrorReason = pb.QUEUE_FULL, **metadata: str
) -> TenutoError:
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    return error_from_reason(code, reason, pb.ErrorReason.Name(reason), metadata, retry_after_s=retry_after_s)


def started(outside: Outside, **options: object) -> Session:
    """A session that has taken step 0."""
    session = Session(outside.options(**options))
    outside.drive(session.step(observation(), False, None))
    outside.calls.clear()
    return session


@pytest.fixture
def outside() -> Outside:
    return Outside()


def test_a_retry_waits_at_least_as_long_as_the_server_asks_and_not_in_step_with_others() -> None:
    pauses: list[float] = []
    for seed in range(20):
        outside = Outside()
        session = started(outside)
        session.options.timing.rng.seed(seed)
        outside.script = [overloaded(0.6)]
        outside.drive(session.step(observation(), False, None))
        pauses += outside.pauses_s
    assert len(pauses) == 20 and all(0.6 <= pause_s <= 0.9 for pause_s in pauses)
    assert max(pauses) - min(pauses) > 0.1


def test_a_hint_beyond_the_deadline_ends_the_step_at_once(outside: Outside) -> None:
    session = started(outside, timeout_s=2.0)
    outside.script = [overloaded(5.0)]
    with pytest.raises(OverloadedError) as caught:
        outside.drive(session.step(observation(), False, None))
    assert caught.value.retry_after_s == 5.0 and not caught.value.outcome_unknown
    assert outside.pauses_s == [] and len(outside.calls) == 1
    assert outside.drive(session.step(observation(mode=1), False, None)).step_index == 1


def test_rows_wait_for_the_longest_of_their_hints(outside: Outside) -> None:
    rows = SessionRows(outside.options(), 2)
    outside.drive(rows.connect())

    def refused(call: object) -> pb.StepBatchResponse:
        errors = [
            pb.RowError(row=row, error=pb.Error(code=8, reason=pb.QUEUE_FULL, retry_after_ms=ms))
            for row, ms in enumerate((100, 700))
        ]
        return pb.StepBatchResponse(versions=[0, 0], errors=errors)

    outside.script = [refused]
    stacked = {name: [value, value] for name, value in observation().items()}
    outside.drive(rows.step(stacked, None, None, None, True))
    [pause_s] = outside.pauses_s
    assert 0.7 <= pause_s <= 1.05


def test_retries_of_an_overloaded_server_are_a_share_of_what_succeeds(outside: Outside) -> None:
    session = started(outside)
    began_s, num_steps = outside.now_s, 200
    for _ in range(num_steps):
        outside.script = [overloaded()]
        outside.drive(session.step(observation(), False, None))
    retries = len(outside.calls) - num_steps
    assert retries == num_steps, "each step was refused once and then applied"
    # A fifth of the steps, one a second, and the reserve: the rest had to be waited for.
    assert outside.now_s - began_s >= retries - 0.2 * num_steps - 10 - 1


def test_an_overload_that_lasts_costs_a_call_a_second(outside: Outside) -> None:
    session = started(outside)
    began_s = outside.now_s
    for _ in range(20):
        outside.script = [overloaded()] * 100
        with pytest.raises(OverloadedError, match="gave up after"):
            outside.drive(session.step(observation(), False, None))
    assert len(outside.calls) <= 20 + (outside.now_s - began_s) + 10 + 1


def test_a_server_that_comes_back_costs_no_token(outside: Outside) -> None:
    session = started(outside, timeout_s=30.0)
    for _ in range(10):
        outside.script = [unavailable() for _ in range(20)]
        outside.drive(session.step(observation(), False, None))
    outside.pauses_s.clear()
    outside.script = [overloaded()]
    outside.drive(session.step(observation(), False, None))
    assert outside.pauses_s[0] <= 0.02, "the reserve is untouched"
    outside.script = [unavailable() for _ in range(1000)]
    with pytest.raises(ServerUnavailableError):
        outside.drive(session.step(observation(), False, None))


def test_too_many_sessions_are_not_tried_again_and_too_many_steps_are(outside: Outside) -> None:
    session = Session(outside.options())
    outside.scripts["OpenSession"] = [overloaded(None, pb.QUOTA_EXCEEDED, quota="sessions")]
    with pytest.raises(OverloadedError):
        outside.drive(session.connect())
    assert outside.pauses_s == []
    outside.drive(session.connect())
    outside.script = [overloaded(0.5, pb.QUOTA_EXCEEDED, quota="steps")]
    outside.drive(session.step(observation(), False, None))
    assert len(outside.pauses_s) == 1


def test_an_idle_budget_fills_no_further_than_its_reserve() -> None:
    budget = RetryBudget(ratio=0.2, per_s=1.0, reserve=3.0)
    budget.spend(0.0)
    for _ in range(3):
        assert budget.wait_s(1000.0) == 0.0
        budget.spend(1000.0)
    assert budget.wait_s(1000.0) == 1.0 and budget.wait_s(1000.75) == 0.25
    for _ in range(5):
        budget.succeeded()
    assert budget.wait_s(1000.75) == 0.0
