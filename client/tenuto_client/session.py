"""The client's half of one session: its step index, and the one step whose outcome may be unknown. No I/O.

Owned by one caller: a second method while one is under way is refused with RuntimeError.
"""

from __future__ import annotations

import logging
from typing import Any

from tenuto_client.effects import Call, Program
from tenuto_client.errors import (
    DrainingError,
    SessionGoneError,
    SpaceMismatchError,
    TenutoError,
    UnexpectedReplyError,
)
from tenuto_client.options import OnWait, PolicyOptions
from tenuto_client.results import StepResult
from tenuto_client.retry import Deadline, attempt, is_transient, noticing
from tenuto_client.served import ServedPolicy, find_policy
from tenuto_client.step import Leaves, Step, StepForm
from tenuto_proto.v1 import policy_pb2 as pb

CLOSE_TIMEOUT_S = 1.0
"""Closing is a courtesy, the server ends an abandoned session by itself; so it never waits long."""
_log = logging.getLogger(__name__)


def may_open_later(error: TenutoError) -> bool:
    """Whether opening a session may succeed later: also where a draining server makes room for its successor."""
    return is_transient(error) or isinstance(error, DrainingError)


def needs_new_session(error: TenutoError) -> bool:
    """Whether an episode that begins now should begin in a new session: the old one is gone, or its server is about to
    be, or nobody can say whether its last step was applied and asking again is of no use.
    """
    return isinstance(error, (SessionGoneError, DrainingError)) or is_stuck(error)


def is_stuck(error: TenutoError) -> bool:
    """Whether a step can be neither settled nor given up: every later step of its session would fail with it."""
    return error.outcome_unknown and not is_transient(error)


def open_request(options: PolicyOptions, policy_name: str, session_id: int, row: int = 0) -> pb.OpenSessionRequest:
    """Return the request that opens the session of an environment."""
    return pb.OpenSessionRequest(
        session_id=session_id,
        policy_name=policy_name,
        version=options.version,
        seed=None if options.seed is None else (options.seed + row) % 2**64,
        deterministic=options.deterministic,
    )


def connect_deadline(options: PolicyOptions, known: ServedPolicy | None) -> tuple[Deadline, bool]:
    """Return until when to connect, and whether to wait for the policy: only the first connection does."""
    wait_s = options.wait_for_policy_s if known is None else 0.0
    return options.timing.deadline(wait_s or options.timeout_s), wait_s > 0


def refresh_policy(
    options: PolicyOptions, known: ServedPolicy | None, deadline: Deadline, *, wait: bool, on_wait: OnWait = None
) -> Program[ServedPolicy]:
    """Find the policy (again). Raises SpaceMismatchError where it is no longer the known one."""
    found = yield from find_policy(options, deadline, wait=wait, on_wait=on_wait)
    if known is not None and not found.has_spaces_of(known):
        raise SpaceMismatchError(f"policy {found.policy_name!r}: its spaces have changed since it was first used")
    return found


class OneAtATime:
    """Refuses a second method while one is under way: a context for the length of a method."""

    def __init__(self) -> None:
        self._busy = False

    def __enter__(self) -> None:
        if self._busy:
            raise RuntimeError("a method of this policy is under way in another thread or task; use one policy each")
        self._busy = True

    def __exit__(self, *_: object) -> None:
        self._busy = False


