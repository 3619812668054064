"""Forms batches: which waiting steps go to the device together, when, and what becomes of those that cannot wait.

:class:`BatchQueue` holds the rules and no I/O, the clock's reading is handed in. :class:`Batcher` drives it on the
event loop: it hands a batch to the engine whenever the device is free. Both are owned by the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, TypeVar

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.errors import Refusal

log = logging.getLogger(__name__)


class TicketState(Enum):
    """Where a ticket is on its way."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"


@dataclass(eq=False, slots=True)
class Ticket:
    """Rows of one request that run on one checkpoint. They enter one batch together or fail together."""

    checkpoint: Hashable
    """A batch runs on one checkpoint: only tickets with an equal one share it."""
    num_rows: int
    rows: Any
    """What the engine needs; opaque here."""
    enqueued_s: float
    deadline_s: float
    """When the rows may no longer be waiting."""
    waiters: list[Callable[[], None]] = field(default_factory=lambda: [])
    """Called when the ticket is settled, well or ill: one for each request that submitted or joined it."""
    refusal: Refusal | None = None
    """Why a settled ticket was not applied."""
    refused: dict[int, Refusal] = field(default_factory=lambda: {})
    """Rows of a settled ticket that were not applied although the others were."""
    state: TicketState = TicketState.QUEUED

    async def settled(self) -> None:
        """Wait until the ticket is settled, well or ill."""
        told = asyncio.Event()
        if self.state is not TicketState.DONE:
            self.waiters.append(told.set)
            await told.wait()


@dataclass
class Batch:
    """Tickets that run together."""

    checkpoint: Hashable
    tickets: list[Ticket] = field(default_factory=lambda: [])
    num_rows: int = 0
    taken_s: float = 0.0


class BatchQueue:
    """Waiting tickets, first in, first out per checkpoint."""

    def __init__(self, max_batch: int, max_wait_s: float, max_rows: int) -> None:
        self.max_batch, self.max_wait_s, self.max_rows = max_batch, max_wait_s, max_rows
        self.num_rows = 0
        self._lanes: dict[Hashable, deque[Ticket]] = {}

    def __len__(self) -> int:
        return sum(len(lane) for lane in self._lanes.values())

    def has_room(self, num_rows: int) -> bool:
        """Whether this many more rows may wait."""
        return self.num_rows + num_rows <= self.max_rows

    def require_room(self, num_rows: int) -> None:
        """Raise Refusal (QUEUE_FULL) where this many more rows would be too many."""
        if not self.has_room(num_rows):
            message = f"waiting steps: got {self.num_rows + num_rows}, expected at most {self.max_rows}"
            raise Refusal(pb.QUEUE_FULL, message, num_rows=num_rows)

    def put(self, ticket: Ticket) -> None:
        """Append a ticket. Its rows must fit into one batch."""
        assert 1 <= ticket.num_rows <= self.max_batch, f"a ticket of {ticket.num_rows} rows"
        self._lanes.setdefault(ticket.checkpoint, deque()).append(ticket)
        self.num_rows += ticket.num_rows

    def remove(self, ticket: Ticket) -> None:
        """Take a queued ticket out."""
        self._lanes[ticket.checkpoint].remove(ticket)
        self.num_rows -= ticket.num_rows
        self._forget_if_empty(ticket.checkpoint)

    def expire(self, now_s: float) -> list[Ticket]:
        """Take out and return the tickets whose deadline has passed."""
        late = [t for lane in self._lanes.values() for t in lane if t.deadline_s <= now_s]
        for ticket in late:
            self.remove(ticket)
        return late

    def ready_at(self) -> float | None:
        """When the next batch should close: the past when it is full, None when nothing waits."""
        if not self._lanes:
            return None
        lane = self._next_lane()
        if self.max_wait_s > 0 and self._is_full(lane):
            return float("-inf")
        return lane[0].enqueued_s + self.max_wait_s

    def take(self, now_s: float) -> tuple[Batch, list[Ticket]]:
        """Take the checkpoint whose first ticket waits longest, one with a full batch before the others, and of its
        tickets, in order, as many as fit.

        Tickets that are too late are taken out too and returned beside the batch, which may then be empty.
        """
        lane = self._next_lane()
        batch, late = Batch(lane[0].checkpoint, taken_s=now_s), list[Ticket]()
        while lane and batch.num_rows + lane[0].num_rows <= self.max_batch:
            ticket = lane.popleft()
            if ticket.deadline_s <= now_s:
                late.append(ticket)
                self.num_rows -= ticket.num_rows
                continue
            ticket.state = TicketState.RUNNING
            batch.tickets.append(ticket)
            batch.num_rows += ticket.num_rows
        self.num_rows -= batch.num_rows
        self._forget_if_empty(batch.checkpoint)
        return batch, late

    def drain(self) -> list[Ticket]:
        """Take out everything."""
        tickets = [t for lane in self._lanes.values() for t in lane]
        self._lanes.clear()
        self.num_rows = 0
        return tickets

    def _next_lane(self) -> deque[Ticket]:
        if len(self._lanes) == 1:
            return next(iter(self._lanes.values()))
        if self.max_wait_s == 0:  # Then nothing waits for company, and the oldest comes first.
            return min(self._lanes.values(), key=lambda lane: lane[0].enqueued_s)
        return min(self._lanes.values(), key=lambda lane: (not self._is_full(lane), lane[0].enqueued_s))

    def _is_full(self, lane: deque[Ticket]) -> bool:
        rows = 0
        for ticket in lane:
            rows += ticket.num_rows
            if rows >= self.max_batch:
                return True
        return False

    def _forget_if_empty(self, checkpoint: Hashable) -> None:
        if not self._lanes[checkpoint]:
            del self._lanes[checkpoint]


