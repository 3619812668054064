"""When and how long to try again: deadlines, jittered exponential backoff, and which errors a retry can mend."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from tenuto_client.effects import Call, Calls, Program, Sleep
from tenuto_client.errors import (
    DeadlineError,
    DrainingError,
    OverloadedError,
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

    def pause_s(self, num_attempts: int) -> float | None:
        """Pause before the next attempt; None where the time is up.

        Drawn from the upper half of an exponentially growing interval, so that clients do not come back in step.
        """
        timing = self.timing
        longest = min(timing.first_pause_s * 2 ** min(num_attempts - 1, 16), timing.max_pause_s)
        pause = longest * timing.rng.uniform(0.5, 1.0)
        return pause if pause < self.remaining_s() else None

    def give_up(self, error: TenutoError, num_attempts: int) -> TenutoError:
        """Say in the error's text how long it was tried. Modifies and returns the error."""
        if num_attempts > 1:
            error.args = (f"{error} (gave up after {num_attempts} attempts in {self.total_s:g} s)", *error.args[1:])
        return error


def is_transient(error: TenutoError) -> bool:
    """Whether the same step may succeed when it is sent again."""
    if isinstance(error, DrainingError):
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
        pause_s = deadline.pause_s(num_attempts)
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
