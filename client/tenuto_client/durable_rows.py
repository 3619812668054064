"""durable.py for the sessions of N environments: keeps whole vector steps and sends the rows again that a restart has
undone. Owned by SessionRows, whose methods run one at a time. No I/O.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tenuto_client.batch import ObservationBatch, Rows
from tenuto_client.durable import (
    expected_index,
    mismatch,
    not_kept,
    num_kept,
    too_late,
    waits_out,
    waits_out_restart,
)
from tenuto_client.effects import Call, Calls, Program
from tenuto_client.errors import (
    SessionExistsError,
    SessionGoneError,
    SessionLostError,
    StepIndexError,
    TenutoError,
    UnexpectedReplyError,
)
from tenuto_client.open_rows import Errors, OpenRows
from tenuto_client.retry import Deadline, is_transient
from tenuto_client.served import ServedPolicy, refresh_policy
from tenuto_proto.v1 import policy_pb2 as pb

SWEEP_AT = 64
"""Kept vector steps from which on those are looked for that stand behind one of a row that rests."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _KeptRows:
    """A vector step, with the answers of its rows; all arrays are ``[N, ...]``."""

    batch: ObservationBatch
    session_ids: NDArray[np.uint64]
    """0: the row was not answered."""
    step_indices: NDArray[np.uint64]
    actions: NDArray[Any]
    versions: NDArray[np.uint64]


class RowHistory:
    """The vector steps of which a row is not known to be durable, in order; bounded."""

    def __init__(self, session_ids: NDArray[np.uint64], max_steps: int) -> None:
        """``session_ids``: ``[N]``, of the open sessions, kept up to date by their owner."""
        self._session_ids, self._max_steps = session_ids, max_steps
        self._kept: deque[_KeptRows] = deque()
        self._sweep_at = SWEEP_AT
        self.first_kept = np.zeros_like(session_ids)
        """``[N]``: the steps of the open sessions are kept from here on."""

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Any:
        """Go through what is kept now, oldest first."""
        return iter(tuple(self._kept))

    def keep(
        self,
        batch: ObservationBatch,
        rows: Rows,
        step_indices: NDArray[np.uint64],
        actions: NDArray[Any],
        versions: NDArray[np.uint64],
    ) -> None:
        """Keep rows of a vector step. ``step_indices``: ``[N]``; the other columns are those of ``rows``."""
        last = self._kept[-1] if self._kept else None
        if last is None or last.batch is not batch or last.session_ids[rows].any():
            if len(self._kept) >= self._max_steps:
                self._drop_oldest()
            last = _KeptRows(
                batch,
                np.zeros_like(self._session_ids),
                np.zeros_like(self._session_ids),
                np.zeros((len(self._session_ids), *actions.shape[1:]), actions.dtype),
                np.zeros_like(self._session_ids),
            )
            self._kept.append(last)
        last.session_ids[rows] = self._session_ids[rows]
        last.step_indices[rows] = step_indices[rows]
        last.actions[rows], last.versions[rows] = actions, versions

    def forget(self, rows: Rows, durable_steps: NDArray[np.uint64]) -> None:
        """Forget the steps of rows before these indices."""
        self.first_kept[rows] = np.maximum(self.first_kept[rows], durable_steps)
        kept = self._kept
        while kept and not self._is_needed(kept[0]):
            kept.popleft()
        if len(kept) > self._sweep_at:
            self._kept = deque(filter(self._is_needed, kept))
            self._sweep_at = max(2 * len(self._kept), SWEEP_AT)

    def _is_needed(self, kept: _KeptRows) -> bool:
        return bool(self._needed(kept).any())

    def _needed(self, kept: _KeptRows) -> NDArray[np.bool_]:
        is_answer = (kept.session_ids == self._session_ids) & (kept.session_ids != 0)
        return is_answer & (kept.step_indices >= self.first_kept)

    def _drop_oldest(self) -> None:
        oldest = self._kept.popleft()
        rows = self._needed(oldest)
        self.first_kept[rows] = oldest.step_indices[rows] + np.uint64(1)


