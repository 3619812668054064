"""One request to step sessions, from its arrival to its answer. Owned by the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.arena import Slots
from tenuto_server.batch_queue import Ticket
from tenuto_server.errors import Refusal
from tenuto_server.principals import ANYONE, Principal

Answer = pb.StepResponse | pb.StepBatchResponse


def _nobody() -> None:
    """What the tickets of an answered call call."""


@dataclass(eq=False, repr=False, slots=True)
class StepCall:
    """A Step, a StepBatch, or one message of a StepStream: n rows, and what has become of them."""

    rpc: str
    request: pb.StepRequest | pb.StepBatchRequest
    began_s: float
    deadline_s: float
    """When its rows may no longer be waiting for the device."""
    answer: Callable[[Answer | Exception], None]
    """Called once with the reply or with what went wrong, unless the caller leaves before."""
    num_rows: int = 1
    principal: Principal = ANYONE
    """Who calls; to it only its own sessions exist."""
    party: str = ""
    """Whose rows wait in the queue, see :class:`Ticket`."""
    first: int = 0
    """Its first row among those of its turn."""
    slots: Slots = field(init=False)
    """[n], once admitted."""
    tickets: list[Ticket] = field(default_factory=lambda: [])
    """What it submitted."""
    joined: dict[int, Ticket] = field(default_factory=lambda: {})
    """Rows that wait for what another call submitted."""
    failed: dict[int, Refusal] = field(default_factory=lambda: {})
    """Rows that were not carried out."""
    num_pending: int = 0
    """Tickets that are not settled yet."""
    waiter: Callable[[], None] = field(init=False)
    """What these tickets call; there is none before the call is admitted."""
    timer: asyncio.TimerHandle | None = None
    """Ends the wait for what others submitted."""
    is_complete: bool = False
    """Whether its sessions were looked for in the store; they are not a second time."""
    is_over: bool = False
    """Whether it was answered, or its caller left."""

    @property
    def is_fresh(self) -> bool:
        """Whether every row is one that its only ticket carried, which is settled just now."""
        return len(self.tickets) == 1 and self.tickets[0].num_rows == self.num_rows

    def finish(self, outcome: Answer | Exception) -> None:
        """Answer the caller, if it still waits."""
        if not self.is_over:
            self.end()
            self.answer(outcome)
            self.let_go()

    def let_go(self) -> None:
        """Hold on to itself no longer, so that it is gone without the garbage collector."""
        self.waiter = _nobody

    def end(self) -> None:
        """Wait for nothing any more."""
        self.is_over = True
        if self.timer is not None:
            self.timer.cancel()
