"""The client's half of one session: its step index, and the one step whose outcome may be unknown. No I/O.

Owned by one caller: a second method while one is under way is refused with RuntimeError.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
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
from tenuto_client.results import StepResult, Timings
from tenuto_client.retry import Deadline, attempt, is_transient, noticing
from tenuto_client.served import ServedPolicy, find_policy
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
    """Refuses a second method while one is under way."""

    def __init__(self) -> None:
        self._busy = False

    @contextmanager
    def __call__(self) -> Generator[None]:
        """Hold for the length of a method."""
        if self._busy:
            raise RuntimeError("a method of this policy is under way in another thread or task; use one policy each")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False


class Session:
    """One environment at one server. Its methods are programs, see effects.py."""

    def __init__(self, options: PolicyOptions) -> None:
        self.options = options
        self.served: ServedPolicy | None = None
        self.session_id = 0
        """0: no session is open."""
        self.step_index = 0
        """Of the next step."""
        self._opening = 0
        """The id of a session that the server has perhaps opened, though nobody heard of it; 0: none."""
        self._server_epoch = 0
        self._begins_next = True
        self._gone: TenutoError | None = None
        self._pending: pb.StepRequest | None = None
        """Sent, and perhaps applied; the same step_index must not be used for another observation."""
        self._alone = OneAtATime()

    def reset(self) -> None:
        """Mark that the next step begins an episode."""
        self._begins_next = True

    def connect(self, on_wait: OnWait = None) -> Program[ServedPolicy]:
        """Find the policy and open a session, if there is none."""
        with self._alone():
            return (yield from self._connect(on_wait))

    def step(self, observation: Any, episode_start: bool, reward: float | None) -> Program[StepResult]:
        """Apply one observation exactly once and return the action, see RemotePolicy.step."""
        with self._alone():
            if self._gone is not None and not (episode_start or self._begins_next):
                raise self._gone.with_traceback(None)
            served = yield from self._connect()
            begins = episode_start or self._begins_next
            tensors = served.pack(observation)
            deadline = self.options.timing.deadline(self.options.timeout_s)
            try:
                reply = yield from self._deliver(tensors, begins, reward, deadline)
            except TenutoError as error:
                # The episode that begins takes nothing over from the session before.
                if not (begins and needs_new_session(error)):
                    raise
                _log.warning("session %d is replaced at an episode's start: %s", self.session_id, error)
                yield from self._abandon(reward)
                yield from self._open(deadline, wait=False)
                reply = yield from self._deliver(tensors, begins, None, deadline)
            return self._result(reply)

    def close(self, reward: float | None) -> Program[None]:
        """End the session. Raises nothing where the server cannot be reached: it ends the session when it is idle."""
        with self._alone():
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
        self.session_id, self._server_epoch = session_id, reply.server_epoch
        self.step_index, self._pending, self._gone, self._begins_next = 0, None, None, True

    def _deliver(
        self, tensors: list[pb.NamedTensor], begins: bool, reward: float | None, deadline: Deadline
    ) -> Program[pb.StepResponse]:
        """Settle a pending step of another observation, then apply this one."""
        pending = self._pending
        if pending is not None:
            if list(pending.observation) == tensors and (pending.episode_start or not begins):
                return (yield from self._apply(pending, deadline))
            yield from self._apply(pending, deadline)
        request = pb.StepRequest(
            session_id=self.session_id,
            step_index=self.step_index,
            episode_start=begins,
            observation=tensors,
            reward=reward,
            outputs=self.options.outputs_to_wire(),
        )
        assert self.served is not None
        self.served.refuse_too_large(request)
        return (yield from self._apply(request, deadline))

    def _apply(self, request: pb.StepRequest, deadline: Deadline) -> Program[pb.StepResponse]:
        # Pending before it is sent: whatever interrupts this program, the index is not used for anything else.
        self._pending, self._begins_next = request, False
        try:
            reply: pb.StepResponse = yield from attempt(
                lambda timeout_s: Call("Step", request, timeout_s, self.session_id, self._server_epoch, self.served),
                deadline,
            )
        except TenutoError as error:
            if not error.outcome_unknown:
                self._pending, self._begins_next = None, request.episode_start
            if isinstance(error, SessionGoneError):
                self.session_id, self._gone = 0, error
            raise
        if reply.step_index != request.step_index:
            raise UnexpectedReplyError(f"reply: got step index {reply.step_index}, expected {request.step_index}")
        self._pending = None
        self.step_index += 1
        return reply

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

    def _result(self, reply: pb.StepResponse) -> StepResult:
        assert self.served is not None
        return StepResult(
            action=self.served.action(reply.action),
            value=reply.value if reply.HasField("value") else None,
            log_prob=reply.log_prob if reply.HasField("log_prob") else None,
            logits=self.served.array(reply.logits).copy() if reply.HasField("logits") else None,
            version=reply.version,
            step_index=reply.step_index,
            timings=Timings.from_wire(reply.timings),
        )