R = TypeVar("R")


class Batcher(Generic[R]):
    """Hands batches to the device, one at a time, and settles their tickets.

    ``start(batch, done)`` begins a batch and has ``done(result, error)`` called on the event loop when it is over,
    perhaps before it returns. ``commit(batch, result)`` records what was applied; ``abandon(ticket, refusal)`` records
    that a ticket's rows were not. Every ticket is settled exactly once. ``freed()`` is called when a batch is over and
    before the next one is taken. ``settled()`` is called after the waiters of any number of tickets, so that those can
    be answered together, and after the next batch has begun.
    """

    def __init__(
        self,
        queue: BatchQueue,
        clock: Callable[[], float],
        start: Callable[[Batch, Callable[[R | None, BaseException | None], None]], None],
        commit: Callable[[Batch, R], None],
        abandon: Callable[[Ticket, Refusal], None],
        freed: Callable[[], None],
        settled: Callable[[], None],
    ) -> None:
        self.queue = queue
        self._clock, self._start, self._commit, self._abandon = clock, start, commit, abandon
        self._freed, self._settled = freed, settled
        self._running: Batch | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = self._is_dispatching = False

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return self._running is None and len(self.queue) == 0

    @property
    def is_busy(self) -> bool:
        """Whether a batch is under way, after which what waits will be looked at."""
        return self._running is not None and not self._closed

    @property
    def running_s(self) -> float:
        """Seconds since the batch under way was taken; without one, 0."""
        running = self._running
        return 0.0 if running is None else self._clock() - running.taken_s

    def submit(self, tickets: Iterable[Ticket]) -> None:
        """Queue tickets; they run at once where the device is free and no company is awaited."""
        if self._closed:
            self._fail(tickets, Refusal(pb.DRAINING, "the server has stopped"))
            self._settled()
            return
        for ticket in tickets:
            self.queue.put(ticket)
        self._dispatch()

    def leave(self, ticket: Ticket, waiter: Callable[[], None]) -> None:
        """One waiter gave up, perhaps again. When it was the last and the ticket still waits, the ticket is dropped; a
        running one is not stopped: its step is applied and its reply stored.
        """
        if ticket.state is TicketState.DONE or waiter not in ticket.waiters:
            return
        ticket.waiters.remove(waiter)
        if not ticket.waiters and ticket.state is TicketState.QUEUED:
            self.queue.remove(ticket)
            self._fail([ticket], Refusal(pb.QUEUE_TIMEOUT, "the caller gave up while the step was waiting"))

    def expire(self) -> None:
        """Refuse the tickets that waited too long; called regularly, since the device may be stuck."""
        self._refuse_late(self.queue.expire(self._clock()))
        self._settled()

    def close(self) -> None:
        """Refuse everything that waits and all that comes; what runs is settled when it ends."""
        self._closed = True
        self._fail(self.queue.drain(), Refusal(pb.DRAINING, "the server has stopped"))
        self._settled()

    def _dispatch(self) -> None:
        """Start the next batch if the device is free and the batch may close; else come back when it may."""
        # A batch that is over as soon as it is begun comes back here: the next one is this loop's, not a nested call's.
        if self._running is not None or self._closed or self._is_dispatching:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._is_dispatching = True
        try:
            while self._running is None and not self._closed and (ready_s := self.queue.ready_at()) is not None:
                now_s = self._clock()
                if now_s < ready_s:
                    self._timer = asyncio.get_running_loop().call_later(ready_s - now_s, self._dispatch)
                    return
                batch, late = self.queue.take(now_s)
                if batch.tickets:
                    self._run(batch)
                if late:
                    self._refuse_late(late)
                    self._settled()
        finally:
            self._is_dispatching = False

    def _run(self, batch: Batch) -> None:
        self._running = batch
        try:
            self._start(batch, lambda result, error: self._finish(batch, result, error))
        except Exception as error:
            if self._running is not batch:
                raise
            self._finish(batch, None, error)

    def _finish(self, batch: Batch, result: R | None, error: BaseException | None) -> None:
        assert self._running is batch
        self._running = None
        if error is None and result is not None:
            try:
                self._commit(batch, result)
            except Exception as caught:  # noqa: BLE001 (whatever it was, the waiters must hear of it)
                error = caught
        if error is not None or result is None:
            log.error("a batch of %d rows failed", batch.num_rows, exc_info=error)
            self._fail(batch.tickets, Refusal(pb.COMPUTE_FAILED, "the forward pass failed; the step was not applied"))
        else:
            for ticket in batch.tickets:
                self._settle(ticket, None)
        self._freed()
        # The device first: it computes while the replies are written.
        self._dispatch()
        self._settled()

    def _refuse_late(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            waited_s = self._clock() - ticket.enqueued_s
            message = f"the step waited {waited_s:.3f} s for the device and was not applied"
            self._fail([ticket], Refusal(pb.QUEUE_TIMEOUT, message))

    def _fail(self, tickets: Iterable[Ticket], refusal: Refusal) -> None:
        for ticket in tickets:
            try:
                self._abandon(ticket, refusal)
            except Exception:
                log.exception("a ticket could not be taken back")
            self._settle(ticket, refusal)

    def _settle(self, ticket: Ticket, refusal: Refusal | None) -> None:
        ticket.state, ticket.refusal = TicketState.DONE, refusal
        for waiter in ticket.waiters:
            waiter()
