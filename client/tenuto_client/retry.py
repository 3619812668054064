"""When and how long to try again: deadlines, jittered exponential backoff, the server's hints, a budget of retries, and
which errors a retry can mend.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from tenuto_client.effects import Call, Calls, Program, Sleep
from tenuto_client.errors import (
    DeadlineError,
    DrainingError,
    OverloadedError,
    QuotaExceededError,
    ServerUnavailableError,
    StepInFlightError,
    TenutoError,
)

MAX_PARALLEL_CALLS = 64
"""Unary calls under way at once."""
_AMBIGUOUS = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}


class RetryBudget:
    """Bounds what a policy sends again to a server that has too much to do, so that retries do not keep it so.

    A bucket of tokens: a retry takes one, a method that succeeds brings ``ratio`` of one, a second ``per_s`` of them.
    So retries are at most a fifth of what succeeds, and one in a second, beyond a small reserve. A retry for which
    there is no token waits for it. Only what an overload causes costs tokens, see :func:`is_pushback`: after a lost
    connection or a restart the backoff is patience enough. Owned by one policy.
    """

    def __init__(self, ratio: float = 0.2, per_s: float = 1.0, reserve: float = 10.0) -> None:
        self.ratio, self.per_s, self.reserve = ratio, per_s, reserve
        self._tokens = reserve
        self._counted_s: float | None = None
        """Until when the seconds have brought theirs."""

    def succeeded(self) -> None:
        """Note that a method succeeded."""
        self._tokens = min(self.reserve, self._tokens + self.ratio)

    def wait_s(self, now_s: float) -> float:
        """Seconds until there is a token; 0 where there is one."""
        self._count(now_s)
        return max(0.0, 1.0 - self._tokens) / self.per_s

    def spend(self, now_s: float) -> None:
        """Take the token of a retry that begins now or, where :meth:`wait_s` says so, later."""
        self._count(now_s)
        self._tokens -= 1.0

    def _count(self, now_s: float) -> None:
        if self._counted_s is not None:
            self._tokens = min(self.reserve, self._tokens + (now_s - self._counted_s) * self.per_s)
        self._counted_s = now_s


@dataclass(frozen=True)
class Timing:
    """Clock, randomness and pauses of one policy; handed in, so that tests own them."""

    clock: Callable[[], float] = time.monotonic
    """Seconds, never going back."""
    rng: random.Random = field(default_factory=random.SystemRandom)
    first_pause_s: float = 0.02
    max_pause_s: float = 1.0
    min_attempt_s: float = 0.1
    """An attempt gets half of the time that is left, but at least this."""
    budget: RetryBudget = field(default_factory=RetryBudget, compare=False)
    """Of the policy's retries."""

    def deadline(self, total_s: float) -> Deadline:
        """Start the clock of one operation."""
        return Deadline(self, total_s, self.clock() + total_s)


@dataclass(frozen=True)
class Deadline:
    """The end of one operation with all its attempts."""

    timing: Timing
    total_s: float
    end: float

    def remaining_s(self) -> float:
        """Seconds until the end; negative after it."""
        return self.end - self.timing.clock()

    def attempt_s(self) -> float:
        """Timeout of an attempt that begins now; leaves time for another one where there is enough."""
        remaining = self.remaining_s()
        return max(min(remaining, max(remaining / 2, self.timing.min_attempt_s)), 0.001)

    def pause_s(self, num_attempts: int, errors: Iterable[TenutoError]) -> float | None:
        """Pause before the next attempt, which mends ``errors``; None where that would be too late.

        Drawn from the upper half of an exponentially growing interval, so that clients do not come back in step. At
        least as long as the server asks for, and up to half as long again for the same reason, and until the policy's
        budget has a token, where it takes one.
        """
        timing, now_s = self.timing, self.timing.clock()
        longest = min(timing.first_pause_s * 2 ** min(num_attempts - 1, 16), timing.max_pause_s)
        pause = longest * timing.rng.uniform(0.5, 1.0)
        costs_token = False
        hint_s = 0.0
        for error in errors:
            costs_token = costs_token or is_pushback(error)
            hint_s = max(hint_s, error.retry_after_s or 0.0)
        if hint_s:
            pause = max(pause, hint_s * timing.rng.uniform(1.0, 1.5))
        if costs_token:
            pause = max(pause, timing.budget.wait_s(now_s))
        if now_s + pause >= self.end:
            return None
        if costs_token:
            timing.budget.spend(now_s)
        return pause

    def give_up(self, error: TenutoError, num_attempts: int) -> TenutoError:
        """Say in the error's text how long it was tried. Modifies and returns the error."""
        if num_attempts > 1:
            error.args = (f"{error} (gave up after {num_attempts} attempts in {self.total_s:g} s)", *error.args[1:])
        return error


