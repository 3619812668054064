"""What one principal may take of the server: sessions at once, and steps per second. Owned by the event loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.errors import Refusal
from tenuto_server.policies import PolicyRegistry
from tenuto_server.principals import Principal


@dataclass(slots=True)
class _Bucket:
    """Steps that a principal may send just now; less than 0 after a batch that was larger than what was left."""

    steps: float
    counted_s: float


class Quotas:
    """Holds each principal to its limits; one without limits costs nothing."""

    def __init__(self, registry: PolicyRegistry, clock: Callable[[], float]) -> None:
        self._registry, self._clock = registry, clock
        self._buckets: dict[str, _Bucket] = {}
        """By the principal's name: as many as there are principals with such a limit."""

    def require_session(self, principal: Principal) -> None:
        """Raise Refusal (QUOTA_EXCEEDED) where a further session would be one too many, over all policies."""
        limit = principal.max_sessions
        if limit is None:
            return
        open_now = sum(policy.sessions.num_of(principal.name) for policy in self._registry)
        if open_now >= limit:
            message = f"sessions of {principal.name!r}: got one more, expected at most {limit} at once"
            raise Refusal(pb.QUOTA_EXCEEDED, message, {"quota": "sessions"})

    def take_steps(self, principal: Principal, num_rows: int) -> None:
        """Count steps that a principal sends. Raises Refusal (QUOTA_EXCEEDED) where they are too many just now.

        A bucket holds the steps of one second. A batch of more needs a full bucket and leaves a debt, so that it is
        possible, and the average holds.
        """
        rate = principal.max_steps_per_s
        if rate is None:
            return
        now_s = self._clock()
        size = max(rate, 1.0)
        bucket = self._buckets.get(principal.name)
        if bucket is None:
            bucket = self._buckets[principal.name] = _Bucket(size, now_s)
        bucket.steps = min(size, bucket.steps + (now_s - bucket.counted_s) * rate)
        bucket.counted_s = now_s
        needed = min(float(num_rows), size)
        # Sums of fractions fall short of what they stand for.
        if bucket.steps < needed - 1e-6:
            message = f"steps of {principal.name!r}: got {num_rows} more, expected at most {rate:g} a second"
            wait_s = (needed - bucket.steps) / rate
            raise Refusal(pb.QUOTA_EXCEEDED, message, {"quota": "steps"}, num_rows, wait_s)
        bucket.steps -= num_rows
