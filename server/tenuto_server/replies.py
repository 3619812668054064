"""Station 8: stored replies become messages, at once for all calls of one policy that are ready.

Legend: n rows of a call, m rows of all the calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenuto_proto import write_array
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.arena import Slots
from tenuto_server.calls import Answer, StepCall
from tenuto_server.errors import Refusal
from tenuto_server.sessions import ReplyStore

_COLUMNS = {"value": "values", "log_prob": "log_probs", "logits": "logits"}
"""Of a row's outputs: what they are called in a batch."""


def write_replies(
    stored: ReplyStore, calls: Sequence[StepCall], durable_index: NDArray[np.int64] | None
) -> list[Answer | Refusal]:
    """Answer each call from the stored replies of its slots, but for its failed rows.

    ``durable_index``: by slot, the steps that outlive the process, -1 for none; None where none do.
    """
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
    timings = [column(times) for times in (stored.queue_us, stored.compute_us, stored.batch_size)]
    actions = column(stored.action)
    durable_steps: list[int] | None = None
    if durable_index is not None:
        durable_steps = np.maximum(column(durable_index), 0).tolist()

    answers, first = list[Answer | Refusal](), 0
    for call in calls:
        request, end = call.request, first + call.num_rows
        if isinstance(request, pb.StepBatchRequest):
            batch = refused_batch(request, call.failed)
            batch.versions.extend(versions[first:end])
            write_array(batch.actions, actions[first:end])
            if len(call.failed) < call.num_rows:
                _write_timings(batch.timings, timings, first, end)
            if durable_steps is not None:
                batch.durable_steps.extend(durable_steps[first:end])
            _add_batch_outputs(batch, request.outputs, stored, call.slots, list(call.failed))
            answers.append(batch)
        elif call.failed:
            answers.append(call.failed[0])
        else:
            row = pb.StepResponse()
            row.step_index, row.version = request.step_index, versions[first]
            write_array(row.action, actions[first])
            _write_timings(row.timings, timings, first, end)
            if durable_steps is not None:
                row.durable_step = durable_steps[first]
            _add_row_outputs(row, request.outputs, stored, int(call.slots[0]))
            answers.append(row)
        first = end
    return answers


def refused_batch(request: pb.StepBatchRequest, failed: Mapping[int, Refusal]) -> pb.StepBatchResponse:
    """Begin the answer to a batch with the rows that failed."""
    batch = pb.StepBatchResponse()
    batch.request_id = request.request_id
    if failed:
        batch.errors.extend(pb.RowError(row=row, error=failed[row].to_wire()) for row in sorted(failed))
    return batch


def _write_timings(timings: pb.Timings, columns: Sequence[NDArray[np.uint32]], first: int, end: int) -> None:
    """Write those of the slowest of some rows."""
    queue_us, compute_us, batch_size = columns
    if end - first == 1:
        timings.queue_us, timings.compute_us = int(queue_us[first]), int(compute_us[first])
        timings.batch_size = int(batch_size[first])
    else:
        timings.queue_us, timings.compute_us = int(queue_us[first:end].max()), int(compute_us[first:end].max())
        timings.batch_size = int(batch_size[first:end].max())


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
        write_array(row.logits, stored.logits[slot])


def _add_batch_outputs(
    batch: pb.StepBatchResponse, outputs: pb.Outputs, stored: ReplyStore, slots: Slots, bad: list[int]
) -> None:
    for wanted, name in ((outputs.value, "value"), (outputs.log_prob, "log_prob"), (outputs.logits, "logits")):
        if wanted:
            values = getattr(stored, name)[slots]
            if bad:
                values[bad] = 0
            write_array(getattr(batch, _COLUMNS[name]), values)