def is_pushback(error: TenutoError) -> bool:
    """Whether the server has too much to do, as far as one can tell: it says so, or it does not answer in time."""
    return isinstance(error, (OverloadedError, DeadlineError))


def is_transient(error: TenutoError) -> bool:
    """Whether the same step may succeed when it is sent again."""
    if isinstance(error, DrainingError):
        return False
    if isinstance(error, QuotaExceededError) and error.metadata.get("quota") == "sessions":
        # Only closing one helps.
        return False
    return isinstance(error, (ServerUnavailableError, DeadlineError, OverloadedError, StepInFlightError))


def noticing(
    should_retry: Callable[[TenutoError], bool], on_wait: Callable[[TenutoError], None] | None
) -> Callable[[TenutoError], bool]:
    """Return ``should_retry``, which also tells ``on_wait`` each error that is waited out."""
    if on_wait is None:
        return should_retry

    def notice(error: TenutoError) -> bool:
        if not should_retry(error):
            return False
        on_wait(error)
        return True

    return notice


def is_ambiguous(error: TenutoError) -> bool:
    """Whether a call that failed so may have been carried out: the connection failed, not the server refused."""
    return not error.reason and error.code in _AMBIGUOUS


def attempt_all(
    make_call: Callable[[int, float], Call],
    keys: Sequence[int],
    deadline: Deadline,
    should_retry: Callable[[TenutoError], bool] = is_transient,
) -> Program[dict[int, Any]]:
    """Make one call per key, at most MAX_PARALLEL_CALLS at once, until each has an answer that no retry can mend.

    ``make_call`` takes a key and a timeout. Returns key -> reply or TenutoError.
    """
    outcomes: dict[int, Any] = {}
    unknown: set[int] = set()
    todo = list(keys)
    num_attempts = 0
    while todo:
        for first in range(0, len(todo), MAX_PARALLEL_CALLS):
            chunk = todo[first : first + MAX_PARALLEL_CALLS]
            timeout_s = deadline.attempt_s()
            answers = yield Calls(tuple(make_call(key, timeout_s) for key in chunk))
            for key, answer in zip(chunk, answers, strict=True):
                outcomes[key] = answer
                if isinstance(answer, TenutoError) and is_ambiguous(answer):
                    unknown.add(key)
        num_attempts += 1
        todo = [key for key in todo if isinstance(outcomes[key], TenutoError) and should_retry(outcomes[key])]
        if not todo:
            break
        pause_s = deadline.pause_s(num_attempts, (outcomes[key] for key in todo))
        if pause_s is None:
            for key in todo:
                deadline.give_up(outcomes[key], num_attempts)
            break
        yield Sleep(pause_s)
    for key in unknown:
        if isinstance(error := outcomes[key], TenutoError):
            # What would be sent again, were there time, may yet turn out to have been carried out.
            error.outcome_unknown = key in todo or is_ambiguous(error)
    return outcomes


def attempt(
    make_call: Callable[[float], Call],
    deadline: Deadline,
    should_retry: Callable[[TenutoError], bool] = is_transient,
) -> Program[Any]:
    """Make one call as :func:`attempt_all` does; return its reply or raise its TenutoError."""
    outcomes = yield from attempt_all(lambda _, timeout_s: make_call(timeout_s), (0,), deadline, should_retry)
    outcome = outcomes[0]
    if isinstance(outcome, TenutoError):
        raise outcome
    return outcome
