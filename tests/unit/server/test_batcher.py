"""The catalogue of a batcher: when batches close, in which order, and what every waiter is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.batch_queue import Batch, BatchQueue, Ticket, TicketState
from tenuto_server.batcher import Batcher
from tenuto_server.errors import FatalError, Refusal


class Device:
    """A device that runs one batch at a time and is finished by hand; the clock is a number."""

    def __init__(self, max_batch: int = 4, max_wait_s: float = 0.0, max_rows: int = 100) -> None:
        self.now_s = 0.0
        self.started: list[Batch] = []
        self.has_started = asyncio.Event()
        self.committed: list[Batch] = []
        self.abandoned: list[Ticket] = []
        self.commit_error: Exception | None = None
        self.arrive: Callable[[], Any] | None = None
        """Called once when the device is free."""
        self.told: list[Ticket] = []
        """Tickets whose waiters were called."""
        self.answers: list[list[Ticket]] = []
        """These, as they stood whenever the batcher said that waiters may be answered."""
        self.waiters: dict[Ticket, Callable[[], None]] = {}
        self._done: Callable[[Any, Any], None] | None = None
        self.is_instant = False
        """Whether a batch is over before its start returns."""
        queue = BatchQueue(max_batch, max_wait_s, max_rows)
        self.batcher: Batcher[str] = Batcher(
            queue,
            lambda: self.now_s,
            self._start,
            self._commit,
            lambda ticket, _: self.abandoned.append(ticket),
            self._freed,
            lambda: self.answers.append(list(self.told)),
        )

    def _start(self, batch: Batch, done: Callable[[Any, Any], None]) -> None:
        assert self._done is None, "two batches at once"
        if batch.checkpoint == "does not start":
            raise RuntimeError("out of memory")
        self.started.append(batch)
        self.has_started.set()
        self._done = done
        if self.is_instant:
            self.finish()

    def _commit(self, batch: Batch, result: str) -> None:
        if self.commit_error is not None:
            raise self.commit_error
        self.committed.append(batch)

    def _freed(self) -> None:
        arrived, self.arrive = self.arrive, None
        if arrived is not None:
            arrived()

    def finish(self, error: Exception | None = None) -> None:
        done, self._done = self._done, None
        assert done is not None
        done(None if error else "result", error)

    def submit(self, num_rows: int = 1, checkpoint: str = "v1", deadline_s: float = 1e9) -> Ticket:
        ticket = Ticket(checkpoint, num_rows, None, self.now_s, deadline_s)
        self.waiters[ticket] = partial(self.told.append, ticket)
        ticket.waiters.append(self.waiters[ticket])
        self.batcher.submit([ticket])
        return ticket

    def leave(self, ticket: Ticket) -> None:
        self.batcher.leave(ticket, self.waiters[ticket])

    def answered(self, ticket: Ticket) -> bool:
        """Whether the ticket's waiter has been told, and its rows were applied."""
        return self.told.count(ticket) == 1 and ticket.refusal is None


def reason(ticket: Ticket) -> int | None:
    assert ticket.state is TicketState.DONE
    return ticket.refusal.reason if ticket.refusal else None


async def test_a_lone_step_runs_at_once_when_the_device_is_free() -> None:
    device = Device()
    ticket = device.submit()
    assert [b.tickets for b in device.started] == [[ticket]]
    device.finish()
    assert device.answered(ticket) and device.batcher.idle


async def test_what_gathers_while_the_device_is_busy_goes_together() -> None:
    device = Device()
    first, *others = [device.submit() for _ in range(4)]
    assert device.started[0].tickets == [first] and len(device.started) == 1
    device.finish()
    assert device.started[1].tickets == others and device.started[1].num_rows == 3
    device.finish()
    assert all(device.answered(t) for t in others) and device.abandoned == []


async def test_a_batch_never_exceeds_the_limit_and_keeps_the_order() -> None:
    device = Device(max_batch=4)
    device.submit()
    tickets = [device.submit(n) for n in (2, 1, 3, 1, 4)]
    taken: list[list[Ticket]] = []
    while not device.batcher.idle:
        device.finish()
        taken += [device.started[-1].tickets] if len(device.started) > len(taken) + 1 else []
    assert taken == [tickets[:2], tickets[2:4], tickets[4:]]


