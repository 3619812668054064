"""Which waiting steps go to the device together, in which order, and which are not let in: rules without I/O.

Those of one party wait first in, first out, and parties take turns by rows (start-time fair queueing): a party that has
had more than its share waits for those that have not. So one with thousands of waiting rows delays another by a batch.
How much may wait is bounded by time, not only by rows: what would wait too long is refused when it comes, since a queue
that is always full serves nobody faster. Owned by the event loop; the clock's reading is handed in.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum
from heapq import heapify, heappop, heapreplace
from math import inf
from typing import Any

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.errors import Refusal

_MEMORY = 0.9
"""Of the device's speed: what is left of a batch's weight after the next one."""
_MIN_HINT_S, _MAX_HINT_S = 0.01, 10.0
_UNKNOWN_HINT_S = 1.0
"""Where nothing has been measured yet."""


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
    party: str = ""
    """Who waits: a principal by its name, or, where nobody authenticates, a host. Parties get equal shares of the
    device.
    """
    number: int = 0
    """By which the tickets of a batch are in the order in which they came."""

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
    num_left: int = 0
    """Rows that went on waiting when it was taken."""


class _Lane:
    """What waits for one checkpoint."""

    def __init__(self) -> None:
        self.of_party: dict[str, OrderedDict[Ticket, None]] = {}
        """Ordered, and a ticket is taken out of the middle at once."""
        self.num_rows = 0

    def oldest_s(self) -> float:
        return min(next(iter(tickets)).enqueued_s for tickets in self.of_party.values())


class BatchQueue:
    """Waiting tickets: a lane for each checkpoint, and in it a line for each party."""

    def __init__(self, max_batch: int, max_wait_s: float, max_rows: int, max_delay_s: float = inf) -> None:
        """``max_wait_s``: for company; ``max_rows``: of one party; ``max_delay_s``: for the device."""
        self.max_batch, self.max_wait_s, self.max_rows, self.max_delay_s = max_batch, max_wait_s, max_rows, max_delay_s
        self.num_rows = 0
        self._lanes: dict[Hashable, _Lane] = {}
        self._waiting: dict[str, int] = {}
        """Rows of each party that has some."""
        self._had: dict[str, float] = {}
        """Rows that a party has had, on the scale of ``_had_by_all``, where that is more."""
        self._had_by_all = 0.0
        """What a party that comes now has had: as much as the one that was served last, before that."""
        self._last_number = 0
        self._measured_rows = self._measured_s = 0.0

    def __len__(self) -> int:
        return sum(len(tickets) for lane in self._lanes.values() for tickets in lane.of_party.values())

    # ------------------------------------------------------------------ what may wait

    @property
    def num_parties(self) -> int:
        """Parties that have rows waiting."""
        return len(self._waiting)

    @property
    def rows_per_s(self) -> float | None:
        """What the device computes when it has enough to do; None before it had."""
        return self._measured_rows / self._measured_s if self._measured_s > 0 else None

    @property
    def delay_s(self) -> float:
        """Seconds that the device needs for what waits; 0 where it cannot be told yet."""
        return self.num_rows / self.rows_per_s if self.rows_per_s else 0.0

    @property
    def max_waiting(self) -> float:
        """Rows that may wait: as many as the device computes within the longest delay, within their bounds."""
        if self._measured_s <= 0 or self.max_delay_s == inf:
            return self.max_rows
        in_time = self.max_delay_s * self._measured_rows / self._measured_s
        return min(max(in_time, self.max_batch), self.max_rows)

    def has_room(self, num_rows: int) -> bool:
        """Whether this many more rows of anybody may wait."""
        return self.num_rows + num_rows <= self.max_waiting

    def require_room(self, num_rows: int, party: str = "", remaining_s: float = inf) -> None:
        """Raise Refusal (QUEUE_FULL) where this many more rows of a party would be too many, or would be reached too
        late. ``remaining_s``: seconds that they may wait.

        What fits into the next batch is not too many. Where several parties wait, each of them counts as if the others
        had as many rows as it has, since no more come before it; one that has none yet may come with twice its share.
        """
        total = self.num_rows + num_rows
        if total <= self.max_batch:
            return
        limit = self.max_waiting
        own = self._waiting.get(party, 0) + num_rows
        num_parties = len(self._waiting) + (own == num_rows)
        ahead = min(total, own * num_parties)
        if ahead > limit * (2 if own == num_rows else 1) or total > 2 * self.max_rows:
            message = f"waiting steps: got {total}, expected at most {int(limit)}"
            if num_parties > 1:
                message = f"waiting steps: got {own} of {total}, expected at most {int(limit / num_parties)}"
            raise Refusal(pb.QUEUE_FULL, message, num_rows=num_rows, retry_after_s=self._hint_s())
        if remaining_s < inf and self._measured_s > 0:
            wait_s = (ahead - num_rows) * self._measured_s / self._measured_rows
            if wait_s > remaining_s:
                message = f"the step would wait {wait_s:.3f} s for the device, expected at most {remaining_s:.3f} s"
                raise Refusal(pb.QUEUE_FULL, message, num_rows=num_rows, retry_after_s=self._hint_s())

    def finished(self, batch: Batch, now_s: float) -> None:
        """Note that a batch is over: how long it took tells how long others will wait."""
        # A small one takes nearly as long as a full one, and says little of what the device can do.
        if batch.num_left or 2 * batch.num_rows >= self.max_batch:
            self._measured_rows = _MEMORY * self._measured_rows + batch.num_rows
            self._measured_s = _MEMORY * self._measured_s + max(now_s - batch.taken_s, 1e-6)

    def _hint_s(self) -> float:
        """When a refused party may try again: the device has done what waits now."""
        return min(max(self.delay_s, _MIN_HINT_S), _MAX_HINT_S) if self._measured_s > 0 else _UNKNOWN_HINT_S

    # ------------------------------------------------------------------ in and out

    def put(self, ticket: Ticket) -> None:
        """Append a ticket. Its rows must fit into one batch."""
        assert 1 <= ticket.num_rows <= self.max_batch, f"a ticket of {ticket.num_rows} rows"
        self._last_number = ticket.number = self._last_number + 1
        lane = self._lanes.get(ticket.checkpoint)
        if lane is None:
            lane = self._lanes[ticket.checkpoint] = _Lane()
        tickets = lane.of_party.get(ticket.party)
        if tickets is None:
            tickets = lane.of_party[ticket.party] = OrderedDict()
        tickets[ticket] = None
        lane.num_rows += ticket.num_rows
        self.num_rows += ticket.num_rows
        self._waiting[ticket.party] = self._waiting.get(ticket.party, 0) + ticket.num_rows

    def remove(self, ticket: Ticket) -> None:
        """Take a queued ticket out."""
        lane = self._lanes[ticket.checkpoint]
        del lane.of_party[ticket.party][ticket]
        self._account(ticket.checkpoint, lane, ticket.party, ticket.num_rows)

    def _account(self, checkpoint: Hashable, lane: _Lane, party: str, num_rows: int) -> None:
        """Note that rows of a party no longer wait in a lane."""
        lane.num_rows -= num_rows
        self.num_rows -= num_rows
        if not lane.of_party[party]:
            del lane.of_party[party]
            if not lane.of_party:
                del self._lanes[checkpoint]
        left = self._waiting[party] - num_rows
        if left:
            self._waiting[party] = left
        else:
            del self._waiting[party]

    def expire(self, now_s: float) -> list[Ticket]:
        """Take out and return the tickets whose deadline has passed."""
        late = [
            ticket
            for lane in self._lanes.values()
            for tickets in lane.of_party.values()
            for ticket in tickets
            if ticket.deadline_s <= now_s
        ]
        for ticket in late:
            self.remove(ticket)
        return late

    def drain(self) -> list[Ticket]:
        """Take out everything."""
        tickets = [t for lane in self._lanes.values() for line in lane.of_party.values() for t in line]
        for ticket in tickets:
            self.remove(ticket)
        return tickets

    # ------------------------------------------------------------------ the next batch

    def ready_at(self) -> float | None:
        """When the next batch should close: the past when it is full, None when nothing waits."""
        if not self._lanes:
            return None
        if self.max_wait_s == 0:
            return -inf
        lane = self._next_lane()
        return -inf if lane.num_rows >= self.max_batch else lane.oldest_s() + self.max_wait_s

    def take(self, now_s: float) -> tuple[Batch, list[Ticket]]:
        """Take as many tickets of one checkpoint as fit, the next one always from the party that has had the least.

        The checkpoint is that of the ticket which comes first so; one with a full batch comes before the others where
        batches wait for company. Tickets that are too late are taken out too and returned beside the batch, which may
        then be empty.
        """
        lane = self._next_lane()
        parties = [(*self._turn(party, tickets), party) for party, tickets in lane.of_party.items()]
        heapify(parties)
        is_shared = len(parties) > 1
        batch, late = Batch(next(iter(lane.of_party[parties[0][2]])).checkpoint, taken_s=now_s), list[Ticket]()
        while parties:
            had, _, party = parties[0]
            tickets = lane.of_party[party]
            # The least that another has had is in one of the heap's next two places.
            until = min((other[0] for other in parties[1:3]), default=inf)
            num_rows, num_late = self._take_from(tickets, batch, late, until - had)
            self._account(batch.checkpoint, lane, party, num_rows + num_late)
            if num_rows:
                self._had_by_all = max(self._had_by_all, had)
                self._had[party] = had + num_rows
            if not tickets:
                heappop(parties)
            elif num_rows:
                heapreplace(parties, (*self._turn(party, tickets), party))
            else:
                break
        if is_shared:
            # Rows that came together stay together: whoever gathers them need not look at each.
            batch.tickets.sort(key=lambda ticket: ticket.number)
        batch.num_left = self.num_rows
        self._forget()
        return batch, late

    def _take_from(
        self, tickets: OrderedDict[Ticket, None], batch: Batch, late: list[Ticket], until: float
    ) -> tuple[int, int]:
        """Move a party's tickets into the batch, at least one, until it has had so many rows, or into ``late``.

        Returns the rows that went to each.
        """
        num_rows = num_late = 0
        while tickets and (not num_rows or num_rows < until):
            ticket = next(iter(tickets))
            if ticket.deadline_s <= batch.taken_s:
                late.append(ticket)
                num_late += ticket.num_rows
            elif batch.num_rows + ticket.num_rows <= self.max_batch:
                ticket.state = TicketState.RUNNING
                batch.tickets.append(ticket)
                batch.num_rows += ticket.num_rows
                num_rows += ticket.num_rows
            else:
                break
            del tickets[ticket]
        return num_rows, num_late

    def _turn(self, party: str, tickets: OrderedDict[Ticket, None]) -> tuple[float, int]:
        """By what the party's next ticket comes before those of others: rows had, then when it came."""
        return max(self._had.get(party, 0.0), self._had_by_all), next(iter(tickets)).number

    def _next_lane(self) -> _Lane:
        if len(self._lanes) == 1:
            return next(iter(self._lanes.values()))

        def turn(lane: _Lane) -> tuple[bool, float, int]:
            # Where nothing waits for company no lane comes first because it is full.
            is_short = self.max_wait_s > 0 and lane.num_rows < self.max_batch
            return is_short, *min(self._turn(party, tickets) for party, tickets in lane.of_party.items())

        return min(self._lanes.values(), key=turn)

    def _forget(self) -> None:
        """Drop what parties have had where it no longer tells them from one that comes new."""
        if not self._lanes:
            self._had.clear()
            self._had_by_all = 0.0
        elif len(self._had) > 2 * len(self._waiting) + 64:
            self._had = {party: had for party, had in self._had.items() if had > self._had_by_all}
