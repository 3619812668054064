"""Opens and closes the sessions of N environments, and knows which are open; session_rows.py steps them. No I/O."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from math import isnan

import numpy as np
from numpy.typing import NDArray

from tenuto_client.batch import Rows
from tenuto_client.effects import Call, Program
from tenuto_client.errors import TenutoError, UnexpectedReplyError, error_from_message
from tenuto_client.options import OnWait, PolicyOptions
from tenuto_client.retry import Deadline, attempt_all, noticing
from tenuto_client.served import ServedPolicy, refresh_policy
from tenuto_client.session import CLOSE_TIMEOUT_S, open_request
from tenuto_proto.v1 import policy_pb2 as pb

Errors = dict[int, TenutoError]
"""Row -> why it failed."""
_log = logging.getLogger(__name__)


class OpenRows:
    """Which session each row has. Owned by SessionRows, whose methods run one at a time."""

    def __init__(self, options: PolicyOptions, num_envs: int) -> None:
        self.options = options
        self.served: ServedPolicy | None = None
        self.session_ids = np.zeros(num_envs, np.uint64)
        """0: no session is open."""
        self.step_indices = np.zeros(num_envs, np.uint64)
        """Of the next steps."""
        self.server_epochs = np.zeros(num_envs, np.uint64)
        """``[N]``: of the servers that have the sessions."""
        self.durable = np.zeros(num_envs, np.bool_)
        """``[N]``: the session outlives its server."""
        self._seeds = np.zeros(num_envs, np.uint64)
        self._opening: set[int] = set()
        """Ids of sessions that the server has perhaps opened, though nobody heard of them."""

    def open(
        self,
        rows: Sequence[int],
        deadline: Deadline,
        should_retry: Callable[[TenutoError], bool],
        *,
        wait: bool,
        on_wait: OnWait = None,
    ) -> Program[Errors]:
        """Open sessions for rows that have none; return those that have still none.

        Raises only what finding the policy raises.
        """
        served = self.served = yield from refresh_policy(
            self.options, self.served, deadline, wait=wait, on_wait=on_wait
        )
        ids = {row: self.options.timing.rng.randrange(1, 2**64) for row in rows}

        def make_call(row: int, timeout_s: float) -> Call:
            request = open_request(self.options, served.policy_name, ids[row], row)
            return Call("OpenSession", request, timeout_s, ids[row])

        # Known before they are sent: whatever interrupts this program, close() ends the sessions.
        self._opening.update(ids.values())
        outcomes = yield from attempt_all(make_call, rows, deadline, noticing(should_retry, on_wait))
        errors: Errors = {}
        for row, outcome in outcomes.items():
            if not (isinstance(outcome, TenutoError) and outcome.outcome_unknown):
                self._opening.discard(ids[row])
            if isinstance(outcome, TenutoError):
                errors[row] = outcome
                continue
            self.session_ids[row], self.step_indices[row], self._seeds[row] = ids[row], 0, outcome.seed
            self.server_epochs[row], self.durable[row] = outcome.server_epoch, outcome.durable
        return errors

    def reopen(
        self, rows: Sequence[int], deadline: Deadline, should_retry: Callable[[TenutoError], bool]
    ) -> Program[Errors]:
        """Open the sessions of rows again as they were, at a server that never heard of them; return what failed."""

        def make_call(row: int, timeout_s: float) -> Call:
            assert self.served is not None
            request = open_request(self.options, self.served.policy_name, int(self.session_ids[row]), row)
            request.seed = int(self._seeds[row])
            return Call("OpenSession", request, timeout_s, request.session_id)

        outcomes = yield from attempt_all(make_call, rows, deadline, should_retry)
        errors: Errors = {}
        for row, outcome in outcomes.items():
            if isinstance(outcome, TenutoError):
                # Whether the session was opened is not what a step's caller asks.
                outcome.outcome_unknown = False
                errors[row] = outcome
            else:
                self.server_epochs[row], self.durable[row] = outcome.server_epoch, outcome.durable
        return errors

    def read_errors(self, rows: Rows, reply: pb.StepBatchResponse) -> tuple[NDArray[np.bool_], Errors]:
        """Return which of a request's rows succeeded, and the errors of the others. Raises UnexpectedReplyError."""
        good = np.ones(len(rows), np.bool_)
        failed: Errors = {}
        for row_error in reply.errors:
            if row_error.row >= len(rows):
                raise UnexpectedReplyError(f"reply: got an error of row {row_error.row} of {len(rows)}")
            good[row_error.row] = False
            row = int(rows[row_error.row])
            failed[row] = error_from_message(row_error.error, int(self.server_epochs[row]))
        return good, failed

    def close(self, rows: Sequence[int], rewards: NDArray[np.float32]) -> Program[None]:
        """End the sessions of rows. ``rewards``: ``[N]``, NaN where none is known. Raises nothing."""
        yield from self._close_sessions(self._take(rows, rewards))

    def close_all(self, rewards: NDArray[np.float32]) -> Program[None]:
        """End all sessions, also those of which nobody knows whether they are open. Raises nothing."""
        earned = dict.fromkeys(self._opening, float("nan"))
        self._opening.clear()
        earned.update(self._take(range(len(self.session_ids)), rewards))
        yield from self._close_sessions(earned)

    def _take(self, rows: Sequence[int], rewards: NDArray[np.float32]) -> dict[int, float]:
        """Return the sessions of rows, which have none from now on: id -> reward."""
        earned = {int(self.session_ids[row]): float(rewards[row]) for row in rows if self.session_ids[row]}
        self.session_ids[list(rows)] = 0
        return earned

    def _close_sessions(self, rewards: Mapping[int, float]) -> Program[None]:
        """``rewards``: session id -> reward, NaN where none is known."""
        deadline = self.options.timing.deadline(min(self.options.timeout_s, CLOSE_TIMEOUT_S))

        def make_call(session_id: int, timeout_s: float) -> Call:
            reward = None if isnan(rewards[session_id]) else rewards[session_id]
            request = pb.CloseSessionRequest(session_id=session_id, reward=reward)
            return Call("CloseSession", request, timeout_s, session_id)

        outcomes = yield from attempt_all(make_call, list(rewards), deadline)
        for session_id, outcome in outcomes.items():
            if isinstance(outcome, TenutoError):
                _log.debug("closing session %d: %s", session_id, outcome)
