"""Station 8: stored replies become messages, at once for all calls of one policy that are ready.

Legend: n rows of a call, m rows of all the calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenuto_proto import array_to_wire
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.arena import Slots
from tenuto_server.calls import Answer, StepCall
from tenuto_server.errors import Refusal
from tenuto_server.sessions import ReplyStore


def write_replies(stored: ReplyStore, calls: Sequence[StepCall]) -> list[Answer | Refusal]:
    """Answer each call from the stored replies of its slots, but for its failed rows."""
    slots = np.concatenate([call.slots for call in calls])
    bad, first = list[int](), 0
    for call in calls:
        if not call.is_fresh:
            _refuse_overtaken(stored, call)
        bad += [first + row for row in call.failed]
        first += call.num_rows

    def column(of_slots: NDArray[Any]) -> NDArray[Any]:
        values = of_slots[slots]
        if bad:
            values[bad] = 0
        return values

    versions: list[int] = column(stored.version).tolist()
    timings: list[list[int]] = [column(c).tolist() for c in (stored.queue_us, stored.compute_us, stored.batch_size)]
    actions = array_to_wire(column(stored.action))
    dtype, shape, data = actions.dtype, stored.action.shape[1:], actions.data
    row_bytes = len(data) // len(slots)

    answers, first = list[Answer | Refusal](), 0
    for call in calls:
        request, end = call.request, first + call.num_rows
        action = pb.Tensor(dtype=dtype, shape=shape, data=data[first * row_bytes : end * row_bytes])
        if isinstance(request, pb.StepRequest):
            if call.failed:
                answers.append(call.failed[0])
            else:
                queue_us, compute_us, batch_size = (times[first] for times in timings)
                row = pb.StepResponse(
                    step_index=request.step_index,
                    version=versions[first],
                    action=action,
                    timings=pb.Timings(queue_us=queue_us, compute_us=compute_us, batch_size=batch_size),
                )
                _add_row_outputs(row, request.outputs, stored, int(call.slots[0]))
                answers.append(row)
        else:
            batch = refused_batch(request, call.failed)
            batch.versions.extend(versions[first:end])
            action.shape.insert(0, call.num_rows)
            batch.actions.CopyFrom(action)
            if len(call.failed) < call.num_rows:
                queue_us, compute_us, batch_size = (max(times[first:end]) for times in timings)
                batch.timings.CopyFrom(pb.Timings(queue_us=queue_us, compute_us=compute_us, batch_size=batch_size))
            _add_batch_outputs(batch, request.outputs, stored, call.slots, list(call.failed))
            answers.append(batch)
        first = end
    return answers


def refused_batch(request: pb.StepBatchRequest, failed: Mapping[int, Refusal]) -> pb.StepBatchResponse:
    """Begin the answer to a batch with the rows that failed."""
    errors = [pb.RowError(row=row, error=failed[row].to_wire()) for row in sorted(failed)]
    return pb.StepBatchResponse(request_id=request.request_id, errors=errors)


def _refuse_overtaken(stored: ReplyStore, call: StepCall) -> None:
    """Refuse the rows whose session has moved on while others of the call were under way."""
    request = call.request
    if isinstance(request, pb.StepRequest):
        session_ids, step_indices = [request.session_id], [request.step_index]
    else:
        session_ids, step_indices = list(request.session_ids), list(request.step_indices)
    asked = np.array(session_ids, np.uint64), np.array(step_indices, np.uint64)
    for row in stored.overtaken(*asked, call.slots):
        message = f"session {session_ids[row]}: the reply was overtaken by a later step or the session's end"
        # A row that failed for a reason of its own has no stored reply either.
        call.failed.setdefault(row, Refusal(pb.STEP_INDEX_MISMATCH, message))


def _add_row_outputs(row: pb.StepResponse, outputs: pb.Outputs, stored: ReplyStore, slot: int) -> None:
    if outputs.value:
        row.value = float(stored.value[slot])
    if outputs.log_prob:
        row.log_prob = float(stored.log_prob[slot])
    if outputs.logits:
        row.logits.CopyFrom(array_to_wire(stored.logits[slot]))


def _add_batch_outputs(
    batch: pb.StepBatchResponse, outputs: pb.Outputs, stored: ReplyStore, slots: Slots, bad: list[int]
) -> None:
    for wanted, field, of_slots in (
        (outputs.value, batch.values, stored.value),
        (outputs.log_prob, batch.log_probs, stored.log_prob),
        (outputs.logits, batch.logits, stored.logits),
    ):
        if wanted:
            values = of_slots[slots]
            values[bad] = 0
            field.CopyFrom(array_to_wire(values))
