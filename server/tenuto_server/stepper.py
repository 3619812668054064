"""A step's way through the server, stations 3 to 7: admit, submit, gather, run, scatter. Owned by the event loop.

Legend: n rows of one request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.arena import Slots
from tenuto_server.batcher import Batch, Batcher, BatchQueue, Ticket, TicketState
from tenuto_server.engine import Engine, ServedVersion
from tenuto_server.errors import Refusal
from tenuto_server.metrics import Metrics
from tenuto_server.policies import PolicyRegistry, ServedPolicy
from tenuto_server.sessions import Admission
from tenuto_server.step import StepResults, StepRows

log = logging.getLogger(__name__)
_FAILURES_LOGGED_EVERY_S = 10.0


@dataclass(frozen=True)
class StepColumns:
    """The rows of a request that passed the checks of its form, as columns of n."""

    session_ids: NDArray[np.uint64]
    step_indices: NDArray[np.uint64]
    episode_starts: NDArray[np.bool_]
    rewards: NDArray[np.float32]
    observations: NDArray[np.float32]
    """[n, O], flattened."""
    refused: dict[int, Refusal]
    """Rows whose values were refused; they go no further."""


class Stepper:
    """Takes rows of checked observations to the device and back."""

    def __init__(
        self, engine: Engine, registry: PolicyRegistry, queue: BatchQueue, metrics: Metrics, clock: Callable[[], float]
    ) -> None:
        self._engine, self._registry, self._metrics, self._clock = engine, registry, metrics, clock
        self.batcher: Batcher[StepResults] = Batcher(queue, clock, self._start, self._commit, self._abandon)
        self.draining = False
        self._log_failures_s = 0.0
        """Not before."""

    async def advance(
        self, policy: ServedPolicy, columns: StepColumns, timeout_s: float
    ) -> tuple[Slots, dict[int, Refusal]]:
        """Advance each row's session by one step.

        Returns the slots [n] at which ``policy.replies`` holds the replies, and the rows that failed. Raises Refusal
        (QUEUE_FULL). Cancelling drops what still waits for the device; what runs already is applied.
        """
        began_s = self._clock()
        self.batcher.queue.require_room(len(columns.session_ids))
        admission = policy.sessions.admit(
            columns.session_ids,
            columns.step_indices,
            columns.episode_starts,
            columns.refused,
            policy.newest.version,
            self.draining,
        )
        self._metrics.station["admit"].observe(self._clock() - began_s)
        submitted = self._submit(policy, columns, admission, began_s, timeout_s)
        own = [(ticket, ticket.join()) for ticket, _ in submitted]
        others = [(ticket, ticket.join()) for ticket in admission.joined.values()]
        try:
            for _, settled in own:
                await settled
            if others:
                # What others submitted has a deadline of theirs; this request does not wait longer than its own.
                remaining_s = max(0.0, began_s + timeout_s - self._clock())
                await asyncio.wait({settled for _, settled in others}, timeout=remaining_s)
        finally:
            for ticket, settled in (*own, *others):
                self.batcher.leave(ticket, settled)
        failed = dict(admission.refused)
        for ticket, rows in submitted:
            if ticket.refusal is not None:
                failed.update(dict.fromkeys(rows.tolist(), ticket.refusal))
            failed.update({int(rows[i]): refusal for i, refusal in ticket.refused.items()})
        for row, ticket in admission.joined.items():
            refusal = _refusal_of_slot(ticket, int(admission.slots[row]))
            if refusal is not None:
                failed[row] = refusal
        for row in policy.replies.overtaken(columns.session_ids, columns.step_indices, admission.slots):
            message = (
                f"session {columns.session_ids[row]}: the reply was overtaken by a later step or the session's end"
            )
            failed.setdefault(row, Refusal(pb.STEP_INDEX_MISMATCH, message))
        return admission.slots, failed

    def _submit(
        self, policy: ServedPolicy, columns: StepColumns, admission: Admission, now_s: float, timeout_s: float
    ) -> list[tuple[Ticket, NDArray[np.int64]]]:
        """Queue the admitted rows, one ticket per checkpoint; returns each with the request's rows it carries."""
        versions = admission.versions[admission.run]
        tickets: list[tuple[Ticket, NDArray[np.int64]]] = []
        for version in dict.fromkeys(versions.tolist()):
            rows = admission.run[versions == version]
            slots = admission.slots[rows]
            sessions = policy.sessions
            step_rows = StepRows(
                slots=slots,
                generations=sessions.pool.generation[slots],
                observations=columns.observations[rows],
                episode_starts=admission.episode_starts[rows],
                seeds=sessions.seed[slots],
                step_indices=columns.step_indices[rows],
                deterministic=sessions.deterministic[slots],
                rewards=columns.rewards[rows],
                session_ids=columns.session_ids[rows],
            )
            ticket = Ticket(policy.versions[version], len(rows), step_rows, now_s, now_s + timeout_s)
            # An object column takes the ticket itself at every slot.
            sessions.ticket[slots] = ticket
            tickets.append((ticket, rows))
        for ticket, _ in tickets:
            self.batcher.submit(ticket)
        self._metrics.queued_rows.set(self.batcher.queue.num_rows)
        return tickets

    def _start(self, batch: Batch, done: Callable[[StepResults | None, BaseException | None], None]) -> None:
        checkpoint = cast("ServedVersion", batch.checkpoint)
        parts = [cast("StepRows", ticket.rows) for ticket in batch.tickets]
        self._engine.submit(lambda: self._engine.run(checkpoint, StepRows.concatenate(parts)), done)
        for ticket in batch.tickets:
            self._metrics.station["submit"].observe(batch.taken_s - ticket.enqueued_s)
        self._metrics.batch_rows.observe(batch.num_rows)
        self._metrics.queued_rows.set(self.batcher.queue.num_rows)

    def _commit(self, batch: Batch, results: StepResults) -> None:
        """Store the replies, then move the sessions on; rows without finite results stay where they were."""
        checkpoint = cast("ServedVersion", batch.checkpoint)
        policy = self._policy_of(checkpoint)
        rows, good, now_s = results.rows, results.finite, self._clock()
        slots = rows.slots[good]
        replies = policy.replies
        replies.session_id[slots], replies.step_index[slots] = rows.session_ids[good], rows.step_indices[good]
        replies.version[slots] = checkpoint.version
        replies.action[slots], replies.value[slots] = results.actions[good], results.values[good]
        replies.log_prob[slots], replies.logits[slots] = results.log_probs[good], results.logits[good]
        waits = [(batch.taken_s - t.enqueued_s) * 1e6 for t in batch.tickets]
        replies.queue_us[slots] = np.repeat(waits, [t.num_rows for t in batch.tickets])[good]
        replies.compute_us[slots] = sum(results.station_s.values()) * 1e6
        replies.batch_size[slots] = batch.num_rows

        finished = policy.sessions.commit(slots, rows.episode_starts[good], rows.rewards[good], now_s)
        self._metrics.observe_returns(policy.name, finished)
        if not good.all():
            self._refuse_rows(policy, checkpoint.version, batch, rows.slots, np.flatnonzero(~good))
        self._metrics.steps.labels(policy.name).inc(len(slots))
        if begun := int(rows.episode_starts[good].sum()):
            self._metrics.count_episodes(policy.name, checkpoint.version, begun)
        self._metrics.engine_busy.inc(sum(results.station_s.values()))
        for station, seconds in results.station_s.items():
            self._metrics.station[station].observe(seconds)

    def _refuse_rows(
        self, policy: ServedPolicy, version: int, batch: Batch, slots: Slots, bad: NDArray[np.int64]
    ) -> None:
        self._release(policy, slots[bad])
        self._metrics.failed_steps.labels(policy.name).inc(len(bad))
        if self._clock() >= self._log_failures_s:
            self._log_failures_s = self._clock() + _FAILURES_LOGGED_EVERY_S
            share = f"{len(bad)} of {len(slots)} steps of a batch"
            log.error("version %d of policy %s: %s gave no finite result", version, policy.name, share)
        firsts = np.cumsum([0] + [t.num_rows for t in batch.tickets])
        for row in bad.tolist():
            number = int(np.searchsorted(firsts, row, side="right")) - 1
            message = "the policy's output is not finite; the step was not applied"
            batch.tickets[number].refused[row - int(firsts[number])] = Refusal(pb.COMPUTE_FAILED, message)

    def _abandon(self, ticket: Ticket, refusal: Refusal) -> None:
        checkpoint = cast("ServedVersion", ticket.checkpoint)
        self._release(self._policy_of(checkpoint), cast("StepRows", ticket.rows).slots)
        if refusal.reason == pb.COMPUTE_FAILED:
            self._metrics.failed_steps.labels(checkpoint.policy_name).inc(ticket.num_rows)

    def _release(self, policy: ServedPolicy, slots: Slots) -> None:
        self._metrics.observe_returns(policy.name, policy.sessions.release(slots, self._clock()))

    def _policy_of(self, checkpoint: ServedVersion) -> ServedPolicy:
        policy = self._registry.get(checkpoint.policy_name)
        assert policy is not None, "a policy never leaves the registry"
        return policy


def _refusal_of_slot(ticket: Ticket, slot: int) -> Refusal | None:
    """Why the ticket's row of this slot was not applied, or is not yet; None where it was."""
    if ticket.state is not TicketState.DONE:
        return Refusal(pb.STEP_IN_FLIGHT, "the step is still under way; send it again to go on waiting")
    (position,) = np.flatnonzero(cast("StepRows", ticket.rows).slots == slot)
    return ticket.refusal or ticket.refused.get(int(position))
