"""Hands batches to the engine whenever the device is free, and tells what becomes of those that cannot wait.

The rules are in batch_queue.py; :class:`Batcher` drives them on the event loop, which owns both.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.batch_queue import Batch, BatchQueue, Ticket, TicketState
from tenuto_server.errors import FatalError, Refusal

log = logging.getLogger(__name__)


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
        self.on_outcome: Callable[[BaseException | None], None] = lambda error: None
        """Called after each batch, with what it failed with; after a FatalError no other batch runs."""
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
        self.queue.finished(batch, self._clock())
        if error is None and result is not None:
            try:
                self._commit(batch, result)
            except Exception as caught:  # noqa: BLE001 (whatever it was, the waiters must hear of it)
                # Its sessions' state has moved on, and they have not: their next step would be a wrong one.
                error = FatalError(f"a batch of {batch.num_rows} rows was computed and could not be recorded")
                error.__cause__ = caught
        if error is not None or result is None:
            log.error("a batch of %d rows failed", batch.num_rows, exc_info=error)
            self._fail(batch.tickets, Refusal(pb.COMPUTE_FAILED, "the forward pass failed; the step was not applied"))
        else:
            for ticket in batch.tickets:
                self._settle(ticket, None)
        if isinstance(error, FatalError):
            self.close()
        self.on_outcome(error)
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
        # They hold on to the ticket: nobody is to wait for the garbage collector.
        ticket.waiters.clear()
