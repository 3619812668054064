"""The client's half of a durable session: keeps the steps that a restart of the server may undo, and sends them again.

Owned by a Session, whose methods run one at a time. No I/O.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

from tenuto_client.effects import Call, Program, Sleep
from tenuto_client.errors import (
    CapacityError,
    DeadlineError,
    DrainingError,
    PolicyUnknownError,
    ReplayMismatchError,
    SessionExistsError,
    SessionLostError,
    StepIndexError,
    TenutoError,
)
from tenuto_client.options import PolicyOptions
from tenuto_client.results import StepResult
from tenuto_client.retry import Deadline, attempt, is_ambiguous, is_transient
from tenuto_client.served import ServedPolicy, refresh_policy
from tenuto_client.step import Step, StepForm
from tenuto_proto.v1 import policy_pb2 as pb

MAX_KEPT_STEPS = 65_536
"""Answered steps that a policy keeps at most; of a vector policy, vector steps."""
MAX_KEPT_BYTES = 256 << 20
"""Of their observations; beyond it the oldest steps go."""
Kept = tuple[Step, "int | bytes", int]
"""A step, the bits of the action that answered it, and the version."""
_log = logging.getLogger(__name__)


def num_kept(observation_bytes: int) -> int:
    """Return how many steps with observations of this size are kept at most."""
    return max(min(MAX_KEPT_STEPS, MAX_KEPT_BYTES // max(observation_bytes, 1)), 1)


def waits_out(error: TenutoError) -> bool:
    """Whether a step of a durable session may succeed later: also where a draining server makes room for another."""
    return is_transient(error) or isinstance(error, DrainingError)


def waits_out_restart(error: TenutoError) -> bool:
    """Whether a server that has just started may be able to do later what it refuses now."""
    return waits_out(error) or isinstance(error, (PolicyUnknownError, CapacityError))


def not_kept(expected: int, first_kept: int) -> SessionLostError:
    """Return the error of a session whose server has lost more steps than the client has kept."""
    return SessionLostError(
        f"the server restarted and goes on at step {expected}; the client keeps the steps from {first_kept} on"
    )


def too_late(cursor: int, step_index: int, deadline: Deadline) -> DeadlineError:
    """Return the error of a step whose server still needs the steps from ``cursor`` on when the time is up."""
    return DeadlineError(
        f"the server restarted and needs the steps {cursor} .. {step_index - 1} again, "
        f"which took more than {deadline.total_s:g} s; call step again to go on"
    )


def mismatch(step_index: int, what: str) -> ReplayMismatchError:
    """Return the error of a replay that differs; ``what``: in what."""
    return ReplayMismatchError(f"step {step_index}, sent again after a restart, was answered with another {what}")


def expected_index(error: StepIndexError, cursor: int, step_index: int, maybe_applied: bool) -> int | None:
    """Return the index with which to go on after the server refused that of ``cursor``; None where there is none.

    ``step_index``: of the step that is under way; ``maybe_applied``: whether it perhaps was.
    """
    expected = error.expected
    if maybe_applied and cursor < step_index and expected == step_index + 1:
        # Meanwhile another server has stored the session with this step.
        return step_index
    return None if expected is None or expected > step_index or expected == cursor else expected


class StepHistory:
    """The answered steps of one session that are not known to be durable, in order; bounded."""

    def __init__(self, max_steps: int, next_index: int = 0) -> None:
        """``next_index``: of the first step that will be kept."""
        self._kept: deque[Kept] = deque(maxlen=max_steps)
        self._next_index = next_index

    @property
    def first_index(self) -> int:
        """Of the oldest step that is kept; of the next one where none is."""
        return self._kept[0][0].step_index if self._kept else self._next_index

    def keep(self, step: Step, result: StepResult) -> None:
        """Keep the step after the last one; forget those that its answer says are durable."""
        action = result.action
        self._kept.append((step, action if isinstance(action, int) else action.tobytes(), result.version))
        self._next_index = step.step_index + 1
        self.forget(result.durable_step or 0)

    def forget(self, durable_step: int) -> None:
        """Forget the steps before this index."""
        kept = self._kept
        while kept and kept[0][0].step_index < durable_step:
            kept.popleft()

    def at(self, step_index: int) -> Kept:
        """Return a step that is kept."""
        return self._kept[step_index - self.first_index]


class DurableSession:
    """Delivers the steps of one session, also to a server that has restarted. Its methods are programs, see effects.py.

    But for :meth:`applied`, which a step costs that needs no program.
    """

    def __init__(self, request: pb.OpenSessionRequest, form: StepForm, options: PolicyOptions, next_index: int) -> None:
        """``request``: opens the same session again, with its id and seed. ``next_index``: of its next step."""
        self._request, self._options = request, options
        self.form = form
        """Of the session's steps; another one once another server has the session."""
        self.history = StepHistory(num_kept(form.served.observation_bytes), next_index)
        self.is_behind = False
        """Whether the server, as it was last heard of, has undone steps."""
        self._maybe_applied = False
        """Whether the step that is under way may have been applied."""

    def applied(self, step: Step, result: StepResult) -> None:
        """Keep a step that was answered."""
        self.history.keep(step, result)

    def apply(self, step: Step, deadline: Deadline, maybe_applied: bool) -> Program[StepResult]:
        """Apply a step; before it, once again, those that the server has undone. ``maybe_applied``: from before.

        Raises ReplayMismatchError or SessionLostError, without a reason, where this side has found the session lost.
        """
        self._maybe_applied = maybe_applied
        try:
            return (yield from self._apply(step, deadline))
        except TenutoError as error:
            error.outcome_unknown = self._maybe_applied and (waits_out_restart(error) or is_ambiguous(error))
            raise

    def _apply(self, step: Step, deadline: Deadline) -> Program[StepResult]:
        """One loop, whose cursor is the step that the server needs next: it may restart again at any of them."""
        cursor, num_refusals = step.step_index, 0
        arrived: ServedPolicy | None = None
        """What the server that undid steps serves; it is this server where a step sent afterwards succeeds."""
        while True:
            self.is_behind = cursor < step.step_index
            kept = self.history.at(cursor) if self.is_behind else None
            try:
                result = yield from self._send(step, kept, deadline)
            except StepIndexError as error:
                cursor = self._undone_from(error, cursor, step.step_index)
                arrived = yield from refresh_policy(self._options, self.form.served, deadline, wait=True)
            except SessionLostError:
                if self.history.first_index:
                    raise
                self.is_behind = True
                cursor = yield from self._reopen(step, deadline)
                arrived = None
            else:
                if kept is None:
                    return result
                self._check(kept, result)
                if arrived is not None:
                    self._adopt(arrived, arrived.server_epoch, step, durable=True)
                    arrived = None
                cursor, num_refusals = cursor + 1, 0
                if deadline.remaining_s() <= 0:
                    raise too_late(cursor, step.step_index, deadline)
                continue
            num_refusals += 1
            if num_refusals > 1:
                pause_s = deadline.pause_s(num_refusals, ())
                if pause_s is None:
                    raise too_late(cursor, step.step_index, deadline)
                yield Sleep(pause_s)

    def _send(self, step: Step, kept: Kept | None, deadline: Deadline) -> Program[StepResult]:
        """Send the step itself or, instead, one that is kept."""

        def should_retry(error: TenutoError) -> bool:
            if kept is not None:
                return waits_out_restart(error)
            self._maybe_applied |= is_ambiguous(error)
            return waits_out(error)

        current = step if kept is None else kept[0].replay(self._replay_form(), kept[2])
        answer: Any = yield from attempt(current.call, deadline, should_retry)
        return current.read(answer)

    def _undone_from(self, error: StepIndexError, cursor: int, step_index: int) -> int:
        """Return the index that the server expects where that is one that can be sent; else raise."""
        expected = expected_index(error, cursor, step_index, self._maybe_applied)
        if expected is None:
            raise error
        self.is_behind = True
        if expected < self.history.first_index:
            raise not_kept(expected, self.history.first_index)
        _log.info("session %d: the server has undone steps %d .. %d", self.session_id, expected, step_index - 1)
        return expected

    def _reopen(self, step: Step, deadline: Deadline) -> Program[int]:
        """Open the session again at a server that never heard of it; return the index of the step to go on with."""
        _log.info("session %d: the server does not know it any more; it begins again", self.session_id)
        found = yield from refresh_policy(self._options, self.form.served, deadline, wait=True)
        try:
            reply: pb.OpenSessionResponse = yield from attempt(
                lambda timeout_s: Call("OpenSession", self._request, timeout_s, self.session_id),
                deadline,
                waits_out_restart,
            )
        except SessionExistsError:
            # It is known after all, and with steps: the server says with the next one where it is.
            return step.step_index
        self._adopt(found, reply.server_epoch, step, durable=reply.durable)
        return 0

    def _adopt(self, served: ServedPolicy, server_epoch: int, step: Step, *, durable: bool) -> None:
        """Go on with a step at another server."""
        self.form = step.form = StepForm(served, server_epoch, self._options, durable=durable)

    def _replay_form(self) -> StepForm:
        form = self.form
        return StepForm(form.served, form.server_epoch, self._options, durable=form.durable, replays=True)

    def _check(self, kept: Kept, result: StepResult) -> None:
        """Raise ReplayMismatchError where a step that was sent again was answered otherwise."""
        step, action, version = kept
        if result.version != version:
            raise mismatch(step.step_index, f"version: got {result.version}, expected {version}")
        again = result.action
        if (again if isinstance(again, int) else again.tobytes()) != action:
            raise mismatch(step.step_index, "action")
        self.history.forget(result.durable_step or 0)

    @property
    def session_id(self) -> int:
        """The session's id."""
        return self._request.session_id