async def test_a_timeout_flushes_a_partial_batch() -> None:
    device = Device(max_batch=4, max_wait_s=0.5)
    first, second = device.submit(), device.submit()
    assert device.started == [] and device.batcher.queue.ready_at() == 0.5
    device.now_s = 0.5
    third = device.submit()
    assert device.started[0].tickets == [first, second, third]


async def test_the_timer_flushes_without_another_request() -> None:
    device = Device(max_batch=4, max_wait_s=0.001)
    ticket = device.submit()
    device.now_s = 1.0
    await asyncio.wait_for(device.has_started.wait(), 10)
    device.finish()
    assert ticket.state is TicketState.DONE


async def test_a_full_batch_does_not_wait() -> None:
    device = Device(max_batch=4, max_wait_s=100.0)
    device.submit(3)
    assert device.started == []
    device.submit(1)
    assert device.started[0].num_rows == 4


async def test_one_checkpoint_per_batch_and_the_oldest_first() -> None:
    device = Device()
    device.submit(checkpoint="busy")
    expected: dict[str, list[Ticket]] = {}
    for now_s, checkpoint in enumerate(["v2", "v1", "v2", "v1", "v3"]):
        device.now_s = float(now_s)
        expected.setdefault(checkpoint, []).append(device.submit(checkpoint=checkpoint))
    for _ in range(4):
        device.finish()
    assert [b.checkpoint for b in device.started] == ["busy", "v2", "v1", "v3"]
    assert all(b.tickets == expected[str(b.checkpoint)] for b in device.started[1:])


async def test_a_failing_forward_rejects_its_waiters_and_nobody_else() -> None:
    device = Device()
    broken, later = device.submit(), device.submit()
    device.finish(RuntimeError("the device is on fire"))
    assert reason(broken) == pb.COMPUTE_FAILED and device.abandoned == [broken]
    device.finish()
    assert device.answered(later) and [b.tickets for b in device.committed] == [[later]]


async def test_a_commit_that_raises_is_fatal_leaves_no_waiter_hanging_and_lets_nothing_run_after_it() -> None:
    device, outcomes = Device(), list[BaseException | None]()
    device.batcher.on_outcome = outcomes.append
    device.commit_error = RuntimeError("a fault of ours")
    broken, later = device.submit(), device.submit()
    device.finish()
    assert [type(outcome) for outcome in outcomes] == [FatalError]
    assert reason(broken) == pb.COMPUTE_FAILED and reason(later) == pb.DRAINING
    assert [b.tickets for b in device.started] == [[broken]], "a step ran on state that may be torn"


async def test_a_full_batch_overtakes_one_that_waits_for_company() -> None:
    device = Device(max_batch=4, max_wait_s=100.0)
    device.submit(1, checkpoint="v1")
    device.submit(4, checkpoint="v2")
    assert [b.checkpoint for b in device.started] == ["v2"]


async def test_a_batch_that_cannot_even_start_rejects_its_waiters() -> None:
    device = Device()
    ticket = device.submit(checkpoint="does not start")
    assert reason(ticket) == pb.COMPUTE_FAILED and device.abandoned == [ticket] and device.batcher.idle


async def test_a_step_whose_deadline_passes_in_the_queue_is_refused_and_not_run() -> None:
    device = Device()
    device.submit()
    late, patient = device.submit(deadline_s=1.0), device.submit(deadline_s=3.0)
    device.now_s = 2.0
    device.finish()
    assert reason(late) == pb.QUEUE_TIMEOUT and device.abandoned == [late]
    assert device.started[1].tickets == [patient]


async def test_late_steps_are_refused_even_while_the_device_is_stuck() -> None:
    device = Device()
    device.submit()
    late = device.submit(deadline_s=1.0)
    device.now_s = 2.0
    device.batcher.expire()
    assert reason(late) == pb.QUEUE_TIMEOUT and device.batcher.queue.num_rows == 0


async def test_a_queue_of_only_late_steps_leaves_the_device_free() -> None:
    device = Device()
    device.submit()
    late = [device.submit(deadline_s=1.0) for _ in range(3)]
    device.now_s = 2.0
    device.finish()
    assert [reason(t) for t in late] == [pb.QUEUE_TIMEOUT] * 3 and device.batcher.idle


async def test_a_waiter_that_leaves_drops_its_queued_step() -> None:
    device = Device()
    running, queued = device.submit(), device.submit()
    device.leave(queued)
    assert queued.state is TicketState.DONE and device.abandoned == [queued]
    device.leave(running)
    assert running.state is TicketState.RUNNING, "what runs is not stopped"
    device.finish()
    assert device.committed[0].tickets == [running]


