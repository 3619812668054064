"""The client's half of one session: its step index, and the one step whose outcome may be unknown. No I/O.

Owned by one caller: a second method while one is under way is refused with RuntimeError.
"""

from __future__ import annotations

import logging
from typing import Any

from tenuto_client.durable import DurableSession, waits_out
from tenuto_client.effects import Call, Program
from tenuto_client.errors import (
    DrainingError,
    SessionExistsError,
    SessionGoneError,
    TenutoError,
    UnexpectedReplyError,
)
from tenuto_client.options import OnWait, PolicyOptions
from tenuto_client.results import StepResult
from tenuto_client.retry import Deadline, attempt, is_ambiguous, is_transient, noticing
from tenuto_client.served import ServedPolicy, refresh_policy
from tenuto_client.step import Leaves, Step, StepForm
from tenuto_proto.v1 import policy_pb2 as pb

CLOSE_TIMEOUT_S = 1.0
"""Closing is a courtesy, the server ends an abandoned session by itself; so it never waits long."""
_log = logging.getLogger(__name__)


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
        """Of the steps of the open session; None where none can be sent."""
        self._durable: DurableSession | None = None
        """What outlives the server; None where the session does not."""
        self._opened_as = pb.OpenSessionRequest()
        """Opens the open session once more."""
        self._stopped: StepForm | None = None
        """The form, where the session was perhaps exported and is not imported anywhere, as far as is known."""
        self._snapshot: pb.SealedSnapshot | None = None
        """What the export has returned."""
        self._begins_next = True
        self._gone: TenutoError | None = None
        self._pending: Step | None = None
        """Sent, and perhaps applied; the same step_index must not be used for another observation."""
        self._was_pending = False
        """Whether it was already when the method under way began."""
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
            self._was_pending = self._pending is not None
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

    def applied(self, result: StepResult) -> None:
        """Note that the usual step was applied."""
        if self._durable is not None:
            self._keep(result)
        self._pending = None
        self.step_index += 1
        self._budget.succeeded()

    def settle(self, step: Step) -> Program[StepResult]:
        """Go on with the usual step, whose first attempt has failed: that is the answer to the first effect."""
        with self.alone:
            total_s = self.options.timeout_s
            deadline = Deadline(self.options.timing, total_s, self._began_s + total_s)
            self._was_pending = False
            return (yield from self._finish(step.leaves, step.begins, step.reward, deadline))

    def export(self) -> Program[None]:
        """Stop the session at this server, for :meth:`import_here` at another. A pending step stays pending.

        If this fails, or nothing follows, the next step goes on at this server.
        """
        with self.alone:
            if self.session_id:
                yield from self._export(self.options.timing.deadline(self.options.timeout_s))

    def import_here(self) -> Program[None]:
        """Go on at this server with the session that was exported; nothing to do where none is open."""
        with self.alone:
            if self._snapshot is not None:
                yield from self._import(self._snapshot, self.options.timing.deadline(self.options.timeout_s))

    def thaw(self) -> Program[None]:
        """Go on at this server, where the session was exported. If this fails, the next step tries it again."""
        with self.alone:
            if self._stopped is not None:
                yield from self._thaw(self.options.timing.deadline(self.options.timeout_s))

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
                noticing(waits_out, on_wait),
            )
        except TenutoError as error:
            if not error.outcome_unknown:
                self._opening = 0
            raise
        self._opening = 0
        self.session_id, self._stopped, self._snapshot = session_id, None, None
        self.step_index, self._pending, self._gone, self._begins_next = 0, None, None, True
        self._opened_as.CopyFrom(request)
        self._opened_as.seed = reply.seed
        self._durable = None
        self._go_on_with(StepForm(self.served, reply.server_epoch, self.options, durable=reply.durable))

    def _go_on_with(self, form: StepForm) -> None:
        """Let the session's steps have another form from now on."""
        self._form, self.served = form, form.served
        if self._durable is not None:
            self._durable.form = form
        elif form.durable:
            self._durable = DurableSession(self._opened_as, form, self.options, self.step_index)
        if self._pending is not None:
            self._pending.form = form

    def _finish(self, leaves: Leaves, begins: bool, reward: float | None, deadline: Deadline) -> Program[StepResult]:
        """Apply an observation; in a new session where it begins an episode and the old session is of no use."""
        try:
            return (yield from self._deliver(leaves, begins, reward, deadline))
        except TenutoError as error:
            # The episode that begins takes nothing over from the session before.
            if not (begins and self._needs_new_session(error)):
                raise
            _log.warning("session %d is replaced at an episode's start: %s", self.session_id, error)
        yield from self._abandon(reward)
        yield from self._open(deadline, wait=False)
        return (yield from self._deliver(leaves, begins, None, deadline))

    def _deliver(self, leaves: Leaves, begins: bool, reward: float | None, deadline: Deadline) -> Program[StepResult]:
        """Settle a pending step of another observation, then apply this one."""
        if self._stopped is not None:
            yield from self._thaw(deadline)
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
        was_pending = self._was_pending and step is self._pending
        # Pending before it is sent: whatever interrupts this program, the index is not used for anything else.
        self._pending, self._begins_next = step, False
        try:
            if self._durable is not None:
                return (yield from self._apply_durably(self._durable, step, deadline, was_pending))
            answer: pb.StepResponse | StepResult = yield from attempt(step.call, deadline)
        except TenutoError as error:
            error.outcome_unknown |= was_pending and (is_transient(error) or is_ambiguous(error))
            if not error.outcome_unknown:
                self._pending, self._begins_next = None, step.begins
            if isinstance(error, SessionGoneError):
                self.session_id, self._gone = 0, error
            raise
        if answer.step_index != step.step_index:
            raise UnexpectedReplyError(f"reply: got step index {answer.step_index}, expected {step.step_index}")
        self._pending = None
        self.step_index += 1
        return answer if isinstance(answer, StepResult) else step.result(answer)

    def _apply_durably(
        self, durable: DurableSession, step: Step, deadline: Deadline, was_pending: bool
    ) -> Program[StepResult]:
        try:
            result = yield from durable.apply(step, deadline, was_pending)
        except SessionGoneError as error:
            if not error.reason:
                # It was this side that found it lost.
                yield from self._abandon(None)
            raise
        finally:
            # Also where the program is interrupted: the server may be another one.
            self._go_on_with(durable.form)
        self.applied(result)
        return result

    def _keep(self, result: StepResult) -> None:
        """Keep the pending step, which was answered, for a replay."""
        assert self._durable is not None and self._pending is not None
        if result.durable_step is None:
            # It was opened again, or imported, at a server that keeps nothing.
            self._durable = None
        else:
            self._durable.applied(self._pending, result)

    def _needs_new_session(self, error: TenutoError) -> bool:
        """Whether an episode that begins should begin in a new session, for which a durable one has fewer reasons."""
        if self._durable is None and self._stopped is None:
            return needs_new_session(error)
        cannot_go_on = (
            error.outcome_unknown or self._stopped is not None or bool(self._durable and self._durable.is_behind)
        )
        return isinstance(error, SessionGoneError) or (cannot_go_on and not waits_out(error))

    def _export(self, deadline: Deadline) -> Program[None]:
        # Stopped before it is sent: whatever interrupts this program, no step is sent to a session that is perhaps.
        if self._stopped is None:
            self._stopped, self._form = self._form, None
        if self._snapshot is not None:
            return
        assert self._stopped is not None
        request, epoch = pb.ExportSessionRequest(session_id=self.session_id), self._stopped.server_epoch
        try:
            reply: pb.ExportSessionResponse = yield from attempt(
                lambda timeout_s: Call("ExportSession", request, timeout_s, self.session_id, epoch), deadline, waits_out
            )
        except TenutoError as error:
            if not error.outcome_unknown:
                self._form, self._stopped = self._stopped, None
            raise
        self._snapshot = reply.snapshot

    def _import(self, snapshot: pb.SealedSnapshot, deadline: Deadline) -> Program[None]:
        served = yield from refresh_policy(self.options, self.served, deadline, wait=False)
        request = pb.ImportSessionRequest(snapshot=snapshot)
        reply: pb.ImportSessionResponse = yield from attempt(
            lambda timeout_s: Call("ImportSession", request, timeout_s, self.session_id), deadline, waits_out
        )
        self._stopped = self._snapshot = None
        self._go_on_with(StepForm(served, reply.server_epoch, self.options, durable=reply.durable))

    def _thaw(self, deadline: Deadline) -> Program[None]:
        """Go on at this server, which has perhaps exported the session."""
        assert self._stopped is not None
        form = self._stopped
        try:
            yield from self._export(deadline)
            assert self._snapshot is not None
            yield from self._import(self._snapshot, deadline)
        except (SessionGoneError, SessionExistsError) as error:
            # It was restarted and forgot the export, or the session: the step will tell.
            _log.debug("session %d: %s", self.session_id, error)
            self._stopped = self._snapshot = None
            self._go_on_with(form)
        except TenutoError as error:
            error.outcome_unknown = self._pending is not None
            raise

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