class Session:
    """One environment at one server. Its methods are programs, see effects.py.

    But for the usual step, which needs none: a transport takes it from :meth:`begin`, sends it while it holds
    ``alone``, and says that it was :meth:`applied`, or gives the answer to the program :meth:`settle`.
    """

    def __init__(self, options: PolicyOptions) -> None:
        self.options = options
        self.served: ServedPolicy | None = None
        self.session_id = 0
        """0: no session is open."""
        self.step_index = 0
        """Of the next step."""
        self.alone = OneAtATime()
        self.first_attempt_s = options.timing.deadline(options.timeout_s).attempt_s()
        """Timeout of a step's first attempt."""
        self._opening = 0
        """The id of a session that the server has perhaps opened, though nobody heard of it; 0: none."""
        self._form: StepForm | None = None
        """Of the steps of the open session."""
        self._begins_next = True
        self._gone: TenutoError | None = None
        self._pending: Step | None = None
        """Sent, and perhaps applied; the same step_index must not be used for another observation."""
        self._began_s = 0.0
        """When the usual step that is under way began, by the clock of the options."""
        self._budget = options.timing.budget

    def reset(self) -> None:
        """Mark that the next step begins an episode."""
        self._begins_next = True

    def connect(self, on_wait: OnWait = None) -> Program[ServedPolicy]:
        """Find the policy and open a session, if there is none."""
        with self.alone:
            return (yield from self._connect(on_wait))

    def step(self, observation: Any, episode_start: bool, reward: float | None) -> Program[StepResult]:
        """Apply one observation exactly once and return the action, see RemotePolicy.step."""
        with self.alone:
            if self._gone is not None and not (episode_start or self._begins_next):
                raise self._gone.with_traceback(None)
            served = yield from self._connect()
            begins = episode_start or self._begins_next
            leaves = served.pack_row(observation)
            deadline = self.options.timing.deadline(self.options.timeout_s)
            return (yield from self._finish(leaves, begins, reward, deadline))

    def begin(self, observation: Any, episode_start: bool, reward: float | None) -> Step | None:
        """Return the usual step, pending from now on; None where there is more to do than to send it: use step().

        Raises ObservationError.
        """
        form = self._form
        if form is None or not self.session_id or self._pending is not None or not form.served.max_rows:
            return None
        leaves = form.served.pack_row(observation)
        step = Step(form, self.session_id, self.step_index, episode_start or self._begins_next, reward, leaves)
        self._pending, self._begins_next = step, False
        self._began_s = self.options.timing.clock()
        return step

    def applied(self) -> None:
        """Note that the usual step was applied."""
        self._pending = None
        self.step_index += 1
        self._budget.succeeded()

    def settle(self, step: Step) -> Program[StepResult]:
        """Go on with the usual step, whose first attempt has failed: that is the answer to the first effect."""
        with self.alone:
            total_s = self.options.timeout_s
            deadline = Deadline(self.options.timing, total_s, self._began_s + total_s)
            return (yield from self._finish(step.leaves, step.begins, step.reward, deadline))

    def close(self, reward: float | None) -> Program[None]:
        """End the session. Raises nothing where the server cannot be reached: it ends the session when it is idle."""
        with self.alone:
            if not self.session_id:
                self.session_id, self._opening, reward = self._opening, 0, None
            yield from self._abandon(reward)

    def _connect(self, on_wait: OnWait = None) -> Program[ServedPolicy]:
        if not self.session_id:
            deadline, wait = connect_deadline(self.options, self.served)
            yield from self._open(deadline, wait=wait, on_wait=on_wait)
        assert self.served is not None
        return self.served

    def _open(self, deadline: Deadline, *, wait: bool, on_wait: OnWait = None) -> Program[None]:
        self.served = yield from refresh_policy(self.options, self.served, deadline, wait=wait, on_wait=on_wait)
        session_id = self.options.timing.rng.randrange(1, 2**64)
        request = open_request(self.options, self.served.policy_name, session_id)
        # Known before it is sent: whatever interrupts this program, close() ends the session.
        self._opening = session_id
        try:
            reply: pb.OpenSessionResponse = yield from attempt(
                lambda timeout_s: Call("OpenSession", request, timeout_s, session_id),
                deadline,
                noticing(may_open_later, on_wait),
            )
        except TenutoError as error:
            if not error.outcome_unknown:
                self._opening = 0
            raise
        self._opening = 0
        self.session_id, self._form = session_id, StepForm(self.served, reply.server_epoch, self.options)
        self.step_index, self._pending, self._gone, self._begins_next = 0, None, None, True

    def _finish(self, leaves: Leaves, begins: bool, reward: float | None, deadline: Deadline) -> Program[StepResult]:
        """Apply an observation; in a new session where it begins an episode and the old session is of no use."""
        try:
            return (yield from self._deliver(leaves, begins, reward, deadline))
        except TenutoError as error:
            # The episode that begins takes nothing over from the session before.
            if not (begins and needs_new_session(error)):
                raise
            _log.warning("session %d is replaced at an episode's start: %s", self.session_id, error)
        yield from self._abandon(reward)
        yield from self._open(deadline, wait=False)
        return (yield from self._deliver(leaves, begins, None, deadline))

    def _deliver(self, leaves: Leaves, begins: bool, reward: float | None, deadline: Deadline) -> Program[StepResult]:
        """Settle a pending step of another observation, then apply this one."""
        pending = self._pending
        if pending is not None:
            if pending.leaves == leaves and (pending.begins or not begins):
                return (yield from self._apply(pending, deadline))
            yield from self._apply(pending, deadline)
        assert self._form is not None
        step = Step(self._form, self.session_id, self.step_index, begins, reward, leaves)
        self._form.served.refuse_too_large(step.request())
        return (yield from self._apply(step, deadline))

    def _apply(self, step: Step, deadline: Deadline) -> Program[StepResult]:
        # Pending before it is sent: whatever interrupts this program, the index is not used for anything else.
        self._pending, self._begins_next = step, False
        try:
            answer: pb.StepResponse | StepResult = yield from attempt(step.call, deadline)
        except TenutoError as error:
            if not error.outcome_unknown:
                self._pending, self._begins_next = None, step.begins
            if isinstance(error, SessionGoneError):
                self.session_id, self._gone = 0, error
            raise
        if answer.step_index != step.step_index:
            raise UnexpectedReplyError(f"reply: got step index {answer.step_index}, expected {step.step_index}")
        self.applied()
        return answer if isinstance(answer, StepResult) else step.result(answer)

    def _abandon(self, reward: float | None) -> Program[None]:
        session_id, self.session_id = self.session_id, 0
        if not session_id:
            return
        request = pb.CloseSessionRequest(session_id=session_id, reward=reward)
        deadline = self.options.timing.deadline(min(self.options.timeout_s, CLOSE_TIMEOUT_S))
        try:
            yield from attempt(lambda timeout_s: Call("CloseSession", request, timeout_s, session_id), deadline)
        except TenutoError as error:
            _log.debug("closing session %d: %s", session_id, error)