async def test_a_queued_step_stays_while_anyone_waits_for_it() -> None:
    device = Device()
    device.submit()
    queued = device.submit()
    other = asyncio.create_task(queued.settled())
    await asyncio.sleep(0)
    device.leave(queued)
    assert queued.state is TicketState.QUEUED
    device.finish()
    assert device.started[1].tickets == [queued]
    device.finish()
    await asyncio.wait_for(other, 10)


async def test_too_many_waiting_rows_are_refused() -> None:
    device = Device(max_rows=5)
    device.submit()
    device.submit(4)
    device.batcher.queue.require_room(1)
    with pytest.raises(Refusal) as caught:
        device.batcher.queue.require_room(2)
    assert caught.value.reason == pb.QUEUE_FULL


async def test_shutdown_refuses_what_waits_and_lets_what_runs_finish() -> None:
    device = Device()
    running, waiting = device.submit(), device.submit()
    device.batcher.close()
    assert reason(waiting) == pb.DRAINING and reason(device.submit()) == pb.DRAINING
    device.finish()
    assert device.answered(running) and len(device.started) == 1


async def test_a_waiter_that_leaves_a_settled_ticket_disturbs_nobody() -> None:
    device = Device()
    first, second = device.submit(), device.submit()
    device.finish()
    device.leave(first)
    device.finish()
    assert device.answered(second) and device.abandoned == []


async def test_tickets_of_a_batch_are_answered_together_when_the_next_has_begun() -> None:
    device = Device()
    first, *others = [device.submit() for _ in range(4)]
    device.finish()
    assert device.answers == [[first]] and device.started[1].tickets == others
    later = device.submit()
    device.finish()
    assert device.answers[1:] == [[first, *others]] and device.started[2].tickets == [later]


async def test_what_is_submitted_when_the_device_becomes_free_joins_the_next_batch() -> None:
    device, late = Device(), list[Ticket]()
    device.submit()
    waiting = device.submit()
    device.arrive = lambda: late.append(device.submit())
    device.finish()
    assert device.started[1].tickets == [waiting, *late]
    assert device.batcher.is_busy


async def test_batches_that_are_over_at_once_follow_one_another_without_end() -> None:
    device = Device(max_batch=1)
    first = device.submit()
    waiting = [device.submit() for _ in range(5000)]
    device.is_instant = True
    device.finish()
    assert device.batcher.idle and len(device.committed) == 5001
    assert all(t.state is TicketState.DONE and t.refusal is None for t in (first, *waiting))
    assert device.told == [first, *waiting] and device.answers[-1] == device.told


async def test_a_batch_that_is_over_at_once_is_settled_before_the_submission_returns() -> None:
    device = Device()
    device.is_instant = True
    device.arrive = device.submit
    ticket = device.submit()
    assert ticket.state is TicketState.DONE and device.batcher.idle
    # What arrives when the device becomes free goes into a batch of its own, not into a nested one.
    assert [batch.num_rows for batch in device.committed] == [1, 1] and len(device.told) == 2


async def test_tickets_that_are_submitted_together_share_a_batch() -> None:
    device = Device()
    tickets = [Ticket("v1", 1, None, 0.0, 1e9) for _ in range(3)]
    device.batcher.submit(tickets)
    assert device.started[0].tickets == tickets


async def test_many_consumers_are_all_settled_exactly_once() -> None:
    device = Device(max_batch=8, max_rows=10_000)
    tickets = [device.submit(1 + i % 8, checkpoint=f"v{i % 3}") for i in range(500)]
    for ticket in tickets[1::7]:
        device.leave(ticket)
    while not device.batcher.idle:
        device.finish()
    ran = [t for b in device.committed for t in b.tickets]
    assert len(ran) == len(set(ran)) and set(ran) | set(device.abandoned) == set(tickets)
    assert not set(ran) & set(device.abandoned) and len(device.told) == len(set(device.told))
    assert all(b.num_rows <= 8 and len({t.checkpoint for t in b.tickets}) == 1 for b in device.committed)


async def test_the_age_of_the_batch_under_way_is_known() -> None:
    device = Device()
    assert device.batcher.running_s == 0
    device.submit()
    device.now_s = 3.0
    assert device.batcher.running_s == 3.0
    device.finish()
    assert device.batcher.running_s == 0
