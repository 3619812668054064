"""The client's half of the sessions of N environments that step together: session.py for StepBatch. No I/O.

Row i is environment i. N numbers the environments everywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tenuto_client.batch import ObservationBatch, ResultBuilder, Rows
from tenuto_client.durable import waits_out
from tenuto_client.durable_rows import DurableRows
from tenuto_client.effects import Call, Calls, Program, Sleep
from tenuto_client.errors import (
    MessageTooLargeError,
    RowsError,
    SessionGoneError,
    TenutoError,
    UnexpectedReplyError,
)
from tenuto_client.open_rows import Errors, OpenRows
from tenuto_client.options import OnWait, PolicyOptions
from tenuto_client.results import VectorStepResult
from tenuto_client.retry import Deadline, is_ambiguous, is_transient
from tenuto_client.served import ServedPolicy
from tenuto_client.session import OneAtATime, connect_deadline, is_stuck, needs_new_session
from tenuto_proto.v1 import policy_pb2 as pb

_log = logging.getLogger(__name__)


class SessionRows:
    """N sessions of one policy at one server. Its methods are programs, see effects.py."""

    def __init__(self, options: PolicyOptions, num_envs: int) -> None:
        if not isinstance(num_envs, (int, np.integer)) or num_envs < 1:
            raise ValueError(f"num_envs: got {num_envs!r}, expected a whole number, at least 1")
        self.options, self.num_envs = options, int(num_envs)
        self._open_rows = OpenRows(options, self.num_envs)
        self._begins_next = np.ones(num_envs, np.bool_)
        self._gone: Errors = {}
        self._pending: ObservationBatch | None = None
        self._is_pending = np.zeros(num_envs, np.bool_)
        """Rows of ``_pending`` that were sent, and perhaps applied."""
        self._durable: DurableRows | None = None
        """What outlives the server; None where no session ever did."""
        self._alone = OneAtATime()

    @property
    def served(self) -> ServedPolicy | None:
        """The policy, once it was found."""
        return self._open_rows.served

    @property
    def session_ids(self) -> NDArray[np.uint64]:
        """``[N]``; 0: no session is open."""
        return self._open_rows.session_ids

    @property
    def step_indices(self) -> NDArray[np.uint64]:
        """``[N]``: of the next steps."""
        return self._open_rows.step_indices

    def reset(self, rows: Iterable[int] | None) -> None:
        """Mark that the next step of these rows (None: of all) begins an episode."""
        self._begins_next[slice(None) if rows is None else list(rows)] = True

    def connect(self, on_wait: OnWait = None) -> Program[ServedPolicy]:
        """Find the policy and open the sessions that are missing; all or none."""
        with self._alone:
            return (yield from self._connect(np.arange(self.num_envs), on_wait))

    def step(
        self,
        observations: Any,
        episode_starts: ArrayLike | None,
        rewards: ArrayLike | None,
        mask: ArrayLike | None,
        raise_errors: bool,
    ) -> Program[VectorStepResult]:
        """Apply one observation per row exactly once, see RemoteVectorPolicy.step."""
        with self._alone:
            rows: Rows = np.flatnonzero(self._column("mask", mask, np.bool_, True))
            starts = self._column("episode_starts", episode_starts, np.bool_, False)
            earned = self._column("rewards", rewards, np.float32, np.nan)
            if self.served is None:
                yield from self._connect(rows)
            assert self.served is not None
            batch = ObservationBatch.pack(self.served, observations, starts | self._begins_next, earned)
            deadline = self.options.timing.deadline(self.options.timeout_s)
            errors, batch = yield from self._settle(batch, rows, deadline)
            missing = [row for row in rows[self.session_ids[rows] == 0].tolist() if row not in errors]
            errors.update((yield from self._renew(batch, missing, deadline)))
            builder = ResultBuilder(self.served, self.num_envs, self.options.outputs)
            ready = rows if not errors else rows[~np.isin(rows, list(errors))]
            errors.update((yield from self._deliver(batch, ready, deadline, builder)))
            result = builder.build(errors)
            if errors and raise_errors:
                raise summary(result, len(rows))
            return result

    def close(self, rewards: ArrayLike | None) -> Program[None]:
        """End the sessions. Raises nothing where the server cannot be reached: it ends them when they are idle."""
        with self._alone:
            earned = self._column("rewards", rewards, np.float32, np.nan)
            yield from self._open_rows.close_all(earned)

    def _column(self, name: str, value: ArrayLike | None, dtype: type[Any], default: Any) -> NDArray[Any]:
        column = np.full(self.num_envs, default, dtype) if value is None else np.array(value, dtype)
        if column.shape != (self.num_envs,):
            raise ValueError(f"{name}: got shape {column.shape}, expected {(self.num_envs,)}")
        return column

    # -------------------------------------------------------------------------------------------------- connecting

    def _connect(self, rows: Rows, on_wait: OnWait = None) -> Program[ServedPolicy]:
        missing = rows[self.session_ids[rows] == 0].tolist()
        if self.served is None or missing:
            deadline, wait = connect_deadline(self.options, self.served)
            errors = yield from self._open(missing, deadline, waits_out, wait=wait, on_wait=on_wait)
            if errors:
                yield from self._open_rows.close(missing, np.full(self.num_envs, np.nan, np.float32))
                raise next(iter(errors.values()))
        assert self.served is not None
        return self.served

    def _open(
        self,
        rows: Sequence[int],
        deadline: Deadline,
        should_retry: Callable[[TenutoError], bool],
        *,
        wait: bool,
        on_wait: OnWait = None,
    ) -> Program[Errors]:
        """Open sessions for rows that have none. Raises only what finding the policy raises."""
        errors = yield from self._open_rows.open(rows, deadline, should_retry, wait=wait, on_wait=on_wait)
        for row in rows:
            if row not in errors:
                self._begins_next[row], self._is_pending[row] = True, False
                self._gone.pop(row, None)
                if self._durable is not None:
                    self._durable.opened(row)
        if self._durable is None and self._open_rows.durable.any():
            assert self.served is not None
            self._durable = DurableRows(self._open_rows, self.served)
        return errors

    def _renew(self, batch: ObservationBatch, rows: Sequence[int], deadline: Deadline) -> Program[Errors]:
        """Open sessions for rows that have none and begin an episode; the running episodes of the others are lost."""
        errors: Errors = {row: self._gone[row] for row in rows if row in self._gone and not batch.starts[row]}
        begin = [row for row in rows if row not in errors]
        if begin:
            batch.rewards[begin] = np.nan
            batch.starts[begin] = True
            try:
                # A draining server is not waited for: it still steps the other rows.
                errors.update((yield from self._open(begin, deadline, is_transient, wait=False)))
            except TenutoError as error:
                errors.update(dict.fromkeys(begin, error))
        return errors

    # ----------------------------------------------------------------------------------------------------- stepping

    def _settle(
        self, batch: ObservationBatch, rows: Rows, deadline: Deadline
    ) -> Program[tuple[Errors, ObservationBatch]]:
        """Complete pending steps of other observations; take pending rows of the same one over as they were sent."""
        pending = self._pending
        if pending is None or not self._is_pending[rows].any():
            return {}, batch
        same = batch.equal_rows(pending) & (pending.starts | ~batch.starts)
        errors = yield from self._deliver(pending, rows[self._is_pending[rows] & ~same[rows]], deadline, None)
        stuck = [row for row, error in errors.items() if batch.starts[row] and self._is_stuck(row, error)]
        if stuck:
            yield from self._open_rows.close(stuck, np.full(self.num_envs, np.nan, np.float32))
            self._is_pending[stuck] = False
        # What begins now needs nothing of the session that failed.
        errors = {row: e for row, e in errors.items() if not (self._needs_new_session(row, e) and batch.starts[row])}
        return errors, batch.merged(pending, self._is_pending & same)

    def _deliver(
        self, batch: ObservationBatch, rows: Rows, deadline: Deadline, builder: ResultBuilder | None
    ) -> Program[Errors]:
        """Step ``rows`` until each is applied or has failed for good. Without a builder the actions are dropped."""
        ambiguous = self._is_pending.copy()
        if self._pending is not None and self._pending is not batch and self._is_pending.any():
            batch = batch.merged(self._pending, self._is_pending & ~np.isin(np.arange(self.num_envs), rows))
        # Pending before they are sent: whatever interrupts this program, no index is used for anything else.
        self._pending = batch
        self._is_pending[rows] = True
        self._begins_next[rows] = False
        final: Errors = {}
        replaced: set[int] = set()
        todo, num_attempts = rows, 0
        while len(todo):
            behind: Errors = {}
            late: Errors = {}
            if self._durable is not None:
                behind = yield from self._durable.catch_up(todo, deadline)
                if behind:
                    todo = todo[~np.isin(todo, list(behind))]
            failed: Errors = (yield from self._attempt(batch, todo, deadline, builder)) if len(todo) else {}
            num_attempts += 1
            ambiguous[[row for row, error in failed.items() if is_ambiguous(error)]] = True
            failed.update(behind)
            retry: list[int] = []
            renew: list[int] = []
            again: list[int] = []
            for row, error in failed.items():
                if self._waits_out(row, error):
                    retry.append(row)
                elif self._is_undone(row, failed, late, deadline, bool(ambiguous[row])):
                    assert self._durable is not None
                    (retry if self._durable.is_stalled(row) else again).append(row)
                elif self._needs_new_session(row, failed[row]) and batch.starts[row] and row not in replaced:
                    renew.append(row)
                else:
                    final[row] = failed[row]
            if renew:
                _log.warning("%d sessions are replaced at an episode's start: %s", len(renew), failed[renew[0]])
                replaced.update(renew)
                yield from self._open_rows.close(renew, batch.rewards)
                refused = yield from self._renew(batch, renew, deadline)
                self._is_pending[renew], self._begins_next[renew], ambiguous[renew] = True, False, False
                final.update(refused)
                renew = [row for row in renew if row not in refused]
            if retry:
                pause_s = deadline.pause_s(num_attempts, (failed[row] for row in retry))
                if pause_s is None:
                    for error in {id(failed[row]): failed[row] for row in retry}.values():
                        deadline.give_up(error, num_attempts)
                    final.update({row: late.get(row, failed[row]) for row in retry})
                    retry = []
                else:
                    yield Sleep(pause_s)
            todo = np.array(sorted(retry + renew + again), np.int64)
        if len(final) < len(rows):
            deadline.timing.budget.succeeded()
        self._conclude(batch, final, ambiguous)
        if self._durable is not None:
            yield from self._end_lost(batch, final)
        return final

    def _waits_out(self, row: int, error: TenutoError) -> bool:
        """Whether a row's step may succeed when it is sent again."""
        return is_transient(error) if self._durable is None else self._durable.waits_out(row, error)

    def _is_undone(self, row: int, failed: Errors, late: Errors, deadline: Deadline, maybe_applied: bool) -> bool:
        """Whether steps that are sent again may mend a row's failure; ``late`` then holds what it is if they are not in
        time. If not, ``failed`` holds what it is.
        """
        if self._durable is None or not self._open_rows.durable[row]:
            return False
        error, is_undone = self._durable.refused(row, failed[row], deadline, maybe_applied)
        (late if is_undone else failed)[row] = error
        return is_undone

    def _needs_new_session(self, row: int, error: TenutoError) -> bool:
        if self._durable is None or not self._open_rows.durable[row]:
            return needs_new_session(error)
        return self._durable.cannot_go_on(row, error)

    def _is_stuck(self, row: int, error: TenutoError) -> bool:
        if self._durable is None or not self._open_rows.durable[row]:
            return is_stuck(error)
        return self._durable.cannot_go_on(row, error) and not isinstance(error, SessionGoneError)

    def _end_lost(self, batch: ObservationBatch, errors: Errors) -> Program[None]:
        """Close the sessions of which this side has found that they cannot go on."""
        lost = [
            row
            for row, error in errors.items()
            if self._open_rows.durable[row]
            and (
                (isinstance(error, SessionGoneError) and not error.reason)
                or (batch.starts[row] and self._is_stuck(row, error))
            )
        ]
        if lost:
            self._is_pending[lost] = False
            yield from self._open_rows.close(lost, np.full(self.num_envs, np.nan, np.float32))

    def _attempt(
        self, batch: ObservationBatch, rows: Rows, deadline: Deadline, builder: ResultBuilder | None
    ) -> Program[Errors]:
        """Send rows once, in as many requests as the server's limits ask for; return the rows that failed."""
        assert self.served is not None
        timeout_s, outputs = deadline.attempt_s(), self.options.outputs_to_wire()
        chunks = batch.chunks(rows, self.served)
        requests = [batch.request(c, self.session_ids, self.step_indices, outputs, timeout_s) for c in chunks]
        try:
            for request in requests:
                self.served.refuse_too_large(request)
        except MessageTooLargeError as error:
            return dict.fromkeys(cast("list[int]", rows.tolist()), error)
        calls = [Call("StepBatch", request, timeout_s) for request in requests]
        answers = yield Calls(tuple(calls))
        failed: Errors = {}
        for chunk, answer in zip(chunks, answers, strict=True):
            failed.update(self._take(batch, chunk, answer, builder))
        return failed

    def _take(self, batch: ObservationBatch, rows: Rows, answer: Any, builder: ResultBuilder | None) -> Errors:
        """Take one request's answer in: advance the rows that were applied, return the others."""
        if isinstance(answer, TenutoError):
            return dict.fromkeys(cast("list[int]", rows.tolist()), answer)
        reply: pb.StepBatchResponse = answer
        try:
            good, failed = self._open_rows.read_errors(rows, reply)
            # Where no row was applied there may be no columns.
            if builder is not None and good.any():
                builder.add(rows, good, reply, self.step_indices)
            if self._durable is not None and good.any():
                self._durable.keep(batch, rows, self.step_indices, reply, good)
        except UnexpectedReplyError as error:
            return dict.fromkeys(cast("list[int]", rows.tolist()), error)
        applied = rows[good]
        self.step_indices[applied] += np.uint64(1)
        self._is_pending[applied] = False
        return failed

    def _conclude(self, batch: ObservationBatch, errors: Errors, ambiguous: NDArray[np.bool_]) -> None:
        """Leave each row that failed as the law says: where it was, or pending, or gone."""
        for row, error in errors.items():
            unknown = bool(ambiguous[row]) and (self._waits_out(row, error) or is_ambiguous(error))
            error.outcome_unknown |= unknown
            self._is_pending[row] = unknown
            self._begins_next[row] = batch.starts[row] and not unknown
            if isinstance(error, SessionGoneError):
                self._gone[row] = error
                if error.reason or self._durable is None:
                    self.session_ids[row] = 0


def summary(result: VectorStepResult, num_rows: int) -> TenutoError:
    """Return what to raise for the errors of a step: the one error where all rows failed alike, else RowsError."""
    errors = list(result.errors.values())
    if len(errors) == num_rows and len({type(error) for error in errors}) == 1:
        return errors[0].with_traceback(None)
    return RowsError(result)
