"""A step's way through the server, stations 3 to 8: admit, submit, gather, run, scatter, reply.

Owned by the event loop. The calls of a turn are admitted and submitted as columns, and all that a batch finishes is
answered in one go. Each call has tickets of its own, and with them its deadline, its status and its caller.

Legend: n rows of a turn.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
from numpy.typing import NDArray

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.arena import Slots
from tenuto_server.batch_queue import Batch, BatchQueue, Ticket, TicketState
from tenuto_server.batcher import Batcher
from tenuto_server.calls import StepCall
from tenuto_server.engine import Engine, ServedVersion
from tenuto_server.errors import Refusal
from tenuto_server.metrics import Metrics
from tenuto_server.policies import PolicyRegistry, ServedPolicy
from tenuto_server.replies import write_replies
from tenuto_server.sessions import Admission, Door
from tenuto_server.step import StepResults, StepRows
from tenuto_server.turn import StepColumns, Turn

log = logging.getLogger(__name__)
_FAILURES_LOGGED_EVERY_S = 10.0
_BRIEF_S = 250e-6
"""For as long a batch may hold the event loop up, on average: to hand it to the engine's thread and back takes half of
that.
"""


@dataclass(eq=False, slots=True)
class TicketRows:
    """The rows of a ticket: some of those of its turn, ascending."""

    turn: StepRows
    rows: range | list[int]

    @property
    def slots(self) -> Slots:
        """[rows of the ticket]"""
        rows = self.rows
        return self.turn.slots[slice(rows.start, rows.stop) if isinstance(rows, range) else rows]


class Stepper:
    """Takes checked rows to the device and their replies back."""

    def __init__(
        self, engine: Engine, registry: PolicyRegistry, queue: BatchQueue, metrics: Metrics, clock: Callable[[], float]
    ) -> None:
        self._engine, self._registry, self._metrics, self._clock = engine, registry, metrics, clock
        self.batcher: Batcher[StepResults] = Batcher(
            queue, clock, self._start, self._commit, self._abandon, lambda: self.when_free(), self._answer_ready
        )
        self.when_free: Callable[[], None] = lambda: None
        """Called when the device is free, before it takes the next batch."""
        self.door = Door.OPEN
        self.is_durable = False
        """Whether the replies say how many steps the store holds."""
        self.want_version: Callable[[ServedPolicy, int], None] = lambda policy, version: None
        """Called where a step is sent again whose version of before is not held."""
        self._ready: dict[ServedPolicy, list[StepCall]] = {}
        """Calls to answer."""
        self._log_failures_s = 0.0
        """Not before."""

    @property
    def draining(self) -> bool:
        """Whether the server is about to end."""
        return self.door is not Door.OPEN

    def advance(self, turn: Turn) -> None:
        """Advance the session of each row by one step; each call is answered when its rows are settled."""
        policy, calls, columns = turn.policy, turn.calls, turn.check()
        num_rows = len(columns.session_ids)
        if (len(calls) == 1 and not calls[0].is_over) or (
            self.batcher.queue.has_room(num_rows)
            and len(set(columns.session_ids.tolist())) == num_rows
            and not any(call.is_over for call in calls)
        ):
            self._advance(policy, calls, columns)
        else:
            # One by one: a step may join another of its session, or be refused since that is under way.
            for call in calls:
                if not call.is_over:
                    part = columns.of(call)
                    call.first = 0
                    self._advance(policy, [call], part)
        self._answer_ready()

    def leave(self, call: StepCall) -> None:
        """The caller is gone. What still waits for the device is dropped; what runs already is applied."""
        if not call.is_over:
            call.end()
            for ticket in (*call.tickets, *dict.fromkeys(call.joined.values())):
                self.batcher.leave(ticket, call.waiter)
            call.let_go()

    def _advance(self, policy: ServedPolicy, calls: Sequence[StepCall], columns: StepColumns) -> None:
        began_s = self._clock()
        if not self.batcher.queue.has_room(len(columns.session_ids)):
            # Then it is one call.
            try:
                self.batcher.queue.require_room(len(columns.session_ids), calls[0].party)
            except Refusal as refusal:
                calls[0].finish(refusal)
                return
        admission = policy.sessions.admit(
            columns.session_ids,
            columns.step_indices,
            columns.episode_starts,
            columns.refused,
            policy.newest.version,
            self.door,
            columns.owners,
            columns.replayed,
            policy.versions,
        )
        for version in set(columns.replayed.values()) - policy.versions.keys():
            self.want_version(policy, version)
        for call in calls:
            rows = slice(call.first, call.first + call.num_rows)
            call.slots = admission.slots[rows]
            call.waiter = partial(self._settled, policy, call)
        if admission.refused or admission.joined:
            self._hand_out(calls, admission)
        self._metrics.station["admit"].observe(self._clock() - began_s, len(calls))
        tickets = self._tickets(policy, calls, columns, admission)
        if settled := [call for call in calls if not call.num_pending]:
            self._ready.setdefault(policy, []).extend(settled)
        self.batcher.submit(tickets)

    def _hand_out(self, calls: Sequence[StepCall], admission: Admission) -> None:
        """Tell the calls which of their rows are refused, and which wait for what others submitted."""
        for row, refusal in admission.refused.items():
            call = _call_of(calls, row)
            call.failed[row - call.first] = refusal
        for row, ticket in admission.joined.items():
            call = _call_of(calls, row)
            if call.timer is None:
                # What others submitted has a deadline of theirs; this call does not wait longer than its own.
                wait_s = max(0.0, call.deadline_s - self._clock())
                call.timer = asyncio.get_running_loop().call_later(wait_s, self._stop_joining, call)
            if ticket not in call.joined.values():
                ticket.waiters.append(call.waiter)
                call.num_pending += 1
            call.joined[row - call.first] = ticket

    def _stop_joining(self, call: StepCall) -> None:
        for ticket in dict.fromkeys(call.joined.values()):
            if ticket.state is not TicketState.DONE:
                self.batcher.leave(ticket, call.waiter)
                call.waiter()
        self._answer_ready()

    def _tickets(
        self,
        policy: ServedPolicy,
        calls: Sequence[StepCall],
        columns: StepColumns,
        admission: Admission,
    ) -> list[Ticket]:
        """Make the tickets of the admitted rows: for each call one per checkpoint."""
        sessions, slots = policy.sessions, admission.slots
        turn = StepRows(
            slots=slots,
            generations=sessions.pool.generation[slots],
            observations=columns.observations,
            episode_starts=admission.episode_starts,
            seeds=sessions.seed[slots],
            step_indices=columns.step_indices,
            deterministic=sessions.deterministic[slots],
            rewards=columns.rewards,
            session_ids=columns.session_ids,
        )
        tickets: list[Ticket] = []
        for call, version, rows in _parts(calls, admission):
            its = TicketRows(turn, rows)
            ticket = Ticket(policy.versions[version], len(rows), its, call.began_s, call.deadline_s, [call.waiter])
            ticket.party = call.party
            # An object column takes the ticket itself at every slot.
            sessions.ticket[its.slots] = ticket
            call.tickets.append(ticket)
            call.num_pending += 1
            tickets.append(ticket)
        return tickets

    def _settled(self, policy: ServedPolicy, call: StepCall) -> None:
        call.num_pending -= 1
        if not call.num_pending and not call.is_over:
            self._ready.setdefault(policy, []).append(call)

    # ------------------------------------------------------------------ what the batcher calls

    def _start(self, batch: Batch, done: Callable[[StepResults | None, BaseException | None], None]) -> None:
        checkpoint = cast("ServedVersion", batch.checkpoint)
        brief = checkpoint.step.expected_s(batch.num_rows) <= _BRIEF_S
        if brief:
            # It commits before this returns: replies that are still to be written would be those of a later step.
            self._answer_ready()
        self._engine.submit(lambda: self._engine.run(checkpoint, _rows_of(batch)), done, brief=brief)
        for ticket in batch.tickets:
            self._metrics.station["submit"].observe(batch.taken_s - ticket.enqueued_s)
        self._metrics.batch_rows.observe(batch.num_rows)

    def _commit(self, batch: Batch, results: StepResults) -> None:
        """Store the replies, then move the sessions on; rows without finite results stay where they were."""
        checkpoint = cast("ServedVersion", batch.checkpoint)
        policy, rows, now_s = self._policy_of(checkpoint), results.rows, self._clock()
        good = slice(None) if np.count_nonzero(results.finite) == len(rows) else results.finite
        slots, starts = rows.slots[good], rows.episode_starts[good]
        compute_s = sum(results.station_s.values())
        replies = policy.replies
        replies.session_id[slots], replies.step_index[slots] = rows.session_ids[good], rows.step_indices[good]
        replies.version[slots] = checkpoint.version
        replies.action[slots], replies.value[slots] = results.actions[good], results.values[good]
        replies.log_prob[slots], replies.logits[slots] = results.log_probs[good], results.logits[good]
        if len(batch.tickets) == 1:
            replies.queue_us[slots] = (batch.taken_s - batch.tickets[0].enqueued_s) * 1e6
        else:
            waits = [(batch.taken_s - t.enqueued_s) * 1e6 for t in batch.tickets]
            replies.queue_us[slots] = np.repeat(waits, [t.num_rows for t in batch.tickets])[good]
        replies.compute_us[slots] = compute_s * 1e6
        replies.batch_size[slots] = batch.num_rows

        finished = policy.sessions.commit(slots, starts, rows.rewards[good], now_s)
        self._metrics.observe_returns(policy.name, finished)
        if len(slots) < len(rows):
            self._refuse_rows(policy, checkpoint.version, batch, rows.slots, np.flatnonzero(~results.finite))
        self._metrics.count_steps(policy.name, len(slots))
        if begun := int(np.count_nonzero(starts)):
            self._metrics.count_episodes(policy.name, checkpoint.version, begun)
        self._metrics.engine_busy.inc(compute_s)
        for station, seconds in results.station_s.items():
            self._metrics.station[station].observe(seconds)

    def _answer_ready(self) -> None:
        """Write the replies of the calls whose tickets are settled."""
        if not self._ready:
            return
        ready, self._ready = self._ready, {}
        began_s = self._clock()
        for policy, calls in ready.items():
            try:
                self._answer(policy, calls, began_s)
            except Exception as error:  # noqa: BLE001 (whatever it was, the callers must hear of it)
                for call in calls:
                    call.finish(error)

    def _answer(self, policy: ServedPolicy, calls: Sequence[StepCall], began_s: float) -> None:
        for call in calls:
            _note_failures(call)
        durable = policy.sessions.durable_index if self.is_durable else None
        for call, answer in zip(calls, write_replies(policy.replies, calls, durable), strict=True):
            call.finish(answer)
            if not isinstance(answer, Refusal):
                for refusal in call.failed.values():
                    self._metrics.refusals.labels(refusal.reason_name).inc()
                self._metrics.step[call.rpc].observe(self._clock() - call.began_s)
        self._metrics.station["reply"].observe(self._clock() - began_s, len(calls))

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
        self._release(self._policy_of(checkpoint), cast("TicketRows", ticket.rows).slots)
        if refusal.reason == pb.COMPUTE_FAILED:
            self._metrics.failed_steps.labels(checkpoint.policy_name).inc(ticket.num_rows)

    def _release(self, policy: ServedPolicy, slots: Slots) -> None:
        self._metrics.observe_returns(policy.name, policy.sessions.release(slots, self._clock()))

    def _policy_of(self, checkpoint: ServedVersion) -> ServedPolicy:
        policy = self._registry.get(checkpoint.policy_name)
        assert policy is not None, "a policy never leaves the registry"
        return policy


def _call_of(calls: Sequence[StepCall], row: int) -> StepCall:
    """Return the call that a row of the turn belongs to."""
    return calls[bisect_right(calls, row, key=lambda call: call.first) - 1]


def _parts(calls: Sequence[StepCall], admission: Admission) -> Iterable[tuple[StepCall, int, range | list[int]]]:
    """Cut the rows that run into tickets: (call, version, rows of the turn)."""
    run, versions = admission.run, admission.versions[admission.run].tolist()
    if len(run) == len(admission.slots) and len(set(versions)) == 1:
        return [(call, versions[0], range(call.first, call.first + call.num_rows)) for call in calls]
    parts: dict[tuple[StepCall, int], list[int]] = {}
    for row, version in zip(run.tolist(), versions, strict=True):
        parts.setdefault((_call_of(calls, row), version), []).append(row)
    return [(call, version, rows) for (call, version), rows in parts.items()]


def _rows_of(batch: Batch) -> StepRows:
    """Put the rows of a batch's tickets together, in order."""
    turns: dict[int, tuple[StepRows, list[int]]] = {}
    for ticket in batch.tickets:
        part = cast("TicketRows", ticket.rows)
        turns.setdefault(id(part.turn), (part.turn, []))[1].extend(part.rows)
    return StepRows.concatenate(
        [
            # The tickets of a turn are queued one after the other, so all of its rows are all in order.
            turn if len(rows) == len(turn) else StepRows(*(column[rows] for column in vars(turn).values()))
            for turn, rows in turns.values()
        ]
    )


def _note_failures(call: StepCall) -> None:
    """Add the rows that the call's tickets did not carry out to its failed ones."""
    for ticket in call.tickets:
        rows = cast("TicketRows", ticket.rows).rows
        if ticket.refusal is not None:
            call.failed.update((row - call.first, ticket.refusal) for row in rows)
        for position, refusal in ticket.refused.items():
            call.failed[rows[position] - call.first] = refusal
    for row, ticket in call.joined.items():
        refusal = _refusal_of_slot(ticket, int(call.slots[row]))
        if refusal is not None:
            call.failed[row] = refusal


def _refusal_of_slot(ticket: Ticket, slot: int) -> Refusal | None:
    """Why the ticket's row of this slot was not applied, or is not yet; None where it was."""
    if ticket.state is not TicketState.DONE:
        return Refusal(pb.STEP_IN_FLIGHT, "the step is still under way; send it again to go on waiting")
    (position,) = np.flatnonzero(cast("TicketRows", ticket.rows).slots == slot)
    return ticket.refusal or ticket.refused.get(int(position))