class DurableRows:
    """Delivers steps of N sessions, those that are durable also to servers that have restarted."""

    def __init__(self, open_rows: OpenRows, served: ServedPolicy) -> None:
        self._open = open_rows
        num_envs = len(open_rows.session_ids)
        self.history = RowHistory(open_rows.session_ids, num_kept(num_envs * served.observation_bytes))
        self._is_behind = np.zeros(num_envs, np.bool_)
        """Rows whose server, as it was last heard of, has undone steps."""
        self._cursors = np.zeros(num_envs, np.uint64)
        """``[N]``: where a server is behind, the index that it needs next."""
        self._unknown: set[int] = set()
        """Rows whose server has undone their opening, too."""
        self._stalled: set[int] = set()
        """Rows that were refused and have not come on since."""
        self._adopts = np.zeros(num_envs, np.bool_)
        """Rows that a server has restored, which did not tell its epoch."""
        self._arrived: ServedPolicy | None = None
        """What the server that undid steps serves; it has a row's session where a step sent afterwards succeeds."""

    def opened(self, row: int) -> None:
        """Note that a row has a new session."""
        self.history.first_kept[row] = 0
        self._is_behind[row] = False
        self._unknown.discard(row)

    def keep(
        self, batch: ObservationBatch, rows: Rows, step_indices: NDArray[np.uint64], reply: pb.StepBatchResponse,
        good: NDArray[np.bool_],
    ) -> None:  # fmt: skip
        """Keep the ``good`` rows of an answer. Raises UnexpectedReplyError, and then keeps nothing."""
        actions, versions, durable_steps = self._columns(reply, len(rows))
        is_durable = good & self._open.durable[rows]
        kept = rows[is_durable]
        self._stalled.difference_update(cast("list[int]", kept.tolist()))
        self.history.keep(batch, kept, step_indices, actions[is_durable], versions[is_durable])
        self.history.forget(kept, durable_steps[is_durable])

    def waits_out(self, row: int, error: TenutoError) -> bool:
        """Whether a row's step may succeed when it is sent again."""
        if not self._open.durable[row]:
            return is_transient(error)
        return waits_out(error) or (bool(self._is_behind[row]) and waits_out_restart(error))

    def cannot_go_on(self, row: int, error: TenutoError) -> bool:
        """Whether an episode that begins should begin in a new session, though the row's is durable."""
        is_stuck = error.outcome_unknown or bool(self._is_behind[row])
        return isinstance(error, SessionGoneError) or (is_stuck and not waits_out(error))

    def refused(
        self, row: int, error: TenutoError, deadline: Deadline, maybe_applied: bool
    ) -> tuple[TenutoError, bool]:
        """Note a refusal that steps which are sent again may mend. ``maybe_applied``: whether its step perhaps was.

        Returns the error, should it not be mended in time, and whether to try it; then at once, unless the row is
        :meth:`stalled`.
        """
        step_index, first_kept = int(self._open.step_indices[row]), int(self.history.first_kept[row])
        cursor = int(self._cursors[row]) if self._is_behind[row] else step_index
        if isinstance(error, StepIndexError):
            expected = expected_index(error, cursor, step_index, maybe_applied)
            if expected is None:
                return error, False
            self._is_behind[row] = True
            if expected < first_kept:
                return not_kept(expected, first_kept), False
            cursor = expected
        elif isinstance(error, SessionLostError) and not first_kept:
            self._is_behind[row] = True
            self._unknown.add(row)
            cursor = 0
        else:
            return error, False
        self._cursors[row], self._arrived = cursor, None
        self._adopts[row] = row not in self._unknown
        return too_late(cursor, step_index, deadline), True

    def is_stalled(self, row: int) -> bool:
        """Whether a row was refused before and has not come on since."""
        if row in self._stalled:
            return True
        self._stalled.add(row)
        return False

    def catch_up(self, rows: Rows, deadline: Deadline) -> Program[Errors]:
        """Send again what the servers of rows have undone; return the rows that are still behind, and why."""
        behind = rows[self._is_behind[rows]]
        if not len(behind):
            return {}
        _log.info("%d sessions: their server has undone steps; they are sent again", len(behind))
        errors: Errors = {}
        try:
            if self._arrived is None:
                self._arrived = yield from refresh_policy(self._open.options, self._open.served, deadline, wait=True)
                self._open.served = self._arrived
        except TenutoError as error:
            error.outcome_unknown = False
            return dict.fromkeys(cast("list[int]", behind.tolist()), error)
        unknown = [row for row in behind.tolist() if row in self._unknown]
        for row, error in (yield from self._open.reopen(unknown, deadline, waits_out_restart)).items():
            if isinstance(error, SessionExistsError):
                # It is known after all, and with steps: the server says with the next one where it is.
                self._unknown.discard(row)
                self._cursors[row] = self._open.step_indices[row]
            else:
                errors[row] = error
        self._unknown.difference_update(row for row in unknown if row not in errors)
        for kept in self.history:
            waiting = behind[self._cursors[behind] < self._open.step_indices[behind]]
            due = (kept.session_ids == self._open.session_ids) & (kept.step_indices == self._cursors)
            waiting = waiting[due[waiting] & ~np.isin(waiting, list(errors))]
            if len(waiting):
                if deadline.remaining_s() <= 0:
                    late = too_late(int(self._cursors[waiting[0]]), int(self._open.step_indices[waiting[0]]), deadline)
                    errors.update(dict.fromkeys(cast("list[int]", waiting.tolist()), late))
                else:
                    errors.update((yield from self._replay(kept, waiting, deadline)))
        self._is_behind[behind] = self._cursors[behind] < self._open.step_indices[behind]
        # Of a session whose opening is undone there may be no step to send again.
        self._is_behind[list(errors)] = True
        return errors

    def _replay(self, kept: _KeptRows, rows: Rows, deadline: Deadline) -> Program[Errors]:
        """Send rows of a vector step again; return those that failed."""
        served = self._open.served
        assert served is not None
        timeout_s, outputs = deadline.attempt_s(), self._open.options.outputs_to_wire()
        chunks = kept.batch.chunks(rows, served)
        calls: list[Call] = []
        for chunk in chunks:
            request = kept.batch.request(chunk, kept.session_ids, kept.step_indices, outputs, timeout_s)
            request.replayed_versions.extend(kept.versions[chunk].tolist())
            calls.append(Call("StepBatch", request, timeout_s))
        answers = yield Calls(tuple(calls))
        errors: Errors = {}
        for chunk, answer in zip(chunks, answers, strict=True):
            errors.update(self._compare(kept, chunk, answer))
        return errors

    def _compare(self, kept: _KeptRows, rows: Rows, answer: Any) -> Errors:
        """Take the answer to rows that were sent again in."""
        if isinstance(answer, TenutoError):
            return dict.fromkeys(cast("list[int]", rows.tolist()), answer)
        try:
            good, errors = self._open.read_errors(rows, answer)
            if not good.any():
                return errors
            actions, versions, durable_steps = self._columns(answer, len(rows))
        except UnexpectedReplyError as error:
            return dict.fromkeys(cast("list[int]", rows.tolist()), error)
        # As bytes: equal bit for bit, where floats have a NaN and two zeros.
        ours, theirs = kept.actions[rows], np.ascontiguousarray(actions)
        same_bits = np.array([a.tobytes() == b.tobytes() for a, b in zip(ours, theirs, strict=True)])
        same_versions = kept.versions[rows] == versions
        for position in np.flatnonzero(good & ~(same_bits & same_versions)).tolist():
            row = int(rows[position])
            what = f"version: got {versions[position]}, expected {kept.versions[row]}"
            errors[row] = mismatch(int(kept.step_indices[row]), "action" if same_versions[position] else what)
        good &= same_bits & same_versions
        done = rows[good]
        self._cursors[done] += np.uint64(1)
        self._stalled.difference_update(cast("list[int]", done.tolist()))
        if self._arrived is not None:
            self._open.server_epochs[done[self._adopts[done]]] = self._arrived.server_epoch
        self.history.forget(done, durable_steps[good])
        return errors

    def _columns(
        self, reply: pb.StepBatchResponse, num_rows: int
    ) -> tuple[NDArray[Any], NDArray[np.uint64], NDArray[np.uint64]]:
        """Return actions, versions and durable steps. Raises UnexpectedReplyError."""
        served = self._open.served
        assert served is not None
        actions = served.array(reply.actions, (num_rows, *served.action_dtype_and_shape[1]))
        versions = np.array(reply.versions, np.uint64)
        durable_steps = np.array(reply.durable_steps or [0] * num_rows, np.uint64)
        if not len(versions) == len(durable_steps) == num_rows:
            raise UnexpectedReplyError(f"reply: got {len(versions)} rows, expected {num_rows}")
        return actions, versions, durable_steps
