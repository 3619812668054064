"""Where calls arrive: those of one turn are checked together (station 2). Owned by the event loop.

A call that has all the sessions that step just now is a turn of its own and goes on at once. With a few others its turn
ends when the loop has run what was ready. Where many step, their calls are under way together, but gRPC hands them over
one by one; so the turn waits until as many rows are here as came in the last milliseconds, for 3 ms at most.
While the device is busy, few rows wait until it is free, which they would have to anyway.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from tenuto_proto import WireError
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.calls import StepCall
from tenuto_server.errors import Refusal, as_refusal, unknown_session
from tenuto_server.metrics import Metrics
from tenuto_server.policies import PolicyRegistry, ServedPolicy
from tenuto_server.replies import refused_batch
from tenuto_server.stepper import Stepper
from tenuto_server.turn import Turn

_MAX_INLINE_FLOATS = 65_536
"""Flattened floats of a turn that are checked on the event loop: some hundred microseconds."""
_FEW_ROWS = 32
"""As many are checked while the device is still busy, so that it does not wait for that."""
_ACTIVE_S = 50e-3
"""Seconds after a step in which its session counts as one that steps."""
_MANY_SESSIONS = 4
"""Fewer that step are not waited for: the loop has time for each of them."""
_COMPANY_S = 3e-3
"""Seconds that a turn waits for company at most."""
_RECENT_S = 3e-3
"""Company is as many rows as came in these last seconds: where none did, none is waited for."""


class Intake:
    """Collects the calls of a turn and hands their checked rows to the stepper."""

    def __init__(
        self,
        registry: PolicyRegistry,
        stepper: Stepper,
        metrics: Metrics,
        clock: Callable[[], float],
        max_batch_rows: int,
        server_epoch: int,
    ) -> None:
        self._registry, self._stepper, self._metrics, self._clock = registry, stepper, metrics, clock
        self._max_batch_rows, self._server_epoch = max_batch_rows, server_epoch
        self._arrived: list[StepCall] = []
        self._num_rows = 0
        """Of the calls that have arrived."""
        self._num_expected = 0
        """Rows that the turn waits for."""
        self._is_ending = False
        """Whether the turn ends as soon as the loop has run what is ready."""
        self._timer: asyncio.TimerHandle | None = None
        """Ends the turn that waits for company."""
        self._apart: set[asyncio.Task[None]] = set()
        """Turns that are checked on a thread, and calls whose sessions are looked for."""
        self.fetch: Callable[[Sequence[int]], Awaitable[None]] | None = None
        """Brings sessions here that are in a store which other servers use too."""
        stepper.when_free = self._end_or_wait

    def take(self, call: StepCall) -> None:
        """Advance each row's session by one step; the call is answered when that is done, perhaps in here."""
        is_alone = False
        if not self._arrived:
            num_active = self._num_active(_ACTIVE_S)
            is_alone = 0 < num_active <= call.num_rows
            self._num_expected = self._num_active(_RECENT_S) if num_active >= _MANY_SESSIONS else 1
        self._arrived.append(call)
        self._num_rows += call.num_rows
        if self._is_ending or (self._num_rows < _FEW_ROWS and self._stepper.batcher.is_busy):
            return
        if is_alone:
            self.end_turn()
        elif self._is_complete():
            self._is_ending = True
            asyncio.get_running_loop().call_soon(self.end_turn)
        else:
            self._await_company()

    def end_turn(self) -> None:
        """Check what has arrived and send it on. Called also regularly, since the device may be stuck."""
        arrived, self._arrived, self._num_rows, self._is_ending = self._arrived, [], 0, False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        began_s = self._clock()
        turns: dict[ServedPolicy, Turn] = {}
        for call in arrived:
            if call.is_over:
                continue
            try:
                if self.fetch is not None and (missing := self._missing(call)):
                    self._do_apart(self._take_when_here(call, missing, self.fetch))
                    continue
                self._sort(call, turns)
            except (Refusal, WireError) as error:
                call.finish(as_refusal(error))
            except Exception as error:  # noqa: BLE001 (whatever it was, the caller must hear of it)
                call.finish(error)
        for turn in turns.values():
            if turn.num_floats <= _MAX_INLINE_FLOATS:
                self._advance(turn, began_s)
            else:
                self._do_apart(self._advance_apart(turn, began_s))

    def _do_apart(self, work: Coroutine[Any, Any, None]) -> None:
        apart = asyncio.create_task(work)
        self._apart.add(apart)
        apart.add_done_callback(self._apart.discard)

    def _missing(self, call: StepCall) -> list[int]:
        """Sessions of a call that are not here, or not as far as their client."""
        if call.is_complete:
            return []
        request = call.request
        if isinstance(request, pb.StepRequest):
            rows = [(request.session_id, request.step_index)]
        else:
            rows = list(zip(request.session_ids, request.step_indices, strict=False))
        return [i for i, index in rows if not self._registry.has_reached(i, index)]

    async def _take_when_here(
        self, call: StepCall, missing: list[int], fetch: Callable[[Sequence[int]], Awaitable[None]]
    ) -> None:
        call.is_complete = True
        try:
            await fetch(missing)
        except Exception as error:  # noqa: BLE001 (whatever it was, the caller must hear of it)
            call.finish(error)
        else:
            self.take(call)

    def _end_or_wait(self) -> None:
        """The device is free: end the turn before it takes the next batch, unless company is expected."""
        if self._is_complete():
            self.end_turn()
        else:
            self._await_company()

    def _num_active(self, within_s: float) -> int:
        """Sessions that took a step in the last seconds."""
        since_s, count = self._clock() - within_s, 0
        for policy in self._registry:
            count += policy.sessions.num_active_since(since_s)
        return count

    def _is_complete(self) -> bool:
        """Whether as many rows are here as are worth waiting for."""
        return self._num_rows >= min(self._num_expected, _FEW_ROWS)

    def _await_company(self) -> None:
        if self._timer is None and self._arrived:
            self._timer = asyncio.get_running_loop().call_later(_COMPANY_S, self.end_turn)

    def _advance(self, turn: Turn, began_s: float) -> None:
        try:
            turn.check()
            self._metrics.station["check"].observe(self._clock() - began_s, len(turn.calls))
            self._stepper.advance(turn)
        except Exception as error:  # noqa: BLE001 (whatever it was, the callers must hear of it)
            turn.fail(error)

    async def _advance_apart(self, turn: Turn, began_s: float) -> None:
        """Check large observations on a thread, since the loop has others to serve."""
        try:
            await asyncio.to_thread(turn.check)
        except Exception as error:  # noqa: BLE001 (whatever it was, the callers must hear of it)
            turn.fail(error)
        else:
            self._advance(turn, began_s)

    def _sort(self, call: StepCall, turns: dict[ServedPolicy, Turn]) -> None:
        """Add a call to the turn of its policy. Raises Refusal or WireError where all of it is refused."""
        request = call.request
        if isinstance(request, pb.StepRequest):
            policy = self._registry.of_session(request.session_id, call.principal.name)
            if policy is None:
                raise unknown_session(request.session_id, self._server_epoch)
            _turn_of(policy, turns).add_row(call, request)
            return
        self._check_columns(call, request)
        owner = call.principal.name
        policies = (self._registry.of_session(session_id, owner) for session_id in request.session_ids)
        policy = next((policy for policy in policies if policy is not None), None)
        if policy is None:
            self._refuse_all(call, request)
            return
        _turn_of(policy, turns).add_rows(call, request, self._rows_of_others(policy, request, owner))

    def _refuse_all(self, call: StepCall, request: pb.StepBatchRequest) -> None:
        """Answer a batch of which no session is known."""
        unknown = {r: unknown_session(i, self._server_epoch) for r, i in enumerate(request.session_ids)}
        response = refused_batch(request, unknown)
        response.versions.extend([0] * call.num_rows)
        self._metrics.refusals.labels(pb.ErrorReason.Name(pb.SESSION_UNKNOWN)).inc(call.num_rows)
        call.finish(response)

    def _check_columns(self, call: StepCall, request: pb.StepBatchRequest) -> None:
        n = call.num_rows
        if n == 0:
            raise Refusal(pb.BATCH_EMPTY, "session_ids: got none, expected at least one")
        if n > self._max_batch_rows:
            raise Refusal(pb.BATCH_TOO_LARGE, f"rows: got {n}, expected at most {self._max_batch_rows}")
        columns: tuple[tuple[str, Sequence[Any], bool], ...] = (
            ("step_indices", request.step_indices, True),
            ("episode_starts", request.episode_starts, False),
            ("rewards", request.rewards, False),
            ("replayed_versions", request.replayed_versions, False),
        )
        for name, column, needed in columns:
            if len(column) != n and (needed or len(column) > 0):
                raise Refusal(pb.BATCH_COLUMNS, f"{name}: got {len(column)}, expected {n}, as many as session_ids")

    def _rows_of_others(self, policy: ServedPolicy, request: pb.StepBatchRequest, owner: str) -> dict[int, Refusal]:
        refused: dict[int, Refusal] = {}
        if len(self._registry) == 1:
            return refused
        session_ids = request.session_ids[:]
        if strangers := policy.sessions.without(session_ids):
            for row, session_id in enumerate(session_ids):
                other = self._registry.of_session(session_id, owner) if session_id in strangers else None
                if other is not None and other is not policy:
                    message = f"session {session_id}: got one of policy {other.name!r}, expected {policy.name!r}"
                    refused[row] = Refusal(pb.POLICY_MISMATCH, message)
        return refused


def _turn_of(policy: ServedPolicy, turns: dict[ServedPolicy, Turn]) -> Turn:
    turn = turns.get(policy)
    if turn is None:
        turn = turns[policy] = Turn(policy)
    return turn
